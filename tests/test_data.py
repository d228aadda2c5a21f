"""Readers and the dataset table: every format, every trap of the real files."""

import argparse
import csv
import gzip
import json
import os
import sqlite3
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import flags
from common import UserError
from dataset import annotations, formats, images
from dataset.formats import files

HERE = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("MITOSIS_REALDATA") or "/nowhere") / "annotations"
real = pytest.mark.skipif(not REAL.is_dir(), reason="MITOSIS_REALDATA is not set")


def midog(images=3, per_image=8, names=("mitotic figure", "not mitotic figure")):
    """A MIDOG file's content: 50 px boxes, labels alternate."""
    return {
        "info": {"description": "made up"},
        "licenses": [{"id": 1, "name": "CC0"}],
        "images": [
            {"id": i, "file_name": f"{i:03d}.tiff", "width": 2000, "height": 1000}
            for i in range(1, images + 1)
        ],
        "categories": [{"id": k + 1, "name": name} for k, name in enumerate(names)],
        "annotations": [
            {
                "id": 100 * i + j,
                "image_id": i,
                "category_id": 1 + j % 2,
                "bbox": [40 * j, 30 * j, 40 * j + 50, 30 * j + 50],
            }
            for i in range(1, images + 1)
            for j in range(per_image)
        ],
    }


