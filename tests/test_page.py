"""The page of the report: complete, from nowhere else, no markup by names; in a real browser."""

import base64
import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from run_folders import annotations, make
from small import call

import common
import evaluate
from reporting import metrics, results, tables

KEYS = {"balanced_accuracy", "weighted_f1", "auroc"}


class Elements(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_the_page_holds_everything_and_nothing_from_elsewhere(study):
    _, out = study
    page = (out / "index.html").read_text()
    elements = Elements(page).found
    names = {attributes["id"] for tag, attributes in elements if tag == "table"}
    assert names == {path.stem for path in out.glob("*.md")}
    pictures = [attributes["src"] for tag, attributes in elements if tag == "img"]
    assert len(pictures) == 5 and all(
        source.startswith("data:image/svg+xml;base64,") for source in pictures
    )
    assert all(attributes["alt"] for tag, attributes in elements if tag == "img")
    assert not {"script", "iframe", "object", "embed", "audio", "video", "base", "form"} & {
        tag for tag, _ in elements
    }
    for tag, attributes in elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "data", "action", "poster"):
                assert value.startswith("data:"), (tag, name)
    assert not re.search(r"@import|url\(", page)


def report(root, *flags):
    """The page of a report on the runs in `root`, its elements, and the folder."""
    out = root.parent / "report"
    assert call(evaluate, root, "--out", out, "--replicates", 100, *flags) == 0
    page = (out / "index.html").read_text()
    return page, Elements(page).found, out


def test_one_share_of_the_training_data_makes_no_curve(copied, tissue):
    _, elements, out = report(copied)
    assert not list(out.glob("scaling_*.png")) and (out / "scaling_tissue.md").exists()
    alone = [attributes["alt"] for tag, attributes in elements if tag == "img"]
    assert len(alone) == 2 and not any("share of the training pool" in text for text in alone)
    make(copied, tissue, "uni", "lora", 0.1, 0)
    report(copied)
    assert (out / "scaling_tissue.png").exists()


def test_figures_stand_in_a_grid_and_tables_in_boxes_that_scroll(study):
    _, out = study
    page = (out / "index.html").read_text()
    outside = re.sub(r'<div class="figures">.*?</div>', "", page, flags=re.S)
    assert "<figure" in page and "<figure" not in outside
    outside = re.sub(r'<div class="scroll" tabindex="0">.*?</div>', "", page, flags=re.S)
    assert "<table" in page and "<table" not in outside
    titles = {attributes.get("id") for tag, attributes in Elements(page).found if tag == "h3"}
    labels = {a["aria-labelledby"] for tag, a in Elements(page).found if tag == "table"}
    assert labels == titles and len(labels) == len(list(out.glob("*.md")))


def test_the_training_curves_of_the_runs_are_in_the_page(copied):
    header = "epoch,lr,train_loss,val_loss,val_auroc,patches_per_s\n"
    for path in copied.glob("*/*/*/metrics.json"):
        rows = [f"{k},1e-3,{1 / k},{1.1 / k},0.{k},9.5\n" for k in range(1, 6)]
        (path.parent / "log.csv").write_text(header + "".join(rows))
    _, elements, out = report(copied)
    alts = [attributes["alt"] for tag, attributes in elements if tag == "img"]
    assert any("validation AUROC. Mark: the epoch that was kept" in text for text in alts)
    assert (out / "training_tissue.svg").exists()
    assert not any("--val-patches" in text for text in alts)
    run = next(copied.glob("tissue/uni-lora/frac1-fold*/log.csv"))  # validated on a sample
    columns = "epoch,lr,train_loss,sample_loss,sample_auroc,patches_per_s,val_loss,val_auroc"
    run.write_text(f"{columns}\n1,1e-3,1,1,0.5,9.5,,\n2,1e-3,1,0.9,0.5,9.5,0.8,0.6\n")
    _, elements, out = report(copied)
    alts = [attributes["alt"] for tag, attributes in elements if tag == "img"]
    assert any("Lines of runs with --val-patches are of a sample" in text for text in alts)
    for path in copied.glob("*/*/*/log.csv"):  # a single epoch is no curve
        path.write_text(header + "1,1e-3,1,1,0.5,9.5\n")
    report(copied)
    assert not (out / "training_tissue.svg").exists()


