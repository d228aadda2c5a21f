"""The hand-made first stage: what it finds, that tiles and threads leave no trace, and its
arithmetic against floating point.
"""

import csv
import json
import os
import tracemalloc
from pathlib import Path

import jpeg_tiff
import numpy as np
import pytest
from onnx_models import classifier, register, write_model
from PIL import Image
from small import call

import classify
from common import UserError
from dataset import formats, slides
from dataset.formats import geojson
from reporting import detection
from scoring import blobs

STAIN = np.array([0.65, 0.70, 0.29])  # optical density of haematoxylin


def field(places, side=1200, sigma=12, texture=0.0, seed=0):
    """uint8 [side, side, 3]: round blobs of haematoxylin on stained ground, at (x, y), px."""
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) + 0.5
    amount = np.full((side, side), 0.4, np.float32)
    for a, b in places:
        amount += np.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * sigma**2))
    if texture:
        coarse = np.random.default_rng(seed).normal(0, texture, (side // 8 + 1, side // 8 + 1))
        amount += np.kron(coarse, np.ones((8, 8)))[:side, :side].astype(np.float32)
    return (np.exp(-amount.clip(0)[..., None] * STAIN) * 255).astype(np.uint8)


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one[:3], other[:3]))


def test_a_blob_is_found_where_it_is_at_any_resolution():
    places = np.array([(700, 700), (300.5, 400.5), (30, 1170), (1160, 600)], float)
    pixels = field(places)
    for mpp in (0.25, 0.2, 0.34, 0.5):
        found = blobs.find(pixels, mpp)
        assert len(found.x) == len(places), mpp
        away = np.hypot(found.x[:, None] - places[:, 0], found.y[:, None] - places[:, 1])
        assert away.min(axis=0).max() < 3, "px"
        assert ((0 < found.score) & (found.score < 1)).all()


def test_tiles_and_threads_leave_no_trace():
    """To the last digit: wherever the seams lie, and also where blobs lie on them."""
    rng = np.random.default_rng(1)
    places = [(512, 512), (256, 300), (511, 128), *rng.uniform(0, 1000, (20, 2))]
    pixels = field(places, side=1030, sigma=8, texture=0.05)
    whole = blobs.find(pixels, 0.25, tile=4096)
    assert len(whole.x) > 20
    for tile, workers in ((512, 4), (128, 2), (100, 1), (57, 3)):
        assert same(blobs.find(pixels, 0.25, tile=tile, workers=workers), whole), tile


def test_tiles_of_a_slide_on_glass_are_not_read(tmp_path, monkeypatch):
    pixels = np.full((2000, 2400, 3), 245, np.uint8)
    pixels[800:1400, 900:1500] = field([(300, 300)], side=600)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    search = blobs.Search(tmp_path / "a.png", 0.25)
    tiles = search.tiles(128)
    assert 9 <= len(tiles) <= 25 and len(search.tiles(10_000)) == 1
    found = blobs.find(tmp_path / "a.png", 0.25)
    assert same(blobs.find(tmp_path / "a.png", 0.25, tile=64), found)
    near = np.hypot(found.x - 1200, found.y - 1100).argmin()
    assert np.hypot(found.x[near] - 1200, found.y[near] - 1100) < 3
    Image.new("RGB", (600, 600), "white").save(tmp_path / "glass.png")
    empty = blobs.find(tmp_path / "glass.png", 0.25)
    assert len(empty.x) == 0 and empty.tissue.area(0.25) == 0