def write(path, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (gzip.open if path.suffix == ".gz" else open)(path, "wt").write(text)
    return path


def sliderunner(path, rows, classes, schema="old", slides=None):
    """A SlideRunner database with spots: rows of (file name, x, y, class id)."""
    path.unlink(missing_ok=True)
    db = sqlite3.connect(path)
    db.execute("PRAGMA synchronous = OFF")  # a test's file need not survive a power cut
    new = (
        ", guid TEXT, lastModified REAL, deleted INTEGER DEFAULT 0, description TEXT"
        if schema == "new"
        else ""
    )
    db.executescript(
        "CREATE TABLE Slides (uid INTEGER PRIMARY KEY, filename TEXT, width INTEGER, height "
        "INTEGER, directory TEXT);"
        "CREATE TABLE Annotations (uid INTEGER PRIMARY KEY, slide INTEGER, type INTEGER, "
        f"agreedClass INTEGER{new});"
        "CREATE TABLE Annotations_coordinates (uid INTEGER PRIMARY KEY, coordinateX INTEGER, "
        "coordinateY INTEGER, "
        "slide INTEGER, annoId INTEGER, orderIdx INTEGER);"
        "CREATE TABLE Annotations_label (uid INTEGER PRIMARY KEY, person INTEGER, class INTEGER, "
        "annoId INTEGER);"
        "CREATE TABLE Classes (uid INTEGER PRIMARY KEY, name TEXT); CREATE TABLE Persons (uid "
        "INTEGER, name TEXT);"
        "CREATE TABLE Log (uid INTEGER PRIMARY KEY, dateTime FLOAT, labelId INTEGER);"
    )
    db.executemany("INSERT INTO Classes VALUES (?, ?)", classes)
    slides = slides or sorted({row[0] for row in rows})
    number = {name: i + 1 for i, name in enumerate(slides)}
    db.executemany(
        "INSERT INTO Slides VALUES (?, ?, NULL, NULL, '')",
        [(i, name) for name, i in number.items()],
    )
    db.executemany(
        "INSERT INTO Annotations (uid, slide, type, agreedClass) VALUES (?, ?, 1, ?)",
        [(i + 1, number[name], kind) for i, (name, _, _, kind) in enumerate(rows)],
    )
    db.executemany(
        "INSERT INTO Annotations_coordinates VALUES (?, ?, ?, ?, ?, 1)",
        [(i + 1, x, y, number[name], i + 1) for i, (name, x, y, _) in enumerate(rows)],
    )
    db.commit()
    return db


def places(a):
    """The table as a comparable list: file stem, x, y, label."""
    return sorted(
        zip([Path(i).stem for i in a.image], a.x.tolist(), a.y.tolist(), a.label.tolist())
    )


def counts(a):
    return int((a.label == 1).sum()), int((a.label == 0).sum())


# ---------------------------------------------------------------- the real files


@real
def test_real_ccmct():
    a = data.load_dataset(REAL / "ccmct/MITOS_WSI_CCMCT_ODAEL_binary_labels.csv")
    assert counts(a) == (44880, 27965) and len(set(a.image)) == len(set(a.case)) == 32
    assert a.known == "ccmct" and data.opposite_pairs(a) == 1160
    biggest = max(np.unique(a.case, return_counts=True)[1]) / len(a)
    assert 0.205 < biggest < 0.215
    test = np.isin(a.case, data.KNOWN["ccmct"].official_test)
    assert counts(a.take(test)) == (22476, 13625) and counts(a.take(~test)) == (22404, 14340)


@real
@pytest.mark.parametrize("schema", ["old", pytest.param("new", marks=pytest.mark.slow)])
def test_a_database_like_ccmcts_gives_the_same_table_as_the_csv(tmp_path, schema):
    a = data.load_dataset(REAL / "ccmct/MITOS_WSI_CCMCT_ODAEL_binary_labels.csv")
    rng = np.random.default_rng(0)
    rows = [
        (str(image), int(x), int(y), 2 if label else 7)
        for image, x, y, label in zip(a.image, a.x, a.y, a.label)
    ]
    extra = [
        (str(a.image[i]), int(a.x[i]) + 3, int(a.y[i]), int(rng.choice([1, 3])))
        for i in range(0, len(a), 7)
    ]
    path = tmp_path / "MITOS_WSI_CCMCT_ODAEL.sqlite"
    sliderunner(path, rows + extra, [(1, "a"), (2, "b"), (3, "c"), (7, "d")], schema).close()
    b = data.load_dataset(path)
    assert places(a) == places(b) and set(a.case) == set(b.case) and b.name == "ccmct"
    assert np.array_equal(a.image, b.image) and len(set(b.id)) == len(b)
    assert any("other classes" in note for note in b.notes)
    other = path.rename(tmp_path / "mine.sqlite")
    for options in ({"profile": "ccmct"}, {"classes": {"mitotic": ["b"], "other": ["7"]}}):
        assert places(data.load_dataset(other, **options)) == places(a)
    with pytest.raises(UserError, match="do not say which"):
        data.load_dataset(other)


@real
@pytest.mark.parametrize("suffix", ["tiff", "png"])
def test_real_midog2022(suffix):
    a = data.load_dataset(REAL / f"midog2022/MIDOG2022_training_{suffix}.csv")
    assert counts(a) == (9501, 11051) and len(set(a.image)) == 354 and a.known == "midog2022"
    per_domain = {d: counts(a.take(a.domain == d)) for d in "ABCDE"}
    assert per_domain == {
        "A": (2327, 1366),
        "B": (3959, 4257),
        "C": (1721, 2714),
        "D": (639, 1762),
        "E": (855, 952),
    }
    assert sum(a.label[a.image == image].sum() == 0 for image in set(a.image)) == 22
    assert data.opposite_pairs(a) == 501 and (a.x % 1 == 0.5).any()
    beyond = images.outside(a, {})
    assert sorted(a.image[beyond]) == [f"255.{suffix}", f"259.{suffix}"]


@real
def test_real_midogpp():
    a = data.load_dataset(REAL / "midogpp/MIDOG++.json")
    assert counts(a) == (11937, 14349) and len(set(a.image)) == 503 and len(a.all_images) == 553
    assert len(set(a.domain)) == 7 and set(a.image) < set(a.all_images)
    b = data.load_dataset(REAL / "midogpp/MultiDomainMitoticFigureDataset.json.gz")
    assert counts(b) == (11937, 14349) and any(
        note.startswith("2 annotations without a class") for note in b.notes
    )
    assert places(a) == places(b) and sorted(zip(a.id, a.domain)) == sorted(zip(b.id, b.domain))
    c = data.load_dataset(REAL / "midogpp/MIDOGpp.csv")  # labels 1 and 2; its centres are rounded
    assert counts(c) == (11937, 14349)
    assert sorted(zip(a.image, a.domain, a.label)) == sorted(zip(c.image, c.domain, c.label))


@real
def test_real_midog2021_json_and_database_agree_on_every_centre():
    a, b = (data.load_dataset(REAL / f"midog2021/MIDOG.{kind}") for kind in ("json", "sqlite"))
    assert counts(a) == (1721, 2714) and len(a) == 4435 and len(a.all_images) == 200
    assert places(a) == places(b) and sorted(zip(a.id, a.case)) == sorted(zip(b.id, b.case))
    assert set(a.domain) == {"Hamamatsu XR", "Hamamatsu S360", "Aperio CS2"}
    c = data.load_dataset(
        REAL / "midog2021/MIDOG_AperioCS2.json"
    )  # other class names, hashes as file names
    assert counts(c) == (688, 924) and c.known is None


@real
def test_real_slidedb():
    a = data.load_dataset(REAL / "slidedb/MITOS2014.sqlite")
    assert counts(a) == (749, 2884) and len(set(a.case)) == 11  # A03_00Aa is a piece of slide A03
    assert counts(data.load_dataset(REAL / "slidedb/TUPAC_alternativeLabels_training.sqlite")) == (
        1898,
        5340,
    )


@real
@pytest.mark.parametrize(
    "name",
    [
        "slidedb/TUPAC_Mitosis_ROI",
        "slidedb/demo",
        "ccmct/HighMCAreas",
        "ccmct/MITOS_WSI_CCMCT_Tumorzone",
    ],
)
@pytest.mark.parametrize("profile", [None, "ccmct", "cmc", "midog"])
def test_real_databases_without_cells_are_refused_in_one_line(name, profile):
    if name == "slidedb/demo" and profile in ("cmc", "midog"):
        # it has spots of classes 1 and 2 without a meaning: with a profile the user's word counts
        return
    with pytest.raises(UserError) as error:
        data.load_dataset(REAL / f"{name}.sqlite", profile=profile)
    assert "\n" not in str(error.value) and name in str(error.value)


@real
def test_real_ami_br_patches():
    options = {
        "columns": formats.parse_columns("path=dataset_uid,case=slide,label=final_label"),
        "classes": {"mitotic": ["Atypical"], "other": None},
    }
    table = REAL / "ami_br/amibr_train_split.csv"
    a = data.load_dataset(table, REAL.parent / "patches/ami_br", **options)
    assert len(a) == 685 and a.kind == "patches" and all(a.path(i).is_file() for i in range(len(a)))
    assert all(
        (image.split("/")[0] == "Atypical") == label for image, label in zip(a.image, a.label)
    )
    assert any("2,209 of 2,894 patches dropped" in note for note in a.notes)
    assert any("685 of the 900 image files" in note for note in a.notes)
    assert (
        len(data.load_dataset(table, **options)) == 2894
    )  # no image at all there: the table alone


@real
@pytest.mark.parametrize(
    "arguments, says",
    [
        (
            ["ccmct/MITOS_WSI_CCMCT_ODAEL_binary_labels.csv"],
            ["44,880", "1,160 pairs", "the same", "32 images are missing"],
        ),
        (
            ["midog2022/MIDOG2022_training_tiff.csv", "--domain", "C", "--fold", "0"],
            [
                "501 pairs",
                "255.tiff (-2, 2416)",
                "train on C, test on it and on A, B, D, E",
                "B canine lymphoma: 3,959 / 4,257: the same",
            ],
        ),
        (
            ["midogpp/MIDOGpp.csv", "--split", "annotation", "--fold", "0"],
            ["human melanoma", "LEAKS: 100.0%", "the same"],
        ),
    ],
)
def test_real_reports(arguments, says):
    run = subprocess.run(
        [sys.executable, "data.py", str(REAL / arguments[0]), *arguments[1:]],
        capture_output=True,
        text=True,
        cwd=HERE,
    )
    assert run.returncode == 0, run.stderr
    assert not [text for text in says if text not in run.stdout] and "DIFFERS" not in run.stdout


# ---------------------------------------------------------------- MIDOG JSON


def test_midog_json(tmp_path):
    a = data.load_dataset(write(tmp_path / "a.json", midog()))
    assert (
        counts(a) == (12, 12)
        and a.name == "a"
        and a.id[1] == "101"
        and a.sizes["001.tiff"] == (2000, 1000)
    )
    assert (
        (a.x[1], a.y[1]) == (65, 55)
        and a.label[0] == 1
        and a.licence == "CC0"
        and set(a.domain) == {"all"}
    )
    b = data.load_dataset(write(tmp_path / "b.json.gz", midog()))
    assert places(a) == places(b) and a.fingerprint() == b.fingerprint()
    boxes = midog()
    boxes["annotations"][0]["bbox"] = [0, 0.5, 51, 50]
    c = data.load_dataset(write(tmp_path / "c.json", boxes))
    assert (c.x[0], c.y[0]) == (25.5, 25.25) and c.fingerprint() != a.fingerprint()


def test_labels_follow_the_names_not_the_numbers(tmp_path):
    swapped = write(tmp_path / "a.json", midog(names=("Hard negative", "Mitotic_Figure")))
    assert data.load_dataset(swapped).label[0] == 0
    with pytest.raises(UserError, match="the opposite"):
        data.load_dataset(swapped, profile="midog")
    with pytest.raises(UserError, match="the opposite"):
        data.load_dataset(swapped, classes={"mitotic": ["1"], "other": ["2"]})
    with pytest.raises(UserError, match="do not say which"):
        data.load_dataset(write(tmp_path / "b.json", midog(names=("a", "b"))))
    assert (
        data.load_dataset(tmp_path / "b.json", classes={"mitotic": ["2"], "other": ["1"]}).label[0]
        == 0
    )


def change(key, index, **values):
    def edit(content):
        content[key][index] |= values

    return edit


@pytest.mark.parametrize(
    "edit, says",
    [
        (change("annotations", 0, bbox=[300, 300, 50, 50]), "x, y, width, height"),
        (change("annotations", 0, bbox=[0, 0, float("nan"), 9]), "no position"),
        (change("annotations", 0, bbox=[0, 0, 10**400, 9]), "a number is needed"),
        (change("annotations", 0, bbox=[0, 0, 1e300, 9]), "no position"),
        (change("annotations", 0, bbox=["0", None, 5, 9]), "a number is needed"),
        (change("annotations", 0, bbox=[1, 2]), "x1, y1, x2, y2"),
        (change("annotations", 0, category_id=9), "not among the categories"),
        (change("annotations", 0, category_id=True), "not among the categories"),
        (change("annotations", 0, image_id=99), "not among the images"),
        (change("images", 0, file_name="../secret.tiff"), "leads out"),
        (change("images", 0, file_name="/etc/passwd"), "leads out"),
        (change("images", 0, file_name="a/../../x.tiff"), "leads out"),
        (change("images", 0, file_name="a\0.tiff"), "control characters"),
        (change("images", 0, file_name="x" * 400), "too long"),
        (change("images", 0, file_name=["001.tiff"]), "a text is needed"),
        (change("images", 1, id=1), "occurs twice"),
        (change("images", 1, file_name="001.tiff"), "occurs twice"),
        (change("categories", 1, id=1), "occurs twice"),
        (lambda content: content.pop("categories"), "categories"),
        (lambda content: content.update(annotations={}), "annotations"),
        (lambda content: content.update(annotations=[]), "no annotation"),
    ],
)
def test_broken_json_ends_in_one_line(tmp_path, edit, says):
    content = midog()
    edit(content)
    with pytest.raises(UserError, match=says) as error:
        data.load_dataset(write(tmp_path / "a.json", content))
    assert "\n" not in str(error.value) and "a.json" in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 100_000,
        "null",
        "3",
        "[1]",
        '{"images": 1}',
        "\x00",
        "9" * 5000,
        '{"images": [], "images": [], "categories": [], "annotations": []}',
    ],
)
def test_no_midog_file(tmp_path, text):
    with pytest.raises(UserError):
        data.load_dataset(write(tmp_path / "a.json", text))


