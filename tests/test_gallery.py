"""The gallery of errors: which patches it shows, and where it finds them."""

from pathlib import Path

import numpy as np
import small
from PIL import Image
from run_folders import annotations, make
from small import call

import common
import data
import evaluate
import flags
from reporting import gallery, results


class Solid:
    """Patches of one grey each: that of their row."""

    def read(self, rows):
        return np.stack([np.full((224, 224, 3), row, np.uint8) for row in rows])


def test_the_most_confident_errors_come_first_by_domain():
    y = np.array([0, 0, 0, 1, 1, 0, 1, 1])
    p = np.array([0.6, 0.9, 0.2, 0.1, 0.4, 0.7, 0.8, 0.3])
    domain = np.array(list("AAAAABBB"))
    rows, ids = np.arange(8) * 20 + 30, np.array([f"id{k}" for k in range(8)])

    def drawn(p, columns):
        sheet = gallery.draw_errors(Solid(), rows, ids, y, p, domain, columns)
        return np.asarray(sheet.convert("L"))

    sheet = drawn(p, 2)
    height, width = gallery.TILE + 30, gallery.TILE + 6

    def tile(line, side, k):  # grey in its middle
        left = gallery.MARGIN + side * (2 * width + 24) + k * width
        return sheet[20 + line * height + gallery.TILE // 2, left + gallery.TILE // 2]

    assert [tile(0, 0, 0), tile(0, 0, 1)] == [
        rows[1],
        rows[0],
    ]  # false positives of A, 0.9 before 0.6
    assert [tile(0, 1, 0), tile(0, 1, 1)] == [
        rows[3],
        rows[4],
    ]  # false negatives of A, 0.1 before 0.4
    assert tile(1, 0, 0) == rows[5] and tile(1, 0, 1) == 255  # B: one look-alike
    assert tile(1, 1, 0) == rows[7] and tile(1, 1, 1) == 255  # B: one missed figure
    # With more errors than places the most confident ones are shown; none at all is said.
    sheet = drawn(p, 1)
    assert sheet[20 + gallery.TILE // 2, gallery.MARGIN + gallery.TILE // 2] == rows[1]
    right = drawn(y.astype(float), 5)
    assert 0 < (right[20:] < 200).sum() < 2000


def test_the_command_draws_the_gallery_of_the_best_model(tmp_path, monkeypatch):
    path = small.dataset(tmp_path / "data", cases=30)
    patches = data.load_dataset(path)
    for fold in range(2):
        for model, strength in (("uni", 0.0), ("virchow", 0.4)):
            make(tmp_path / "runs", patches, model, "probe", 1.0, fold, strength=strength)
    monkeypatch.chdir(tmp_path)
    assert call(evaluate, "runs", "--data", path, "--replicates", 100) == 0
    page = Path("report/index.html").read_text()
    assert (
        "the most confident errors of virchow linear probe on the test set, mean over 2 repeats"
        in page
    )
    image = Image.open("report/errors_small.png")
    assert image.size == (
        gallery.MARGIN + 10 * (gallery.TILE + 6) + 24,
        20 + 2 * (gallery.TILE + 30),
    )  # two domains
    # The first tile of a line is the patch with the highest probability among the look-alikes of
    # its domain.
    run = next(run for run in results.collect(["runs"])[0] if run.model == "virchow")
    ids, y, _, _, domain = run.rows("test")
    p = np.mean(
        [run.rows("test")[2] for run in results.collect(["runs"])[0] if run.model == "virchow"],
        axis=0,
    )
    worst = np.argmax(np.where(y == 0, p, 0))
    assert p[worst] > 0.5
    patch = Image.open(patches.image_path(patches.image[patches.rows(ids[[worst]])[0]]))
    top = 20 + "AB".index(domain[worst]) * (gallery.TILE + 30)
    tile = np.asarray(
        image.crop((gallery.MARGIN, top, gallery.MARGIN + gallery.TILE, top + gallery.TILE)), float
    )
    assert np.abs(tile - np.asarray(patch.resize((gallery.TILE, gallery.TILE)), float)).mean() < 12


def test_without_the_images_the_reason_is_said(study, tmp_path, monkeypatch):
    _, out = study
    assert "no gallery of errors for midog2022: " in (out / "index.html").read_text()
    make(tmp_path / "runs", annotations("small"))
    other = small.dataset(tmp_path / "data")
    call(
        evaluate,
        tmp_path / "runs",
        "--out",
        tmp_path / "report",
        "--data",
        other,
        "--replicates",
        100,
    )
    assert (
        "holds other annotations than the runs were made with"
        in (tmp_path / "report/index.html").read_text()
    )
    assert not (tmp_path / "report/errors_small.png").exists()


def test_the_gallery_reads_a_dataset_of_ones_own_as_the_run_did(tmp_path, monkeypatch):
    """A CSV with labels, columns and images of its own, which no name finds: the run says how it
    was read.
    """
    path = small.dataset(tmp_path / "data", cases=30)
    header, *lines = path.read_text().splitlines()
    lines = [line.replace(",0,", ",no,").replace(",1,", ",yes,") for line in lines]
    odd = tmp_path / "odd.csv"
    odd.write_text("\n".join([header.replace("label", "verdict"), *lines]) + "\n")
    source = dict.fromkeys(flags.SOURCE) | {
        "data": str(odd),
        "images": str(path.parent),
        "positive": "yes",
        "columns": "label=verdict",
        "fit": "resize",
    }
    run = make(tmp_path / "runs", flags.from_source(source)[0], "uni", "probe", strength=0.0)
    config = common.read_json(run / "config.json")
    common.write_json(run / "config.json", config | {"source": source})
    monkeypatch.chdir(tmp_path)
    assert call(evaluate, "runs", "--replicates", 100) == 0
    assert (
        "odd: the most confident errors of uni linear probe"
        in Path("report/index.html").read_text()
    )
    assert Image.open("report/errors_odd.png").width > 1000
    # Moved since: the flags name the new place, and the labels are still read as the run read them.
    odd.rename(path.parent / "odd.csv")
    assert call(evaluate, "runs", "--out", "gone", "--replicates", 100) == 0
    assert "no gallery of errors for odd: " in Path("gone/index.html").read_text()
    assert (
        call(
            evaluate,
            "runs",
            "--out",
            "moved",
            "--data",
            path.parent / "odd.csv",
            "--replicates",
            100,
        )
        == 0
    )
    assert Path("moved/errors_odd.png").read_bytes() == Path("report/errors_odd.png").read_bytes()
