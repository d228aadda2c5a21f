"""Pixels: one `read` for whole-slide images and for everything that OpenSlide refuses.

OpenSlide reads .svs, .ndpi, .mrxs, tiled TIFF and so on at random. What it refuses or reads wrongly
(PNG, JPEG, stripped TIFF, colour in three grey planes, turned TIFF) Pillow decodes whole, once per
process, and the decoded image is kept for the reads that follow.

One rule for all kinds of file: pixels are read as they are stored. Orientation tags are ignored;
`notes` says so. Of a file of several images the first is read, and `notes` says that, too."""

import functools
import os
import stat
import threading
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import openslide
from PIL import Image

from common import UserError
from dataset import dicom, tiff

OPEN_SLIDES = 8  # handles kept open per process
DECODED_BYTES = 1 << 30  # of decoded images kept per process; the newest is kept whatever its size
MAX_PIXELS = 1_000_000_000  # of an image that is decoded whole, whatever the memory
PEAK_BYTES = 10  # per pixel, while Pillow's image becomes an array
WHITE = 255

# What Pillow may open. None of these starts another program, as PostScript does.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "PPM", "WEBP", "JPEG2000")

ADVICE = "convert it, for example: vips tiffsave FILE out.tif --tile --pyramid --compression jpeg"


class Facts(NamedTuple):
    """What a file says of its image: size of level 0 in px, µm/px or None, notes for the user."""

    width: int
    height: int
    mpp: float | None
    random_access: bool
    notes: tuple


def corner(center, size):
    """First pixel of a window of `size` px around a centre: floor(c - size / 2 + 0.5)."""
    return int(np.floor(center - size / 2 + 0.5))


def corners(centers, size):
    """corner, of an array of centres."""
    return np.floor(centers - size / 2 + 0.5).astype(np.int64)


def read(image, x, y, size, mpp=None, source_mpp=None):
    """The window of size x size px centred on (x, y), level-0 pixels, as uint8 [size, size, 3] RGB.

    It is white outside the image. With `mpp` (microns per pixel) the window covers size * mpp
    microns and is resampled if the image has another resolution, which is read from the file or
    given as `source_mpp`. UserError: no such file, broken, not an image, resolution unknown."""
    wide = source_size(image, size, mpp, source_mpp)
    return resample(open_slide(image).window(corner(x, wide), corner(y, wide), wide), size)


def source_size(image, size, mpp=None, source_mpp=None):
    """Side at level 0, in px, of the window that becomes `size` px at `mpp`; UserError if the
    image's resolution is unknown.
    """
    if mpp is None:
        return size
    source = source_mpp or microns_per_pixel(image)
    if source is None:
        raise UserError(f"{image}: its µm/px are unknown; give them with --source-mpp")
    return max(1, round(size * mpp / source))


def resample(window, size):
    """uint8 [wide, wide, 3] → [size, size, 3]; bicubic, with a wider filter if it shrinks."""
    if len(window) == size:
        return window
    return np.asarray(
        Image.fromarray(window).resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0)
    )


def dimensions(image):
    """(width, height) of level 0, in px."""
    return facts(image)[:2]


def microns_per_pixel(image):
    """Microns per pixel of level 0 by the file (OME-XML, ImageJ, TIFF tags, DICOM, the scanner's
    own properties), or None if unknown.
    """
    return facts(image).mpp


def pages(image, most):
    """All images of a multi-page TIFF in their order, each uint8 [H, W, 3]; UserError if one of
    them cannot be read, or if there are more than `most`.
    """
    regular_file(image)
    directories = tiff.directories(image)
    if len(directories) > most:
        raise UserError(f"{image}: holds more than {most} images")
    # The last directory says that none follows; another one could not be read.
    if not directories or directories[-1].next:
        raise UserError(f"{image}: not a TIFF, or cut off; copy or download it again")
    for directory in directories:
        if problem := tiff.sample_problem(directory):
            raise UserError(f"{image}: {problem}, 8 bits per channel are needed; {ADVICE}")
    stack = PlainImage(str(image), directories)
    if stack.planes:
        raise UserError(f"{image}: its pages are the colours of one image, not a stack of images")
    return [stack.decode(number) for number in range(len(directories))]