def test_a_cut_off_or_endless_gzip_file(tmp_path, monkeypatch):
    path = write(tmp_path / "a.json.gz", midog())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="gzip"):
        data.load_dataset(path)
    monkeypatch.setattr(files, "MAX_BYTES", 1 << 16)
    write(path, " " * (1 << 17))
    with pytest.raises(UserError, match="larger than"):
        data.load_dataset(path)


def test_ids_that_are_not_unique_are_replaced(tmp_path):
    content = midog()
    content["annotations"][5]["id"] = content["annotations"][0]["id"]
    a = data.load_dataset(write(tmp_path / "a.json", content))
    assert (
        len(set(a.id)) == len(a)
        and a.id[0] == "a.json#1"
        and any("more than once" in note for note in a.notes)
    )


# ---------------------------------------------------------------- SlideRunner SQLite

SPOTS = [("a.svs", 10, 20, 1), ("a.svs", 500, 20, 2), ("b.svs", 11, 21, 1), ("b.svs", 700, 21, 2)]
NAMES = [(1, "Mitose"), (2, "Hard negative"), (3, "Granulocyte")]


@pytest.mark.parametrize("schema", ["old", "new"])
def test_sliderunner(tmp_path, schema):
    path = tmp_path / "a b%20#?.sqlite"  # a name that an address would need quoted
    db = sliderunner(path, SPOTS + [("b.svs", 1, 1, 3), ("b.svs", 2, 2, 0)], NAMES, schema)
    db.execute(
        "INSERT INTO Annotations (uid, slide, type, agreedClass) VALUES (90, 1, 3, 1)"
    )  # a polygon
    db.executemany(
        "INSERT INTO Annotations_coordinates VALUES (?, 5, 5, 1, 90, ?)",
        [(90, 1), (91, 2), (92, 3)],
    )
    if schema == "new":
        db.execute(
            "INSERT INTO Annotations (uid, slide, type, agreedClass, deleted) VALUES (91, 1, 1, "
            "1, 1)"
        )
        db.execute("INSERT INTO Annotations_coordinates VALUES (99, 8, 8, 1, 91, 1)")
    db.commit()
    db.close()
    before = path.read_bytes()
    path.chmod(0o444)
    a = data.load_dataset(path)
    assert places(a) == sorted((name[0], x, y, int(kind == 1)) for name, x, y, kind in SPOTS)
    assert set(a.id) == {"1", "2", "3", "4"} and set(a.case) == {"a", "b"}
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "profile, mitotic, other",
    [("ccmct", 2, 7), ("cmc", 2, 1), ("midog", 1, 2), ("mitos2014", 1, 2), ("tupac", 1, 2)],
)
def test_profiles_say_which_ids_count(tmp_path, profile, mitotic, other):
    rows = [("a.svs", 10 * number, 5, number) for number in (1, 2, 3, 7)]
    classes = [(number, f"class {number}") for number in (1, 2, 3, 7)]
    sliderunner(tmp_path / "a.sqlite", rows, classes).close()
    a = data.load_dataset(tmp_path / "a.sqlite", profile=profile)
    assert sorted(zip(a.x.tolist(), a.label.tolist())) == sorted(
        [(10 * mitotic, 1), (10 * other, 0)]
    )


