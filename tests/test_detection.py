"""Detection: the matching against brute force, the curve, files of candidates, the command and its
errors.
"""

import csv
import itertools
import json
import re
import tracemalloc

import numpy as np
import pytest
from PIL import Image
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from small import call

import data
import evaluate
from common import UserError
from dataset import formats
from reporting import detection

# ---------------------------------------------------------------- the matching


def close(x, y, figures_x, figures_y, radius):
    return (x[:, None] - figures_x[None]) ** 2 + (y[:, None] - figures_y[None]) ** 2 <= radius**2


def tried_all(near):
    """Size of the largest one-to-one pairing, by trying every choice of every candidate."""
    if not len(near):
        return 0
    taken = [1 + tried_all(np.delete(near[1:], j, axis=1)) for j in np.flatnonzero(near[0])]
    return max(tried_all(near[1:]), *taken, 0)


def crowd(rng, most=7, side=40):
    n, m = rng.integers(0, most, 2)
    x, y, score = rng.uniform(0, side, n), rng.uniform(0, side, n), np.round(rng.random(n), 1)
    return x, y, score, rng.uniform(0, side, m), rng.uniform(0, side, m)


def test_matching_of_every_prefix_equals_brute_force():
    rng, several = np.random.default_rng(0), 0
    for _ in range(300):
        x, y, score, fx, fy = crowd(rng)
        order, found = detection.matched(x, y, score, fx, fy, 15)
        assert sorted(order.tolist()) == list(range(len(x))) and (np.diff(score[order]) <= 0).all()
        near = close(x, y, fx, fy, 15)[order]
        for k in range(len(x) + 1):
            assert found[:k].sum() == tried_all(near[:k])
        # Where taking the nearest or the first would do, nothing would be proven.
        taken = set()
        for row in near:
            taken |= set(
                np.flatnonzero([hit and j not in taken for j, hit in enumerate(row)])[:1].tolist()
            )
        several += len(taken) < found.sum()
    assert several > 10


