"""classify.py on folders: which file belongs to which slide, the report, what is finished, several
devices, and runs that are stopped."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import dicom_wsi
import jpeg_tiff
import numpy as np
import pytest
import small
import tifffile
from onnx_models import patches
from PIL import Image

import classify
import common
from dataset import formats
from onnx_model import reading
from scoring import folder

ROOT = Path(__file__).resolve().parent.parent
SIDE = 512  # px


def tiled(path, pixels, mpp=0.25):
    scale = {"resolution": (10000 / mpp, 10000 / mpp), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, pixels, tile=(256, 256), photometric="rgb", **scale)


def svs(path, pixels):
    tiles = jpeg_tiff.cut(Image.fromarray(pixels))
    jpeg_tiff.write(path, [tiles[key] for key in sorted(tiles)], SIDE)


def dicom_folder(path, pixels):
    path.mkdir()
    number = zlib.crc32(path.name.encode())
    image = Image.fromarray(pixels)
    dicom_wsi.write(path / "1.dcm", image, 0.25, f"1.2.{number}", "1.2.1")
    half = image.resize((SIDE // 2, SIDE // 2))
    dicom_wsi.write(path / "0.dcm", half, 0.5, f"1.2.{number}", "1.2.2", derived=True)


def png(path, pixels):
    Image.fromarray(pixels).save(path, dpi=(101600, 101600))


WRITERS = [("tif", tiled), ("svs", svs), ("", dicom_folder), ("png", png)]


def write_candidates(path, points, image):
    """A file of candidates in the format of its suffix."""
    if path.suffix == ".csv":
        path.write_text("\n".join(["x,y", *(f"{x},{y}" for x, y in points)]) + "\n")
    elif path.suffix == ".json":
        boxes = [[x - 25, y - 25, x + 25, y + 25] for x, y in points]
        records = [{"id": i, "image_id": 1, "bbox": box} for i, box in enumerate(boxes)]
        images = [{"id": 1, "file_name": image}]
        path.write_text(json.dumps({"images": images, "annotations": records}))
    else:
        features = [
            {"type": "Feature", "geometry": {"type": "Point", "coordinates": [x, y]}}
            for x, y in points
        ]
        path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def make(root, count, each=9):
    """`count` slides of four formats in nested folders, and their candidates in three → their
    names.
    """
    names = []
    for i in range(count):
        inner = f"batch{i // 4}"
        suffix, write = WRITERS[i % 4]
        name = f"{inner}/s{i:02d}.{suffix}".rstrip(".")
        path = root / "slides" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, patches(1, seed=i, size=SIDE)[0])
        points = np.random.default_rng(i).integers(20, SIDE - 20, (each, 2)).tolist()
        ending = (".csv", ".json", ".geojson")[i % 3]
        file = root / "candidates" / f"{inner}/s{i:02d}{ending}"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_candidates(file, points, path.name)
        names.append(name)
    return names


def words(model, root, *more, out="out"):
    return [
        model,
        *("--slide", root / "slides", "--candidates", root / "candidates", "--out", root / out),
        *("--device", "cpu", "--threads", 1, *more),
    ]


def report(path):
    with open(path / "report.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def outputs(path):
    """{name: bytes} of what was written, without the report."""
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name not in (".lock", "report.csv")
    }


# ---------------------------------------------------------------- the whole


def test_a_folder_of_four_formats(model, tmp_path, capsys):
    """Every slide gets what it gets alone; a broken one and one without candidates are named, one
    without µm/px says so.
    """
    names = make(tmp_path, 4)
    (tmp_path / "slides/broken.tif").write_bytes(
        (tmp_path / "slides/batch0/s00.tif").read_bytes()[:900]
    )
    write_candidates(tmp_path / "candidates/broken.csv", [(50, 50)], "")
    Image.fromarray(patches(1, size=SIDE)[0]).save(tmp_path / "slides/bare.png")
    write_candidates(tmp_path / "candidates/bare.csv", [(50, 50), (90, 90)], "")
    png(tmp_path / "slides/alone.png", patches(1, size=SIDE)[0])
    assert small.call(classify, *words(model, tmp_path)) == 1
    said = capsys.readouterr()
    assert "5 of 7 slides scored (0 of them before), 38 candidates" in said.out
    assert "warning: the µm/px of 1 slide is unknown (bare.png)" in said.err
    assert "not scored: broken.tif: " in said.err and "not scored: alone.png: " in said.err
    rows = {row["slide"]: row for row in report(tmp_path / "out")}
    assert list(rows) == sorted([*names, "broken.tif", "bare.png", "alone.png"])
    assert "no file of candidates" in rows["alone.png"]["error"]
    assert rows["bare.png"]["mpp"] == "" and "µm/px is unknown" in rows["bare.png"]["notes"]
    for name in names:
        row = rows[name]
        assert float(row["mpp"]) == pytest.approx(0.25, rel=1e-3)
        assert row["candidates"] == row["scored"] == "9" and not row["error"]
        alone = tmp_path / f"alone{Path(row['file']).suffix}"
        given = tmp_path / "candidates" / row["file"]
        slide = tmp_path / "slides" / name
        usual = ("--slide", slide, "--candidates", given, "--out", alone, "--device", "cpu")
        assert small.call(classify, model, *usual, "--threads", 1) == 0
        assert alone.read_bytes() == (tmp_path / "out" / row["file"]).read_bytes()
        assert f", {row['figures']} mitotic figure" in capsys.readouterr().out
    assert set(outputs(tmp_path / "out")) == {rows[n]["file"] for n in (*names, "bare.png")}


def test_what_is_finished_is_skipped_until_something_changes(model, tmp_path, capsys, monkeypatch):
    names = make(tmp_path, 4)
    assert small.call(classify, *words(model, tmp_path)) == 0
    before = outputs(tmp_path / "out")

    def again(*more):
        scored = []
        original = folder.Work.finish
        monkeypatch.setattr(
            folder.Work,
            "finish",
            lambda self, *rest: scored.append(self.task.slide) or original(self, *rest),
        )
        assert small.call(classify, *words(model, tmp_path, *more)) == 0
        monkeypatch.undo()
        return sorted(scored)

    path = tmp_path / "out/report.csv"  # saved by a spreadsheet, with its mark and line ends
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert again() == [] and outputs(tmp_path / "out") == before
    assert "(4 of them before)" in capsys.readouterr().out
    assert len(report(tmp_path / "out")) == 4
    assert again("--threshold", 0.9) == names and again("--threshold", 0.9) == []
    assert again() == names and outputs(tmp_path / "out") == before
    os.utime(tmp_path / "slides" / names[0], (1, 1))
    os.utime(tmp_path / "slides" / names[2] / "0.dcm", (1, 1))
    (tmp_path / "out/batch0/s01.json").unlink()
    assert again() == [names[0], names[1], names[2]]
    write_candidates(tmp_path / "candidates/batch0/s03.csv", [(60, 60)], "")
    assert again() == [names[3]]
    model_again = shutil.copy(model, tmp_path / "m.onnx")
    with open(model_again, "ab") as file:  # an empty field, which protobuf reads over
        file.write(b"\x12\x00")
    model = model_again
    assert again() == names


def test_devices_share_the_slides_and_change_nothing(model, tmp_path, monkeypatch):
    make(tmp_path, 6)
    assert small.call(classify, *words(model, tmp_path)) == 0
    served = set()
    original = folder.Work.prepare
    monkeypatch.setattr(
        folder.Work,
        "prepare",
        lambda self, settings, metadata: (
            served.add(id(metadata)) or time.sleep(0.05) or original(self, settings, metadata)
        ),
    )
    more = ("--device", "cpu,cpu", "--workers", 2)
    assert small.call(classify, *words(model, tmp_path, *more, out="two")) == 0
    assert len(served) == 2
    assert outputs(tmp_path / "two") == outputs(tmp_path / "out")
    same = ("slide", "file", "mpp", "candidates", "scored", "figures", "notes", "fingerprint")
    one, two = (
        [[row[name] for name in same] for row in report(tmp_path / out)] for out in ("out", "two")
    )
    assert one == two


def test_an_error_on_one_device_ends_all(model, tmp_path, monkeypatch):
    make(tmp_path, 6)

    def full(*_, **__):
        raise OSError(28, "disk full", str(tmp_path / "out"))

    monkeypatch.setattr(folder.formats, "write", full)
    assert small.call(classify, *words(model, tmp_path, "--device", "cpu,cpu")) == 2
    assert report(tmp_path / "out") == []


def test_the_report_has_a_line_as_soon_as_a_slide_is_done(model, tmp_path, monkeypatch):
    make(tmp_path, 4)
    original, seen = folder.Report.add, []

    def add(self, row):
        original(self, row)
        seen.append(len(report(tmp_path / "out")))
        if len(seen) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(folder.Report, "add", add)
    assert small.call(classify, *words(model, tmp_path)) == 130
    assert seen == [1, 2, 3] and len(report(tmp_path / "out")) == 3
    monkeypatch.undo()
    # The machine stopped while the fourth line was written, and while its output was.
    with open(tmp_path / "out/report.csv", "a") as file:
        file.write('batch0/s03.png,"ba')
    (tmp_path / "out/batch0/.s03.csv.abc.tmp").write_text("half")
    (tmp_path / "out/batch0/.other.tmp").write_text("somebody's")
    assert small.call(classify, *words(model, tmp_path)) == 0
    assert small.call(classify, *words(model, tmp_path, out="whole")) == 0
    (tmp_path / "out/batch0/.other.tmp").unlink()
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")
    assert len(report(tmp_path / "out")) == 4


def test_another_format_for_all(model, tmp_path):
    names = make(tmp_path, 4)
    assert small.call(classify, *words(model, tmp_path, "--format", "geojson")) == 0
    assert sorted(outputs(tmp_path / "out")) == [f"batch0/s0{i}.geojson" for i in range(4)]
    for row in report(tmp_path / "out"):
        written = formats.read_candidates(
            tmp_path / "out" / Path(row["file"]).with_suffix(".geojson")
        )
        given = formats.read_candidates(tmp_path / "candidates" / row["file"])
        assert written.x.tolist() == given.x.tolist() and written.y.tolist() == given.y.tolist()
    assert small.call(classify, *words(model, tmp_path, "--format", "sqlite", out="no")) == 1
    assert all("a SlideRunner database" in row["error"] for row in report(tmp_path / "no"))
    assert len(report(tmp_path / "no")) == len(names)


def test_a_coarser_slide_is_resampled_and_said_so(model, tmp_path):
    make(tmp_path, 1)
    assert small.call(classify, *words(model, tmp_path)) == 0
    assert small.call(classify, *words(model, tmp_path, "--mpp", 0.5, out="coarse")) == 0
    (row,), (coarse,) = report(tmp_path / "out"), report(tmp_path / "coarse")
    assert (row["mpp"], coarse["mpp"]) == ("0.25", "0.5") and row["notes"] == ""
    assert coarse["notes"] == "0.5 µm/px, resampled to the model's 0.25"
    one, two = (outputs(tmp_path / out)["batch0/s00.csv"] for out in ("out", "coarse"))
    assert one != two


def test_candidates_outside_a_slide(model, tmp_path):
    make(tmp_path, 2)
    write_candidates(tmp_path / "candidates/batch0/s00.csv", [(60, 60), (9000, 9000)], "")
    assert small.call(classify, *words(model, tmp_path)) == 1
    first, second = report(tmp_path / "out")
    assert "lies outside s00.tif" in first["error"] and not second["error"]
    assert list(outputs(tmp_path / "out")) == ["batch0/s01.json"]
    for _ in range(2):  # also where the slide was finished before
        assert small.call(classify, *words(model, tmp_path, "--skip")) == 1
    first, _ = report(tmp_path / "out")
    assert (first["candidates"], first["scored"], first["error"]) == ("2", "1", "")
    assert "left out: candidate line 3 at (9000, 9000) lies outside" in first["notes"]


# ---------------------------------------------------------------- counts per mm²

SQUARE_MM2 = (SIDE * 0.25 / 1000) ** 2


def outline(path, side, name="Tumor"):
    """A square of `side` px at the corner as an outline of QuPath's."""
    ring = [[0, 0], [side, 0], [side, side], [0, side], [0, 0]]
    feature = {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"classification": {"name": name}},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))


