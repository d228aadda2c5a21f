"""The images of a table: checked against the annotation file, fingerprinted, and looked at."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageDraw

import data
from common import UserError
from dataset import images, look, slides
from dataset.patches import Patches, build_store

ROOT = Path(__file__).resolve().parent.parent
PATCHES = Path(os.environ.get("MITOSIS_REALDATA") or "/nowhere") / "patches"


@pytest.fixture(autouse=True)
def nothing_open():
    slides.close_all()


def tissue(height=600, width=800, nuclei=(), seed=0):
    """Pink tissue with noise, and dark nuclei of 30 px at (x, y)."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (width, height), (225, 170, 200))
    draw = ImageDraw.Draw(image)
    for x, y in nuclei:
        draw.ellipse((x - 15, y - 15, x + 15, y + 15), fill=(90, 50, 130))
    noise = rng.integers(-20, 20, (height, width, 3))
    return np.clip(np.asarray(image).astype(int) + noise, 0, 255).astype(np.uint8)


def made(folder, mpp=(0.25, 0.25, 0.25), each=10, seed=0):
    """A MIDOG file and its images with a nucleus at each annotation → path of the file."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    records, annotations = [], []
    for number, value in enumerate(mpp):
        name = f"{number:03d}.tif"
        places = rng.uniform(120, 480, (each, 2)).round()
        options = {}
        if value:
            options = {"resolution": (10000 / value,) * 2, "resolutionunit": "CENTIMETER"}
        pixels = tissue(nuclei=places, seed=number)
        tifffile.imwrite(folder / name, pixels, tile=(256, 256), photometric="rgb", **options)
        records.append({"id": number, "file_name": name, "width": 800, "height": 600})
        for x, y in places:
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": number,
                    "category_id": 1 + len(annotations) % 2,
                    "bbox": [x - 25, y - 25, x + 25, y + 25],
                }
            )
    content = {
        "images": records,
        "categories": [{"id": 1, "name": "mitotic figure"}, {"id": 2, "name": "hard negative"}],
        "annotations": annotations,
    }
    (folder / "a.json").write_text(json.dumps(content))
    return folder / "a.json"


def edited(path, edit):
    """The MIDOG file with another content, loaded."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return data.load_dataset(path)


