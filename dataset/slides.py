"""Pixels: one `read` for whole-slide images and for everything OpenSlide refuses. No torch.

OpenSlide reads .svs, .ndpi, .mrxs, tiled TIFF and so on at random. What it refuses (PNG, JPEG,
stripped or multi-page TIFF) Pillow decodes whole, once per process, and the decoded image is kept
for the reads that follow."""

import os
import threading
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import openslide
from PIL import Image

from common import UserError

OPEN_SLIDES = 8  # handles kept open per process
DECODED_BYTES = 1 << 30  # of decoded images kept per process; the newest is kept whatever its size
# a larger image is no region of interest but a whole slide, which OpenSlide must read
MAX_PIXELS = 2_000_000_000
WHITE = 255


def corner(center, size):
    """First pixel of a window of `size` px around a centre: floor(c - size / 2 + 0.5)."""
    return int(np.floor(center - size / 2 + 0.5))


def read(image, x, y, size, mpp=None, source_mpp=None):
    """The window of size x size px centred on (x, y), level-0 pixels, as uint8 [size, size, 3] RGB.

    Outside the image it is white. With `mpp` (microns per pixel) the window covers size * mpp
    microns and is resampled where the image has another resolution, which is read from the file or
    given as `source_mpp`. UserError: no such file, broken, not an image, resolution unknown."""
    wide = source_size(image, size, mpp, source_mpp)
    return resample(open_slide(image).window(corner(x, wide), corner(y, wide), wide), size)


def source_size(image, size, mpp=None, source_mpp=None):
    """Side at level 0, in px, of the window that becomes `size` px at `mpp`; UserError where nobody
    tells.
    """
    if mpp is None:
        return size
    source = source_mpp or microns_per_pixel(image)
    if source is None:
        raise UserError(
            f"{image}: does not tell its microns per pixel; give them with --source-mpp"
        )
    return max(1, round(size * mpp / source))


def resample(window, size):
    """uint8 [wide, wide, 3] → [size, size, 3]; bicubic, with a wider filter where it shrinks."""
    if len(window) == size:
        return window
    return np.asarray(
        Image.fromarray(window).resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0)
    )


def dimensions(image):
    """(width, height) of level 0, in px."""
    slide = open_slide(image)
    return slide.width, slide.height


def microns_per_pixel(image):
    """Microns per pixel of level 0, or None where the file does not tell."""
    return open_slide(image).mpp


def random_access(image):
    """False where the first read has to decode the whole image (PNG, JPEG, stripped TIFF)."""
    return open_slide(image).random_access


# ---------------------------------------------------------------- open images, per process

_open = OrderedDict()  # path → slide, the longest unused first
_lock = threading.RLock()
_inherited = []  # of the parent process: kept, so that nothing closes them here


def _forget():
    """In a forked child: the parent's handles must be neither used nor closed, its locks may be
    held.
    """
    global _open, _lock
    _inherited.append(_open)
    _open, _lock = OrderedDict(), threading.RLock()


os.register_at_fork(after_in_child=_forget)


def open_slide(image):
    """The opened image, from the few that stay open in this process; one that `opened` gave, as it
    is.
    """
    if hasattr(image, "window"):
        return image
    key = str(image)
    with _lock:
        slide = _open.get(key)
        if slide is None:
            slide = _open[key] = _open_file(key)
            while len(_open) > OPEN_SLIDES:
                _open.popitem(last=False)  # closed when the last reader lets it go
        _open.move_to_end(key)
        return slide


def opened(image):
    """A slide that a program holds itself, for every function here that takes an image.

    image   openslide.OpenSlide (the caller closes it) or uint8 [H, W, 3], the pixels of a whole
            image
    """
    if isinstance(image, openslide.OpenSlide):
        return WholeSlide(repr(image), image)
    if isinstance(image, openslide.ImageSlide):  # Pillow's, which threads cannot share
        return ArrayImage(np.asarray(_rgb(image.read_region((0, 0), 0, image.dimensions))))
    if isinstance(image, np.ndarray):
        return ArrayImage(image)
    raise TypeError(
        f"a {type(image).__name__} is no slide: give a path, an openslide.OpenSlide or an array "
        "uint8 [H, W, 3]"
    )


def close(image):
    """Let go of an image and of its decoded pixels: for whoever is done with it."""
    with _lock:
        _open.pop(str(image), None)
        PlainImage.decoded.pop(str(image), None)


def _open_file(path):
    if not Path(path).exists():
        raise UserError(f"{path}: no such image")
    if Path(path).is_dir():
        raise UserError(f"{path}: a folder, an image is needed")
    try:
        if openslide.OpenSlide.detect_format(path) is not None:
            return WholeSlide(path)
    except openslide.OpenSlideError as error:
        raise UserError(
            f"{path}: OpenSlide cannot read it ({str(error).splitlines()[0]}); copy or download it "
            "again"
        ) from None
    return PlainImage(path)