def hotspots(path):
    """The regions that a scored GeoJSON shows: [(box, measurements)]."""
    found = []
    for feature in json.loads(path.read_text())["features"]:
        if feature["properties"]["classification"]["name"] == "mitotic hotspot":
            ring = np.array(feature["geometry"]["coordinates"][0])
            found.append(((*ring.min(0), *ring.max(0)), feature["properties"]["measurements"]))
    return found


def test_figures_per_mm2_of_tissue(model, tmp_path):
    """The pictures are tissue all over, and smaller than the 2.37 mm²."""
    make(tmp_path, 3)
    more = ("--area", "tissue", "--threshold", 0.01)
    assert small.call(classify, *words(model, tmp_path, *more)) == 0
    for row in report(tmp_path / "out"):
        assert row["area_of"] == "tissue" and row["figures"] == row["area_figures"]
        assert float(row["area_mm2"]) == pytest.approx(SQUARE_MM2, rel=0.01)
        per_mm2 = int(row["figures"]) / float(row["area_mm2"])
        assert float(row["per_mm2"]) == pytest.approx(per_mm2, rel=1e-4)
        assert row["densest_figures"] == row["figures"] and int(row["figures"]) > 0
        assert float(row["densest_x"]) == float(row["densest_y"]) == SIDE / 2
    ((box, measured),) = hotspots(tmp_path / "out/batch0/s02.geojson")
    assert box == (0, 0, SIDE, SIDE) and measured["mitotic figures"] == int(row["figures"])
    # Scored again, what was written keeps one such region, and its cells are the cells.
    again = formats.read_candidates(tmp_path / "out/batch0/s02.geojson")
    assert len(again) == 9
    slide, out = tmp_path / "slides/batch0/s02", tmp_path / "again.geojson"
    single = ("--slide", slide, "--candidates", again.path, "--out", out, "--device", "cpu", *more)
    assert small.call(classify, model, *single) == 0
    assert hotspots(out) == [(box, measured)]
    # Without --area the densest field alone is counted, and no region is added.
    assert small.call(classify, *words(model, tmp_path, out="plain")) == 0
    assert hotspots(tmp_path / "plain/batch0/s02.geojson") == []
    assert {row["area_mm2"] for row in report(tmp_path / "plain")} == {""}