def report(path, *arguments):
    command = [sys.executable, str(ROOT / "data.py"), str(path), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return " ".join(run.stdout.split())


def test_a_sound_dataset_has_no_problems(tmp_path, capsys):
    a = data.load_dataset(made(tmp_path / "d"))
    problems = images.find_problems(a)
    assert problems.lines == [] and problems.scales == {0.25: 3}
    images.check(a)
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------- the annotation file's word


def test_sizes_are_checked_against_the_images(tmp_path, capsys):
    path = made(tmp_path / "d")

    def lie(content):
        for record in content["images"]:
            record |= {"width": 100_000, "height": 100_000}

    a = edited(path, lie)
    images.check(a)
    out = capsys.readouterr().out
    assert "000.tif is 800 x 600 px, the annotation file says 100000 x 100000" in out
    assert "2 more images differ" in out
    # Random patches lie on the images all the same.
    number = data.pool_size(a)
    x, y = data.random_pool(a, "000.tif", number)
    assert x.max() <= 800 - 112 and y.max() <= 600 - 112
    sample = data.Sampler(a, a.id, 64).epoch(0)
    sample = sample[sample["row"] < 0]
    assert (Patches(a).read_sample(sample).min((1, 2, 3)) < 255).all()


def test_centres_outside_are_said_and_many_of_them_refused(tmp_path, capsys):
    path = made(tmp_path / "d", each=20)

    def move(number):
        def edit(content):
            for annotation in content["annotations"][:number]:
                annotation["bbox"] = [900, 900, 950, 950]

        return edit

    images.check(edited(path, move(2)))
    out = capsys.readouterr().out
    assert "2 of 60 centres lie outside their image: 000.tif (925, 925)" in out
    with pytest.raises(UserError, match="30 of 60 centres lie outside .* pixels of level 0"):
        images.check(edited(path, move(30)))


def test_scales_that_differ_are_a_problem_unless_resampled(tmp_path):
    a = data.load_dataset(made(tmp_path / "d", mpp=(0.25, 0.5, 0.5)))
    (line,) = images.find_problems(a).lines
    assert "different µm/px: 0.25 (1), 0.5 (2)" in line and "--mpp 0.5" in line
    assert images.find_problems(a, mpp=0.5).lines == []
    assert "different µm/px" in report(tmp_path / "d/a.json")
    assert "different µm/px" not in report(tmp_path / "d/a.json", "--mpp", "0.5")
    b = data.load_dataset(made(tmp_path / "e", mpp=(0.25, None, 0.25)))
    (line,) = images.find_problems(b).lines
    assert "µm/px of 1 images are unknown" in line


def test_scales_of_the_annotation_file_are_checked(tmp_path):
    path = made(tmp_path / "d")

    def say(value):
        def edit(content):
            for record in content["images"]:
                record["mpp"] = value

        return edit

    (line,) = images.find_problems(edited(path, say(0.5))).lines
    assert "other µm/px by their own files: 000.tif (0.25, taken as 0.5)" in line
    with pytest.raises(UserError, match=r"no microscope has: 000.tif \(250 µm/px\)"):
        images.check(edited(path, say(250)))


def test_broken_images_are_named_before_training(tmp_path):
    path = made(tmp_path / "d")
    (tmp_path / "d/001.tif").write_text("no image")
    a = data.load_dataset(path)
    with pytest.raises(UserError, match="1 images cannot be read: .*001.tif: not an image"):
        images.check(a)
    assert "001.tif: not an image" in report(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_an_image_that_is_a_pipe_is_named_and_not_waited_for(tmp_path):
    path = made(tmp_path / "d")
    (tmp_path / "d/001.tif").unlink()
    os.mkfifo(tmp_path / "d/001.tif")
    assert "001.tif: not a regular file" in report(path)
    with pytest.raises(UserError, match="not a regular file"):
        images.content(data.load_dataset(path))


def test_what_files_say_of_themselves_is_passed_on(tmp_path):
    path = made(tmp_path / "d")
    for name in ("001.tif", "002.tif"):
        pixels = np.stack([tissue(), tissue()])
        tifffile.imwrite(tmp_path / "d" / name, pixels, photometric="rgb")
    lines = images.find_problems(data.load_dataset(path)).lines
    assert "001.tif holds 2 images; only the first is read (and 1 more" in lines[0]


def test_ready_made_patches_of_mixed_sizes_are_looked_at_one_by_one(tmp_path):
    rows = ["path,label,case"]
    for number in range(10):
        side = 64 if number == 7 else 128
        Image.fromarray(tissue(side, side, seed=number)).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,{number % 2},c{number}")
    (tmp_path / "a.csv").write_text("\n".join(rows) + "\n")
    a = data.load_dataset(tmp_path / "a.csv")
    (line,) = images.find_problems(a).lines
    assert "2 sizes: 128 x 128 px (9), 64 x 64 px (1)" in line
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:20])
    slides.close_all()
    with pytest.raises(UserError, match="1 images cannot be read: .*3.png"):
        images.check(a)


# ---------------------------------------------------------------- fingerprints