def test_a_database_that_somebody_has_open_is_read_with_its_journal(tmp_path):
    path = tmp_path / "a.sqlite"
    sliderunner(path, SPOTS, NAMES).close()
    db = sqlite3.connect(path)
    db.execute("PRAGMA journal_mode = wal")
    db.execute("UPDATE Annotations SET agreedClass = 1")
    db.execute("UPDATE Annotations SET agreedClass = 2 WHERE uid = 1")
    db.commit()
    assert Path(f"{path}-wal").exists()
    assert counts(data.load_dataset(path)) == (3, 1)
    db.close()


@pytest.mark.parametrize(
    "change, says",
    [
        ("DROP TABLE Annotations_coordinates", "lacks the table"),
        ("ALTER TABLE Annotations DROP COLUMN agreedClass", "lacks agreedclass"),
        ("UPDATE Annotations SET slide = 77 WHERE uid = 1", "slide 77"),
        ("UPDATE Slides SET filename = '../../x.svs' WHERE uid = 1", "leads out"),
        ("UPDATE Slides SET filename = NULL WHERE uid = 1", "a text is needed"),
        ("UPDATE Slides SET filename = 'a.svs'", "twice"),
        ("UPDATE Annotations_coordinates SET coordinateX = 'here'", "a number is needed"),
        ("UPDATE Annotations_coordinates SET coordinateX = 9e99", "no position"),
        ("UPDATE Annotations_coordinates SET coordinateX = zeroblob(5)", "a number is needed"),
        ("UPDATE Annotations_coordinates SET annoId = 1", "has more|a number"),
        ("UPDATE Annotations SET type = 2", "no cell labels"),
        ("UPDATE Annotations SET agreedClass = 0", "no cell labels"),
        ("UPDATE Classes SET name = 'x'", "do not say which"),
        ("DELETE FROM Annotations", "no cell labels"),
        (
            "DROP TABLE Slides; CREATE VIEW Slides AS WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL "
            "SELECT n FROM r) "
            "SELECT n AS uid, 'x' AS filename FROM r",
            "lacks the table",
        ),
    ],
)
def test_broken_databases_end_in_one_line(tmp_path, change, says):
    db = sliderunner(tmp_path / "a.sqlite", SPOTS, NAMES)
    db.executescript(change)
    db.commit()
    db.close()
    with pytest.raises(UserError, match=says) as error:
        data.load_dataset(tmp_path / "a.sqlite")
    assert "\n" not in str(error.value)