def test_figures_per_mm2_of_a_tumour(model, tmp_path, capsys):
    names = make(tmp_path, 2)
    outline(tmp_path / "tumours/batch0/s00.geojson", 384)
    more = ("--area", tmp_path / "tumours", "--threshold", 1e-6)
    assert small.call(classify, *words(model, tmp_path, *more)) == 0
    rows = {row["slide"]: row for row in report(tmp_path / "out")}
    first, second = (rows[name] for name in names)
    given = formats.read_candidates(tmp_path / "candidates/batch0/s00.csv")
    inside = int(((given.x < 384) & (given.y < 384)).sum())
    assert 0 < inside < 9 and first["figures"] == "9" and first["area_figures"] == str(inside)
    assert float(first["area_mm2"]) == pytest.approx(SQUARE_MM2 * (3 / 4) ** 2, rel=1e-3)
    assert first["area_of"] == "tumour" and second["area_mm2"] == ""
    # The same slide alone; another outline is another result.
    capsys.readouterr()
    single = ("--slide", tmp_path / "slides" / names[0], "--candidates", given.path, "--device")
    file = tmp_path / "tumours/batch0/s00.geojson"
    last = ("--area", file, "--threshold", 1e-6)
    assert small.call(classify, model, *single, "cpu", "--out", tmp_path / "o.csv", *last) == 0
    assert f"{inside} mitotic figures on 0.01 mm² of tumour" in capsys.readouterr().out
    outline(file, 320)
    assert small.call(classify, *words(model, tmp_path, *more)) == 0
    assert "(1 of them before)" in capsys.readouterr().out
    # What cannot be meant is an error before the work.
    for bad, text in (
        (file, "tissue or a folder"),
        (tmp_path / "slides", "holds no .geojson file"),
        (tmp_path / "candidates", "holds no .geojson file"),
    ):
        assert small.call(classify, *words(model, tmp_path, "--area", bad, out="no")) == 2
        assert text in capsys.readouterr().err
    outline(tmp_path / "tumours/other.geojson", 384)
    assert small.call(classify, *words(model, tmp_path, *more, out="no")) == 2
    assert "there is no slide of the name of other.geojson" in capsys.readouterr().err