def test_matching_of_crowds_equals_scipys_maximum_matching():
    rng = np.random.default_rng(1)
    for k in range(60):
        x, y, score, fx, fy = crowd(rng, 120, (60, 200, 500)[k % 3])
        order, found = detection.matched(x, y, score, fx, fy, 20)
        near = close(x, y, fx, fy, 20)[order]
        for part in (len(x), len(x) // 2, len(x) // 5):
            wanted = (
                (maximum_bipartite_matching(csr_array(near[:part]), "column") >= 0).sum()
                if part and len(fx)
                else 0
            )
            assert found[:part].sum() == wanted


def test_a_long_chain_is_no_limit_of_recursion():
    """Each candidate takes a figure from the one before it: the last one moves them all along."""
    n = 4000
    score = np.r_[np.linspace(0.9, 0.5, n), 0.1]
    figures = np.arange(n + 1) * 10.0
    x = np.r_[
        figures[:-1] + 5, -5.0
    ]  # candidate i lies between figures i and i + 1; the last one near figure 0 alone
    order, found = detection.matched(x, np.zeros(n + 1), score, figures, np.zeros(n + 1), 5)
    assert found.all() and order[-1] == n


def test_a_candidate_on_the_radius_finds_and_one_beyond_it_does_not():
    def found(distance, mpp):
        image = {
            "x": [100 + distance],
            "y": [50],
            "probability": [0.9],
            "figures_x": [100],
            "figures_y": [50],
            "mpp": mpp,
            "domain": "A",
        }
        return detection.at(detection.score_images([image]))["tp"]

    assert detection.RADIUS == 7.5
    assert found(30, 0.25) == 1 and found(30.01, 0.25) == 0
    assert found(15, 0.5) == 1 and found(15.01, 0.5) == 0


def test_two_candidates_find_one_figure_once_and_one_candidate_finds_one_of_two():
    two = {
        "x": [10, 12],
        "y": [10, 10],
        "probability": [0.6, 0.7],
        "figures_x": [11],
        "figures_y": [10],
        "mpp": 1,
        "domain": "A",
    }
    assert detection.at(detection.score_images([two])) == {
        "threshold": None,
        "tp": 1,
        "fp": 1,
        "fn": 0,
        "precision": 0.5,
        "recall": 1.0,
        "f1": 2 / 3,
    }
    one = two | {
        "x": [11],
        "y": [10],
        "probability": [0.6],
        "figures_x": [10, 12],
        "figures_y": [10, 10],
    }
    scored = detection.at(detection.score_images([one]))
    assert (scored["tp"], scored["fp"], scored["fn"]) == (1, 0, 1)


# ---------------------------------------------------------------- the curve


def images(seed=0, number=5):
    rng = np.random.default_rng(seed)
    found = []
    for k in range(number):
        x, y, score, fx, fy = crowd(rng, 40, 120)
        found.append(
            {
                "x": x,
                "y": y,
                "probability": score,
                "figures_x": fx,
                "figures_y": fy,
                "mpp": (0.25, 0.5)[k % 2],
                "domain": "AB"[k % 2],
            }
        )
    return found


def by_threshold(images, threshold):
    """tp, fp, fn of the candidates with p >= threshold, each image matched anew."""
    tp = kept = figures = 0
    for image in images:
        keep = image["probability"] >= threshold
        near = close(
            image["x"][keep],
            image["y"][keep],
            image["figures_x"],
            image["figures_y"],
            7.5 / image["mpp"],
        )
        tp += (maximum_bipartite_matching(csr_array(near), "column") >= 0).sum() if near.size else 0
        kept, figures = kept + keep.sum(), figures + len(image["figures_x"])
    return int(tp), int(kept - tp), int(figures - tp)


def test_the_curve_equals_matching_anew_at_every_threshold():
    own = images()
    curve = detection.score_images(own)
    assert (np.diff(curve["thresholds"]) < 0).all()
    assert set(curve["thresholds"]) == {p for image in own for p in image["probability"]}
    for t in [*curve["thresholds"], 0.33, 0.0, 1.0, 2.0]:
        at = detection.at(curve, t)
        assert (at["tp"], at["fp"], at["fn"]) == by_threshold(own, t)
    every = detection.at(curve)
    assert (every["tp"], every["fp"], every["fn"]) == by_threshold(own, -1)
    assert every["fp"] + every["tp"] == curve["candidates"] == sum(len(image["x"]) for image in own)


def test_the_order_of_candidates_and_of_images_does_not_matter():
    own, rng = images(), np.random.default_rng(1)
    curve = detection.score_images(own)
    mixed = []
    for image in own[::-1]:
        order = rng.permutation(len(image["x"]))
        mixed.append(image | {key: image[key][order] for key in ("x", "y", "probability")})
    other = detection.score_images(mixed)
    for key in ("thresholds", "tp", "fp", "fn"):
        assert np.array_equal(curve[key], other[key]), key


def test_best_is_the_highest_f1_over_all_thresholds():
    for seed in range(10):
        curve = detection.score_images(images(seed))
        f1 = {t: detection.at(curve, t)["f1"] for t in curve["thresholds"]}
        best = detection.best(curve)
        assert best["f1"] == max(f1.values())
        assert best["threshold"] == max(t for t, value in f1.items() if value == best["f1"])


def test_no_candidates_and_no_figures_are_no_division_by_zero():
    nothing = {
        "x": [],
        "y": [],
        "probability": [],
        "figures_x": [],
        "figures_y": [],
        "mpp": 0.25,
        "domain": "A",
    }
    missed = nothing | {"figures_x": [1.0, 2.0], "figures_y": [1.0, 2.0]}
    scored = detection.at(detection.score_images([missed]))
    assert (scored["tp"], scored["fn"], scored["f1"], scored["precision"], scored["recall"]) == (
        0,
        2,
        0,
        0,
        0,
    )
    scored = detection.at(detection.score_images([nothing]))
    assert np.isnan(scored["f1"]) and np.isnan(scored["recall"])
    false = nothing | {"x": [1.0], "y": [1.0], "probability": [0.4]}
    scored = detection.at(detection.score_images([false, missed]), 0.5)
    assert (scored["tp"], scored["fp"], scored["fn"]) == (0, 0, 2)
    assert detection.best(detection.score_images([missed]))["f1"] == 0
    with pytest.raises(UserError, match="NaN"):
        detection.score_images([false | {"probability": [np.nan]}])


# ---------------------------------------------------------------- files

FIGURES = {"one.tiff": [(100, 100), (300, 300)], "two.tiff": [(50, 60)], "three.tiff": [(70, 70)]}
#         image, x, y, probability: true, true (29 px), too far (31 px), false, on the image without
# figures nearby
SCORED = [
    ("one.tiff", 100, 100, 0.9),
    ("one.tiff", 300, 329, 0.6),
    ("one.tiff", 131, 100, 0.8),
    ("two.tiff", 200, 200, 0.7),
    ("two.tiff", 50, 60, 0.3),
]


@pytest.fixture
def dataset(tmp_path):
    """A MIDOG JSON with images of 0.25 µm/px: three with figures and look-alikes; "three" gets no
    candidate.
    """
    folder = tmp_path / "tissue"
    folder.mkdir()
    listed, found = [], []
    for k, (name, points) in enumerate(FIGURES.items()):
        Image.new("RGB", (400, 400), "white").save(
            folder / name, resolution=40000, resolution_unit=3
        )
        listed.append({"id": k, "file_name": name, "width": 400, "height": 400, "domain": "AAB"[k]})
        for x, y, label in [(*point, 1) for point in points] + [(200, 200, 2)]:
            found.append(
                {
                    "id": len(found),
                    "image_id": k,
                    "bbox": [x - 25, y - 25, x + 25, y + 25],
                    "category_id": label,
                }
            )
    content = {
        "images": listed,
        "annotations": found,
        "categories": [{"id": 1, "name": "mitotic figure"}, {"id": 2, "name": "hard negative"}],
    }
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder / "annotations.json"


def midog(path, scored=SCORED, listed=("one.tiff", "two.tiff", "three.tiff")):
    content = {
        "images": [{"id": k, "file_name": f"elsewhere/{name}"} for k, name in enumerate(listed)],
        "annotations": [
            {
                "id": k,
                "image_id": listed.index(name),
                "bbox": [x - 5, y - 5, x + 5, y + 5],
                "category_id": 1,
                "probability": p,
            }
            for k, (name, x, y, p) in enumerate(scored)
        ],
    }
    path.write_text(json.dumps(content))
    return path


def table(path, scored=SCORED, header="filename,x,y,probability"):
    path.write_text(header + "\n" + "".join(",".join(map(str, row)) + "\n" for row in scored))
    return path


def counted(rows, threshold):
    return {
        domain: (
            n,
            *(detection.at(curve, t)[key] for t in (None, threshold) for key in ("tp", "fp", "fn")),
        )
        for domain, n, curve in rows
    }


def test_before_and_after_the_second_stage_by_domain(dataset, tmp_path):
    annotations = data.load_dataset(dataset)
    rows = detection.report(midog(tmp_path / "scored.json"), annotations)
    # "three" is in the file's list of images: its figure is missed.
    assert counted(rows, 0.5) == {
        "all": (3, 3, 2, 1, 2, 2, 2),
        "A": (2, 3, 2, 0, 2, 2, 1),
        "B": (1, 0, 0, 1, 0, 0, 1),
    }


def test_a_csv_names_only_images_with_candidates(dataset, tmp_path):
    annotations = data.load_dataset(dataset)
    rows = detection.report(table(tmp_path / "scored.csv"), annotations)
    assert counted(rows, 0.5) == {"all": (2, 3, 2, 0, 2, 2, 1)}
    # The header says where the probability is, however it is written, and case and folder of a name
    # are nothing.
    other = [(f"X/{name.upper()}", x, y, "note", p) for name, x, y, p in SCORED]
    rows = detection.report(
        table(tmp_path / "other.csv", other, "filename,x,y,remark, Probability "), annotations
    )
    assert counted(rows, 0.5) == {"all": (2, 3, 2, 0, 2, 2, 1)}


def one_image(dataset, name="one.tiff"):
    annotations = data.load_dataset(dataset)
    return annotations.take(annotations.image == name)


def test_the_challenges_millimetres_are_those_of_the_image(dataset, tmp_path):
    own = [row for row in SCORED if row[0] == "one.tiff"]
    content = formats.challenge.content_of(
        [r[1] for r in own], [r[2] for r in own], [r[3] for r in own], 0.5, 0.25
    )
    (tmp_path / "points.json").write_text(json.dumps(content))
    rows = detection.report(tmp_path / "points.json", one_image(dataset))
    assert counted(rows, 0.5) == {"all": (1, 2, 1, 0, 2, 1, 0)}
    rows = detection.report(tmp_path / "points.json", one_image(dataset))
    assert counted(rows, 0.7) == {"all": (1, 2, 1, 0, 1, 1, 1)}
    # Said to be coarser, the same millimetres are other px.
    assert (
        counted(detection.report(tmp_path / "points.json", one_image(dataset), mpp=0.5), 0.5)[
            "all"
        ][1]
        == 0
    )


def test_a_file_that_names_no_image_belongs_to_the_only_one(dataset, tmp_path):
    own = [row[1:] for row in SCORED if row[0] == "one.tiff"]
    rows = detection.report(
        table(tmp_path / "points.csv", own, "x,y,probability"), one_image(dataset)
    )
    assert counted(rows, 0.5) == {"all": (1, 2, 1, 0, 2, 1, 0)}
    with pytest.raises(UserError, match="does not say which image"):
        detection.report(tmp_path / "points.csv", data.load_dataset(dataset))


def test_a_detector_that_found_nothing_misses_everything(dataset, tmp_path):
    (tmp_path / "points.json").write_text(
        json.dumps(formats.challenge.content_of([], [], [], 0.5, 0.25))
    )
    assert counted(detection.report(tmp_path / "points.json", one_image(dataset)), 0.5) == {
        "all": (1, 0, 0, 2, 0, 0, 2)
    }
    found = detection.report(midog(tmp_path / "none.json", []), data.load_dataset(dataset))
    assert counted(found, 0.5)["all"] == (3, 0, 0, 4, 0, 0, 4)
    assert "all,3,4,0" in detection.files(found, 0.5)["detection.csv"]  # and can be written
    assert "0.000" in detection.table(found, 0.5)


def test_only_the_images_of_a_test_set_are_scored(dataset, tmp_path):
    annotations = data.load_dataset(dataset)
    ids = annotations.id[annotations.image == "two.tiff"]
    rows = detection.report(midog(tmp_path / "scored.json"), annotations, ids)
    assert counted(rows, 0.5) == {"all": (1, 1, 1, 0, 0, 1, 1)}


def test_images_that_are_not_annotated_are_named_and_left_out(dataset, tmp_path, capsys):
    more = [*SCORED, ("nine.tiff", 5, 5, 0.9)]
    rows = detection.report(
        midog(tmp_path / "s.json", more, ("one.tiff", "two.tiff", "three.tiff", "nine.tiff")),
        data.load_dataset(dataset),
    )
    assert counted(rows, 0.5)["all"] == (3, 3, 2, 1, 2, 2, 2)
    assert "left out 1 image not in annotations (nine)" in capsys.readouterr().out
    with pytest.raises(UserError, match="none of its images is in annotations"):
        detection.report(
            table(tmp_path / "s.csv", [("nine.tiff", 5, 5, 0.9)]), data.load_dataset(dataset)
        )


def test_two_images_of_one_name_are_not_taken_for_each_other(dataset, tmp_path):
    (dataset.parent / "a").mkdir()
    Image.open(dataset.parent / "one.tiff").save(dataset.parent / "a" / "one.tiff")
    content = json.loads(dataset.read_text())
    content["images"].append({"id": 9, "file_name": "a/one.tiff", "domain": "A"})
    content["annotations"].append(
        {"id": 99, "image_id": 9, "bbox": [0, 0, 50, 50], "category_id": 1}
    )
    dataset.write_text(json.dumps(content))
    with pytest.raises(UserError, match="two images are called one"):
        detection.report(midog(tmp_path / "scored.json"), data.load_dataset(dataset))


@pytest.mark.parametrize(
    "content",
    [
        "filename,x,y\none.tiff,5,5\n",
        "filename,x,y,probability\none.tiff,5,5,\n",
        json.dumps(
            {
                "images": [{"id": 0, "file_name": "one.tiff"}],
                "annotations": [{"id": 0, "image_id": 0, "bbox": [0, 0, 9, 9]}],
            }
        ),
        json.dumps(
            {
                "type": "FeatureCollection",
                "features": [
                    {
                        "type": "Feature",
                        "geometry": {"type": "Point", "coordinates": [5, 5]},
                        "properties": {},
                    }
                ],
            }
        ),
    ],
    ids=["no column", "empty", "json", "geojson"],
)
def test_candidates_without_a_probability_are_refused(dataset, tmp_path, content):
    path = tmp_path / ("scored.csv" if content.startswith("filename") else "scored.json")
    path.write_text(content)
    with pytest.raises(
        UserError, match="the candidates have no probability; score them with classify.py first"
    ):
        detection.report(path, data.load_dataset(dataset))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "7.5", "-0.5", "-1", "1e999", "high"])