def test_fingerprints_follow_scale_and_content(tmp_path):
    path = made(tmp_path / "d")
    a = data.load_dataset(path)
    first = {times: Patches(a, mpp=0.5).fingerprint(times) for times in (True, False)}
    assert first == {times: Patches(a, mpp=0.5).fingerprint(times) for times in (True, False)}
    # Which image has which µm/px matters, if patches are resampled.
    a.mpp = {"000.tif": 0.5, "001.tif": 0.25, "002.tif": 0.25}
    one = Patches(a, mpp=0.5).fingerprint()
    a.mpp = {"000.tif": 0.25, "001.tif": 0.5, "002.tif": 0.25}
    other = Patches(a, mpp=0.5).fingerprint()
    assert len({first[True], one, other}) == 3
    assert Patches(a).fingerprint() == Patches(data.load_dataset(path)).fingerprint()
    # A touched file is another one for caches, the same one for runs; other bytes are another one.
    a.mpp = None
    os.utime(tmp_path / "d/001.tif", ns=(1, 1))
    assert Patches(a, mpp=0.5).fingerprint(True) != first[True]
    assert Patches(a, mpp=0.5).fingerprint(False) == first[False]
    content = bytearray((tmp_path / "d/001.tif").read_bytes())
    content[-100:] = bytes(range(100, 200))
    (tmp_path / "d/001.tif").write_bytes(content)
    os.utime(tmp_path / "d/001.tif", ns=(1, 1))
    assert Patches(a, mpp=0.5).fingerprint(False) != first[False]


