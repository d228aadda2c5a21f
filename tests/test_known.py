"""The known datasets of atypical mitotic figures: read by name, without a flag for columns or
labels; votes; scanners and species; cases that they share."""

import argparse
import csv
import os
from pathlib import Path

import numpy as np
import pytest
import small
from PIL import Image

import data
import flags
from common import UserError
from dataset.annotations import KNOWN, case_identity, leak

REAL = Path(os.environ.get("MITOSIS_REALDATA") or "/nowhere")
real = pytest.mark.skipif(not REAL.is_dir(), reason="MITOSIS_REALDATA is not set")


def table(path, rows):
    """A CSV of dicts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def images(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / name)


def amibr(root, count=12):
    """AMi-Br as its repositories have it: six cases of two, three of them (060, 120, 28) of the
    published test set."""
    slides = [
        ("MIDOG21", "002.tiff"),
        ("MIDOG21", "060.tiff"),
        ("MIDOG21", "120.tiff"),
        ("TUPAC16", "04_stitched1.tif"),
        ("TUPAC16", "28.tif"),
        ("TUPAC16", "29.tif"),
    ]
    rows = []
    for number in range(count):
        dataset, slide = slides[number // 2]
        votes = [number % 2 == 1, number % 2 == 1, number % 4 == 3]
        row = {"": number, "slide": slide, "dataset": dataset, "uid": number, "x": 1, "y": 2}
        row |= {"expert1_label": "AMF, polar", "expert2_label": "NMF metaphase"}
        row |= {f"expert{k}_atypical": vote for k, vote in enumerate(votes, 1)}
        rows.append(row | {"majority_atypical": sum(votes) > 1})
    for row in rows:
        kind = "Atypical" if row["majority_atypical"] else "Normal"
        images(root / "amibr/AMi-Br" / kind, [f"{row['dataset']}_{row['uid']}.png"])
    return table(root / "amibr/AMI-BR.csv", rows)


def atnorm(root):
    """AtNorM-Br and -MD beside it; both call their files 1.png, 2.png, …"""
    for name in ("AtNorM-Br", "AtNorM-MD"):
        images(root / "amibr" / name / "Atypical", ["1.png"])
        images(root / "amibr" / name / "Normal", ["2.png", "3.png"])
    rows = []
    for number, votes in ((1, "AAANN"), (2, "NNNNN"), (3, "ANNNN")):
        words = [{"A": "Atypical", "N": "Normal"}[vote] for vote in votes]
        row = {"Filename": f"{number}.png"} | {f"Expert_{k}": w for k, w in enumerate(words, 1)}
        rows.append(row | {"Majority": max(set(words), key=words.count)})
    return table(root / "amibr/AtNorM-MD_expert_votes.csv", rows)


def midog25(root, numbers=(2, 3, 201, 300), **more):
    """The table of MIDOG 2025, two patches per case; the third expert is asked if two disagree."""
    rows = []
    for number, case in enumerate(numbers):
        for k, votes in enumerate((("NMF", "NMF", ""), ("AMF", "NMF", "AMF"))):
            row = {"image_id": f"{2 * number + k}.png", "filename": f"{case:03d}.tiff"}
            row |= {"coordinateX": 5, "coordinateY": 6, "Tumor": f"tumour {case // 200}"}
            row |= {"Scanner": "Hamammatsu XR" if case < 3 else "3D Histech", "Origin": "Vienna"}
            row |= {"Species": "Human" if case < 200 else "Canine"}
            row |= dict(zip(("expert1", "expert2", "expert3"), votes))
            rows.append(row | {"majority": votes[-1] or votes[0]} | more)
    images(root / "midog25/patches", [row["image_id"] for row in rows])
    return table(root / "midog25/MIDOG25.csv", rows)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MITOSIS_ROOT", str(tmp_path))
    amibr(tmp_path)
    atnorm(tmp_path)
    midog25(tmp_path)
    return tmp_path


def test_amibr_by_its_name(root):
    a = flags.load_dataset("amibr")
    assert (a.name, a.known, a.kind, len(a)) == ("amibr", "amibr", "patches", 12)
    assert a.root == root / "amibr/AMi-Br" and not a.missing
    assert a.classes == ("normal", "atypical")
    assert sorted(set(a.case)) == [
        "MIDOG21-002.tiff",
        "MIDOG21-060.tiff",
        "MIDOG21-120.tiff",
        "TUPAC16-04_stitched1.tif",
        "TUPAC16-28.tif",
        "TUPAC16-29.tif",
    ]
    for image, label, share in zip(a.image.tolist(), a.label.tolist(), a.share.tolist()):
        number = int(image.rsplit("_", 1)[1].removesuffix(".png"))
        assert label == number % 2 and image.startswith("Atypical" if label else "Normal")
        assert share == pytest.approx({0: 0, 1: 2 / 3, 2: 0, 3: 1}[number % 4])
    assert a.share.dtype == np.float32 and set(a.domain) == {"MIDOG21", "TUPAC16"}
    scanners = dict(zip(a.case.tolist(), a.scanner.tolist()))
    assert scanners["MIDOG21-002.tiff"] == "Hamamatsu XR" and not scanners["TUPAC16-29.tif"]
    assert set(a.species) == {"human"}
    assert flags.load_dataset(root / "amibr/AMI-BR.csv").fingerprint() == a.fingerprint()


def test_a_file_of_a_known_name_with_columns_of_the_users(root):
    """As it was read before the dataset was known: no name, no share of its own."""
    columns = {"path": "{dataset}_{uid}.png", "case": "slide", "label": "majority_atypical"}
    a = flags.load_dataset(root / "amibr/AMI-BR.csv", columns=columns)
    assert (a.name, a.known, a.share) == ("AMI-BR", None, None) and set(a.domain) == {"all"}


def test_atnorm_lies_beside_amibr(root):
    br, md = flags.load_dataset("atnorm-br"), flags.load_dataset("atnorm-md")
    assert (br.name, br.label.tolist(), br.share) == ("atnorm-br", [1, 0, 0], None)
    assert br.classes == md.classes == ("normal", "atypical")
    chosen = {"mitotic": ["Normal"], "other": ["Atypical"]}
    assert flags.load_dataset("atnorm-br", classes=chosen).classes == ("Atypical", "Normal")
    assert md.root == root / "amibr/AtNorM-MD"
    found = {image.split("/")[-1]: share for image, share in zip(md.image, md.share.tolist())}
    assert found == pytest.approx({"1.png": 0.6, "2.png": 0, "3.png": 0.2})
    assert md.take([0]).share.tolist() == md.share[:1].tolist()


def test_midog25(root):
    a = flags.load_dataset("midog25")
    assert set(a.case) == {"002.tiff", "003.tiff", "201.tiff", "300.tiff"}
    assert set(a.scanner) == {"Hamamatsu XR", "3DHistech"} and set(a.species) == {"Human", "Canine"}
    assert a.share[a.label == 1] == pytest.approx(2 / 3) and not a.share[a.label == 0].any()


def test_omg_octo_names_its_cases_in_the_images(tmp_path, monkeypatch):
    monkeypatch.setenv("MITOSIS_ROOT", str(tmp_path))
    files = ["022857018aa597374b6c_x1_y2_3_4_5_6.png", "69a_040622_x1_y2.png", "69a_1_x3_y2.png"]
    images(tmp_path / "omg-octo", files)
    rows = [{"image_file": file, "label": kind} for file, kind in zip(files, ("AMF", "MF", "nMF"))]
    table(tmp_path / "omg-octo/OMG-Octo.csv", [*rows, rows[0]])
    a = flags.load_dataset("omg-octo")
    assert a.case.tolist() == ["022857018aa597374b6c", "69a"] and a.label.tolist() == [1, 0]


def test_votes_of_the_users_own_columns(tmp_path):
    rows = [
        {"path": f"{k}.png", "label": kind, "a": a, "b": b}
        for k, (kind, a, b) in enumerate(
            [("good", "good", "bad"), ("bad", "bad", ""), ("bad", "", ""), ("good", "1", "TRUE")]
        )
    ]
    images(tmp_path, [row["path"] for row in rows])
    path = table(tmp_path / "t.csv", rows)
    choices = {"classes": {"mitotic": ["bad"], "other": None}}
    a = data.load_dataset(path, columns={"votes": "a+b"}, **choices)
    assert a.share.tolist() == [0.5, 1, 1, 1] and data.load_dataset(path, **choices).share is None
    with pytest.raises(UserError, match="no column 'c'"):
        data.load_dataset(path, columns={"votes": "a+c"}, **choices)
    rows[1]["b"] = "maybe"
    table(path, rows)
    with pytest.raises(UserError, match="line 3: the vote 'maybe' is none of the labels"):
        data.load_dataset(path, columns={"votes": "a+b"}, **choices)


def test_columns_that_are_joined(tmp_path):
    rows = [{"set": "a", "n": " 1", "label": 0}, {"set": "b", "n": "1", "label": 1}]
    images(tmp_path, ["a-1.png", "b-1.png"])
    path = table(tmp_path / "t.csv", rows)
    a = data.load_dataset(path, columns={"path": "{set}-{n}.png"})
    assert a.image.tolist() == ["a-1.png", "b-1.png"]
    with pytest.raises(UserError, match="no column 'm'"):
        data.load_dataset(path, columns={"path": "{set}-{m}.png"})


def test_counts_are_compared_with_the_published_ones(root, capsys):
    a = flags.load_dataset("amibr")
    (line,) = data.compare_with_published(a)
    assert line == "all: 832 / 2,888 on 3,720 images: DIFFERS, here 6 / 6 on 12 images"
    assert small.call(data, "amibr", "--split", "given", "--fold", 0) == 0
    out = capsys.readouterr().out
    assert "scanner      unknown (6), Aperio CS2 (2), Hamamatsu S360 (2), Hamamatsu XR (2)" in out
    assert "the experts agree on 75.0% of the annotations" in out
    row = next(line.split() for line in out.splitlines() if line.split()[:2] == ["0", "1"])
    assert " ".join(row) == "0 1 2 + 2 (2) 1 + 1 (1) 3 + 3 (3) 33.3 / 16.7 / 50.0"


@pytest.mark.parametrize("name, cases", [("ccmct", 11), ("midogpp", 111), ("amibr", 56)])
def test_published_test_sets(name, cases):
    official = KNOWN[name].official_test
    assert len(set(official)) == len(official) == cases


# ---------------------------------------------------------------- shared cases


@pytest.mark.parametrize(
    "case, known, same",
    [
        ("MIDOG21-007.tiff", "amibr", "midog7"),
        ("midog2021_7", None, "midog7"),
        ("007", "midog2021", "midog7"),
        ("007.tiff", "midog25", "midog7"),
        ("151", "midog2022", "midog201"),
        ("354", "midog2022", "midog397"),
        ("TUPAC16-03_stitched1.tif", "amibr", "tupac3"),
        ("03_stitched1", None, "tupac3"),
        ("TUPAC16-72.tif", "amibr", "tupac72"),
        ("007", None, "7"),
        ("1", "atnorm-br", "atnorm-br:1"),
    ],
)
def test_one_name_for_a_case(case, known, same):
    assert case_identity(case, known) == same


def test_which_datasets_share_cases(root):
    amibr, br, md, m25 = (
        flags.load_dataset(name) for name in ("amibr", "atnorm-br", "atnorm-md", "midog25")
    )
    assert data.shared_cases(amibr, m25) == ["002.tiff"]
    assert data.shared_cases(m25, amibr) == ["MIDOG21-002.tiff"]
    text, certain = leak(m25, slice(None), amibr)
    assert certain and "amibr shares 1 case with the training on midog25" in text
    # AtNorM-MD is of MIDOG++ cases beyond its breast cancer; which, nobody says.
    text, certain = leak(m25, slice(None), md)
    assert certain and "among 2 cases of midog25" in text
    assert leak(m25, np.flatnonzero(m25.domain == "tumour 0"), md) is None
    assert leak(amibr, slice(None), md) is None and leak(amibr, slice(None), br) is None
    assert leak(br, slice(None), md) is None  # both call their patches 1, 2, 3


def planned(*words):
    """The further test sets and the splits that these flags of train.py and probe.py give."""
    parser = argparse.ArgumentParser()
    flags.add_arguments(parser)
    flags.add_split_arguments(parser)
    flags.add_run_arguments(parser)
    args = parser.parse_args(words)
    annotations = flags.from_arguments(args)
    tests = flags.further(args, annotations)
    return tests, flags.splits(args, annotations, tests)


def test_training_and_testing_on_shared_cases_is_refused(root, capsys):
    both = ("--data", "midog25", "--test", "amibr")
    with pytest.raises(UserError, match="amibr shares 1 case with .* --shared-cases allow"):
        for fold in "01234":  # case 002 is trained on in all but the test set's
            planned(*both, "--folds", "4", "--fold", fold)
    tests, _ = planned(*both, "--leave-out", "tumour 0")  # with its cases 002 and 003
    assert [test.name for test in tests] == ["amibr"]
    assert "note" not in capsys.readouterr().out
    planned(*both, "--leave-out", "tumour 1", "--shared-cases", "allow")
    assert "note: amibr shares 1 case" in capsys.readouterr().out
    # Known test sets are read in their own way, whatever is said of --data.
    own = ("--data", str(root / "amibr/AMI-BR.csv"), "--positive", "True", "--test", "atnorm-br")
    columns = "path={dataset}_{uid}.png,case={dataset}-{slide},label=majority_atypical"
    (test,), _ = planned(*own, "--columns", columns)
    assert test.label.tolist() == [1, 0, 0] and test.classes == ("normal", "atypical")
    assert "note: atnorm-br tells atypical from normal, AMI-BR True from False" in (
        capsys.readouterr().out
    )


def test_numbers_of_strangers_prove_nothing(tmp_path):
    for name in ("a", "b"):
        rows = [{"path": f"{k}.png", "label": k % 2, "case": k, "domain": "x"} for k in range(4)]
        images(tmp_path / name, [row["path"] for row in rows])
        table(tmp_path / name / f"{name}.csv", rows)
    a, b = (data.load_dataset(tmp_path / name) for name in ("a", "b"))
    text, certain = leak(a, slice(None), b)
    assert "4 cases" in text and not certain


@real
def test_the_real_tables():
    """The lists that were made of the repository: every case is found under its name here."""
    folder = REAL / "annotations/ami_br"
    train, test = (
        data.load_dataset(
            folder / f"amibr_{part}.csv",
            REAL / "patches",
            classes={"mitotic": ["Atypical"], "other": ["Normal"]},
        )
        for part in ("train", "test")
    )
    assert not data.shared_cases(train, test) and leak(train, slice(None), test) is None
    assert sorted(set(test.case)) == sorted(KNOWN["amibr"].official_test)
    midog = data.load_dataset(REAL / "annotations/midog2021/MIDOG.json")
    assert len(data.shared_cases(midog, test)) == 36
    assert midog.scanner is not None and set(midog.species) == {"human"}