# ---------------------------------------------------------------- pairs


def paired(tmp_path, slide_names, files):
    """{file: slide or problem} of empty images and files of these names."""
    for name in slide_names:
        path = tmp_path / "slides" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    for name, content in files.items():
        path = tmp_path / "candidates" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    tasks = folder.tasks_of(tmp_path / "slides", tmp_path / "candidates")
    assert [task.slide or task.file for task in tasks] == sorted(t.slide or t.file for t in tasks)
    return {task.file or f"no file for {task.slide}": task.problem or task.slide for task in tasks}


def test_files_belong_to_slides_by_name_and_folder(tmp_path):
    found = paired(
        tmp_path,
        ["a/001.svs", "b/001.svs", "c/002.ome.tif", "d/003.tiff", "004.png", "e/005.svs"],
        {
            "a/001.csv": "",
            "deep/b/001.geojson.gz": "",
            "002.json": "",
            "x/003.tiff.csv": "",
            "other.csv": "filename,x,y\n004.svs,1,1\n",
            "005.txt": "no candidates",
            ".hidden.csv": "",
        },
    )
    assert found == {
        "a/001.csv": "a/001.svs",
        "deep/b/001.geojson.gz": "b/001.svs",
        "002.json": "c/002.ome.tif",
        "x/003.tiff.csv": "d/003.tiff",
        "other.csv": "004.png",
        "no file for e/005.svs": "there is no file of candidates for it",
    }