class WholeSlide:
    random_access = True

    def __init__(self, path, handle=None):
        self.path, self.handle = path, handle
        if handle is None:
            self.handle = openslide.OpenSlide(path)
            # Per slide; the default grows with every slide.
            self.handle.set_cache(openslide.OpenSlideCache(32 << 20))
        self.width, self.height = self.handle.dimensions
        self.mpp = _number(self.handle.properties.get(openslide.PROPERTY_NAME_MPP_X))
        if self.mpp is None:
            self.mpp = _tiff_mpp(
                self.handle.properties.get("tiff.XResolution"),
                self.handle.properties.get("tiff.ResolutionUnit"),
            )

    def window(self, left, top, size):
        try:
            rgba = np.asarray(self.handle.read_region((left, top), 0, (size, size)))
        except openslide.OpenSlideError as error:
            with _lock:
                _open.pop(
                    self.path, None
                )  # OpenSlide answers nothing more on a handle that failed once
            raise UserError(
                f"{self.path}: broken at ({left}, {top}) ({str(error).splitlines()[0]})"
            ) from None
        window = rgba[..., :3].copy()
        alpha = rgba[..., 3:].astype(np.uint32)
        if (
            alpha.min() < 255
        ):  # pixels that do not exist, or that are partly covered by a tile: on white
            window = ((window * alpha + WHITE * (255 - alpha) + 127) // 255).astype(np.uint8)
        x0, y0, x1, y1 = -left, -top, self.width - left, self.height - top
        if (
            x0 > 0 or y0 > 0 or x1 < size or y1 < size
        ):  # some formats pad their last tiles with other colours
            inside = np.zeros((size, size), bool)
            inside[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = True
            window[~inside] = WHITE
        return window


class PlainImage:
    """An image that is decoded whole, at the first read; the decoded pixels are shared among the
    open images.
    """

    random_access = False
    decoded = OrderedDict()  # path → array, the longest unused first

    def __init__(self, path):
        self.path = path
        self.busy = threading.Lock()
        with self._file() as image:
            self.width, self.height = image.size
            self.mpp = _pillow_mpp(image)

    def _file(self):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # of odd tags, and of many pixels: MAX_PIXELS is the limit here
                with _lock:
                    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
                    try:
                        image = Image.open(self.path)
                    finally:
                        Image.MAX_IMAGE_PIXELS = limit
        except (OSError, ValueError, SyntaxError) as error:
            if isinstance(error, PermissionError):
                raise
            raise UserError(
                f"{self.path}: not an image that OpenSlide or Pillow reads, or cut off"
            ) from None
        if image.width * image.height > MAX_PIXELS:
            raise UserError(
                f"{self.path}: {image.width} x {image.height} px cannot be decoded whole; convert "
                "it to a "
                "tiled TIFF (vips tiffsave --tile --pyramid)"
            )
        return image

    def pixels(self):
        with self.busy:  # several threads wait for one decoding
            with _lock:
                array = self.decoded.get(self.path)
                if array is not None:
                    self.decoded.move_to_end(self.path)
                    return array
            try:
                with self._file() as image:
                    array = np.asarray(_rgb(image))
            except UserError:
                raise
            except Exception as error:  # Pillow's decoders raise almost anything on broken files
                raise UserError(
                    f"{self.path}: broken image "
                    f"({str(error).splitlines()[0] if str(error) else error!r}); "
                    "copy or download it again"
                ) from None
            with _lock:
                self.decoded[self.path] = array
                while (
                    len(self.decoded) > 1
                    and sum(a.nbytes for a in self.decoded.values()) > DECODED_BYTES
                ):
                    self.decoded.popitem(last=False)
            return array

    def window(self, left, top, size):
        return cut(self.pixels(), left, top, size)


class ArrayImage:
    """The pixels of a whole image that a program has in memory: uint8 [H, W, 3]."""

    random_access = True
    mpp = None

    def __init__(self, pixels):
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise ValueError(
                f"an image of {pixels.dtype} {list(pixels.shape)}: uint8 [H, W, 3] is needed, RGB"
            )
        self.array = pixels
        self.height, self.width = pixels.shape[:2]
        self.path = f"array of {self.width} x {self.height} px"

    def pixels(self):
        return self.array

    def window(self, left, top, size):
        return cut(self.array, left, top, size)


def cut(pixels, left, top, size):
    """uint8 [size, size, 3] out of the pixels of a whole image; white outside of it."""
    height, width = pixels.shape[:2]
    window = np.full((size, size, 3), WHITE, np.uint8)
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + size, width), min(top + size, height)
    if x0 < x1 and y0 < y1:
        window[y0 - top : y1 - top, x0 - left : x1 - left] = pixels[y0:y1, x0:x1]
    return window


def _rgb(image):
    """Any mode as RGB; transparent pixels become white."""
    if image.mode in ("I;16", "I;16L", "I;16B", "I", "F"):
        raise ValueError(f"{image.mode} pixels, 8 bits per channel are needed")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (WHITE,) * 4)
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _number(text):
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if 0.01 <= value <= 100 else None  # otherwise a placeholder, like 72 dpi


def _tiff_mpp(resolution, unit):
    """Microns per pixel of TIFF's pixels per unit (tags 282, 296: 2 inch, 3 centimetre)."""
    try:
        resolution, unit = (
            float(resolution),
            {"2": "inch", "3": "centimeter"}.get(str(unit), str(unit)),
        )
        mpp = {"inch": 25400.0, "centimeter": 10000.0}[unit] / resolution
    except (TypeError, ValueError, KeyError, ZeroDivisionError):
        return None
    return (
        mpp if 0.01 <= mpp <= 20 else None
    )  # coarser is a screen's or a printer's resolution, not a microscope's


def _pillow_mpp(image):
    tags = getattr(image, "tag_v2", None)
    if tags is not None:
        return _tiff_mpp(tags.get(282), tags.get(296, 2))
    dpi = image.info.get("dpi")
    return _tiff_mpp(dpi[0], 2) if isinstance(dpi, tuple) and dpi else None
