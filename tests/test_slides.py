"""Pixels, compared with what wrote them: Pillow, tifffile, and OpenSlide's own regions on a real
slide.
"""

import concurrent.futures
import gc
import multiprocessing
import os
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import dicom_wsi
import jpeg_tiff
import numpy as np
import openslide
import psutil
import pytest
import tifffile
from PIL import Image

from common import UserError
from dataset import slides

ROOT = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("MITOSIS_REALDATA") or "/nowhere") / "slides"
real = pytest.mark.skipif(not REAL.is_dir(), reason="MITOSIS_REALDATA is not set")
HEIGHT, WIDTH = 700, 900


@pytest.fixture(autouse=True)
def nothing_open():
    """Every test starts with no image open."""
    slides.close_all()


def picture(height=HEIGHT, width=WIDTH, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def tiled(path, pixels, **options):
    tifffile.imwrite(
        path, pixels, tile=(256, 256), photometric="rgb", compression="zlib", **options
    )
    return path


def png(path, pixels):
    Image.fromarray(pixels).save(path, compress_level=1)
    return path


def jpeg(path, pixels):
    Image.fromarray(pixels).save(path, quality=95)
    return path


def stripped(path, pixels):
    tifffile.imwrite(path, pixels, rowsperstrip=16, photometric="rgb")
    return path


def lzw(path, pixels):
    Image.fromarray(pixels).save(path, compression="tiff_lzw")
    return path


def pages(path, pixels):
    with tifffile.TiffWriter(path) as file:
        file.write(pixels, photometric="rgb")
        file.write(255 - pixels[:64, :64], photometric="rgb")
    return path


WRITERS = {
    "tiled.tif": tiled,
    "a.png": png,
    "a.jpg": jpeg,
    "stripped.tiff": stripped,
    "lzw.tif": lzw,
    "pages.tif": pages,
}


def expected(pixels, x, y, size):
    """The window written out: a white canvas, pixel by pixel where the image is."""
    window = np.full((size, size, 3), 255, np.uint8)
    left, top = int(np.floor(x - size / 2 + 0.5)), int(np.floor(y - size / 2 + 0.5))
    for row in range(size):
        for column in range(size):
            if 0 <= top + row < pixels.shape[0] and 0 <= left + column < pixels.shape[1]:
                window[row, column] = pixels[top + row, left + column]
    return window


PLACES = [
    (450, 350),
    (450.5, 350.5),
    (450.49, 349.51),
    (0, 0),
    (-2, -5),
    (3, 690.5),
    (899, 699),
    (899.75, 0.25),
    (-200, 300),
    (2000, 2000),
    (WIDTH - 32, HEIGHT - 32),
]


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_pixels_that_were_written(tmp_path, name):
    path = WRITERS[name](tmp_path / name, picture())
    pixels = picture() if name != "a.jpg" else np.asarray(Image.open(path).convert("RGB"))
    assert slides.dimensions(path) == (WIDTH, HEIGHT)
    assert slides.facts(path).random_access == (name == "tiled.tif")
    for size in (64, 63):
        for x, y in PLACES:
            window = slides.read(path, x, y, size)
            assert (
                window.dtype == np.uint8
                and window.shape == (size, size, 3)
                and window.flags.c_contiguous
            )
            assert np.array_equal(window, expected(pixels, x, y, size)), (x, y, size)
    whole = slides.read(path, WIDTH / 2, HEIGHT / 2, 1000)
    assert np.array_equal(whole[150:850, 50:950], pixels)
    whole[150:850, 50:950] = 255
    assert (whole == 255).all()


@pytest.mark.parametrize(
    "center, size, first",
    [
        (10, 4, 8),
        (10.5, 4, 9),
        (10.49, 4, 8),
        (10, 5, 8),
        (10.5, 5, 8),
        (9.99, 5, 7),
        (-2, 224, -114),
        (0.25, 3, -1),
    ],
)
def test_corner(center, size, first):
    # The pixel that holds the centre lies in the middle (odd) or right of it (even); half-integers
    # go right.
    assert slides.corner(center, size) == first


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_other_modes(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    colours = picture(40, 50)
    image = Image.fromarray(colours)
    if mode in ("RGBA", "LA"):
        image = image.convert("RGB" if mode == "RGBA" else "L")
        alpha = np.zeros((40, 50), np.uint8)
        alpha[:, 25:] = 255
        image.putalpha(Image.fromarray(alpha))
    else:
        image = image.convert(mode)
    image.save(path)
    window = slides.read(path, 25, 20, 50)[5:45]
    wanted = np.asarray(image.convert("RGB")).copy()
    if mode in ("RGBA", "LA"):
        wanted[:, :25] = 255  # where it is transparent
    assert np.array_equal(window, wanted)


def test_deep_pixels_are_refused(tmp_path):
    Image.fromarray(np.full((40, 50), 40000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="RGB of 8 bits"):
        slides.read(tmp_path / "a.png", 20, 20, 10)


def test_what_a_format_pads_its_last_tiles_with_is_not_shown(tmp_path):
    slide = slides.open_slide(tiled(tmp_path / "a.tif", picture()))

    class Padded:
        def read_region(self, corner, level, size):
            return Image.new("RGBA", size, (90, 80, 70, 255))

    slide.handle = Padded()
    window = slides.read(tmp_path / "a.tif", WIDTH, 0, 100)
    assert (
        (window[50:, :50] == (90, 80, 70)).all()
        and (window[:50] == 255).all()
        and (window[:, 50:] == 255).all()
    )


# ---------------------------------------------------------------- resolution


def test_microns_per_pixel_of_the_formats(tmp_path):
    pixels = picture(300, 300)
    cases = {
        tiled(
            tmp_path / "a.tif", pixels, resolution=(40000, 40000), resolutionunit="CENTIMETER"
        ): 0.25,
        tiled(tmp_path / "b.tif", pixels, resolution=(50800, 50800), resolutionunit="INCH"): 0.5,
        tiled(tmp_path / "c.tif", pixels, resolution=(72, 72), resolutionunit="INCH"): None,
        tiled(tmp_path / "d.tif", pixels, resolution=(40000, 40000), resolutionunit="NONE"): None,
    }
    tifffile.imwrite(
        tmp_path / "e.tif", pixels, resolution=(40000, 40000), resolutionunit="CENTIMETER"
    )
    Image.fromarray(pixels).save(tmp_path / "f.png", dpi=(101600, 101600))
    Image.fromarray(pixels).save(tmp_path / "g.png")
    Image.fromarray(pixels).save(tmp_path / "h.jpg", dpi=(72, 72))
    cases |= {
        tmp_path / "e.tif": 0.25,
        tmp_path / "f.png": 0.25,
        tmp_path / "g.png": None,
        tmp_path / "h.jpg": None,
    }
    for path, mpp in cases.items():
        assert slides.microns_per_pixel(path) == (
            None if mpp is None else pytest.approx(mpp, rel=1e-3)
        ), path


def test_resampling(tmp_path):
    # A ramp over 600 px: shrunk by 2 its steps double; its values at given places stay.
    ramp = np.broadcast_to(
        (np.arange(600) / 600 * 250).astype(np.uint8)[None, :, None], (600, 600, 3)
    )
    path = tiled(
        tmp_path / "a.tif",
        np.ascontiguousarray(ramp),
        resolution=(40000, 40000),
        resolutionunit="CENTIMETER",
    )
    assert (
        slides.source_size(path, 100, 0.5) == 200
        and slides.source_size(path, 100, 0.5, 0.125) == 400
    )
    window = slides.read(path, 300, 300, 100, mpp=0.5)
    assert window.shape == (100, 100, 3)
    wanted = (200 + 2 * np.arange(100) + 0.5) / 600 * 250
    assert np.abs(window[50, 4:-4, 0] - wanted[4:-4]).max() <= 1.5
    larger = slides.read(path, 300, 300, 100, mpp=0.125)
    wanted = (275 + (np.arange(100) - 0.5) / 2) / 600 * 250
    assert np.abs(larger[50, 4:-4, 0] - wanted[4:-4]).max() <= 1.5
    # As scanned where the resolutions are the same, or none is asked for.
    plain = slides.read(path, 300, 300, 100)
    assert np.array_equal(slides.read(path, 300, 300, 100, mpp=0.25), plain)
    assert np.array_equal(slides.read(path, 300, 300, 100, mpp=0.5, source_mpp=0.5), plain)
    # The filter is wide enough: fine stripes become grey, not coarse stripes.
    stripes = np.zeros((400, 400, 3), np.uint8)
    stripes[:, ::2] = 255
    small = slides.read(png(tmp_path / "b.png", stripes), 200, 200, 60, mpp=1.0, source_mpp=0.25)
    assert np.abs(small[4:-4, 4:-4].astype(int) - 127).max() < 12
    with pytest.raises(UserError, match="its µm/px are unknown; give them with --source-mpp"):
        slides.read(tmp_path / "b.png", 200, 200, 60, mpp=0.25)


# ---------------------------------------------------------------- what is broken


def broken_files(folder):
    tiled(folder / "whole.tif", picture())
    png(folder / "whole.png", picture())
    whole = (folder / "whole.tif").read_bytes()
    (folder / "text.png").write_text("no image")
    (folder / "empty.tif").write_bytes(b"")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:5000])
    (folder / "cut.tif").write_bytes(whole[: len(whole) // 2])
    (folder / "text.svs").write_text("no slide")
    return [
        folder / name
        for name in ("text.png", "empty.tif", "cut.png", "cut.tif", "text.svs", "absent.svs", ".")
    ]


def test_broken_files_are_one_line_that_names_them(tmp_path):
    for path in broken_files(tmp_path):
        for _ in range(2):  # a second try answers the same
            with pytest.raises(UserError) as error:
                for x in range(100, 900, 200):
                    for y in range(100, 700, 200):
                        slides.read(path, x, y, 64)
            assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_broken_tile_does_not_spoil_the_others(tmp_path):
    path = tiled(tmp_path / "a.tif", picture())
    with tifffile.TiffFile(path) as file:
        offset, length = (
            file.pages[0].dataoffsets[5],
            file.pages[0].databytecounts[5],
        )  # second row, second column
    content = bytearray(path.read_bytes())
    content[offset : offset + length] = os.urandom(length)
    path.write_bytes(content)
    with pytest.raises(UserError, match="broken at"):
        slides.read(path, 384, 384, 64)
    assert np.array_equal(slides.read(path, 100, 100, 64), expected(picture(), 100, 100, 64))


def test_a_huge_header_is_refused_before_memory_is_taken(tmp_path):
    def chunk(kind, content):
        return (
            len(content).to_bytes(4, "big")
            + kind
            + content
            + zlib.crc32(kind + content).to_bytes(4, "big")
        )

    header = (100_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))
    )
    with pytest.raises(UserError, match="it is 100,000 x 100,000 px, and decoding takes"):
        slides.read(tmp_path / "a.png", 5, 5, 5)


# ---------------------------------------------------------------- handles


def test_a_plain_image_is_decoded_once(tmp_path, monkeypatch):
    path, count = png(tmp_path / "a.png", picture()), []
    decode = slides._rgb
    monkeypatch.setattr(slides, "_rgb", lambda image: count.append(1) or decode(image))
    for i in range(50):
        slides.read(path, i, i, 32)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # nor by several threads at once
        slides.close(path)
        list(pool.map(lambda i: slides.read(path, i, i, 32), range(50)))
    assert len(count) == 2


def open_files(folder):
    return sum(str(folder) in file.path for file in psutil.Process().open_files())


def alive():
    gc.collect()
    return sum(isinstance(thing, slides.WholeSlide) for thing in gc.get_objects())


def test_few_handles_stay_open(tmp_path):
    paths = [tiled(tmp_path / f"{i}.tif", picture(300, 300, i)) for i in range(20)]
    rng = np.random.default_rng(0)
    for i in rng.integers(0, 20, 300).tolist():
        assert np.array_equal(
            slides.read(paths[i], 150, 150, 8), picture(300, 300, i)[146:154, 146:154]
        )
        assert len(slides.opened().slides) <= slides.OPEN_SLIDES
    assert open_files(tmp_path) <= 2 * slides.OPEN_SLIDES and alive() == slides.OPEN_SLIDES
    for path in paths:
        slides.close(path)
    assert not slides.opened().slides and open_files(tmp_path) == alive() == 0


def test_decoded_images_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(slides, "DECODED_BYTES", 3 * 200 * 200 * 3)
    paths = [png(tmp_path / f"{i}.png", picture(200, 200, i)) for i in range(6)]
    for path in paths:
        slides.read(path, 9, 9, 9)
        assert len(slides.opened().decoded) <= 3
    assert list(slides.opened().decoded) == [str(path) for path in paths[3:]]  # the newest
    monkeypatch.setattr(slides, "DECODED_BYTES", 1)
    assert np.array_equal(slides.read(paths[0], 100, 100, 200), picture(200, 200, 0))
    assert len(slides.opened().decoded) == 1


def _sum(task):
    return int(sum(slides.read(path, x, y, 64).astype(int).sum() for path, x, y in task))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_what_this_one_has_open(tmp_path, method):
    paths = [tiled(tmp_path / "a.tif", picture()), png(tmp_path / "b.png", picture(seed=1))]
    tasks = [[(path, x, y) for path in paths] for x in range(0, 900, 180) for y in (90, 600)]
    here = [_sum(task) for task in tasks]  # all handles are open now
    stop = threading.Event()

    def busy():  # holds the lock now and then while the processes are made
        while not stop.is_set():
            _sum(tasks[0])

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        with concurrent.futures.ProcessPoolExecutor(3, multiprocessing.get_context(method)) as pool:
            assert list(pool.map(_sum, tasks, timeout=60)) == here
    finally:
        stop.set()
        thread.join()
    assert [_sum(task) for task in tasks] == here


def _read_into(queue, path):
    queue.put((len(slides.opened().slides), slides.read(path, 100, 100, 8).tolist()))


def test_a_fork_takes_neither_handles_nor_a_held_lock_along(tmp_path):
    path, context = tiled(tmp_path / "a.tif", picture()), multiprocessing.get_context("fork")
    wanted = slides.read(path, 100, 100, 8).tolist()
    held, let_go, queue = threading.Event(), threading.Event(), context.SimpleQueue()

    def hold():
        with slides.opened().lock:
            held.set()
            let_go.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    process = context.Process(target=_read_into, args=(queue, path))
    process.start()
    process.join(20)
    hangs = process.is_alive()
    if hangs:
        process.kill()
    let_go.set()
    thread.join()
    assert not hangs and queue.get() == (0, wanted)


def test_threads_with_fewer_handles_than_images(tmp_path, monkeypatch):
    monkeypatch.setattr(slides, "OPEN_SLIDES", 2)
    paths = [tiled(tmp_path / f"{i}.tif", picture(300, 300, i)) for i in range(6)]
    paths += [png(tmp_path / f"{i}.png", picture(300, 300, i)) for i in range(6)]
    wanted = [expected(picture(300, 300, i % 6), 40, 200, 32) for i in range(12)]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for i, window in enumerate(
            pool.map(lambda i: slides.read(paths[i % 12], 40, 200, 32), range(240))
        ):
            assert np.array_equal(window, wanted[i % 12])


def test_no_torch():
    code = "import sys; from dataset import memmap, slides; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---------------------------------------------------------------- what TIFF files say


def blocks(height=300, width=400):
    """Four colours in the corners: whatever turns or mirrors the picture shows."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = 200, 120, 160
    pixels[: height // 2, width // 2 :] = 90, 60, 140
    pixels[height // 2 :, : width // 2] = 240, 230, 235
    pixels[height // 2 :, width // 2 :] = 30, 160, 80
    return pixels


def whole(path, pixels):
    """All of an image, as slides reads it."""
    height, width = pixels.shape[:2]
    side = max(height, width)
    return slides.read(path, side / 2, side / 2, side)[:height, :width]


def grey_planes(path, pixels, **metadata):
    """Colour as Bio-Formats writes it: an OME-TIFF of three grey pages."""
    tile = metadata.pop("tile", (256, 256))
    planes = np.moveaxis(pixels, 2, 0)
    options = {"tile": tile} if tile else {}
    metadata = {"axes": "CYX", **metadata}
    tifffile.imwrite(path, planes, photometric="minisblack", metadata=metadata, **options)
    return path


@pytest.mark.parametrize("tile", [(256, 256), None])
def test_colour_in_grey_planes_is_colour(tmp_path, tile):
    path = grey_planes(tmp_path / "a.ome.tif", blocks(), tile=tile)
    assert np.array_equal(whole(path, blocks()), blocks())
    assert slides.facts(path).notes == ()
    planes = np.moveaxis(blocks(), 2, 0)[None, :, :, :, None]
    tifffile.imwrite(
        tmp_path / "b.tif", planes[:, :, :, :, 0], imagej=True, metadata={"axes": "ZCYX"}
    )
    assert np.array_equal(whole(tmp_path / "b.tif", blocks()), blocks())


def test_planes_that_are_no_colour_are_refused(tmp_path):
    two = np.moveaxis(blocks(), 2, 0)[:2]
    tifffile.imwrite(tmp_path / "a.ome.tif", two, tile=(256, 256), metadata={"axes": "CYX"})
    with pytest.raises(UserError, match="2 grey channels"):
        slides.dimensions(tmp_path / "a.ome.tif")
    stack = np.stack([np.moveaxis(blocks(), 2, 0)] * 2)
    tifffile.imwrite(tmp_path / "b.ome.tif", stack, metadata={"axes": "ZCYX"})
    with pytest.raises(UserError, match="a stack of grey planes"):
        slides.dimensions(tmp_path / "b.ome.tif")


@pytest.mark.parametrize("suffix", ["tif", "strips.tif", "jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_are_read_as_stored_whatever_the_orientation_tag(tmp_path, suffix, orientation):
    path, pixels = tmp_path / f"a.{suffix}", blocks()
    if suffix.endswith("tif"):
        options = {"extratags": [(274, "H", 1, orientation, True)], "photometric": "rgb"}
        if suffix == "tif":
            options["tile"] = (256, 256)
        tifffile.imwrite(path, pixels, **options)
    else:
        exif = Image.Exif()
        exif[274] = orientation
        Image.fromarray(pixels).save(path, exif=exif, quality=95)
    assert slides.dimensions(path) == (400, 300)
    difference = np.abs(whole(path, pixels).astype(int) - pixels)
    assert difference.mean() < 2 and (suffix == "jpg" or not difference.any())
    notes = slides.facts(path).notes
    if orientation == 1:
        assert notes == ()
    else:
        expected = f"has the orientation tag {orientation}; its pixels are read as stored"
        assert notes == (expected,)


def test_turned_jpeg_tiles_are_read_as_stored(tmp_path):
    tiles = list(jpeg_tiff.cut(Image.fromarray(blocks(512, 512))).values())
    jpeg_tiff.write(tmp_path / "upright.tif", tiles, 512)
    upright = whole(tmp_path / "upright.tif", blocks(512, 512)).astype(int)
    assert slides.facts(tmp_path / "upright.tif").random_access
    for orientation in (3, 6):
        path = tmp_path / f"{orientation}.tif"
        jpeg_tiff.write(path, tiles, 512, orientation)
        # Another decoder, so not to the bit.
        assert np.abs(whole(path, blocks(512, 512)) - upright).mean() < 2
        assert "orientation tag" in slides.facts(path).notes[0]


@pytest.mark.parametrize("tile", [(256, 256), None])
def test_deep_pixels_are_right_or_refused(tmp_path, tile):
    options = {"photometric": "rgb"} | ({"tile": tile} if tile else {})
    deep = tmp_path / "deep.tif"
    tifffile.imwrite(deep, picture(300, 400).astype(np.uint16) * 257, **options)
    assert np.array_equal(whole(deep, picture(300, 400)), picture(300, 400))
    twelve = tmp_path / "twelve.tif"
    tifffile.imwrite(twelve, picture(300, 400).astype(np.uint16) * 16, **options)
    with pytest.raises(UserError, match="12-bit data"):
        whole(twelve, picture(300, 400))
    floats = tmp_path / "float.tif"
    tifffile.imwrite(floats, (picture(300, 400) / 255).astype(np.float32), **options)
    with pytest.raises(UserError, match="32-bit floating-point pixels, 8 bits per channel"):
        slides.dimensions(floats)
    signed = tmp_path / "signed.tif"
    tifffile.imwrite(signed, (picture(300, 400).astype(int) - 128).astype(np.int8), **options)
    with pytest.raises(UserError, match="signed"):
        slides.dimensions(signed)


def test_twelve_bits_in_a_png_are_refused(tmp_path):
    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    def write(name, pixels):
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
        header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
        body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n" + body)
        return tmp_path / name

    pixels = picture(60, 80)
    full = write("a.png", pixels.astype(np.uint16) * 257)
    assert np.array_equal(whole(full, pixels), pixels)
    with pytest.raises(UserError, match="12-bit data"):
        whole(write("b.png", pixels.astype(np.uint16) * 16), pixels)


@pytest.mark.parametrize("tile", [(256, 256), None])
def test_palettes_are_colour(tmp_path, tile):
    index = picture(300, 400)[..., 0]
    colours = np.random.default_rng(3).integers(0, 256, (3, 256))
    options = {"tile": tile} if tile else {}
    tifffile.imwrite(
        tmp_path / "a.tif",
        index,
        photometric="palette",
        colormap=(colours * 257).astype(np.uint16),
        **options,
    )
    expected = np.moveaxis(colours[:, index], 0, 2)
    assert np.array_equal(whole(tmp_path / "a.tif", expected), expected)


def with_compression(path, number):
    """The file's first compression tag set to another number."""
    with tifffile.TiffFile(path) as file:
        offset, order = file.pages[0].tags[259].valueoffset, file.byteorder
    content = bytearray(path.read_bytes())
    content[offset : offset + 2] = struct.pack(f"{order}H", number)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "number, name",
    [(34887, "LERC"), (34933, "PNG"), (50002, "JPEG XL"), (50001, "WebP"), (34712, "JPEG 2000")],
)
def test_an_unsupported_compression_is_called_that(tmp_path, number, name):
    for path in (tiled(tmp_path / "a.tif", picture()), stripped(tmp_path / "b.tif", picture())):
        with pytest.raises(UserError, match=f"compressed with {name}, which neither") as error:
            slides.read(with_compression(path, number), 50, 50, 64)
        assert "again" not in str(error.value)