def test_probabilities_that_are_none_are_refused(dataset, tmp_path, value, capsys):
    """-1 too, which once stood for candidates that are not scored."""
    rows = [("one.tiff", 5, 5, 0.5), ("one.tiff", 9, 9, value)]
    path = table(tmp_path / "scored.csv", rows)
    said = f"the probability of candidate line 3 is {value}, not a number from 0 to 1"
    with pytest.raises(UserError, match=said):
        detection.report(path, data.load_dataset(dataset))
    assert said in failure(
        capsys, "--detection", path, "--data", dataset, "--out", tmp_path / "report"
    )
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("value", [True, "0.5x", [0.5], {"p": 1}, 10**400])
def test_json_probabilities_that_are_none_are_refused(dataset, tmp_path, value):
    path = midog(tmp_path / "scored.json", [("one.tiff", 5, 5, 0.5), ("one.tiff", 9, 9, value)])
    with pytest.raises(UserError, match="the probability of candidate 1 is .{1,60}, not a number"):
        detection.report(path, data.load_dataset(dataset))


@pytest.mark.parametrize("value", ["nan", "40", "inf", "-1", "1.01"])
def test_thresholds_that_are_none_are_refused(dataset, tmp_path, value, capsys):
    scored = midog(tmp_path / "scored.json")
    flags = ("--detection", scored, "--data", dataset, "--out", tmp_path / "report")
    assert f"--threshold {value}: give a probability between 0 and 1" in failure(
        capsys, *flags, f"--threshold={value}"
    )
    assert not (tmp_path / "report").exists()