def bounds_offset(image):
    """(x, y) of the scanned area's corner at level 0, which QuPath takes for the origin.

    As QuPath does, only if both its width and its height differ from the slide's; else (0, 0).
    """
    slide = open_slide(image)
    if not isinstance(slide, WholeSlide):
        return 0, 0
    bounds = [slide.handle.properties.get(f"openslide.bounds-{key}") for key in BOUNDS]
    try:
        x, y, width, height = (int(number) for number in bounds)
    except (TypeError, ValueError):
        return 0, 0
    if width == slide.width or height == slide.height:
        return 0, 0
    return x, y


BOUNDS = ("x", "y", "width", "height")


# ---------------------------------------------------------------- open images, per process


class Opened:
    """What a process has open. A forked child starts with nothing: its parent's handles must be
    neither used nor closed, and its parent's lock may be held.
    """

    def __init__(self):
        self.lock = threading.RLock()
        self.slides = OrderedDict()  # path → slide, the longest unused first
        self.decoded = OrderedDict()  # path → array, the longest unused first
        self.decoded_bytes = 0
        self.facts = {}  # path → (state of the file, Facts)


_opened = {}  # process → Opened


def opened():
    mine = _opened.get(os.getpid())
    # setdefault: two threads of a new process get the same one.
    return mine if mine is not None else _opened.setdefault(os.getpid(), Opened())


def facts(image):
    """The Facts of an image. The file is opened once per process, and again after a change."""
    if isinstance(image, ArrayImage):
        return Facts(image.width, image.height, None, True, ())
    key, mine = str(image), opened()
    state = regular_file(key)
    with mine.lock:
        known = mine.facts.get(key)
        if known is None or known[0] != state:
            if known is not None:
                close(key)  # the file has changed
            slide = open_slide(key)
            found = Facts(slide.width, slide.height, slide.mpp, slide.random_access, slide.notes)
            known = mine.facts[key] = state, found
        return known[1]


def open_slide(image):
    """The opened image, from the few that stay open in this process."""
    if isinstance(image, ArrayImage):
        return image
    key, mine = str(image), opened()
    with mine.lock:
        slide = mine.slides.get(key)
        if slide is None:
            slide = mine.slides[key] = _open_file(key)
            while len(mine.slides) > OPEN_SLIDES:
                mine.slides.popitem(last=False)  # closed when the last reader lets it go
        mine.slides.move_to_end(key)
        return slide


def keep_open(number):
    """Keep at least so many slides open at a time, for programs that read several side by side."""
    global OPEN_SLIDES
    OPEN_SLIDES = max(OPEN_SLIDES, number)


def held(slide):
    """A slide that a program holds, for every function here that takes an image.

    slide   openslide.OpenSlide, which is read by its path | PIL.Image or uint8 [H, W, 3], the
            pixels of a whole image | a path, which is given back; of a folder of DICOM files, the
            file that opens it
    """
    if isinstance(slide, str | os.PathLike):
        if not os.path.isdir(slide):
            return slide
        return dicom.slide_in(slide) or slide
    if isinstance(slide, openslide.OpenSlide):
        path = getattr(slide, "_filename", None)
        if path is None or not Path(path).exists():
            raise UserError(f"{slide!r}: its file is not found; give the path")
        return path
    if isinstance(slide, openslide.ImageSlide):
        slide = slide.read_region((0, 0), 0, slide.dimensions)
    if isinstance(slide, Image.Image):
        slide = np.asarray(_rgb(slide))
    if isinstance(slide, np.ndarray):
        return ArrayImage(slide)
    raise TypeError(
        f"a {type(slide).__name__} is no slide: give a path, an openslide.OpenSlide, or an array "
        "uint8 [H, W, 3]"
    )


def close(image):
    """Let go of an image and of its decoded pixels: for whoever is done with it."""
    key, mine = str(image), opened()
    with mine.lock:
        mine.slides.pop(key, None)
        mine.facts.pop(key, None)
        array = mine.decoded.pop(key, None)
        if array is not None:
            mine.decoded_bytes -= array.nbytes


def close_all():
    """Let go of all images of this process."""
    _opened[os.getpid()] = Opened()


