"""The mitotic count: the densest window against brute force, areas of outlines against numbers
worked out by hand, and what is unknown.
"""

import json
import time

import numpy as np
import pytest
from PIL import Image

from common import UserError
from scoring import count, tissue


def tried_all(x, y, width, height):
    """Most points in a window whose left and upper edges touch a point, by trying all of them."""
    most = 0
    for left in x:
        for top in y:
            inside = (left <= x) & (x <= left + width) & (top <= y) & (y <= top + height)
            most = max(most, int(inside.sum()))
    return most


def test_the_densest_window_equals_brute_force():
    rng = np.random.default_rng(0)
    for k in range(300):
        n, side = rng.integers(1, 40), rng.choice([30, 200, 1000])
        x, y = rng.uniform(0, side, (2, n))
        if k % 2:  # whole numbers: points coincide, and lie on the edges
            x, y = np.floor(x), np.floor(y)
        width, height = rng.integers(1, 150, 2).tolist()
        figures, left, top = count.most_in_window(x, y, width, height)
        assert figures == tried_all(x, y, width, height)
        inside = (left <= x) & (x <= left + width) & (top <= y) & (y <= top + height)
        assert inside.sum() == figures
        order = rng.permutation(n)
        assert count.most_in_window(x[order], y[order], width, height) == (figures, left, top)


def test_the_window_lies_on_the_slide_and_holds_its_figures():
    rng, cut = np.random.default_rng(1), 0
    for _ in range(200):
        size = rng.integers(50, 400, 2)
        x, y = rng.uniform(0, size[0], 12), rng.uniform(0, size[1], 12)
        window = count.densest(x, y, 120.0, 90.0, size)
        assert 0 <= window.left <= window.right <= size[0]
        assert 0 <= window.top <= window.bottom <= size[1]
        assert window.right - window.left == pytest.approx(min(120, size[0]))
        assert window.bottom - window.top == pytest.approx(min(90, size[1]))
        inside = (window.left - 1e-9 <= x) & (x <= window.right + 1e-9)
        inside &= (window.top - 1e-9 <= y) & (y <= window.bottom + 1e-9)
        assert inside.sum() == window.figures == tried_all(x, y, 120, 90)
        cut += size.min() < 90
    assert cut > 10


def test_a_hundred_thousand_figures_take_seconds():
    rng = np.random.default_rng(2)
    x, y = rng.uniform(0, 100_000, 100_000), rng.uniform(0, 80_000, 100_000)
    x[:3000], y[:3000] = rng.uniform(40_000, 46_000, 3000), rng.uniform(30_000, 34_000, 3000)
    start = time.process_time()
    window = count.densest(x, y, count.WIDTH / 0.25, count.HEIGHT / 0.25, (100_000, 80_000))
    assert time.process_time() - start < 60
    assert window.figures >= 3000 and 39_000 < window.left < 41_000


def test_the_window_is_ten_high_power_fields():
    """2.37 mm², 4:3: 1,777.6 by 1,333.2 µm."""
    assert count.WIDTH * count.HEIGHT == pytest.approx(2.37e6)
    assert count.WIDTH / count.HEIGHT == pytest.approx(4 / 3)
    apart = count.WIDTH / 0.25  # px
    for distance, figures in ((apart - 0.1, 2), (apart + 0.1, 1)):
        result = count.count([10_000, 10_000 + distance], [9000, 9000], 0.25, (40_000, 30_000))
        assert result.window.figures == figures
        assert result.window_area == pytest.approx(2.37)


def test_per_mm2_of_tissue_and_of_tumour():
    x, y = np.array([500.0, 1500, 3000, 3500]), np.array([500.0, 500, 3000, 100])
    result = count.count(x, y, 0.5, (4000, 4000), tissue=2.0)
    assert (result.figures, result.area_of) == (4, "tissue")
    assert result.per_mm2 == pytest.approx(2.0)
    assert result.window_area == pytest.approx(2.37)  # of 4 mm²
    square = [np.array([[0.0, 0], [2000, 0], [2000, 2000], [0, 2000]])]
    result = count.count(x, y, 0.5, (4000, 4000), tumour=[square], tissue=2.0)
    assert (result.figures, result.area_of, result.area) == (2, "tumour", pytest.approx(1.0))
    assert result.per_mm2 == pytest.approx(2.0) and result.window.figures == 2
    assert "2 mitotic figures on 1.00 mm² of tumour: 2.00 per mm²" in count.text(result)
    assert "densest 2.37 mm²: 2" in count.text(result)


def test_slides_without_figures_tiny_ones_and_unknown_scales():
    nothing = count.count([], [], 0.25, (5000, 5000), tissue=1.5)
    assert (nothing.figures, nothing.per_mm2, nothing.window) == (0, 0.0, None)
    assert count.record(nothing)["densest_figures"] is None
    assert "0 mitotic figures on 1.50 mm² of tissue" in count.text(nothing)
    glass = count.count([], [], 0.25, (5000, 5000), tissue=0.0)
    assert glass.per_mm2 is None and "no tissue" in count.text(glass)
    tiny = count.count([10, 90], [10, 50], 0.25, (100, 60), tissue=0.0004)
    assert tiny.window == (2, 0, 0, 100, 60)
    assert tiny.window_area == pytest.approx(25 * 15 / 1e6)
    unknown = count.count([10, 90], [10, 50], None, (100, 60))
    assert (unknown.figures, unknown.per_mm2, unknown.window) == (2, None, None)
    assert "unknown" in count.text(unknown)
    assert count.record(unknown)["figures"] == 2 and count.record(unknown)["per_mm2"] is None