def test_matching_of_coincident_points_needs_memory_in_line_with_their_number():
    """20,000 candidates on the place of 2,000 figures: 40 million pairs, none of which is kept."""
    n, m = 20_000, 2_000
    rng = np.random.default_rng(0)
    tracemalloc.start()
    try:
        _, adds = detection.matched(
            np.full(n, 5.0), np.full(n, 5.0), rng.random(n), np.full(m, 5.0), np.full(m, 5.0), 1
        )
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert adds[:m].all() and not adds[m:].any()


def test_images_that_are_not_scored_yet_are_named_and_left_out(dataset, tmp_path, capsys):
    """classify.py scores one slide at a time, and leaves the candidates on others as they are."""
    path = midog(tmp_path / "scored.json")
    content = json.loads(path.read_text())
    for candidate in content["annotations"]:
        if content["images"][candidate["image_id"]]["file_name"].endswith("two.tiff"):
            del candidate["probability"]
    path.write_text(json.dumps(content))
    rows = detection.report(path, data.load_dataset(dataset))
    assert counted(rows, 0.5)["all"] == (
        2,
        2,
        1,
        1,
        2,
        1,
        1,
    )  # "three", where nothing was found, is still missed
    assert "left out 1 image with unscored candidates (two)" in capsys.readouterr().out
    del content["annotations"][0]["probability"]  # half of an image is a mistake
    path.write_text(json.dumps(content))
    with pytest.raises(
        UserError, match="1 of 3 candidates on one.tiff have no probability; score them"
    ):
        detection.report(path, data.load_dataset(dataset))
    ids = data.load_dataset(dataset).id[data.load_dataset(dataset).image == "two.tiff"]
    with pytest.raises(UserError, match="none of its scored images is in annotations"):
        detection.report(path, data.load_dataset(dataset), ids)
    empty = [(*row[:3], "") if row[0] == "two.tiff" else row for row in SCORED]
    assert counted(
        detection.report(table(tmp_path / "scored.csv", empty), data.load_dataset(dataset)),
        0.5,
    )["all"] == (1, 2, 1, 0, 2, 1, 0)
    with pytest.raises(UserError, match="the probability of candidate line 2 is nan, not a number"):
        detection.report(
            table(tmp_path / "nan.csv", [("one.tiff", 5, 5, "nan")]),
            data.load_dataset(dataset),
        )


