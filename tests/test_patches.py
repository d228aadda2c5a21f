"""Patches out of images, of the store of crops and of ready-made files: the same bytes, however
they are read.
"""

import csv
import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import psutil
import pytest
import tifffile
from PIL import Image

import data
import flags
from common import UserError
from dataset import memmap, slides
from dataset import patches as patches_module

ROOT = Path(__file__).resolve().parent.parent
HEIGHT, WIDTH = 700, 900


def pixels(seed, height=HEIGHT, width=WIDTH):
    """Noise over coarse blobs, white on the left: tissue and glass."""
    rng = np.random.default_rng(seed)
    blobs = np.kron(
        rng.integers(60, 180, (height // 20 + 1, width // 20 + 1, 3)), np.ones((20, 20, 1))
    )
    image = (blobs[:height, :width] + rng.integers(-20, 20, (height, width, 3))).astype(np.uint8)
    image[:, : width // 3] = 245
    return image


def write_image(path, array):
    if path.suffix == ".tif":
        tifffile.imwrite(path, array, tile=(256, 256), photometric="rgb", compression="zlib")
    else:
        Image.fromarray(array).save(path, compress_level=1)


def made(folder, suffix=".png", n=5, each=30, seed=0, shape=(HEIGHT, WIDTH)):
    """Annotations on n images that are written to `folder`; centres also outside, at halves and at
    the border.
    """
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    names = [f"{i:03d}{suffix}" for i in range(n)]
    for i, name in enumerate(names):
        write_image(folder / name, pixels(i, *shape))
    image = np.repeat(names, each)
    x, y = rng.uniform(-3, shape[1] + 3, len(image)), rng.uniform(-3, shape[0] + 3, len(image))
    x[::3], y[::3] = np.floor(x[::3]) + 0.5, np.round(y[::3])
    label = np.zeros(len(image), np.int8)
    label[::10] = 1  # few, so that there is room for random patches
    return data.Annotations(
        np.array([f"a{i}" for i in range(len(image))]),
        image,
        np.char.replace(image, suffix, ""),
        np.full(len(image), "all"),
        x,
        y,
        label,
        "made",
        folder,
        sizes={name: (shape[1], shape[0]) for name in names},
        all_images=names,
    )


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.delenv("MITOSIS_CACHE", raising=False)
    slides.close_all()


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    """A dataset and the folder of its store of crops, built by two processes."""
    a = made(tmp_path_factory.mktemp("points"))
    patches_module.build_store(patches_module.Patches(a, cache=a.root / "store"), 2)
    return a, a.root / "store"


def sampler(a, **options):
    return data.Sampler(a, a.id, epoch_size=options.pop("epoch_size", 64), **options)


def no_images(monkeypatch):
    def refuse(image):
        raise AssertionError(f"{image} was opened")

    monkeypatch.setattr(slides, "open_slide", refuse)


# ---------------------------------------------------------------- out of images


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_annotated_patches_are_slides_windows(tmp_path, suffix):
    a = made(tmp_path / "d", suffix, 2)
    patches = patches_module.Patches(a)
    rows = np.array([59, 3, 3, 0, 31])
    for size in (None, 224, 320, 7):
        got = patches.read(rows, size)
        assert got.shape == (5, size or 224, size or 224, 3) and got.dtype == np.uint8
        for patch, row in zip(got, rows):
            assert np.array_equal(patch, slides.read(a.path(row), a.x[row], a.y[row], size or 224))
    assert patches.read([]).shape == (0, 224, 224, 3) and len(patches) == 60


def test_a_sample_is_read_where_it_says(tmp_path):
    a = made(tmp_path / "d", n=3)
    names = np.unique(a.image)
    for options in ({}, {"jitter": 0.1}, {"balance": "slide"}):
        sample = sampler(a, **options).epoch(2)
        got = patches_module.Patches(a).read_sample(sample, 100)
        assert (sample["row"] < 0).sum() == 16
        for patch, s in zip(got, sample):
            assert np.array_equal(
                patch, slides.read(a.root / names[s["image"]], s["x"], s["y"], 100)
            )
            if s["row"] >= 0 and not options:
                assert (a.x[s["row"]], a.image[s["row"]]) == (s["x"], names[s["image"]])


def test_resampled_patches(tmp_path):
    a = made(tmp_path / "d", n=2)
    a.mpp = {"000.png": 0.25, "001.png": 0.5}  # of the annotation file
    patches = patches_module.Patches(a, mpp=0.5)
    for row in (3, 40):
        wanted = slides.read(a.path(row), a.x[row], a.y[row], 224, 0.5, a.mpp[a.image[row]])
        assert np.array_equal(patches.read([row])[0], wanted)
    assert patches.window == 448 and patches_module.Patches(a).window == 224
    given = patches_module.Patches(a, mpp=0.5, source_mpp=1.0)
    assert np.array_equal(given.read([3])[0], slides.read(a.path(3), a.x[3], a.y[3], 224, 0.5, 1.0))
    a.mpp = None
    with pytest.raises(UserError, match="--source-mpp"):
        patches_module.Patches(a, mpp=0.5).read([0])


def test_tissue(tmp_path):
    a = made(tmp_path / "d", n=3, shape=(900, 3000))
    patches = patches_module.Patches(a)
    sample = sampler(a, accept=patches.tissue, epoch_size=256).epoch(0)
    x = sample["x"][sample["row"] < 0]
    # The left third is glass: at least a quarter of each window lies right of it, and those are
    # drawn as before.
    assert x.min() > 1000 + 56 - 112 and x.max() > 2500 and 944 < np.sort(x)[:3].mean() < 1400
    free = sampler(a, epoch_size=256).epoch(0)
    x = free["x"][free["row"] < 0]
    assert (x < 900).any()
    for i in range(3):
        write_image(a.root / f"{i:03d}.png", np.full((900, 3000, 3), 250, np.uint8))
        slides.close(a.root / f"{i:03d}.png")
    with pytest.raises(UserError, match="no tissue"):
        sampler(a, accept=patches.tissue, epoch_size=4).epoch(0)


# ---------------------------------------------------------------- ready-made files


def ready_made(folder, shapes):
    folder.mkdir()
    for i, (height, width) in enumerate(shapes):
        Image.fromarray(
            np.random.default_rng(i).integers(0, 200, (height, width, 3), np.uint8)
        ).save(folder / f"{i}.png")
    n, nan = len(shapes), np.full(len(shapes), np.nan)
    name = np.array([f"{i}.png" for i in range(n)])
    return data.Annotations(
        name, name, name, name, nan, nan, np.arange(n) % 2, "files", folder, kind="patches"
    )


def test_ready_made_patches(tmp_path):
    a = ready_made(tmp_path / "p", [(224, 224), (300, 300), (128, 128), (224, 100)])
    files = [np.asarray(Image.open(tmp_path / "p" / f"{i}.png")) for i in range(4)]
    got = patches_module.Patches(a).read(range(4))
    assert np.array_equal(got[0], files[0]) and np.array_equal(got[1], files[1][38:262, 38:262])
    resized = np.asarray(Image.fromarray(files[2]).resize((224, 224), Image.Resampling.BICUBIC))
    assert np.array_equal(got[2], resized)
    padded = patches_module.Patches(a, fit="pad").read(range(4))
    assert np.array_equal(padded[2][48:176, 48:176], files[2]) and (padded[2][:48] == 255).all()
    assert np.array_equal(padded[3][:, 62:162], files[3]) and (padded[3][:, :62] == 255).all()
    # The margin is reflected where there is none, and taken from the file where there is.
    large = patches_module.Patches(a).read(range(4), 320)
    assert np.array_equal(large[0], np.pad(files[0], ((48, 48), (48, 48), (0, 0)), mode="reflect"))
    assert np.array_equal(large[1][10:310, 10:310], files[1])
    assert np.array_equal(large[2][48:272, 48:272], resized)
    with pytest.raises(UserError, match="--fit crop"):
        patches_module.Patches(a, fit="crop")
    with pytest.raises(UserError, match="ready-made patches need no store"):
        patches_module.build_store(a)
    sample = sampler(a).epoch(0)
    assert np.array_equal(patches_module.Patches(a).read_sample(sample), got[sample["row"]])


# ---------------------------------------------------------------- the store


def test_the_store_gives_the_bytes_of_the_images(points, monkeypatch):
    a, cache = points
    direct, stored = patches_module.Patches(a, cache=False), patches_module.Patches(a, cache=cache)
    samples = [sampler(a, seed=1).epoch(k) for k in range(3)]
    rows = np.random.default_rng(0).permutation(len(a))
    wanted = [direct.read(rows, size) for size in (224, 320, 50)]
    wanted += [direct.read_sample(sample, size) for sample in samples for size in (224, 320)]
    no_images(monkeypatch)  # the store alone must do
    got = [stored.read(rows, size) for size in (224, 320, 50)]
    got += [stored.read_sample(sample, size) for sample in samples for size in (224, 320)]
    assert all(np.array_equal(x, y) for x, y in zip(wanted, got))
    with pytest.raises(AssertionError, match="was opened"):
        stored.read([0], 321)  # larger than what is stored


def test_larger_than_stored_is_read_from_the_image(points):
    a, cache = points
    for size in (321, 500):
        assert np.array_equal(
            patches_module.Patches(a, cache=cache).read([5, 100], size),
            patches_module.Patches(a, cache=False).read([5, 100], size),
        )


@pytest.mark.parametrize(
    "options, side",
    [
        ({"jitter": 0.1}, 320 + 46),
        pytest.param({"mpp": 0.5}, 640, marks=pytest.mark.slow),
        ({"mpp": 0.2}, 256),
        ({"mpp": 0.5, "source_mpp": 0.4}, 400),
    ],
)
def test_with_jitter_and_resampling(tmp_path, monkeypatch, options, side):
    a = made(tmp_path / "d", n=3, each=10, shape=(1000, 1100))
    a.mpp = {"000.png": 0.25, "001.png": 0.3, "002.png": 0.25}
    direct, stored = (
        patches_module.Patches(a, cache=cache, **options) for cache in (False, tmp_path / "c")
    )
    patches_module.build_store(stored, 1)
    assert stored.layout["side"] == side
    jitter = options.get("jitter", 0)
    samples = [sampler(a, jitter=jitter, window=direct.window).epoch(k) for k in range(2)]
    wanted = [direct.read_sample(sample, size) for sample in samples for size in (224, 320)]
    no_images(monkeypatch)
    got = [stored.read_sample(sample, size) for sample in samples for size in (224, 320)]
    assert all(np.array_equal(x, y) for x, y in zip(wanted, got))


def test_tissue_is_the_same_out_of_the_store(points, monkeypatch):
    a, cache = points
    direct, stored = (patches_module.Patches(a, cache=c) for c in (False, cache))
    wanted = sampler(a, accept=direct.tissue).epoch(1)
    no_images(monkeypatch)
    assert np.array_equal(sampler(a, accept=stored.tissue).epoch(1), wanted)


def test_the_index_says_what_each_row_is(points):
    a, cache = points
    array = np.load(cache / "made-320.npy", mmap_mode="r")
    with open(cache / "made-320.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(array) == len(a) + 5 * data.pool_size(a)
    for i in (0, 77, len(a), len(rows) - 1):
        row = rows[i]
        center = [int(row[key]) + 160 for key in ("left", "top")]
        assert np.array_equal(array[i], slides.read(a.root / row["image"], *center, 320))
        assert (row["id"], row["label"]) == ((a.id[i], str(a.label[i])) if i < len(a) else ("", ""))


def log_decoding(monkeypatch, path):
    decode = slides._rgb

    def logged(image):
        with open(path, "a") as file:  # also of forked processes
            file.write(f"{Path(image.filename).name}\n")
        return decode(image)

    monkeypatch.setattr(slides, "_rgb", logged)


@pytest.mark.parametrize("workers", [1, 3])
def test_each_image_is_decoded_once(tmp_path, monkeypatch, capsys, workers):
    a = made(tmp_path / "d", each=5)
    log_decoding(monkeypatch, tmp_path / "log")
    patches_module.build_store(patches_module.Patches(a), workers)
    assert sorted((tmp_path / "log").read_text().split()) == [f"{i:03d}.png" for i in range(5)]
    assert not slides.opened().decoded  # nothing is kept
    rows = 25 + 5 * 51
    out = capsys.readouterr().out
    assert (
        f"25 annotated and 255 random ones of 320 px from 5 images; {rows * 307200 / 1e9:.1f} "
        "GB in" in out
    )
    assert (tmp_path / "d/.crops/made-320.npy").exists()  # the default place
    # A second time there is nothing to do.
    patches_module.build_store(patches_module.Patches(a), workers)
    assert "already built, fresh and complete" in capsys.readouterr().out
    assert len((tmp_path / "log").read_text().split()) == 5
    no_images(monkeypatch)
    patches_module.Patches(a).read(range(len(a)))


KILLED = """
import os, signal, sys, time
sys.path.insert(0, "tests")
import data
from dataset import patches as patches_module
from dataset import slides
from dataset import memmap
from test_patches import made, Path
a = made(Path(sys.argv[1]), each=5)
parent, write, count = os.getpid(), memmap.Writer.write, 0
def counted(self, rows, values):
    global count
    write(self, rows, values)
    count += 1
    if count == int(sys.argv[3]):
        os.kill(parent, signal.SIGKILL)
        while os.getppid() == parent:
            time.sleep(0.001)
memmap.Writer.write = counted
patches_module.build_store(patches_module.Patches(a), int(sys.argv[2]))
"""


@pytest.mark.parametrize("workers, writes", [(1, 3), (2, 1)])
def test_a_killed_build_continues(tmp_path, monkeypatch, capsys, workers, writes):
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "d"), str(workers), str(writes)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == -9, process.stderr
    # The children end by themselves: nothing is left that holds the store.
    a = made(tmp_path / "other", each=5)
    a.root = tmp_path / "d"  # the images of the killed process, with their times
    path = tmp_path / "d/.crops/made-320"
    deadline = time.monotonic() + 20
    while True:
        try:
            with memmap.Writer(
                path, (280, 320, 320, 3), np.uint8, patches_module.Patches(a).store_fingerprint()
            ) as writer:
                left = len(writer.todo)
            break
        except UserError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert 0 < left < 280
    done = np.flatnonzero(np.fromfile(path.with_name(path.name + ".done"), np.uint8))
    finished = set(range(5)) - set(
        patches_module.Patches(a).layout["image"][np.setdiff1d(np.arange(280), done)].tolist()
    )
    log_decoding(monkeypatch, tmp_path / "log")
    written = []
    write = memmap.Writer.write
    monkeypatch.setattr(
        memmap.Writer,
        "write",
        lambda self, rows, values: written.extend(rows) or write(self, rows, values),
    )
    patches_module.build_store(patches_module.Patches(a), 1)
    assert f"continuing: {280 - left} of 280 crops exist" in capsys.readouterr().out
    assert sorted(written) == sorted(set(range(280)) - set(done.tolist()))  # nothing is repeated
    assert not finished & {int(name[:3]) for name in (tmp_path / "log").read_text().split()}
    sample = sampler(a).epoch(0)
    assert np.array_equal(
        patches_module.Patches(a).read_sample(sample),
        patches_module.Patches(a, cache=False).read_sample(sample),
    )


@pytest.mark.slow
def test_twenty_killed_builds_end_in_the_bytes_of_an_uninterrupted_one(tmp_path):
    a = made(tmp_path / "d", each=20)
    rows = "".join(
        f"{image},{x},{y},{label}\n" for image, x, y, label in zip(a.image, a.x, a.y, a.label)
    )
    (tmp_path / "t.csv").write_text("filename,x,y,label\n" + rows)

    def command(cache):
        arguments = [tmp_path / "t.csv", "--images", a.root, "--cache", cache, "--workers", "2"]
        return [sys.executable, "data.py", *map(str, arguments)]

    def content(cache):
        return {file.name: file.read_bytes() for file in sorted(cache.iterdir())}

    start = time.monotonic()
    subprocess.run(command(tmp_path / "whole"), cwd=ROOT, check=True, capture_output=True)
    duration = time.monotonic() - start
    expected = content(tmp_path / "whole")
    for number in range(20):
        cache = tmp_path / f"killed{number}"
        process = subprocess.Popen(
            command(cache), cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(duration * (0.3 + 0.035 * number))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        subprocess.run(command(cache), cwd=ROOT, check=True, capture_output=True)
        found = content(cache)
        assert {name: found[name] for name in expected} == expected
        assert not [name for name in found if name.endswith((".done", ".tmp"))]


def test_a_stale_store_is_said_and_not_used(tmp_path, capsys):
    a = made(tmp_path / "d", n=3, each=5)
    patches_module.build_store(a, 1)
    write_image(a.root / "001.png", pixels(9))  # another image in its place
    capsys.readouterr()
    patches, wanted = patches_module.Patches(a), patches_module.Patches(a, cache=False)
    assert np.array_equal(patches.read(range(15)), wanted.read(range(15)))
    patches.read(range(3))
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "made from other images" in out and "--cache rebuilds it" in out
    patches_module.build_store(a, 1)
    assert "made from other images" in capsys.readouterr().out
    assert patches_module.Patches(a).read(range(15)).tobytes() == wanted.read(range(15)).tobytes()
    assert capsys.readouterr().out == ""
    os.utime(a.root / "002.png", ns=(0, 0))  # of the same length, but of another time
    patches_module.Patches(a).read([0])
    assert "made from other images" in capsys.readouterr().out
    a.label[0] ^= 1
    patches_module.Patches(a).read([0])
    assert "made from other annotations" in capsys.readouterr().out


def test_a_damaged_store_is_said_and_built_anew(tmp_path, capsys):
    a = made(tmp_path / "d", n=2, each=5)
    path = patches_module.build_store(a, 1)
    array = path.with_name(path.name + ".npy")
    good = array.read_bytes()
    array.write_bytes(good[:-1000])
    wanted = patches_module.Patches(a, cache=False).read(range(10))
    assert np.array_equal(patches_module.Patches(a).read(range(10)), wanted)
    assert "damaged" in capsys.readouterr().out
    array.write_bytes(good[:-1000] + bytes(1000))  # only found where all is read
    patches_module.build_store(a, 1)
    assert "damaged" in capsys.readouterr().out and array.read_bytes() == good


def test_it_is_built_by_training_where_random_reads_are_too_slow(tmp_path, monkeypatch, capsys):
    a = made(tmp_path / "d", n=3, each=10)
    sample = sampler(a).epoch(0)
    wanted = patches_module.Patches(a, cache=False).read_sample(sample)
    patches_module.Patches(a).read_sample(sample)  # all fit in memory, decoded
    assert not (a.root / ".crops").exists()
    monkeypatch.setattr(slides, "DECODED_BYTES", 3 * HEIGHT * WIDTH * 3 - 1)
    slides.close_all()
    patches_module.Patches(a).read(range(30))
    assert not (a.root / ".crops").exists()  # no need to, one after the other
    capsys.readouterr()
    monkeypatch.setenv("MITOSIS_CACHE", str(tmp_path / "elsewhere"))
    patches = patches_module.Patches(a)
    assert np.array_equal(patches.read_sample(sample), wanted)
    assert "3 images of 0.0 GB decoded cannot be read at random" in capsys.readouterr().out
    no_images(monkeypatch)
    assert np.array_equal(patches_module.Patches(a).read_sample(sample), wanted)
    assert (tmp_path / "elsewhere/made-320.npy").exists() and not (a.root / ".crops").exists()


def test_a_stale_store_is_built_anew_by_training_where_it_is_needed(tmp_path, monkeypatch, capsys):
    a = made(tmp_path / "d", n=2, each=10)
    patches_module.build_store(a, 1)
    write_image(a.root / "001.png", pixels(7))
    monkeypatch.setattr(slides, "DECODED_BYTES", 1)
    sample = sampler(a).epoch(0)
    wanted = patches_module.Patches(a, cache=False).read_sample(sample)
    capsys.readouterr()
    assert np.array_equal(patches_module.Patches(a).read_sample(sample), wanted)
    assert "made from other images" in (out := capsys.readouterr().out) and "rebuilding it" in out
    patches_module.Patches(a).read_sample(sample)
    assert capsys.readouterr().out == ""


def test_slides_that_can_be_read_at_random_need_no_store(tmp_path, monkeypatch):
    a = made(tmp_path / "d", ".tif", 2)
    monkeypatch.setattr(slides, "DECODED_BYTES", 1)
    patches_module.Patches(a).read_sample(sampler(a).epoch(0))
    assert not (a.root / ".crops").exists()
    patches_module.build_store(a, 2)  # but may have one
    sample = sampler(a).epoch(3)
    wanted = patches_module.Patches(a, cache=False).read_sample(sample, 320)
    no_images(monkeypatch)
    assert np.array_equal(patches_module.Patches(a).read_sample(sample, 320), wanted)


def test_broken_images_are_all_named_and_the_others_kept(tmp_path, capsys):
    a = made(tmp_path / "d", each=5)
    for name in ("001.png", "004.png"):
        (a.root / name).write_bytes((a.root / name).read_bytes()[:3000])
    for workers in (1, 2):
        with pytest.raises(UserError, match="2 images cannot be read") as error:
            patches_module.build_store(a, workers)
        assert "001.png: broken" in str(error.value) and "004.png: broken" in str(error.value)
        done = np.fromfile(a.root / ".crops/made-320.done", np.uint8)
        assert done.sum() == 3 * (5 + 51)
    assert np.array_equal(
        patches_module.Patches(a).read(range(5)),
        patches_module.Patches(a, cache=False).read(range(5)),
    )


def test_a_full_disk_in_a_process_is_said_as_such(tmp_path, monkeypatch):
    def full(*rest):
        raise OSError(errno.ENOSPC, "No space left on device", "rows")

    a = made(tmp_path)
    monkeypatch.setattr(memmap.Writer, "write", full)  # the processes are forked
    with pytest.raises(OSError) as error:
        patches_module.build_store(a, 2)
    assert error.value.errno == errno.ENOSPC


@pytest.mark.parametrize(
    "fit, size, expected",
    [
        ("resize", (256, 256), 224),
        ("resize", (160, 96), 96),
        ("pad", (256, 300), 224),
        ("pad", (100, 128), 128),
    ],
)
def test_what_a_model_is_told_of_ready_made_patches_is_what_training_saw(
    tmp_path, fit, size, expected
):
    Image.fromarray(pixels(0, *size[::-1])).save(tmp_path / "0.png")
    a = data.Annotations(
        np.array(["0"]),
        np.array(["0.png"]),
        np.array(["c"]),
        np.array(["d"]),
        np.full(1, np.nan),
        np.full(1, np.nan),
        np.array([1], np.int8),
        "p",
        tmp_path,
        kind="patches",
    )
    assert flags.facts(a, fit)["patch"] == expected


def test_the_mpp_of_a_dataset_is_that_of_all_its_images(tmp_path):
    a = made(tmp_path, ".tif", n=2)
    for mpp, wanted in (((0.25, 0.25), 0.25), ((0.25, 0.5), None)):
        for name, value in zip(np.unique(a.image), mpp):
            tifffile.imwrite(
                tmp_path / name,
                pixels(0),
                tile=(256, 256),
                photometric="rgb",
                compression="zlib",
                resolution=(10000 / value, 10000 / value),
                resolutionunit="CENTIMETER",
            )
            slides.close(tmp_path / name)
        assert flags.facts(a)["mpp"] == wanted


def test_a_process_that_is_killed_is_said(tmp_path, monkeypatch):
    a = made(tmp_path / "d", each=5)
    monkeypatch.setattr(memmap.Writer, "write", lambda self, rows, values: os._exit(9))
    with pytest.raises(UserError, match="2 of 2 processes ended .*run the same command again"):
        patches_module.build_store(a, 2)


def test_too_small_a_disk_is_said_before_anything_is_decoded(tmp_path, monkeypatch, capsys):
    a = made(tmp_path / "d", n=2, each=5)
    log_decoding(monkeypatch, tmp_path / "log")
    monkeypatch.setattr(
        memmap.shutil, "disk_usage", lambda path: namedtuple("u", "total used free")(9, 9, 10**6)
    )
    with pytest.raises(UserError, match="needs 0.0 GB on the disk, 0.0 GB are free"):
        patches_module.build_store(a, 1)
    assert not (tmp_path / "log").exists() and "has 0.0 GB free" in capsys.readouterr().out


def test_the_command(points, tmp_path):
    a, _ = points
    rows = "".join(
        f"{image},{x},{y},{label}\n" for image, x, y, label in zip(a.image, a.x, a.y, a.label)
    )
    (tmp_path / "t.csv").write_text("filename,x,y,label\n" + rows)
    command = [
        sys.executable,
        "data.py",
        str(tmp_path / "t.csv"),
        "--images",
        str(a.root),
        "--cache",
        str(tmp_path / "c"),
        "--workers",
        "2",
    ]
    for says in ("random ones of 320 px", "already built, fresh and complete"):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and says in done.stdout, done
        assert "MITOSIS_CACHE=" in done.stdout and done.stderr == ""
    array = np.load(tmp_path / "c/t-320.npy", mmap_mode="r")
    assert len(array) == len(a) + 5 * 51
    assert np.array_equal(array[0], patches_module.Patches(a, cache=False).read([0], 320)[0])


# ---------------------------------------------------------------- processes


class Training:
    """What a DataLoader reads: patch i of a run of several epochs."""

    def __init__(self, patches, epochs, jitter):
        self.patches = patches
        self.samples = np.concatenate(
            [
                sampler(
                    patches.annotations, jitter=jitter, accept=patches.tissue, epoch_size=24
                ).epoch(k)
                for k in epochs
            ]
        )

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return i, self.patches.read_sample(self.samples[i : i + 1], 320)[0]


@pytest.mark.parametrize("cache", [pytest.param(False, marks=pytest.mark.slow), True])
def test_any_number_of_workers_and_a_resume_give_the_same_patches(points, cache):
    torch_data = pytest.importorskip("torch.utils.data")
    a, folder = points
    patches = patches_module.Patches(a, cache=folder if cache else False, jitter=0.1)
    everything = Training(patches, range(4), 0.1)
    wanted = patches.read_sample(everything.samples, 320)

    def read(training, workers, context=None):
        got = {}
        loader = torch_data.DataLoader(
            training,
            4,
            num_workers=workers,
            collate_fn=list,
            multiprocessing_context=context,
            timeout=60 if workers else 0,
        )
        for batch in loader:
            got.update(batch)
        return np.stack([got[i] for i in range(len(training))])

    for workers, context in ((0, None), (1, "fork"), (4, "fork"), (1, "spawn")):
        assert np.array_equal(read(everything, workers, context), wanted), (workers, context)
    # Another process, begun at the third epoch, with everything made anew.
    again = patches_module.Patches(a, cache=folder if cache else False, jitter=0.1)
    assert np.array_equal(read(Training(again, range(2, 4), 0.1), 2, "fork"), wanted[48:])


def test_threads_share_patches(points):
    a, cache = points
    patches, wanted = (
        patches_module.Patches(a, cache=cache),
        patches_module.Patches(a, cache=False).read(range(len(a))),
    )
    results = {}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: patches.read(range(len(a)))}))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(result, wanted) for result in results.values()) and len(results) == 4