def test_memory_is_that_of_a_few_tiles(tmp_path):
    """A slide whose pixels are 200 MB, in tiles as in .svs files, takes a quarter of that."""
    tiles = [jpeg_tiff.cut(Image.new("RGB", (256, 256), "white"))[0, 0]] * 32 * 32
    stained = jpeg_tiff.cut(Image.fromarray(field([(256, 200), (100, 400)], side=512)))
    for row, column in ((3, 4), (20, 30)):
        for (down, right), tile in stained.items():
            tiles[(row + down) * 32 + column + right] = tile
    jpeg_tiff.write(tmp_path / "a.svs", tiles, 8192)
    tracemalloc.start()
    found = blobs.find(tmp_path / "a.svs", tile=256, workers=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6
    for x, y in ((4 * 256 + 256, 3 * 256 + 200), (30 * 256 + 100, 20 * 256 + 400)):
        assert np.hypot(found.x - x, found.y - y).min() < 3
    slides.close(tmp_path / "a.svs")


@pytest.mark.skipif("MITOSIS_REALDATA" not in os.environ, reason="MITOSIS_REALDATA is not set")
def test_tiles_leave_no_trace_on_a_real_slide():
    """Through OpenSlide, with glass at its sides."""
    path = Path(os.environ["MITOSIS_REALDATA"]) / "slides" / "CMU-1-Small-Region.svs"
    whole = blobs.find(path, tile=4096)
    assert 1500 < len(whole.x) < 3000
    assert same(blobs.find(path, tile=300), whole)


def test_tiny_images():
    for side in (1, 2, 3, 40):
        found = blobs.find(field([], side=side), 0.25)
        assert len(found.x) == 0
    found = blobs.find(field([(20, 20)], side=40, sigma=6), 0.25)
    assert len(found.x) == 1


def test_scales_that_are_unknown_or_too_coarse():
    with pytest.raises(UserError, match="unknown; give it with --mpp"):
        blobs.find(field([], side=64))
    with pytest.raises(UserError, match="too coarse"):
        blobs.find(field([], side=64), 2.0)


def test_the_stain_does_not_change_the_score_much():
    """Less stain: the same blobs, as strong against the slide's own staining."""
    places = [(300, 300), (800, 500), (500, 900)]
    strong = blobs.find(field(places), 0.25)
    density = -np.log((field(places).astype(float) + 1) / 256)
    weak = blobs.find((256 * np.exp(-0.7 * density) - 1).clip(0, 255).astype(np.uint8), 0.25)
    assert np.allclose(strong.x, weak.x, atol=3) and np.allclose(strong.score, weak.score, atol=0.1)


# ---------------------------------------------------------------- its arithmetic


def test_the_stain_tables_are_the_inverse_of_the_stains():
    pixels = np.array([[[120, 60, 140], [255, 255, 255], [30, 20, 90]]], np.uint8)
    density = -np.log((pixels.astype(float) + 1) / 256)
    expected = np.linalg.solve(blobs.STAINS.T, density[0].T)[0]
    tables = blobs.stain_tables(2)
    sums = pixels.astype(int) * 4  # of 2 × 2 px of one colour
    amount = sum(table[sums[..., i]] for i, table in enumerate(tables))[0]
    assert np.allclose(amount / blobs.UNIT, expected, atol=1e-3)


def test_blur_is_nearly_a_gaussian():
    """Of a point: its sum and its width."""
    image = np.zeros((241, 241), np.int64)
    image[120, 120] = 1
    distance = np.arange(-200, 201)
    for sigma in (4, 12):
        blur = blobs.Blur(sigma)
        spread = blur.valid(np.pad(image, 80)).astype(float)
        assert spread.sum() == (2 * blur.radius + 1) ** 3
        line = spread[:, 200] / spread.sum()
        centred = distance[blur.reach : 401 - blur.reach]
        assert (line @ centred**2) ** 0.5 == pytest.approx(sigma, rel=0.15)


def test_heights_beside_the_border_are_those_of_a_slide_that_goes_on():
    """What is outside of the slide is unknown, not bright: even ground has no edge."""
    found = blobs.find(field([], side=300), 0.25)
    assert len(found.x) == 0
    search = blobs.Search(slides.held(field([], side=300)), 0.25)
    peaks, histogram = search.tile((0, 0, search.width, search.height))
    assert peaks.shape[1] == 0 and histogram.sum() == search.width * search.height


def test_of_equal_neighbours_one_is_a_maximum():
    height = np.zeros((7, 8), np.int64)
    height[2, 2:4] = 5  # two that are equal, side by side
    height[5, 6] = height[4, 5] = 7  # and across
    maxima = np.argwhere(blobs.local_maxima(height)).tolist()
    assert [1, 2] in maxima and [1, 1] not in maxima
    assert [4, 5] in maxima and [3, 4] not in maxima


def test_the_strongest_of_neighbours_remains():
    """Against the definition, pair by pair."""
    rng = np.random.default_rng(4)
    x, y = rng.integers(0, 60, (2, 200))
    score = rng.integers(0, 50, 200)
    expected = []
    for i in sorted(range(200), key=lambda i: (-score[i], i)):
        if all(np.hypot(x[i] - x[j], y[i] - y[j]) >= 7.5 for j in expected):
            expected.append(i)
    assert blobs.strongest(x, y, score, 7.5).tolist() == sorted(expected)


# ---------------------------------------------------------------- classify.py --candidates blobs


PLACES = [(300, 300), (400, 420), (700, 200), (650, 800)]


@pytest.fixture
def slide(tmp_path):
    """An image at 0.25 µm/px with four blobs and glass at its right."""
    pixels = field(PLACES, side=1000)
    pixels[:, 896:] = 245
    path = tmp_path / "slides" / "a.png"
    path.parent.mkdir()
    Image.fromarray(pixels).save(path, dpi=(101600, 101600))
    return path


def features(path):
    content = json.loads(path.read_text())["features"]
    points = [one for one in content if one["geometry"]["type"] == "Point"]
    return points, [one for one in content if one["geometry"]["type"] == "Polygon"]


def test_a_slide_alone_gives_scored_figures_and_a_count(model, slide, tmp_path, capsys):
    out = tmp_path / "o.geojson"
    words = [model, "--slide", slide, "--candidates", "blobs", "--threshold", 1e-9]
    assert call(classify, *words, "--out", out) == 0
    said = capsys.readouterr().out
    found = blobs.find(slide)
    expected = classify.Classifier(model, "cpu").score(slide, found.x, found.y)
    points, (window,) = features(out)
    places = [point["geometry"]["coordinates"] for point in points]
    assert np.allclose(places, np.stack([found.x, found.y], axis=1)) and len(places) >= 4
    values = [point["properties"]["measurements"] for point in points]
    assert np.allclose([v["probability of mitotic figure"] for v in values], expected, atol=1e-5)
    assert np.allclose([v["detector score"] for v in values], found.score)
    area = found.tissue.area(0.25)
    assert area == pytest.approx(896 * 1000 * 0.25**2 / 1e6)
    assert f"{len(points)} mitotic figures on {area:.2f} mm² of tissue" in said
    assert window["properties"]["measurements"]["mitotic figures"] == len(points)
    assert call(classify, *words, "--out", tmp_path / "o.csv") == 0
    again = formats.read_candidates(tmp_path / "o.csv")
    assert np.allclose(again.x, found.x) and set(again.images) == {"a.png"}
    assert np.allclose(detection.detector_scores(again), found.score)


def test_a_slide_without_a_blob(model, tmp_path, capsys):
    Image.new("RGB", (400, 400), "white").save(tmp_path / "glass.png", dpi=(101600, 101600))
    words = [model, "--slide", tmp_path / "glass.png", "--candidates", "blobs"]
    assert call(classify, *words, "--out", tmp_path / "o.geojson") == 0
    assert features(tmp_path / "o.geojson") == ([], [])
    assert "0 mitotic figures, no tissue" in capsys.readouterr().out


def test_a_folder_of_slides_is_continued(model, slide, tmp_path, monkeypatch):
    """One by one, an unknown scale does not stop the rest, and what is finished is not searched."""
    for name in ("b", "c"):
        Image.open(slide).rotate(90).save(slide.with_name(f"{name}.png"), dpi=(101600, 101600))
    Image.new("RGB", (300, 300)).save(slide.with_name("unknown.png"))
    words = [model, "--slide", slide.parent, "--candidates", "blobs", "--out", tmp_path / "out"]
    find, searched = blobs.find, []

    def watched(image, *rest, **options):
        searched.append(image.name)
        return find(image, *rest, **options)

    monkeypatch.setattr(blobs, "find", watched)
    assert call(classify, *words) == 1
    assert searched == ["a.png", "b.png", "c.png", "unknown.png"]
    with open(tmp_path / "out" / "report.csv", newline="") as file:
        rows = {row["slide"]: row for row in csv.DictReader(file)}
    assert "µm/px is unknown" in rows.pop("unknown.png")["error"]
    for name, row in rows.items():
        points, _ = features(tmp_path / "out" / f"{name}.geojson")
        assert int(row["candidates"]) == int(row["scored"]) == len(points) >= 4
        assert row["area_of"] == "tissue" and float(row["area_mm2"]) == pytest.approx(
            0.056, abs=3e-3
        )
    before = (tmp_path / "out" / "b.png.geojson").read_bytes()
    searched.clear()
    (tmp_path / "out" / "b.png.geojson").unlink()
    assert call(classify, *words) == 1
    assert searched == ["b.png", "unknown.png"]
    assert (tmp_path / "out" / "b.png.geojson").read_bytes() == before


@pytest.mark.parametrize("number", [geojson.MANY, geojson.MANY + 1])
def test_many_points_are_detections_to_qupath(slide, tmp_path, number):
    x = np.linspace(1, 900, number)
    candidates = formats.from_points(slide, x, x, np.full(number, 0.5))
    probability, out = np.full(number, 0.7), tmp_path / "o.geojson"
    names, images = ["hard negative", "mitotic figure"], [slide] * number
    formats.write(candidates, out, probability, 0.5, names, images=images, scales={slide: 0.25})
    kinds = {point["properties"]["objectType"] for point in features(out)[0]}
    assert kinds == {"detection" if number > geojson.MANY else "annotation"}
    again = formats.read_candidates(out)
    assert np.allclose(again.x, x) and len(again) == number


def test_mistakes_with_blobs_end_with_one_line(model, slide, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for where, out, says in (
        (tmp_path / "no.svs", tmp_path / "o.geojson", "no such file"),
        (slide, tmp_path / "o.xyz", "says no format"),
        (slide, slide, "reads or writes this file"),
        (slide, tmp_path / "o.sqlite", "says no format"),
        (tmp_path / "empty", tmp_path / "out", "holds no slide"),
    ):
        assert call(classify, model, "--slide", where, "--candidates", "blobs", "--out", out) == 2
        assert says in capsys.readouterr().err.splitlines()[-1]


def test_a_model_of_other_classes_is_refused_before_the_search(
    slide, tmp_path, monkeypatch, capsys
):
    register(monkeypatch)
    atypical = tmp_path / "atypical.onnx"
    write_model(atypical, classifier("gelu"), metadata={"labels": ["normal", "atypical"]})
    monkeypatch.setattr(blobs, "find", None)
    for where, out in ((slide, "o.geojson"), (slide.parent, "out")):
        words = ["--slide", where, "--candidates", "blobs", "--out", tmp_path / out]
        assert call(classify, atypical, *words, "--area", "tissue") == 2
        assert "the class 1 of this model is atypical" in capsys.readouterr().err
        assert not (tmp_path / out).exists()