def test_a_store_is_stale_after_the_sizes_were_corrected(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(images, "POOL", 12)  # few enough not to depend on the area
    a = data.load_dataset(made(tmp_path / "d"))
    sizes = dict(a.sizes)
    monkeypatch.setattr(images, "image_size", lambda table, image: (2000, 2000))
    build_store(Patches(a, cache=tmp_path / "c"), 1)
    monkeypatch.setattr(images, "image_size", lambda table, image: sizes[image])
    capsys.readouterr()
    sample = data.Sampler(a, a.id, 64, random_share=0.5).epoch(0)
    stored = Patches(a, cache=tmp_path / "c").read_sample(sample)
    assert "made from other places" in capsys.readouterr().out
    assert np.array_equal(stored, Patches(a, cache=False).read_sample(sample))


def test_a_store_of_an_earlier_version_is_rebuilt_with_one_honest_line(tmp_path, capsys):
    a = data.load_dataset(made(tmp_path / "d"))
    path = build_store(a, 1)
    index = path.with_name(path.name + ".json")
    content = json.loads(index.read_text())
    del content["fingerprint"]["places"]
    content["fingerprint"] |= {"version": 1, "images": "0"}
    index.write_text(json.dumps(content))
    capsys.readouterr()
    Patches(a).read([0])
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "made by another version of this program" in out
    build_store(a, 1)
    Patches(a).read([0])
    assert "not used" not in capsys.readouterr().out


# ---------------------------------------------------------------- leaks


def test_the_same_places_under_other_case_names_are_a_leak(tmp_path):
    rows = ["filename,x,y,label,case"]
    rng = np.random.default_rng(0)
    for image in range(12):
        Image.new("RGB", (1000, 1000), (220, 160, 190)).save(tmp_path / f"{image:02d}.png")
        for number in range(12):
            x, y = rng.uniform(100, 900, 2).round()
            for twin in ("", "dup"):
                rows.append(f"{image:02d}.png,{x},{y},{number % 2},{twin}{image}")
    (tmp_path / "a.csv").write_text("\n".join(rows) + "\n")
    text = report(tmp_path / "a.csv", "--fold", "0")
    assert (
        "LEAKS:" in text
        and "% of the test annotations lie within 112 px of a training annotation" in text
    )
    assert "no case is on two sides" not in text and "other case names" in text


def test_an_image_under_two_names_is_a_problem(tmp_path):
    path = made(tmp_path / "d", mpp=(0.25,) * 4)
    content = (tmp_path / "d/000.tif").read_bytes()
    (tmp_path / "d/003.tif").write_bytes(content)
    assert "same content as another of another case: 000.tif and 003.tif" in report(path)


# ---------------------------------------------------------------- a look at the pixels


def cells(n=40, size=128, contrast=True):
    """Patches of tissue, with a nucleus in the middle or anywhere but there."""
    patches = []
    for seed in range(n):
        place = (size // 2, size // 2)
        if not contrast:
            place = (size // 4 + seed % 5, size // 4)
        patches.append(tissue(size, size, [place], seed))
    return np.stack(patches)


def test_patches_of_cells_are_not_suspicious():
    assert look.suspicion(cells()) is None
    assert look.suspicion(cells(1)) is None and look.suspicion(cells()[:0]) is None
    sparse = np.full((10, 128, 128, 3), 240, np.uint8)  # a cell on glass is a cell
    sparse[:, 55:73, 55:73] = 90, 50, 130
    assert look.suspicion(sparse) is None


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda p: np.full_like(p, 255), "40 are blank (no stained tissue) (wrong slide, scale"),
        (lambda p: np.maximum(p, 230), "40 are blank"),
        (lambda p: p // 16, "40 are nearly black (more than 8 bits"),
        (lambda p: np.repeat(p[..., :1], 3, 3), "40 are grey (a single channel"),
        (lambda p: np.full_like(p, 120), "40 are of one colour"),
        (lambda p: np.zeros_like(p), "40 are of one colour"),
    ],
)
def test_what_cannot_be_cells_is_said(change, says):
    line = look.suspicion(change(cells()))
    assert line.startswith("of 40 patches looked at, ") and says in line and "\n" not in line
    few = cells()
    few[:3] = change(cells())[:3]
    assert look.suspicion(few) is None  # three of forty may be a detector's mistakes
    few[:10] = change(cells())[:10]
    assert says.replace("40", "10") in look.suspicion(few)


def test_places_without_cells_are_said_of_points():
    wrong = cells(contrast=False)
    assert "no darker in the middle than around it" in look.suspicion(wrong)
    assert "wrong slide, scale, origin or unit" in look.suspicion(wrong)
    assert look.suspicion(wrong, points=False) is None  # ready-made patches were cut by others
    assert look.suspicion(wrong[:10]) is None  # too few to tell


def test_data_py_looks_at_the_pixels(tmp_path):
    path = made(tmp_path / "d", each=12)
    assert "looked at" not in report(path)

    def shift(content):
        for annotation in content["annotations"]:
            annotation["bbox"] = [value + 90 for value in annotation["bbox"]]

    edited(path, shift)
    assert "no darker in the middle" in report(path)
    for name in ("000.tif", "001.tif", "002.tif"):
        blank = np.full((600, 800, 3), 244, np.uint8)
        tifffile.imwrite(tmp_path / "d" / name, blank, tile=(256, 256), photometric="rgb")
    assert "36 are blank (no stained tissue)" in report(path)


def test_the_sample_of_large_images_is_on_few_of_them(tmp_path, monkeypatch):
    a = data.load_dataset(made(tmp_path / "d", mpp=(0.25,) * 6))
    assert len(set(a.image[look.sample_rows(a)])) == 6
    for number in range(6):
        Image.fromarray(tissue(seed=number)).save(tmp_path / f"d/{number:03d}.png")
        (tmp_path / f"d/{number:03d}.tif").unlink()
    b = data.load_dataset(tmp_path / "d/a.json")
    monkeypatch.setattr(look, "DECODE", 2 * 800 * 600)
    assert len(set(b.image[look.sample_rows(b)])) == 2


@pytest.mark.skipif(not PATCHES.is_dir(), reason="MITOSIS_REALDATA is not set")
def test_real_cells_are_darker_than_what_surrounds_them():
    files = sorted(PATCHES.glob("ami_br/*/*.png"))[:60]
    patches = np.stack([slides.read(file, 64, 64, 128) for file in files])
    assert look.suspicion(patches) is None
    shifted = np.roll(patches, 64, axis=2)
    assert "no darker" in look.suspicion(shifted)