def test_no_database(tmp_path):
    (tmp_path / "a.sqlite").write_bytes(b"hello")
    with pytest.raises(UserError, match="not an SQLite"):
        data.load_dataset(tmp_path / "a.sqlite")
    (tmp_path / "a.sqlite").write_bytes(b"SQLite format 3\0" + b"\xff" * 4096)
    with pytest.raises(UserError, match="not a readable"):
        data.load_dataset(tmp_path / "a.sqlite")


# ---------------------------------------------------------------- CSV


def rows_csv(path, header, rows, delimiter=","):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(header)
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_of_points(tmp_path, delimiter):
    path = rows_csv(
        tmp_path / "a.csv",
        ["Filename", "X", "Y", "label", "patient", "tumor_type"],
        [["a.png", "3.5", "4", "1", "P1", "t"], ["b.png", "5", "6", "0.0", "P1", "u"]],
        delimiter,
    )
    a = data.load_dataset(path)
    assert places(a) == [("a", 3.5, 4, 1), ("b", 5, 6, 0)] and a.case.tolist() == ["P1", "P1"]
    assert a.domain.tolist() == ["t", "u"] and a.id.tolist() == ["a.csv#1", "a.csv#2"]


def test_a_column_that_only_numbers_the_files_is_not_the_case(tmp_path):
    header = ["filename", "x", "y", "label", "slide"]
    a = data.load_dataset(
        rows_csv(tmp_path / "a.csv", header, [["a.png", 1, 2, 1, 7], ["b.png", 1, 2, 0, 8]])
    )
    assert a.case.tolist() == ["a", "b"]
    a = data.load_dataset(
        rows_csv(tmp_path / "a.csv", header, [["a.png", 1, 2, 1, 7], ["b.png", 1, 2, 0, 7]])
    )
    assert a.case.tolist() == ["7", "7"]


@pytest.mark.parametrize(
    "labels, expected",
    [
        ("01", [0, 1]),
        ("10", [1, 0]),
        (["True", "false"], [1, 0]),
        (["Mitosis", "non-mitotic"], [1, 0]),
        ("12", None),
        ("012", None),
        ("02", None),
        ("2", None),
        (["Mitosis", "7"], None),
        ("ab", None),
        ([""], None),
        (["-1", "1"], None),
    ],
)
def test_labels_of_a_csv_are_told_apart_or_refused(tmp_path, labels, expected):
    path = rows_csv(
        tmp_path / "a.csv",
        ["filename", "x", "y", "label"],
        [["a.png", 300 * i, 1, label] for i, label in enumerate(labels)],
    )
    if expected is None:
        with pytest.raises(UserError, match="label"):
            data.load_dataset(path)
    else:
        assert data.load_dataset(path).label.tolist() == expected


