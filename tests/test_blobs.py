"""The hand-made first stage: what it finds, that tiles and threads leave no trace, and its
arithmetic against floating point.
"""

import numpy as np
import pytest
from PIL import Image

from common import UserError
from dataset import slides
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