def test_two_processes_that_both_need_the_store_build_it_once(tmp_path, monkeypatch):
    a = made(tmp_path / "d", n=3, each=5)
    log_decoding(monkeypatch, tmp_path / "log")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=patches_module.build_store, args=(a, 1)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 3
    assert len((tmp_path / "log").read_text().split()) == 3


# ---------------------------------------------------------------- memory


def peak_memory(command, cwd=ROOT):
    """(the largest sum of the resident memory of a command and its children in GB, its output)."""
    process = psutil.Popen(command, cwd=cwd, stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        total = 0
        try:
            for member in (process, *process.children(recursive=True)):
                total += member.memory_info().rss
        except psutil.NoSuchProcess:
            continue
        peak = max(peak, total)
        time.sleep(0.02)
    assert process.returncode == 0
    return peak / 1e9, process.stdout.read()


BUILD = """
import sys
sys.path.insert(0, "tests")
import numpy as np
import data
from dataset import patches as patches_module
from dataset import images
from test_patches import Path
folder, n, shape = Path(sys.argv[1]), int(sys.argv[2]), (int(sys.argv[3]), int(sys.argv[4]))
images.POOL = 3540
rng = np.random.default_rng(0)
names = sorted(path.name for path in folder.glob("*.png"))
image = np.repeat(names, 20)
text = np.arange(len(image)).astype(str)
x, y = rng.uniform(0, shape[1], len(image)), rng.uniform(0, shape[0], len(image))
label = np.arange(len(image)) % 2
a = data.Annotations(text, image, image, image, x, y, label, "made", folder)
patches_module.build_store(a, 2)
stored, direct = patches_module.Patches(a), patches_module.Patches(a, cache=False)
print("same", np.array_equal(stored.read([0, 20, -1]), direct.read([0, 20, -1])))
"""


@pytest.mark.long
def test_memory_of_the_builder_354_images_2_processes(tmp_path):
    shape = 5000, 7000
    for i in range(3):
        write_image(tmp_path / f"{i:03d}.png", np.tile(pixels(i, 500, 700), (10, 10, 1)))
    for i in range(3, 354):
        os.link(tmp_path / f"{i % 3:03d}.png", tmp_path / f"{i:03d}.png")
    start = time.monotonic()
    peak, out = peak_memory([sys.executable, "-c", BUILD, str(tmp_path), "354", *map(str, shape)])
    print(
        f"354 images of 7,000 x 5,000 px, 2 processes: {peak:.2f} GB, "
        f"{time.monotonic() - start:.0f} s"
    )
    assert "7,080 annotated and 3,540 random" in out and "same True" in out and peak <= 2.0


READS = """
import sys
import numpy as np
import psutil
from dataset import slides
paths, rng, here, peak = sys.argv[1:], np.random.default_rng(0), psutil.Process(), []
for i in range(100_000):
    which, (x, y) = rng.integers(0, len(paths)), rng.uniform(0, 2000, 2)
    slides.read(paths[which], x, y, 224)
    if i % 1000 == 0:
        peak.append(here.memory_info().rss)
        assert here.num_fds() < 100 and len(slides.opened().slides) <= slides.OPEN_SLIDES
print("grown", (max(peak[50:]) - max(peak[:50])) / 1e6)
"""


@pytest.mark.long
def test_memory_and_handles_of_100_000_random_reads_over_32_slides(tmp_path):
    paths = [tmp_path / f"{i}.tif" for i in range(32)]
    for i, path in enumerate(paths):
        write_image(path, pixels(i, 2000, 2000))
    start = time.monotonic()
    peak, out = peak_memory([sys.executable, "-c", READS, *map(str, paths)])
    print(
        f"100,000 reads: {peak:.2f} GB, {out.strip()} MB in the second half, "
        f"{time.monotonic() - start:.0f} s"
    )
    assert peak < 1.0 and float(out.split()[-1]) < 50