def test_labels_1_and_2_are_the_benchmarks_in_its_files_only(tmp_path):
    header = ["x", "y", "label", "filename", "slide", "split", "tumortype"]
    rows = [
        [300 * i, 1, 1 + i % 2, f"{i:03d}.tiff", i, "train", "human melanoma"] for i in range(4)
    ]
    assert data.load_dataset(rows_csv(tmp_path / "a.csv", header, rows)).label.tolist() == [
        1,
        0,
        1,
        0,
    ]
    other = rows_csv(tmp_path / "b.csv", header[:4], [row[:4] for row in rows])
    with pytest.raises(UserError, match="--positive"):
        data.load_dataset(other)
    a = data.load_dataset(
        other, classes={"mitotic": ["2"], "other": ["1"]}
    )  # as in the CMC data set
    assert a.label.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "empty"),
        ("filename,x,y\na.png,1,2\n", "label"),
        ("filename,x,y,label\n", "no annotation"),
        ("filename,x,y,label\na.png,1,nan,1\n", "line 2.*no position"),
        ("filename,x,y,label\na.png,,2,1\n", "line 2.*number"),
        ("filename,x,y,label\na.png,1,2\n", "line 2.*3 fields"),
        ("filename,x,y,label\na.png,1,2,1,5\n", "line 2.*5 fields"),
        ("filename,x,y,label\n../a.png,1,2,1\n", "leads out"),
        ("filename,x,y,label,label\na.png,1,2,1,0\n", "twice"),
        ('filename,x,y,label\n"a.png,1,2,1\n', "CSV"),
        ("path,x,y,label\na.png,1,2,1\n", "say --columns filename"),
        ("path,label\na.png,1\na.png,0\n", "twice"),
        ("filename,x,y,label\na.png,1_0,2,1\n", "number"),
        ("filename,x,y,label,case\na.png,1,2,1,\n", "the case is empty"),
    ],
)
def test_broken_csv_ends_in_one_line(tmp_path, text, says):
    with pytest.raises(UserError, match=says) as error:
        data.load_dataset(write(tmp_path / "a.csv", text))
    assert "\n" not in str(error.value)


def test_csv_that_is_no_text(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\x81\x00\xff" * 9)  # 0x81 is no character of cp1252
    with pytest.raises(UserError, match="UTF-8"):
        data.load_dataset(tmp_path / "a.csv")


def patch_files(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)


def test_patches_in_subfolders_and_files_that_are_not_there(tmp_path):
    patch_files(tmp_path / "images", ["x/1.png", "y/2.png", "y/3.png", "extra.png"])
    path = rows_csv(
        tmp_path / "t.csv",
        ["uid", "file_id", "who", "what"],
        [[1, "1.png", "P1", "Odd"], [1, "2.png", "P2", "Even"], [1, "9.png", "P2", "Even"]],
    )
    columns = formats.parse_columns("path=file_id,case=who,label=what")
    a = data.load_dataset(
        path, tmp_path / "images", {"mitotic": ["Odd"], "other": None}, columns=columns
    )
    assert (
        a.image.tolist() == ["x/1.png", "y/2.png"]
        and a.label.tolist() == [1, 0]
        and a.case.tolist() == ["P1", "P2"]
    )
    assert any("1 of 3 patches dropped" in note for note in a.notes)
    assert any("2 of the 4 image files" in note for note in a.notes)
    assert a.id.tolist() == ["t.csv#1", "t.csv#2"] and a.missing == ["9.png"]
    patch_files(tmp_path / "images", ["z/1.png"])
    with pytest.raises(UserError, match="several"):
        data.load_dataset(
            path, tmp_path / "images", {"mitotic": ["Odd"], "other": None}, columns=columns
        )


def test_positive_alone_needs_one_other_class(tmp_path):
    path = rows_csv(
        tmp_path / "t.csv", ["path", "label"], [["1.png", "a"], ["2.png", "b"], ["3.png", "c"]]
    )
    with pytest.raises(UserError, match="2 other classes"):
        data.load_dataset(path, classes={"mitotic": ["a"], "other": None})
    with pytest.raises(UserError, match="no class 'd'"):
        data.load_dataset(path, classes={"mitotic": ["d"], "other": ["a"]})
    assert data.load_dataset(path, classes={"mitotic": ["a"], "other": ["c"]}).label.tolist() == [
        1,
        0,
    ]


def test_images_under_another_suffix_and_missing_ones(tmp_path):
    patch_files(tmp_path / "deep", ["er/001.png", "er/002.png"])
    a = data.load_dataset(write(tmp_path / "a.json", midog()), tmp_path / "deep")
    assert sorted(set(a.image)) == ["er/001.png", "er/002.png"] and a.sizes["er/001.png"] == (
        2000,
        1000,
    )
    assert any("another suffix" in note for note in a.notes) and a.missing == ["003.tiff"]
    assert any("8 of 24 annotations dropped on 1 images" in note for note in a.notes)
    # Where the files lie does not change what the dataset is.
    patch_files(tmp_path / "flat", ["001.tiff", "002.tiff"])
    assert (
        data.load_dataset(tmp_path / "a.json", tmp_path / "flat").fingerprint() == a.fingerprint()
    )


# ---------------------------------------------------------------- GeoJSON


def feature(geometry, name, **more):
    return {
        "type": "Feature",
        "id": more.pop("id", None),
        "geometry": geometry,
        "properties": {"objectType": "annotation", "classification": name} | more,
    }


def test_geojson(tmp_path):
    point = {"type": "Point", "coordinates": [3.5, 4]}
    box = {"type": "Polygon", "coordinates": [[[0, 0], [50, 0], [50, 40], [0, 40], [0, 0]]]}
    several = {"type": "MultiPoint", "coordinates": [[300, 1], [600, 2]]}
    (tmp_path / "q").mkdir()
    write(
        tmp_path / "q" / "001.geojson",
        {
            "type": "FeatureCollection",
            "features": [
                feature(point, {"name": "Mitosis", "color": [1, 2, 3]}, id="u1"),
                feature(box, {"names": ["Non-mitotic"]}, id="u2"),
                feature(point, None),
                feature(point, {"name": "Tumor"}),
            ],
        },
    )
    write(tmp_path / "q" / "002.geojson", [feature(several, "Mitosis", id="u3")])
    a = data.load_dataset(tmp_path / "q")
    assert places(a) == [
        ("001", 3.5, 4, 1),
        ("001", 25, 20, 0),
        ("002", 300, 1, 1),
        ("002", 600, 2, 1),
    ]
    assert a.id.tolist() == ["u1", "u2", "u3", "u3.2"] and set(a.case) == {"001", "002"}
    assert (
        data.load_dataset(
            tmp_path / "q", classes={"mitotic": ["tumor"], "other": ["mitosis"]}
        ).label.sum()
        == 1
    )


LOOK_ALIKE = feature({"type": "Point", "coordinates": [1, 2]}, "Non-mitotic")


@pytest.mark.parametrize(
    "content, says",
    [
        ([LOOK_ALIKE, feature({"type": "Point", "coordinates": [1]}, "Mitosis")], "x, y"),
        ([LOOK_ALIKE, feature({"type": "Point", "coordinates": ["a", 1]}, "Mitosis")], "number"),
        ([LOOK_ALIKE, feature(None, "Mitosis")], "no geometry"),
        ([LOOK_ALIKE, feature({"type": "Circle", "coordinates": [1]}, "Mitosis")], "no geometry"),
        ([feature({"type": "Point", "coordinates": [1, 2]}, None)], "class"),
        ([feature({"type": "Point", "coordinates": [1, 2]}, "Mitosis")], "do not say"),
        ([], "class"),
        ([3], "features"),
        ({"type": "FeatureCollection"}, "features"),
        ({"type": "FeatureCollection", "features": 3}, "features"),
    ],
)
def test_broken_geojson_ends_in_one_line(tmp_path, content, says):
    with pytest.raises(UserError, match=says):
        data.load_dataset(write(tmp_path / "001.geojson", content))


# ---------------------------------------------------------------- finding datasets, the command


def test_a_dataset_is_found_by_name_folder_and_file(tmp_path, monkeypatch):
    monkeypatch.setenv("MITOSIS_ROOT", str(tmp_path))
    folder = tmp_path / "midog2022"
    folder.mkdir()
    content = midog()
    for image, number in zip(content["images"], (10, 200, 355)):
        image["file_name"] = f"{number:03d}.png"
    write(folder / "MIDOG2022_training_png.json", content)
    write(folder / "other.json", midog())
    for where in ("midog2022", folder, folder / "MIDOG2022_training_png.json"):
        a = data.load_dataset(where)
        assert a.name == a.known == "midog2022" and sorted(set(a.domain)) == [
            "B",
            "C",
            "unlabelled",
        ]
    with pytest.raises(UserError, match="--download ccmct"):
        data.load_dataset("ccmct")
    with pytest.raises(UserError, match="neither a known dataset"):
        data.load_dataset("nothing")
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="no annotation file"):
        data.load_dataset(tmp_path / "mine")
    write(tmp_path / "mine" / "a.json", midog())
    assert data.load_dataset("mine").name == "mine"
    write(tmp_path / "mine" / "b.json", midog())
    with pytest.raises(UserError, match="2 annotation files"):
        data.load_dataset("mine")