def test_several_pages_are_said(tmp_path):
    pixels = picture(300, 400)
    tifffile.imwrite(tmp_path / "a.tif", np.stack([pixels, 255 - pixels]), photometric="rgb")
    note = "holds 2 images; only the first is read"
    assert slides.facts(tmp_path / "a.tif").notes == (note,)
    assert np.array_equal(whole(tmp_path / "a.tif", pixels), pixels)
    with tifffile.TiffWriter(tmp_path / "b.tif") as file:  # a pyramid is one image
        file.write(pixels, photometric="rgb", tile=(128, 128))
        file.write(pixels[::2, ::2], photometric="rgb", tile=(128, 128), subfiletype=1)
        file.write(pixels[::4, ::4], photometric="rgb")  # a level that does not say so
    assert slides.facts(tmp_path / "b.tif").notes == ()
    with tifffile.TiffWriter(tmp_path / "c.tif") as file:  # a thumbnail first
        file.write(pixels[::4, ::4], photometric="rgb")
        file.write(pixels, photometric="rgb")
    assert slides.facts(tmp_path / "c.tif").notes == (note,)


@pytest.mark.parametrize(
    "metadata, mpp",
    [
        ({"PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.5}, 0.5),
        ({"PhysicalSizeX": 250, "PhysicalSizeXUnit": "nm"}, 0.25),
        ({"PhysicalSizeX": 0.00025, "PhysicalSizeXUnit": "mm"}, 0.25),
        ({"PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "pixel"}, None),
        ({"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.5}, None),  # not square
        ({}, None),
    ],
)
@pytest.mark.parametrize("tile", [(256, 256), None])
def test_microns_per_pixel_of_ome_tiff(tmp_path, metadata, mpp, tile):
    options = {"tile": tile} if tile else {}
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(
        path, picture(), photometric="rgb", metadata={"axes": "YXS", **metadata}, **options
    )
    found = slides.microns_per_pixel(path)
    assert found == (None if mpp is None else pytest.approx(mpp))
    assert (
        slides.microns_per_pixel(grey_planes(tmp_path / "b.ome.tif", blocks(), **metadata)) == found
    )


@pytest.mark.parametrize(
    "unit, mpp", [("um", 0.5), ("\\u00B5m", 0.5), ("nm", 0.0005), ("px", None)]
)
def test_microns_per_pixel_of_imagej(tmp_path, unit, mpp):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture(), imagej=True, resolution=(2, 2), metadata={"unit": unit})
    found = slides.microns_per_pixel(path)
    assert found == (pytest.approx(mpp) if mpp and mpp >= 0.01 else None)


@pytest.mark.parametrize("dpi, mpp", [(72, None), (300, None), (2540, 10), (101600, 0.25)])
def test_a_printers_resolution_is_no_scale(tmp_path, dpi, mpp):
    tiled(tmp_path / "a.tif", picture(), resolution=(dpi, dpi), resolutionunit=2)
    Image.fromarray(picture()).save(tmp_path / "a.png", dpi=(dpi, dpi))
    for name in ("a.tif", "a.png"):
        found = slides.microns_per_pixel(tmp_path / name)
        assert found == (None if mpp is None else pytest.approx(mpp, rel=1e-3)), name


def test_dicom(tmp_path):
    pixels = blocks(512, 512)
    dicom_wsi.write(tmp_path / "a.dcm", Image.fromarray(pixels), 0.25)
    assert slides.facts(tmp_path / "a.dcm") == (512, 512, pytest.approx(0.25), True, ())
    assert np.abs(whole(tmp_path / "a.dcm", pixels).astype(int) - pixels).mean() < 2


# ---------------------------------------------------------------- the scanned area


def test_the_scanned_area_is_an_origin_only_if_it_differs_in_both_sides(tmp_path):
    path = tiled(tmp_path / "a.tif", picture())
    slide = slides.open_slide(path)

    class Handle:
        properties = {}

    slide.handle = Handle()
    for bounds, expected in (
        ((10, 20, 300, 400), (10, 20)),
        ((10, 20, WIDTH, 400), (0, 0)),
        ((10, 20, 300, HEIGHT), (0, 0)),
        (("x", 20, 300, 400), (0, 0)),
        ((), (0, 0)),
    ):
        names = [f"openslide.bounds-{side}" for side in ("x", "y", "width", "height")]
        Handle.properties = {name: str(value) for name, value in zip(names, bounds)}
        assert slides.bounds_offset(path) == expected
    assert slides.bounds_offset(png(tmp_path / "b.png", picture())) == (0, 0)


# ---------------------------------------------------------------- hostile files


def test_postscript_is_no_image(tmp_path, monkeypatch):
    script = "#!/bin/sh\ntouch " + str(tmp_path / "ran") + "\n"
    (tmp_path / "gs").write_text(script)
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "slide.tif").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 300 300\n%%EndComments\nshowpage\n"
    )
    with pytest.raises(UserError, match="not an image that OpenSlide or Pillow reads"):
        slides.read(tmp_path / "slide.tif", 50, 50, 64)
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for use in (slides.dimensions, slides.open_slide):
        with pytest.raises(UserError, match="not a regular file"):
            use(tmp_path / "a.png")


def test_the_limit_of_pixels_follows_from_memory(tmp_path, monkeypatch):
    path = png(tmp_path / "a.png", picture(200, 300))
    monkeypatch.setattr(slides, "memory", lambda: 4 * 10 * 60_000)
    assert slides.read(path, 50, 50, 8).shape == (8, 8, 3)
    slides.close(path)
    monkeypatch.setattr(slides, "memory", lambda: 4 * 10 * 60_000 - 40)
    with pytest.raises(UserError, match="it is 300 x 200 px, and decoding takes about") as error:
        slides.read(path, 50, 50, 8)
    assert "vips tiffsave" in str(error.value) and "again" not in str(error.value)
    whole_tile = tmp_path / "b.tif"  # read at random, but in one tile
    tifffile.imwrite(whole_tile, picture(1024, 1024), tile=(1024, 1024), photometric="rgb")
    with pytest.raises(UserError, match="its tiles are 1,024 x 1,024 px"):
        slides.read(whole_tile, 50, 50, 8)


def test_too_little_memory_is_called_that(tmp_path, monkeypatch):
    path = png(tmp_path / "a.png", picture())

    def full(image):
        raise MemoryError

    monkeypatch.setattr(slides, "_rgb", full)
    with pytest.raises(UserError, match="out of memory; 900 x 700 px need about 0.0 GB"):
        slides.read(path, 50, 50, 8)


def test_memory_is_known(monkeypatch):
    assert 1e8 < slides.memory() < 1e14


def test_facts_follow_a_changed_file(tmp_path):
    path = png(tmp_path / "a.png", picture(50, 60))
    assert slides.dimensions(path) == (60, 50)
    png(path, picture(70, 80))
    os.utime(path, ns=(1, 1))
    assert slides.dimensions(path) == (80, 70)
    assert np.array_equal(whole(path, picture(70, 80)), picture(70, 80))


# ---------------------------------------------------------------- real files


@real
def test_real_slide_equals_openslide():
    path = REAL / "CMU-1-Small-Region.svs"
    handle = openslide.OpenSlide(path)
    width, height = handle.dimensions
    assert (
        slides.dimensions(path) == (width, height) == (2220, 2967)
        and slides.facts(path).random_access
    )
    assert slides.microns_per_pixel(path) == pytest.approx(0.499)
    for x, y in np.random.default_rng(0).uniform(200, 1900, (20, 2)).round(1):
        corner = int(np.floor(x - 112 + 0.5)), int(np.floor(y - 112 + 0.5))
        wanted = np.asarray(handle.read_region(corner, 0, (224, 224)))
        assert (wanted[..., 3] == 255).all()
        assert np.array_equal(slides.read(path, x, y, 224), wanted[..., :3])
    # Over the border: white, also where the last tiles are padded.
    window = slides.read(path, width, height, 200)
    assert (window[100:] == 255).all() and (window[:, 100:] == 255).all()
    assert np.array_equal(
        window[:100, :100],
        np.asarray(handle.read_region((width - 100, height - 100), 0, (100, 100)))[..., :3],
    )
    # 0.25 µm/px is a magnification here: 112 px become 224.
    assert slides.source_size(path, 224, 0.25) == 112
    small = slides.read(path, 1000, 1000, 224, mpp=0.25).astype(float)
    again = small.reshape(112, 2, 112, 2, 3).mean((1, 3))
    assert np.abs(again - slides.read(path, 1000, 1000, 112)).mean() < 4


@real
def test_real_plain_images_equal_pillow_and_tifffile():
    for name in (
        "stack_5.tiff",
        "owkin_example.tif",
        *sorted(str(path.relative_to(REAL)) for path in (REAL / "ccmct_tiles").glob("*.png"))[:5],
    ):
        path = REAL / name
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert slides.dimensions(path) == (pixels.shape[1], pixels.shape[0])
        assert np.array_equal(slides.read(path, 60, 50, 90), expected(pixels, 60, 50, 90)), name
    with tifffile.TiffFile(REAL / "stack_5.tiff") as file:
        assert len(file.pages) == 16
        first = file.pages[0].asarray()
    first = np.repeat(first[..., None], 3, 2) if first.ndim == 2 else first[..., :3]
    assert np.array_equal(slides.read(REAL / "stack_5.tiff", 64, 64, 128), first)


def test_half_covered_pixels_lie_on_white(tmp_path, monkeypatch):
    """OpenSlide's pixels are not premultiplied any more when openslide-python gives them out."""
    path = tiled(tmp_path / "a.tif", picture())
    slide = slides.open_slide(path)
    seen = np.zeros((4, 4, 4), np.uint8)
    seen[:2] = 200, 120, 160, 128
    seen[2] = 10, 20, 30, 255

    class Handle:
        def read_region(self, *place):
            return Image.fromarray(seen)

    monkeypatch.setattr(slide, "handle", Handle())
    found = slide.window(0, 0, 4)
    assert np.abs(found[:2].astype(int) - [227, 187, 207]).max() <= 1
    assert (found[2] == [10, 20, 30]).all() and (found[3] == 255).all()


# ---------------------------------------------------------------- stacks


def test_all_pages_of_a_stack_are_read(tmp_path):
    """Also of different sizes, packed or not, grey ones as RGB."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (20 + i, 30, 3), np.uint8) for i in range(3)]
    grey = rng.integers(0, 256, (9, 11), np.uint8)
    with tifffile.TiffWriter(tmp_path / "a.tiff") as file:
        for image, compression in zip(images, (None, "zlib", "zlib")):
            file.write(image, photometric="rgb", compression=compression)
        file.write(grey, photometric="minisblack")
    pages = slides.pages(tmp_path / "a.tiff", 4)
    assert len(pages) == 4
    for page, image in zip(pages, images):
        assert np.array_equal(page, image)
    assert np.array_equal(pages[3], np.repeat(grey[..., None], 3, axis=2))
    with pytest.raises(UserError, match="more than 3 images"):
        slides.pages(tmp_path / "a.tiff", 3)


def test_stacks_that_are_none_or_broken(tmp_path):
    path = tmp_path / "a.tiff"
    stack = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), np.uint8)
    tifffile.imwrite(path, stack, photometric="rgb", compression="zlib")
    whole = path.read_bytes()
    for share in (0, 0.01, 0.3, 0.6, 0.95):  # never fewer pages, without a word
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(UserError):
            slides.pages(path, 16)
    tifffile.imwrite(path, stack.astype(np.float32), photometric="rgb")
    with pytest.raises(UserError, match="floating-point"):
        slides.pages(path, 16)
    planes = np.moveaxis(stack[0], -1, 0)
    tifffile.imwrite(path, planes, imagej=True, metadata={"axes": "CYX"})
    with pytest.raises(UserError, match="colours of one image"):
        slides.pages(path, 16)
    Image.fromarray(stack[0]).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="not a TIFF"):
        slides.pages(tmp_path / "a.png", 16)