def regular_file(path):
    """(size, time) of a file; UserError if there is none. A pipe or device would wait forever."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such image") from None
    except ValueError:  # a zero byte in the name
        raise UserError(f"{path!r}: not a file name") from None
    if stat.S_ISDIR(status.st_mode):
        raise UserError(f"{path}: a folder, an image is needed")
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path}: not a regular file (a pipe or device), an image is needed")
    return status.st_size, status.st_mtime_ns


def _open_file(path):
    """The opened file, by the library that reads it rightly; UserError if none does."""
    regular_file(path)
    with open(path, "rb") as file:
        head = file.read(8)
    if head.startswith((b"\x89PNG", b"\xff\xd8\xff")):  # OpenSlide would look in vain
        return PlainImage(path)
    pages = tiff.directories(path)
    try:
        vendor = openslide.OpenSlide.detect_format(path)
        if pages and (problem := tiff.sample_problem(pages[0])):
            raise UserError(f"{path}: {problem}, 8 bits per channel are needed; {ADVICE}")
        if vendor is not None and not (pages and _misread(path, pages)):
            return WholeSlide(path, pages)
    except openslide.OpenSlideError as error:
        # Pillow decodes some compressions that OpenSlide does not.
        if not (pages and tiff.compression(pages[0])):
            raise UserError(
                f"{path}: OpenSlide cannot read it ({_first_line(error)}); copy or download it "
                "again"
            ) from None
    return PlainImage(path, pages)


def _misread(path, pages):
    """Whether OpenSlide would read the file, but wrongly: it turns each tile of a turned TIFF in
    itself, reads the red plane alone of colour in grey planes, and 12 bits in 16 as nearly black.
    """
    try:
        planes = tiff.colour_planes(pages)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    turned = tiff.value(pages[0], tiff.ORIENTATION, 1) in UPRIGHT
    return planes or turned or tiff.value(pages[0], tiff.BITS, 1) == 16


def _first_line(error):
    lines = str(error).splitlines()
    return lines[0] if lines else repr(error)


def _notes(orientation, pages):
    notes = []
    if orientation in UPRIGHT:
        notes.append(f"has the orientation tag {orientation}; its pixels are read as stored")
    if pages > 1:
        notes.append(f"holds {pages} images; only the first is read")
    return tuple(notes)


class WholeSlide:
    """A slide that OpenSlide reads at random."""

    random_access = True

    def __init__(self, path, pages):
        self.path = path
        self.handle = openslide.OpenSlide(path)
        # A cache per slide: the default one grows with every slide.
        self.handle.set_cache(openslide.OpenSlideCache(32 << 20))
        self.width, self.height = self.handle.dimensions
        properties = self.handle.properties
        tile = [properties.get(f"openslide.level[0].tile-{side}", "1") for side in BOUNDS[2:]]
        if all(side.isdigit() for side in tile):
            check_pixels(path, int(tile[0]), int(tile[1]), "its tiles are")
        generic = properties.get(openslide.PROPERTY_NAME_VENDOR) == "generic-tiff"
        self.mpp = None
        if pages and generic:
            self.mpp = tiff.microns_per_pixel(pages[0])
        if self.mpp is None and not generic:
            self.mpp = tiff.square(
                properties.get(openslide.PROPERTY_NAME_MPP_X),
                properties.get(openslide.PROPERTY_NAME_MPP_Y),
            ) or tiff.from_resolution(
                properties.get("tiff.XResolution"),
                properties.get("tiff.YResolution"),
                properties.get("tiff.ResolutionUnit"),
            )
        number = 1
        if pages and generic:
            number = tiff.different_pages(pages)
        self.notes = _notes(1, number)

    def level_window(self, level, left, top, width, height):
        """The pixels of a level from (left, top) on, which are level-0 px: uint8 [height, width,
        3]; white where nothing was scanned.
        """
        try:
            rgba = np.asarray(self.handle.read_region((left, top), level, (width, height)))
        except openslide.OpenSlideError as error:
            mine = opened()
            with mine.lock:  # OpenSlide answers nothing more on a handle that failed once
                mine.slides.pop(self.path, None)
            raise UserError(
                f"{self.path}: broken at ({left}, {top}) ({_first_line(error)})"
            ) from None
        window = rgba[..., :3].copy()
        alpha = rgba[..., 3:].astype(np.uint32)
        # Pixels that do not exist, or that a tile covers in part, lie on white.
        if alpha.min() < 255:
            window = ((window * alpha + WHITE * (255 - alpha) + 127) // 255).astype(np.uint8)
        return window

    def window(self, left, top, size):
        """The square at (left, top) of level 0 as uint8 [size, size, 3]; white outside."""
        window = self.level_window(0, left, top, size, size)
        # Some formats pad their last tiles with other colours.
        x0, y0, x1, y1 = -left, -top, self.width - left, self.height - top
        if x0 > 0 or y0 > 0 or x1 < size or y1 < size:
            inside = np.zeros((size, size), bool)
            inside[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = True
            window[~inside] = WHITE
        return window


# ---------------------------------------------------------------- images that are decoded whole

# How to undo what Pillow does with a TIFF of an orientation.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
MODES = ("1", "L", "P", "LA", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")


class PlainImage:
    """An image that is decoded whole, at the first read."""

    random_access = False

    def __init__(self, path, pages=()):
        self.path, self.pages = path, pages
        self.busy = threading.Lock()
        with self._file() as image:
            self.width, self.height = image.size
            if pages:
                self.width, self.height = tiff.size(pages[0])  # Pillow's may be turned
                self.mpp = tiff.microns_per_pixel(pages[0])
                orientation = tiff.value(pages[0], tiff.ORIENTATION, 1)
            else:
                dpi = image.info.get("dpi")
                self.mpp = None
                if isinstance(dpi, tuple) and len(dpi) == 2:
                    self.mpp = tiff.from_resolution(*dpi, "inch")
                orientation = _exif_orientation(image)
        try:
            self.planes = bool(pages) and tiff.colour_planes(pages)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
        number = 1
        if self.planes:
            number = tiff.different_pages(pages[2:])
        elif pages:
            number = tiff.different_pages(pages)
        self.notes = _notes(orientation, number)

    def _file(self):
        """The file as Pillow opens it, not yet decoded."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd tags
                with opened().lock:  # the limit here is another one; Pillow's must be put back
                    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
                    try:
                        image = Image.open(self.path, formats=FORMATS)
                    finally:
                        Image.MAX_IMAGE_PIXELS = limit
        except PermissionError:
            raise
        except (OSError, ValueError, SyntaxError, TypeError, KeyError):
            self._refuse_compression()
            raise UserError(
                f"{self.path}: not an image that OpenSlide or Pillow reads, or cut off"
            ) from None
        check_pixels(self.path, image.width, image.height, "it is")
        if image.mode not in MODES:
            raise UserError(
                f"{self.path}: {image.mode} pixels; RGB of 8 bits per channel is needed; {ADVICE}"
            )
        return image

    def _refuse_compression(self):
        """UserError if a file that cannot be decoded is compressed in an unusual way."""
        name = tiff.compression(self.pages[0]) if self.pages else None
        if name:
            raise UserError(
                f"{self.path}: compressed with {name}, which neither OpenSlide nor Pillow decodes "
                f"here; {ADVICE}"
            )

    def pixels(self):
        """The whole image as uint8 [height, width, 3]."""
        mine = opened()
        with self.busy:  # several threads wait for one decoding
            with mine.lock:
                array = mine.decoded.get(self.path)
                if array is not None:
                    mine.decoded.move_to_end(self.path)
                    return array
            array = self.decode()
            with mine.lock:
                mine.decoded[self.path] = array
                mine.decoded_bytes += array.nbytes
                while len(mine.decoded) > 1 and mine.decoded_bytes > DECODED_BYTES:
                    _, unused = mine.decoded.popitem(last=False)
                    mine.decoded_bytes -= unused.nbytes
            return array

    def decode(self, page=0):
        """The pixels of a page; UserError if it is broken, deeper than 8 bits, or too large."""
        try:
            with self._file() as image:
                if page:
                    image.seek(page)
                    check_pixels(self.path, image.width, image.height, f"page {page + 1} is")
                deep = any(";16" in str(tile[3]) for tile in image.tile)
                if self.planes:
                    array = np.stack([self._plane(image, number) for number in range(3)], axis=2)
                else:
                    array = np.asarray(_rgb(_as_stored(image)))
        except UserError:
            raise
        except MemoryError:
            gigabytes = self.width * self.height * PEAK_BYTES / 1e9
            raise UserError(
                f"{self.path}: out of memory; {self.width:,} x {self.height:,} px need about "
                f"{gigabytes:.1f} GB while they are decoded; {ADVICE}"
            ) from None
        except Exception as error:  # Pillow's decoders raise almost anything on broken files
            self._refuse_compression()
            raise UserError(
                f"{self.path}: broken image ({_first_line(error)}); copy or download it again"
            ) from None
        # Pillow keeps the upper 8 bits of 16: of 12 or 14 bits that leaves next to nothing.
        if deep and array.max(initial=0) < 64:
            raise UserError(
                f"{self.path}: 16 bits per channel, the upper 2 unused (12-bit data?); "
                "it would look nearly black: rescale it to 8 bits per channel"
            )
        return array

    def _plane(self, image, number):
        image.seek(number)
        if image.mode != "L":
            raise UserError(f"{self.path}: {image.mode} planes, 8 bits per channel are needed")
        return np.asarray(_as_stored(image))

    def window(self, left, top, size):
        """The square at (left, top) as uint8 [size, size, 3]; white outside the image."""
        return cut(self.pixels(), left, top, size)