# ---------------------------------------------------------------- the command


def test_the_command_writes_tables_and_a_figure(dataset, tmp_path, capsys):
    out = tmp_path / "report"
    scored = midog(tmp_path / "scored.json")
    assert (
        call(evaluate, "--detection", scored, "--data", dataset, "--threshold", 0.5, "--out", out)
        == 0
    )
    printed = capsys.readouterr().out
    assert "within 7.5 µm, one to one" in printed and "chosen on these very images" in printed
    line = next(line for line in printed.splitlines() if line.startswith("all"))
    # 3 of 5 candidates and 3 of 4 figures before; 2 of 4 and 2 of 4 after
    assert line.split()[:11] == [
        "all",
        "3",
        "4",
        "5",
        "0.600",
        "0.750",
        "0.667",
        "0.500",
        "0.500",
        "0.500",
        "0.667",
    ]
    with open(out / "detection.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["domain"] for row in rows] == ["all", "A", "B"]
    assert (
        float(rows[0]["before_f1"]) == 2 * 3 / (2 * 3 + 2 + 1) and float(rows[0]["after_f1"]) == 0.5
    )
    with open(out / "detection_curve.csv") as file:
        curve = [row for row in csv.DictReader(file) if row["domain"] == "all"]
    assert [(float(r["threshold"]), int(r["tp"]), int(r["fp"]), int(r["fn"])) for r in curve] == [
        (0.9, 1, 0, 3),
        (0.8, 1, 1, 3),
        (0.7, 1, 2, 3),
        (0.6, 2, 2, 2),
        (0.3, 3, 2, 1),
    ]
    for suffix in ("png", "svg"):
        assert (out / f"detection.{suffix}").stat().st_size > 1000
    assert np.asarray(Image.open(out / "detection.png").convert("L")).std() > 5


def test_the_table_fits_a_terminal_with_midogs_domains(dataset, tmp_path, capsys):
    content = json.loads(dataset.read_text())
    names = list(data.KNOWN["midogpp"].domains)
    for image, name in zip(content["images"], names[3:]):
        image["domain"] = name
    dataset.write_text(json.dumps(content))
    scored = midog(tmp_path / "scored.json")
    assert (
        call(evaluate, "--detection", scored, "--data", dataset, "--out", tmp_path / "report") == 0
    )
    lines = capsys.readouterr().out.splitlines()
    first = next(k for k, line in enumerate(lines) if line.startswith("domain "))
    assert [line.split()[0] for line in lines[first + 2 : first + 6]] == [
        "all",
        "CCMCT",
        "CSTS",
        "HNT",
    ]
    assert max(map(len, lines[first : first + 6])) <= 100
    said = " ".join(lines[first + 6 : -1])
    assert (
        said == "CCMCT: canine cutaneous mast cell tumor, CSTS: canine soft tissue sarcoma, "
        "HNT: human neuroendocrine tumor."
    )
    with open(tmp_path / "report/detection.csv") as file:  # where there is room, the whole name
        assert [row["domain"] for row in csv.DictReader(file)] == [
            "all",
            names[3],
            names[5],
            names[4],
        ]


def test_annotations_are_read_as_the_flags_say(tmp_path, capsys):
    Image.new("RGB", (400, 400), "white").save(
        tmp_path / "one.tiff", resolution=40000, resolution_unit=3
    )
    (tmp_path / "own.csv").write_text(
        "slide,x,y,verdict\none.tiff,100,100,M\none.tiff,300,300,M\none.tiff,5,5,N\n"
    )
    scored = table(tmp_path / "scored.csv", [("one.tiff", 100, 100, 0.9)])
    flags = (
        "--detection",
        scored,
        "--data",
        tmp_path / "own.csv",
        "--out",
        tmp_path / "report",
        "--columns",
        "filename=slide,label=verdict",
    )
    assert call(evaluate, *flags, "--positive", "M") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("all"))
    assert line.split()[1:4] == ["1", "2", "1"]  # one image, two figures, one candidate
    assert call(evaluate, *flags, "--positive", "M", "--negative", "N") == 0
    assert call(evaluate, *flags, "--classes", "mitotic=M,other=N") == 0
    capsys.readouterr()
    assert "error: " in failure(capsys, *flags, "--columns", "nonsense")