@pytest.mark.parametrize(
    "file, content, problem",
    [
        ("001.csv", "", "several files under"),
        ("other.csv", "x,y\n1,1\n", "there is no slide of its name"),
        ("other.csv", "filename,x,y\nz.svs,1,1\n", "there is no slide of its name"),
        ("other.csv", "filename,x,y\na/001.svs,1,1\n002.svs,2,2\n", "candidates on 2 images"),
        ("other.csv", "filename,x,y\n../001.svs,1,1\n", "leads out of the folder"),
        ("other.json", "{", "not a readable JSON file"),
    ],
)
def test_files_that_belong_to_no_slide(file, content, problem, tmp_path):
    found = paired(tmp_path, ["a/001.svs", "b/001.svs", "002.svs"], {file: content})
    assert problem in found[file]


def test_two_files_for_one_slide(tmp_path):
    found = paired(tmp_path, ["a.svs"], {"a.csv": "", "a.json": ""})
    assert set(found.values()) == {"a.csv and a.json are all candidates of it; keep one of them"}


def test_a_slide_that_is_the_folder_itself(model, tmp_path):
    dicom_folder(tmp_path / "slides", patches(1, size=SIDE)[0])
    (tmp_path / "candidates").mkdir()
    write_candidates(tmp_path / "candidates/slides.csv", [(60, 60)], "")
    assert small.call(classify, *words(model, tmp_path)) == 0
    (row,) = report(tmp_path / "out")
    assert (row["slide"], row["scored"]) == ("slides", "1")
    written = formats.read_candidates(tmp_path / "out/slides.csv")
    one = classify.Classifier(model, "cpu", threads=1)
    (probability,) = one.score(tmp_path / "slides", 60, 60)
    assert float(written.probabilities[0]) == float(probability)
    out, given = tmp_path / "alone.csv", tmp_path / "candidates/slides.csv"
    places = ("--slide", tmp_path / "slides", "--candidates", given, "--out", out)
    assert small.call(classify, model, *places, "--device", "cpu", "--threads", 1) == 0
    assert out.read_bytes() == (tmp_path / "out/slides.csv").read_bytes()


