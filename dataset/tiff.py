"""What the tags of a TIFF file say: scale, orientation, sample type, pages, compression.

OpenSlide and Pillow both leave some of it out. Only the directories are read, no pixels; files are
untrusted, so a tag that makes no sense counts as absent.
"""

import re
import struct
import warnings

from PIL.TiffImagePlugin import ImageFileDirectory_v2

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, DESCRIPTION = 256, 257, 258, 259, 262, 270
ORIENTATION, SAMPLES, X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT = 274, 277, 282, 283, 296
SUBFILE_TYPE, SAMPLE_FORMAT = 254, 339

MOST_DIRECTORIES = 64  # read per file; enough to tell a stack from a pyramid

# Compressions that OpenSlide or Pillow always decode: if decoding fails, the file is broken.
DECODED = {1, 2, 3, 4, 5, 7, 8, 32773, 32946, 50000}
COMPRESSIONS = {
    6: "old-style JPEG",
    33003: "JPEG 2000",
    33004: "JPEG 2000",
    33005: "JPEG 2000",
    34712: "JPEG 2000",
    34887: "LERC",
    34892: "lossy JPEG (DNG)",
    34925: "LZMA",
    34933: "PNG",
    34934: "JPEG XR",
    50001: "WebP",
    50002: "JPEG XL",
    52546: "JPEG XL",
}

MICRONS = {  # per unit, as OME-XML, ImageJ and TIFF spell it
    "nm": 1e-3,
    "µm": 1.0,  # micro sign
    "μm": 1.0,  # Greek letter
    "um": 1.0,
    "micron": 1.0,
    "microns": 1.0,
    "micrometer": 1.0,
    "micrometre": 1.0,
    "\\u00b5m": 1.0,  # as ImageJ escapes it
    "mm": 1e3,
    "cm": 1e4,
    "centimeter": 1e4,
    "m": 1e6,
    "inch": 25400.0,
    "in": 25400.0,
}


def directories(path):
    """The image directories of a TIFF or BigTIFF, main chain only; [] if the file is no TIFF."""
    found, seen = [], set()
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd tags
            header = file.read(8)
            if header[:2] not in (b"II", b"MM"):
                return []
            if 43 in header[2:4]:  # BigTIFF
                header += file.read(8)
            offset = ImageFileDirectory_v2(header).next
            while offset and offset not in seen and len(found) < MOST_DIRECTORIES:
                seen.add(offset)
                file.seek(offset)
                directory = ImageFileDirectory_v2(header)
                directory.next = 0
                directory.load(file)
                if not len(directory):
                    break
                found.append(directory)
                offset = directory.next
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error, OverflowError):
        pass  # what was readable counts; whoever reads the pixels reports the rest
    return found


def value(directory, tag, default=None):
    """One value of a tag (the first of several), or the default."""
    try:
        content = directory.get(tag, default)
    except (ValueError, TypeError, KeyError, IndexError, struct.error, ZeroDivisionError):
        return default
    if isinstance(content, tuple):
        return content[0] if content else default
    return content


def description(directory):
    text = value(directory, DESCRIPTION, "")
    if isinstance(text, bytes):
        return text.decode("utf-8", "replace")
    if not isinstance(text, str):
        return ""
    try:
        return text.encode("latin-1").decode("utf-8")  # Pillow reads UTF-8 as Latin-1
    except UnicodeError:
        return text


def plausible(mpp):
    """`mpp` if a microscope can have it, else None: coarser is a screen or a printer."""
    try:
        mpp = float(mpp)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return mpp if 0.01 <= mpp <= 20 else None


def square(x, y):
    """µm/px of pixels of x × y µm: x if both agree or y is unknown; None for other pixels."""
    x, y = plausible(x), plausible(y)
    if x is None or y is not None and abs(y / x - 1) > 0.05:
        return None
    return x