def failure(capsys, *arguments):
    assert call(evaluate, *arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


def test_mistakes_end_with_one_line(dataset, tmp_path, capsys):
    scored = midog(tmp_path / "scored.json")
    assert "needs --data" in failure(capsys, "--detection", scored)
    assert "this is a file" in failure(
        capsys, "--detection", scored, "--data", dataset, "--out", dataset
    )
    assert "no such file" in failure(capsys, "--detection", tmp_path / "no.json", "--data", dataset)
    assert "no such file" in failure(
        capsys, "--detection", scored, "--data", dataset, "--only", tmp_path / "run"
    )
    (tmp_path / "half.json").write_text(scored.read_text()[:200])
    assert "not a readable JSON" in failure(
        capsys, "--detection", tmp_path / "half.json", "--data", dataset
    )
    for name in FIGURES:  # without a resolution
        Image.new("RGB", (400, 400)).save(dataset.parent / name)
    assert "--source-mpp" in failure(capsys, "--detection", scored, "--data", dataset)
    assert (
        call(
            evaluate,
            "--detection",
            scored,
            "--data",
            dataset,
            "--source-mpp",
            0.25,
            "--out",
            tmp_path / "r",
        )
        == 0
    )


def test_every_prefix_of_a_small_case_by_hand():
    """Three in a row: the middle candidate comes first and would take the wrong figure."""
    for first, second in itertools.permutations((0.0, 20.0)):
        x = np.array([10.0, first, second])
        order, found = detection.matched(
            x, np.zeros(3), [0.9, 0.8, 0.7], np.array([5.0, 15.0]), np.zeros(2), 6
        )
        assert order.tolist() == [0, 1, 2] and found.tolist() == [True, True, False]


# ---------------------------------------------------------------- two scores as one


def scored_world(folder, images=40, seed=0):
    """A dataset of 40 images, one case each, with candidates whose detector and classifier see
    different things → (annotation file, scored CSV, run folder with a split by image).
    """
    rng = np.random.default_rng(seed)
    folder.mkdir()
    (folder / "run").mkdir()
    listed, cells, rows = [], [], ["filename,x,y,score,probability"]
    for k in range(images):
        name = f"{k:02d}.tiff"
        Image.new("RGB", (800, 800), "white").save(
            folder / name, resolution=40000, resolution_unit=3
        )
        listed.append({"id": k, "file_name": name, "width": 800, "height": 800})
        places = rng.permutation(64)[:30] * 100.0
        for j, place in enumerate(places):
            x, y, figure = place % 800 + 50, place // 800 * 100 + 50, j < 10
            score, probability = 1 / (1 + np.exp(-rng.normal(2 * figure - 1, 1.0, 2)))
            rows.append(f"{name},{x},{y},{score},{probability}")
            box = [x - 25, y - 25, x + 25, y + 25]
            cell = {"id": len(cells), "image_id": k, "bbox": box, "category_id": 2 - figure}
            cells.append(cell)
    content = {
        "images": listed,
        "annotations": cells,
        "categories": [{"id": 1, "name": "mitotic figure"}, {"id": 2, "name": "hard negative"}],
    }
    (folder / "annotations.json").write_text(json.dumps(content))
    (folder / "scored.csv").write_text("\n".join(rows) + "\n")
    data.make_split(data.load_dataset(folder / "annotations.json")).save(
        folder / "run" / "split.json"
    )
    return folder / "annotations.json", folder / "scored.csv", folder / "run"


@pytest.mark.parametrize("how", detection.COMBINATIONS)
def test_combined_scores_beat_either_alone(tmp_path, capsys, how):
    truth, scored, run = scored_world(tmp_path / "world")
    flags = ("--detection", scored, "--data", truth, "--only", run, "--combine", how)
    assert call(evaluate, *flags, "--out", tmp_path / "report") == 0
    with open(tmp_path / "report" / "detection_combined.csv", newline="") as file:
        f1 = {row["score"]: float(row["f1"]) for row in csv.DictReader(file)}
    assert list(f1) == ["detector", "classifier", how]
    assert f1[how] > max(f1["detector"], f1["classifier"]) + 0.03
    said = capsys.readouterr().out
    assert all(f"{value:.3f}" in said for value in f1.values())
    with open(tmp_path / "report" / "detection.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["after_f1"]) == f1[how]  # from the validation images' threshold on


def test_nothing_is_fitted_or_chosen_on_test_images(tmp_path):
    """Whatever the test images' truth is: weights and thresholds stay."""
    truth, scored, run = scored_world(tmp_path / "world")
    table = data.load_dataset(truth)
    split = data.load_split(run / "split.json", table)
    _, before = detection.combined_report(scored, table, split, "logistic")
    table.label[table.rows(split.test)] = 1 - table.label[table.rows(split.test)]
    _, after = detection.combined_report(scored, table, split, "logistic")
    assert [v["threshold"] for _, v in before] == [v["threshold"] for _, v in after]
    assert [v["f1"] for _, v in before] != [v["f1"] for _, v in after]


def test_scores_of_a_detector_that_cannot_be_combined(tmp_path, capsys):
    truth, scored, run = scored_world(tmp_path / "world")
    said = ("--detection", scored, "--data", truth, "--out", tmp_path / "report")
    assert "--combine needs --only RUN" in failure(capsys, *said, "--combine", "product")
    text = scored.read_text()
    for change, says in (
        (lambda row: row.replace("score", "remark"), "has no score of the detector's"),
        (lambda row: re.sub(r"^(\d\d.tiff,[^,]*,[^,]*),[^,]*", r"\1,", row), "has no score"),
        (
            lambda row: re.sub(r"^(\d\d.tiff,[^,]*,[^,]*),[^,]*", r"\1,high", row),
            "a number is needed",
        ),
        (lambda row: re.sub(r"^(\d\d.tiff,[^,]*,[^,]*),[^,]*", r"\1,7", row), "from 0 to 1"),
    ):
        scored.write_text("\n".join(map(change, text.splitlines())) + "\n")
        flags = (*said, "--only", run, "--combine", "product")
        assert says in failure(capsys, *flags)
    scored.write_text(text)
    content = json.loads(truth.read_text())
    for cell in content["annotations"]:
        cell["image_id"] %= 2
    truth.write_text(json.dumps(content))
    data.make_split(data.load_dataset(truth), by="annotation").save(run / "split.json")
    assert "both validation and test" in failure(
        capsys, *said, "--only", run, "--combine", "logistic"
    )
    assert not (tmp_path / "report").exists()


def test_the_challenges_file_keeps_the_detectors_probability(tmp_path):
    content = formats.challenge.content_of([10], [20], [0.3], 0.5, 0.25)
    (tmp_path / "points.json").write_text(json.dumps(content))
    for probability in (0.9, 0.8):  # scored, and scored again
        candidates = formats.read_candidates(tmp_path / "points.json")
        formats.write(candidates, tmp_path / "out.json", np.array([probability]), 0.5, ["a", "b"])
        (tmp_path / "points.json").write_text((tmp_path / "out.json").read_text())
    candidates = formats.read_candidates(tmp_path / "out.json")
    assert detection.detector_scores(candidates).tolist() == [0.3]
    assert detection.probabilities(candidates).tolist() == [0.8]