def test_shared_cases_across_numberings(tmp_path):
    def named(folder, numbers, name):
        content = midog(len(numbers))
        for image, number in zip(content["images"], numbers):
            image["file_name"] = f"{number:03d}.tiff"
        (tmp_path / folder).mkdir()
        return data.load_dataset(write(tmp_path / folder / name, content))

    a = named("a", [5, 151, 347, 354, 300], "MIDOG2022_training.json")
    b = named("b", [5, 201, 398, 397, 300, 151], "MIDOG++.json")
    assert data.shared_cases(a, b) == ["005", "201", "397", "398"]
    assert data.shared_cases(b, a) == ["005", "151", "347", "354"]


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, str(HERE / "data.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


def test_the_report_of_images_that_are_there(tmp_path):
    for name in ("001.tiff", "002.tiff"):
        Image.new("RGB", (300, 200)).save(tmp_path / name)
    content = midog(2, 6)
    for image in content["images"]:
        image |= {"width": 300, "height": 200}
    content["annotations"][3]["bbox"] = [280, 0, 330, 50]  # centre 305, 25
    content["annotations"].append(content["annotations"][0] | {"id": 999})
    write(tmp_path / "a.json", content)
    run = command(tmp_path / "a.json")
    assert run.returncode == 0, run.stderr
    for text in (
        "centres lie outside their image: 001.tiff (305, 25)",
        "1 annotations repeat",
        "pairs of opposite class",
        "unknown (2 images)",
        "2 of 2 exist",
        "needs at least 3 cases",
    ):
        assert text in run.stdout, text


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["a.json", "--classes", "2,7"],
        ["a.json", "--classes", "mitotic=1"],
        ["a.json", "--frac", "2"],
        ["a.json", "--positive", "1", "--classes", "mitotic=1,other=2"],
        ["a.json", "--mpp", "nan"],
        ["a.json", "--columns", "path"],
        ["a.json", "--images", "nothing"],
        ["a.json", "--cache"],
        ["a.json", "--check-split", "nothing"],
        ["a.json", "--save-split", "x", "--fold", "0", "1"],
        ["a.json", "--save-split", "x", "--split", "official"],
        ["a.json", "--negative", "3"],
        ["a.json", "--fold", "-1"],
        ["a.json", "--domain", "nothing"],
        ["a.json", "--val-frac", "0"],
    ],
)
def test_mistakes_end_with_one_line_and_status_2(tmp_path, arguments):
    write(tmp_path / "a.json", midog(12))
    run = subprocess.run(
        [sys.executable, str(HERE / "data.py"), *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    errors = run.stderr.strip().splitlines()
    assert (
        run.returncode == 2
        and len(errors) == 1
        and errors[0].startswith("error: ")
        and not run.stdout
    ), run
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json"]


def test_import_without_torch():
    code = (
        "import data, sys; from dataset import download, formats; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE).returncode == 0


def test_fingerprint_notices_a_changed_label(tmp_path):
    a = data.load_dataset(write(tmp_path / "a.json", midog()))
    for column in ("label", "x", "case", "domain", "id"):
        b = data.load_dataset(tmp_path / "a.json")
        getattr(b, column)[3] = 0 if column in ("label", "x") and getattr(b, column)[3] else 1
        assert b.fingerprint() != a.fingerprint(), column


def test_path_stays_below_the_root(tmp_path):
    a = data.load_dataset(write(tmp_path / "a.json", midog()))
    assert a.path(0) == tmp_path / "001.tiff"
    a.image[0] = "../x"
    with pytest.raises(UserError, match="leads out"):
        a.path(0)


def test_neighbours_equal_the_plain_way():
    rng = np.random.default_rng(1)
    xa, ya, xb, yb = rng.integers(0, 900, (4, 150)) / 2
    for chebyshev in (False, True):
        dx, dy = np.abs(xa[:, None] - xb), np.abs(ya[:, None] - yb)
        near = (np.maximum(dx, dy) if chebyshev else np.hypot(dx, dy)) <= 40
        found = annotations.near_any(xa, ya, xb, yb, 40, chebyshev)
        assert 0 < found.sum() < 150 and np.array_equal(found, near.any(axis=1))
        assert annotations.count_near_pairs(xa, ya, xb, yb, 40, chebyshev) == near.sum()
    assert not annotations.near_any(xa, ya, xb[:0], yb[:0], 40).any()
    assert annotations.count_near_pairs(xa[:0], ya[:0], xb, yb, 40) == 0


def test_coincident_points_need_memory_for_the_points_alone():
    n = 200_000
    same = np.full(n, 5.0)
    tracemalloc.start()
    assert annotations.count_near_pairs(same, same, same, same, 10) == n * n
    assert annotations.near_any(same, same, same, same, 10).all()
    # Points that nearly coincide are no different.
    x = np.linspace(0, 1, 4000)
    assert annotations.count_near_pairs(x, x, x, x, 10) == 4000**2
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150 * 2**20  # the pairs alone would be 600 GB


def test_a_file_with_a_known_name_is_not_that_dataset_for_its_name_alone(tmp_path):
    annotations = [
        {"id": i, "image_id": i % 9, "category_id": 1 + i % 2, "bbox": [10, 10, 60, 60]}
        for i in range(30)
    ]
    (tmp_path / "MIDOG.json").write_text(
        json.dumps(
            {
                "images": [
                    {"id": i, "file_name": f"{i + 1:03d}.tiff", "width": 500, "height": 500}
                    for i in range(9)
                ],
                "categories": [
                    {"id": 1, "name": "mitotic figure"},
                    {"id": 2, "name": "hard negative"},
                ],
                "annotations": annotations,
            }
        )
    )
    a = data.load_dataset(tmp_path / "MIDOG.json")
    assert (a.known, a.name, a.licence, set(a.domain.tolist())) == (None, "MIDOG", None, {"all"})


def test_the_names_of_datasets_win_over_folders_of_the_same_name(tmp_path, monkeypatch):
    """The repository has a folder demo/, and the commands run from there."""
    for name in ("demo", "midog2022"):
        folder = tmp_path / "root" / name
        folder.mkdir(parents=True)
        write(
            folder / {"demo": "MIDOG.json", "midog2022": "MIDOG2022_training.json"}[name], midog()
        )
        for i in range(1, 4):
            Image.new("RGB", (8, 8)).save(folder / f"{i:03d}.tiff")
        (tmp_path / "here" / name).mkdir(parents=True)
    monkeypatch.setenv("MITOSIS_ROOT", str(tmp_path / "root"))
    monkeypatch.chdir(tmp_path / "here")
    args = argparse.Namespace(**dict.fromkeys(flags.SOURCE))
    for name in ("demo", "midog2022"):
        assert len(flags.load_dataset(name)) == 24
        args.data = name
        assert flags.source(args)["data"] == name
    args.data = "./demo"
    assert flags.source(args)["data"] == str(tmp_path / "here" / "demo")
    with pytest.raises(UserError, match="no annotation file"):
        flags.load_dataset("./demo")