# ---------------------------------------------------------------- outlines


def ring(*points):
    return np.array(points, np.float64)


def test_areas_of_outlines():
    """A triangle, a square with a hole, squares that overlap, and what lies beyond the slide."""
    whole = (1000, 1000)
    triangle = [ring((100, 100), (500, 100), (100, 400))]
    assert count.area_px([triangle], whole) == pytest.approx(60_000, rel=1e-3)
    square = [ring((0, 0), (400, 0), (400, 400), (0, 400))]
    hole = ring((100, 100), (300, 100), (300, 300), (100, 300))
    assert count.area_px([[*square, hole]], whole) == pytest.approx(120_000, rel=1e-3)
    other = [ring((200, 0), (600, 0), (600, 400), (200, 400), (200, 0))]  # closed, as files are
    assert count.area_px([square, other], whole) == pytest.approx(240_000, rel=1e-3)
    assert count.area_px([square, square], whole) == pytest.approx(160_000, rel=1e-3)
    assert count.area_px([square], (200, 300)) == pytest.approx(60_000, rel=1e-3)
    assert count.area_px([[ring((2000, 2000), (2100, 2000), (2000, 2100))]], whole) == 0
    circle = np.stack([np.cos(a := np.linspace(0, 2 * np.pi, 500)), np.sin(a)], axis=1)
    area = count.area_px([[500 + 300 * circle]], whole)
    assert area == pytest.approx(np.pi * 300**2, rel=1e-3)


def test_points_in_outlines_equal_the_winding_of_their_angles():
    """Of random polygons: a point inside sees the outline turn around it an odd number of times."""
    rng = np.random.default_rng(3)
    for _ in range(30):
        polygon = rng.uniform(0, 100, (rng.integers(3, 9), 2))
        x, y = rng.uniform(-10, 110, (2, 200))
        from_point = polygon[None] - np.stack([x, y], axis=1)[:, None]
        angle = np.arctan2(from_point[..., 1], from_point[..., 0])
        turn = (np.roll(angle, -1, axis=1) - angle + np.pi) % (2 * np.pi) - np.pi
        turns = np.rint(turn.sum(axis=1) / (2 * np.pi)).astype(int)
        assert (count.contains([[polygon]], x, y) == (turns % 2 != 0)).all()
    assert count.contains([], np.zeros(2), np.zeros(2)).tolist() == [False, False]


def geojson(path, *features):
    content = []
    for kind, coordinates, name in features:
        properties = {} if name is None else {"classification": {"name": name}}
        geometry = {"type": kind, "coordinates": coordinates}
        content.append({"type": "Feature", "geometry": geometry, "properties": properties})
    path.write_text(json.dumps({"type": "FeatureCollection", "features": content}))
    return path


def box(left, top, side):
    right, bottom = left + side, top + side
    return [[[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]]


def test_outlines_of_the_tumour(tmp_path):
    image = tmp_path / "a.png"
    Image.new("RGB", (3000, 2000)).save(image)
    path = tmp_path / "a.geojson"
    cell = ("Polygon", box(10, 10, 40), "Mitosis")
    geojson(
        path, ("Polygon", box(0, 0, 1000), "Tumor"), ("Polygon", box(0, 0, 9000), "Other"), cell
    )
    (polygon,) = count.outlines(path, image)
    assert count.area_px([polygon], (3000, 2000)) == pytest.approx(1e6, rel=1e-3)
    geojson(path, ("MultiPolygon", [box(0, 0, 1000), box(1500, 0, 500)], None), cell)
    assert len(count.outlines(path, image)) == 2  # the only class of regions
    for features, says in (
        ([cell], "holds no region"),
        (
            [("Polygon", box(0, 0, 900), "Stroma"), ("Polygon", box(0, 0, 900), None)],
            "is called Tumor",
        ),
        ([("Polygon", [[[0, 0], [900, 900]]], "Tumor")], "fewer than three points"),
        ([("Polygon", [[[0, 0], [900, "x"], [9, 9]]], "Tumor")], "a number is needed"),
    ):
        geojson(path, *features)
        with pytest.raises(UserError, match=says):
            count.outlines(path, image)
    (tmp_path / "b.csv").write_text("x,y\n1,2\n")
    with pytest.raises(UserError, match="no GeoJSON"):
        count.outlines(tmp_path / "b.csv", image)


# ---------------------------------------------------------------- tissue


def test_the_area_of_tissue(tmp_path):
    """A pink rectangle on glass: whole cells, and those at the border as far as the image goes."""
    pixels = np.full((1100, 1500, 3), 240, np.uint8)
    pixels[256:768, 128:1024] = (200, 120, 180)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = tissue.find(tmp_path / "a.png", 0.25)
    assert found.side == 128 and found.cells.shape == (9, 12)
    assert found.cells.sum() == 4 * 7 and found.cells[2:6, 1:8].all()
    assert found.area(0.25) == pytest.approx(512 * 896 * 0.25**2 / 1e6)
    assert found.grown().cells.sum() == 6 * 9 and found.grown().cells[1:7, 0:9].all()
    pixels[:] = (200, 120, 180)
    Image.fromarray(pixels).save(tmp_path / "full.png")
    found = tissue.find(tmp_path / "full.png", 0.25)
    assert found.area(0.25) == pytest.approx(1100 * 1500 * 0.25**2 / 1e6)
