"""The page of the report: complete, from nowhere else, no markup by names; in a real browser."""

import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from run_folders import annotations, make
from small import call

import common
import evaluate
from reporting import metrics, tables

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
@pytest.mark.parametrize("width", [1280, 600])
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