# ---------------------------------------------------------------- mistakes


def test_mistakes_are_found_before_the_work(model, tmp_path, capsys):
    make(tmp_path, 1)

    def refused(*more, **changes):
        flags = {"--slide": "slides", "--candidates": "candidates", "--out": "out", **changes}
        places = [word for flag, name in flags.items() for word in (flag, tmp_path / name)]
        assert small.call(classify, model, *places, "--device", "cpu", *more) == 2
        return capsys.readouterr().err

    assert "give the folder of the slides" in refused(**{"--slide": "slides/batch0/s00.tif"})
    assert "in a folder of inputs" in refused(**{"--out": "candidates/scored"})
    assert "in a folder of inputs" in refused(**{"--out": "slides"})
    assert "--overlay draws one slide" in refused("--overlay", tmp_path / "o.png")
    assert "holds no file of candidates" in refused(**{"--candidates": "slides"})
    assert "choose auto, cpu" in refused("--device", "cpu,gpu")
    file = {"--candidates": "candidates/batch0/s00.csv", "--out": "o.csv"}
    assert "several devices are for a folder" in refused("--device", "cpu,cpu", **file)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/report.csv").write_text("my,own\n1,2\n")
    assert "not a report of this command" in refused()
    assert (tmp_path / "out/report.csv").read_text() == "my,own\n1,2\n"
    (tmp_path / "out/report.csv").unlink()
    with common.exclusive(tmp_path / "out/.lock"):
        assert "another process scores into this folder" in refused()
    tiled(tmp_path / "slides/report.tif", patches(1, size=SIDE)[0])
    write_candidates(tmp_path / "candidates/report.csv", [(50, 50)], "")
    assert "report.csv and the command's report would be written to one file" in refused()
    (tmp_path / "candidates/report.csv").unlink()
    (tmp_path / "candidates/batch0/s00.csv").unlink()
    (tmp_path / "candidates/x.csv").write_text("filename,x,y\ns00.tif,50,50\n")
    write_candidates(tmp_path / "candidates/X.json", [(50, 50)], "report.tif")
    assert "X.json and x.csv would be written to one file" in refused("--format", "geojson")
    assert outputs(tmp_path / "out") == {}


# ---------------------------------------------------------------- reading ahead


class Counting:
    """A model that counts what is read and not yet scored."""

    batch_size = 8

    def __init__(self):
        self.read = self.scored = self.most = 0

    def __call__(self, batch):
        self.most = max(self.most, self.read - self.scored)
        self.scored += len(batch)
        return batch.reshape(len(batch), -1).mean(1).astype(np.float32)


class Numbers:
    """A slide whose patch at (x, y) holds x alone; it counts its patches."""

    name = "numbers"

    def __init__(self, model):
        self.model = model

    def read(self, x, y):
        if x < 0:
            raise OSError("broken")
        self.model.read += 1
        return np.full((2, 2, 3), x, np.uint8)


def test_the_ends_of_slides_are_read_over_and_batches_end_with_them():
    model = Counting()
    taken, sizes = [], []
    original = Counting.__call__

    def sets():
        for n in (20, 0, 3, 30, 1):
            taken.append(n)
            yield reading.Cells([Numbers(model)], np.zeros(n, int), np.arange(n), np.zeros(n))

    def scored(batch):
        sizes.append(len(batch))
        return original(model, batch)

    class Watched(Counting):
        def __call__(self, batch):
            return scored(batch)

    results = list(reading.score_each(Watched(), sets(), workers=2))
    assert [len(cells.probability) for cells in results] == [20, 0, 3, 30, 1]
    for cells in results:
        assert np.array_equal(cells.probability, np.arange(len(cells.probability)))
    assert sizes == [8, 8, 4, 3, 8, 8, 8, 6, 1]
    assert model.most <= 8 * (2 + 2 + 1)  # workers, two batches ahead, the one at work


