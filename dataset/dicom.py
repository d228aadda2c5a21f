"""Slides that are a folder of DICOM files: one series, whose files are its levels and labels."""

import contextlib
import struct
from pathlib import Path

import openslide

SUFFIX = ".dcm"
HEADER = 1 << 20  # bytes of a file that are looked through for the series
SERIES = (0x0020, 0x000E)
ITEM, ITEM_END, SEQUENCE_END = (0xFFFE, 0xE000), (0xFFFE, 0xE00D), (0xFFFE, 0xE0DD)
UNDEFINED = 0xFFFFFFFF
# Value representations with a length of 32 bits, two bytes after their name.
LONG = (
    *(b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ"),
    *(b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"),
)


def slide_of(paths):
    """The file by which OpenSlide opens the slide that these files are together, or None.

    paths  all image files of a folder: one slide if all are DICOM files of one series
    """
    paths = sorted(Path(path) for path in paths)
    if not paths or any(path.suffix.lower() != SUFFIX for path in paths):
        return None
    first = series(paths[0])
    if first is None or any(series(path) != first for path in paths[1:]):
        return None
    for path in paths:
        # Files of a series may be no images; whoever opens a damaged one says so.
        with contextlib.suppress(openslide.OpenSlideError):
            if openslide.OpenSlide.detect_format(str(path)) is not None:
                return path
    return None


def slide_in(folder):
    """slide_of the DICOM files of a folder, whatever else lies in it."""
    return slide_of(path for path in Path(folder).iterdir() if path.suffix.lower() == SUFFIX)


def series(path):
    """The Series Instance UID of a DICOM file of explicit little-endian values, or None."""
    try:
        with open(path, "rb") as file:
            head = file.read(HEADER)
    except OSError:  # whoever opens the slide says so
        return None
    if head[128:132] != b"DICM":
        return None
    place = 132
    try:
        while True:
            tag, length, start = element(head, place)
            if tag > SERIES or (tag == SERIES and start + length > len(head)):
                return None
            if tag == SERIES:
                return head[start : start + length].rstrip(b"\0 ").decode("ascii")
            place = after(head, length, start)
    except (struct.error, ValueError, RecursionError):
        return None


def element(head, place):
    """The element at a place → (tag, length of its value, where the value starts)."""
    group, number, kind, length = struct.unpack_from("<HH2sH", head, place)
    if kind in LONG:
        return (group, number), struct.unpack_from("<I", head, place + 8)[0], place + 12
    return (group, number), length, place + 8


def after(head, length, start):
    """Where the element after this one starts; sequences may end by a mark instead of a length."""
    if length != UNDEFINED:
        return start + length
    while True:
        group, number, length = struct.unpack_from("<HHI", head, start)
        start += 8
        if (group, number) == SEQUENCE_END:
            return start
        if (group, number) != ITEM:
            raise ValueError
        if length != UNDEFINED:
            start += length
            continue
        while struct.unpack_from("<HH", head, start) != ITEM_END:
            _, length, inner = element(head, start)
            start = after(head, length, inner)
        start += 8


def name_of(path):
    """What a slide's file is called: for one of several DICOM files, by its folder."""
    path = Path(path)
    if path.suffix.lower() != SUFFIX or slide_in(path.parent) is None:
        return path.name
    return path.parent.resolve().name