def test_given_pictures_come_first_and_stay_what_they_are(copied, tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a <b>.png")
    information = PngInfo()
    information.add_text("Description", "cells of one image, scored")
    Image.new("RGB", (30, 20), "blue").save(tmp_path / "b.png", pnginfo=information)
    Image.new("RGB", (30, 20), "blue").save(tmp_path / "c.jpg")
    names = [tmp_path / name for name in ("a <b>.png", "b.png", "c.jpg")]
    _, elements, out = report(copied, "--figure", *names)
    pictures = [attributes for tag, attributes in elements if tag == "img"]
    said = [picture["alt"] for picture in pictures[:3]]
    assert said == ["a <b>.png", "cells of one image, scored", "c.jpg"]
    for picture, path in zip(pictures, names):
        kind, content = picture["src"].removeprefix("data:image/").split(";base64,")
        assert base64.b64decode(content) == path.read_bytes()
        assert kind == ("jpeg" if path.suffix == ".jpg" else "png")
    assert not (out / "b.png").exists()


def test_the_classes_are_called_as_the_data_call_them(copied):
    for path in copied.glob("*/*/*/config.json"):
        content = common.read_json(path)
        content["data"]["classes"] = ["normal", "atypical"]
        common.write_json(path, content)
    page, _, out = report(copied)
    assert "Classes: atypical (1) against normal (0)." in page
    assert "of the class atypical;" in (out / "decisions_tissue.md").read_text()


def test_sets_of_one_class_are_said_and_have_no_figures(tissue, tmp_path, capsys):
    """A domain of look-alikes: its runs count, and every metric of "elsewhere" is over the same
    domains."""
    table = annotations("tissue")
    table.label[table.domain == "C"] = 0
    for fold in range(2):
        make(tmp_path / "runs", table, "uni", "probe", 1.0, fold, "A")
    page, _, out = report(tmp_path / "runs")
    said = capsys.readouterr().out
    note = "tissue: the test set C holds label 0 only: balanced accuracy"
    assert note in said and note in page and "(2 runs)" in said
    finished, problems = results.collect([tmp_path / "runs"])
    assert not problems and len(finished) == 2
    (line,) = (line for line in said.splitlines() if " elsewhere " in line)
    for cell, key in zip(line.split()[-3:], ("balanced_accuracy", "weighted_f1", "auroc")):
        values = [run.sets["B"][key] for run in finished]
        assert cell == f"{np.mean(values):.3f}±{np.std(values, ddof=1):.3f}"
        assert all(run.sets["C"][key] is None for run in finished)
    # Runs of versions that gave such a set a weighted F1 are read as before.
    for run in finished:
        content = common.read_json(run.path / "metrics.json")
        content["sets"]["C"]["weighted_f1"] = 1.0
        common.write_json(run.path / "metrics.json", content)
    finished, problems = results.collect([tmp_path / "runs"])
    assert len(finished) == 2 and finished[0].sets["C"]["weighted_f1"] is None


def test_names_cannot_become_markup(tmp_path):
    make(tmp_path / "runs", annotations("<i>data"), "<script>alert(1)</script>")
    damaged = make(tmp_path / "runs", annotations("<i>data"), "<img src=x onerror=y>", fold=1)
    common.write_json(damaged / "metrics.json", {})
    assert call(evaluate, tmp_path / "runs", "--out", tmp_path / "report", "--replicates", 100) == 0
    page = (tmp_path / "report/index.html").read_text()
    tags = {tag for tag, _ in Elements(page).found}
    assert (
        "script" not in tags and "i" not in tags and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    )
    assert all("onerror" not in attributes for _, attributes in Elements(page).found)
    assert all(
        path.parent == tmp_path / "report" for path in (tmp_path / "report").rglob("*")
    )  # nor folders


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
# Put into a copy of the page: what is broken or wider than the window ends up in the title.
LOOK = """<script>addEventListener("load", () => { document.title = JSON.stringify({
    broken: [...document.images].filter(i => !i.complete || i.naturalWidth < 100).length,
    images: document.images.length, width: document.documentElement.scrollWidth, window: innerWidth,
    tables: document.querySelectorAll("table").length,
    rows: document.querySelectorAll("tbody tr").length,
    asked: performance.getEntriesByType("resource").map(e => e.name)
        .filter(name => !name.startsWith("data:"))
}) })</script></body>"""


def browse(page, tmp_path, *flags):
    return subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--disable-background-networking",
            f"--user-data-dir={tmp_path / 'profile'}",
            *flags,
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )


def look(page, tmp_path, width):
    seen = browse(page, tmp_path, f"--window-size={width},900", "--dump-dom")
    return json.loads(html.unescape(re.search(r"<title>(\{.*?\})</title>", seen.stdout)[1]))


@pytest.mark.skipif(BROWSER is None, reason="needs a browser: chromium")
@pytest.mark.parametrize("width", [1280, 500])
def test_a_real_browser_shows_all_of_it_and_asks_nobody(study, tmp_path, width):
    _, out = study
    page = tmp_path / "copy.html"
    text = (out / "index.html").read_text()
    page.write_text(text.replace("</body>", LOOK))
    title = look(page, tmp_path, width)
    assert (
        title["images"] == 5
        and title["broken"] == 0
        and title["tables"] == len(list(out.glob("*.md")))
    )
    assert title["rows"] == text.count("<tr>") - title["tables"] and title["asked"] == []
    assert (
        title["width"] <= title["window"] == width
    )  # wide tables scroll in their own box, not the page
    # What would ask somebody is seen as that.
    page.write_text(text.replace("</body>", '<img src="http://127.0.0.1:9/a.png">' + LOOK))
    title = look(page, tmp_path, width)
    assert title["asked"] == ["http://127.0.0.1:9/a.png"] and title["broken"] == 1


@pytest.mark.skipif(BROWSER is None, reason="needs a browser: chromium")
def test_the_page_looks_like_tables_and_figures(study, tmp_path):
    _, out = study
    browse(
        out / "index.html",
        tmp_path,
        "--window-size=1280,4000",
        f"--screenshot={tmp_path / 'page.png'}",
    )
    picture = np.asarray(Image.open(tmp_path / "page.png").convert("L"))
    assert picture.shape == (4000, 1280)
    rows = (picture < 128).any(1)
    assert rows[:2500].mean() > 0.3 and 0.01 < (picture[:2500] < 128).mean() < 0.3


def test_metrics_named_in_the_tables_are_those_of_the_summary():
    assert set(tables.METRICS) == KEYS <= set(metrics.summarise([0, 1], [0.2, 0.8]))