def test_few_cells_are_read_by_all_threads_and_scored_together():
    """What is waited for is a batch: of 8 cells each of 4 threads reads two."""
    model, threads, sizes = Counting(), {}, []
    at_once = threading.Barrier(4, timeout=10)

    class Slow(Numbers):
        def read(self, x, y):
            threads.setdefault(threading.get_ident(), []).append(x)
            if len(threads[threading.get_ident()]) == 1:
                at_once.wait()  # until four threads are at work
            return super().read(x, y)

    def scored(batch):
        sizes.append(len(batch))
        return Counting.__call__(model, batch)

    scored.batch_size = 8
    for n in (8, 3, 1):
        at_once = threading.Barrier(min(n, 4), timeout=10)
        threads.clear()
        x = np.arange(n)
        result = reading.score(scored, [Slow(model)], np.zeros(n, int), x, np.zeros(n), workers=4)
        assert (
            np.array_equal(result, x)
            and sorted(map(len, threads.values()))
            == {
                8: [2, 2, 2, 2],
                3: [1, 1, 1],
                1: [1],
            }[n]
        )
    assert sizes == [8, 3, 1]


def test_a_set_that_cannot_be_read_spoils_no_other():
    model = Counting()
    sets = [
        reading.Cells([Numbers(model)], [0, 0], [1, 2], [0, 0]),
        reading.Cells([Numbers(model)], [0] * 40, [-1, *range(39)], [0] * 40),
        reading.Cells([Numbers(model)], [0, 0], [3, 4], [0, 0], failed=None, sample=[1]),
    ]
    first, second, third = reading.score_each(model, iter(sets), workers=1)
    assert first.probability.tolist() == [1, 2] and third.probability.tolist() == [3, 4]
    assert "cannot be read at (-1, 0): broken" in str(second.error)
    assert first.error is None and third.error is None
    assert len(third.looked) == 1 and third.looked[0][0, 0, 0] == 4
    failed = []
    one = reading.Cells(
        [Numbers(model)], [0, 0], [5, -1], [0, 0], lambda *told: failed.append(told)
    )
    next(reading.score_each(model, [one]))
    assert one.probability[0] == 5 and np.isnan(one.probability[1])
    assert failed[0][0] == 1 and one.error is None


# ---------------------------------------------------------------- thirty slides


@pytest.mark.slow
def test_thirty_slides_killed_and_started_again(model, tmp_path):
    """One broken, one without µm/px; killed three times in the middle by SIGKILL: the same files as
    of an uninterrupted run, and memory that does not grow with the number of slides.
    """
    names = make(tmp_path, 30, each=120)
    broken = tmp_path / "slides" / names[8]
    broken.write_bytes(broken.read_bytes()[:-5000])
    bare = tmp_path / "slides" / names[3]
    Image.open(bare).save(bare)  # without its resolution

    def started(out, *more):
        line = [sys.executable, ROOT / "classify.py", *words(model, tmp_path, *more, out=out)]
        return subprocess.Popen(list(map(str, line)), stderr=subprocess.PIPE, text=True)

    whole = started("whole")
    _, usage = os.wait4(whole.pid, 0)[1:]
    assert "not scored: " + names[8] in whole.stderr.read()
    for finished in (3, 11, 20):
        process = started("out")
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            path = tmp_path / "out/report.csv"
            if path.exists() and len(path.read_text().splitlines()) > finished:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    last = started("out", "--device", "cpu,cpu")
    assert last.wait(timeout=300) == 1 and "not scored: " + names[8] in last.stderr.read()
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")
    rows, expected = report(tmp_path / "out"), report(tmp_path / "whole")
    for row, one in zip(rows, expected, strict=True):
        assert {**row, "seconds": ""} == {**one, "seconds": ""}
    assert [row["slide"] for row in rows if row["error"]] == [names[8]]
    assert [row["slide"] for row in rows if "µm/px is unknown" in row["notes"]] == [names[3]]
    few = tmp_path / "few"
    make(few, 4, each=120)
    process = subprocess.Popen(
        [sys.executable, *map(str, [ROOT / "classify.py", *words(model, few)])]
    )
    _, small_usage = os.wait4(process.pid, 0)[1:]
    assert usage.ru_maxrss < 1.3 * small_usage.ru_maxrss