def microns_per_pixel(directory):
    """µm/px by OME-XML, ImageJ's description or the resolution tags, in this order; or None."""
    text = description(directory)
    pixels = ome_pixels(text)
    if pixels:
        sizes = [
            _times(pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", "µm"))
            for axis in "XY"
        ]
        if sizes[0] is not None:
            return square(*sizes)
    unit = None
    if text.startswith("ImageJ="):
        match = re.search(r"^unit=(.*)$", text, re.MULTILINE)
        unit = match[1].strip() if match else None
    if unit is None:
        # The unit's default is the inch.
        unit = {2: "inch", 3: "cm"}.get(value(directory, RESOLUTION_UNIT, 2))
    return from_resolution(value(directory, X_RESOLUTION), value(directory, Y_RESOLUTION), unit)


def from_resolution(x, y, unit):
    """µm/px of a resolution in pixels per unit."""
    return square(_per(x, unit), _per(y, unit))


def _times(length, unit):
    try:
        return float(length) * MICRONS[str(unit).lower()]
    except (TypeError, ValueError, KeyError):
        return None


def _per(resolution, unit):
    try:
        return MICRONS[str(unit).lower()] / float(resolution)
    except (TypeError, ValueError, KeyError, ZeroDivisionError):
        return None


def ome_pixels(text):
    """Attributes of the first <Pixels> element of an OME-XML description; {} if there is none."""
    if "<OME" not in text and "OME:OME" not in text and "ome:OME" not in text:
        return {}
    element = re.search(r"<(?:\w+:)?Pixels\b[^<>]*>", text)
    if not element:
        return {}
    return {a or b: c or d for a, c, b, d in re.findall(ATTRIBUTE, element[0])}


ATTRIBUTE = r"""(\w+)\s*=\s*"([^"]*)"|(\w+)\s*=\s*'([^']*)'"""


def colour_planes(pages):
    """Whether the first three pages are the red, green and blue planes of one image.

    Bio-Formats, tifffile and ImageJ write RGB so. ValueError if the description announces channels
    that are not three.
    """
    first = pages[0]
    if value(first, SAMPLES, 1) != 1 or value(first, PHOTOMETRIC) not in (0, 1):
        return False
    text = description(first)
    pixels = ome_pixels(text)
    if pixels:
        channels, depth, times = (_count(pixels.get(name)) for name in ("SizeC", "SizeZ", "SizeT"))
    else:
        counts = dict(re.findall(r"^(channels|slices|frames)=(\d{1,6})\s*$", text, re.MULTILINE))
        if not text.startswith("ImageJ="):
            return False
        channels, depth, times = (
            _count(counts.get(name)) for name in ("channels", "slices", "frames")
        )
    if channels == 1:
        return False
    if channels != 3:
        raise ValueError(f"{channels} grey channels; an RGB image is needed")
    if depth * times > 1 or len(pages) < 3 or any(size(p) != size(first) for p in pages[:3]):
        raise ValueError("a stack of grey planes; an RGB image is needed")
    return True


def _count(text):
    try:
        return max(1, int(text))
    except (TypeError, ValueError):
        return 1


def size(directory):
    """(width, height) as stored, whatever the orientation."""
    return value(directory, WIDTH), value(directory, HEIGHT)


def different_pages(pages):
    """Number of pages, reduced versions of the first one (the levels of a pyramid) not counted."""
    return 1 + sum(not _is_reduced(page, pages[0]) for page in pages[1:])


def _is_reduced(page, first):
    kind = value(page, SUBFILE_TYPE, 0)
    if isinstance(kind, int) and kind & 1:
        return True
    try:
        across, down = (a / b for a, b in zip(size(first), size(page)))
    except (TypeError, ZeroDivisionError):
        return False
    return across > 1.5 and abs(across / down - 1) < 0.02


def compression(directory):
    """Name of a compression that may not be supported here, or None for the usual ones."""
    number = value(directory, COMPRESSION, 1)
    if number in DECODED:
        return None
    return COMPRESSIONS.get(number, f"compression {number}")


def sample_problem(directory):
    """Why the samples are no 8-bit (or full-range 16-bit) intensities, or None."""
    bits, kind = value(directory, BITS, 1), value(directory, SAMPLE_FORMAT, 1)
    if kind == 3:
        return f"{bits}-bit floating-point pixels"
    if kind not in (1, 4):  # 4: undefined, as some scanners write
        return f"signed or complex {bits}-bit pixels"
    if bits not in (1, 2, 4, 8, 16):
        return f"{bits} bits per channel"
    return None