class ArrayImage:
    """The pixels of a whole image that a program has in memory: uint8 [H, W, 3]."""

    def __init__(self, pixels):
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise ValueError(
                f"an image of {pixels.dtype} {list(pixels.shape)}: uint8 [H, W, 3] is needed, RGB"
            )
        self.pixels = pixels
        self.height, self.width = pixels.shape[:2]

    def __str__(self):
        return f"an array of {self.width} x {self.height} px"

    def window(self, left, top, size):
        """The square at (left, top) as uint8 [size, size, 3]; white outside the image."""
        return cut(self.pixels, left, top, size)


def cut(pixels, left, top, size):
    """uint8 [size, size, 3] out of the pixels of a whole image; white outside of it."""
    height, width = pixels.shape[:2]
    window = np.full((size, size, 3), WHITE, np.uint8)
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + size, width), min(top + size, height)
    if x0 < x1 and y0 < y1:
        window[y0 - top : y1 - top, x0 - left : x1 - left] = pixels[y0:y1, x0:x1]
    return window


def check_pixels(path, width, height, what):
    """UserError if so many pixels cannot be decoded at once."""
    most = min(MAX_PIXELS, memory() // 4 // PEAK_BYTES)
    if width * height > most:
        raise UserError(
            f"{path}: {what} {width:,} x {height:,} px, and decoding takes about "
            f"{width * height * PEAK_BYTES / 1e9:.1f} GB at once; here the limit is "
            f"{most * PEAK_BYTES / 1e9:.1f} GB (a quarter of the memory, 10 GB at most). A tiled "
            f"TIFF is read in parts: {ADVICE}"
        )


@functools.cache
def memory():
    """Bytes of memory that this process may have: the machine's, its container's, or its limit.

    8 GB if the system does not say.
    """
    limits = []
    try:
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # Windows
        pass
    try:
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text("ascii")))
    except (OSError, ValueError):  # "max"
        pass
    try:
        import resource

        limits.append(resource.getrlimit(resource.RLIMIT_AS)[0])
    except ImportError:  # Windows
        pass
    return min((limit for limit in limits if limit > 0), default=8_000_000_000)


def _exif_orientation(image):
    if not {"exif", "Raw profile type exif"} & set(image.info):
        return 1
    try:
        return image.getexif().get(tiff.ORIENTATION, 1)
    except Exception:  # broken EXIF data: there is no orientation to report
        return 1


def _as_stored(image):
    """The decoded image without the turn that Pillow gives a TIFF of another orientation."""
    if image.format != "TIFF":
        return image
    orientation = image.tag_v2.get(tiff.ORIENTATION, 1)
    image.load()
    # Pillow removes the tag when it turns the pixels.
    if orientation in UPRIGHT and tiff.ORIENTATION not in image.tag_v2:
        return image.transpose(UPRIGHT[orientation])
    return image


def _rgb(image):
    """Any mode as RGB; transparent pixels become white."""
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (WHITE,) * 4)
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
