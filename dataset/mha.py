"""MetaImage (.mha): a text header, then the pixels, plain or compressed with zlib.

Read strictly: what ITK writes for RGB images and stacks of them is understood, everything else is
refused by name. Files are untrusted: pixels in another file (ElementDataFile) are not followed, and
no more is decompressed than the header announces."""

import re
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import UserError
from dataset import slides, tiff

LONGEST_HEADER = 1 << 16  # bytes
CHANNELS = 3
TRUE, FALSE = ("true", "1"), ("false", "0")


class MetaImage(NamedTuple):
    """The images of a file, and where their pixels lie."""

    pixels: np.ndarray  # uint8 [N, H, W, 3], RGB
    mpp: float | None  # µm/px; None if the file does not say a plausible one
    offset: tuple  # (x, y) of the first pixel's centre, mm


def read(path):
    """The MetaImage in the file `path`; UserError if it is not one of RGB with 8 bits."""
    slides.regular_file(path)
    content = Path(path).read_bytes()
    header, start = _header(path, content)
    size = _numbers(path, header, "DimSize", whole=True)
    dimensions = len(size)
    if dimensions not in (2, 3) or header.get("NDims", str(dimensions)) != str(dimensions):
        raise UserError(f"{path}: an image (2 dimensions) or a stack of them (3) is needed")
    if min(size) < 1:
        raise UserError(f"{path}: DimSize {header['DimSize']}: holds no pixels")
    _check_kind(path, header, dimensions)
    width, height = size[:2]
    count = size[2] if dimensions == 3 else 1
    slides.check_pixels(path, width, height * count, "it is")

    spacing = [1.0] * dimensions
    for key in ("ElementSize", "ElementSpacing"):  # ITK reads the second if both are there
        if key in header:
            spacing = _numbers(path, header, key, dimensions)
    offset = [0.0] * dimensions
    for key in ("Origin", "Position", "Offset"):  # names of the same
        if key in header:
            offset = _numbers(path, header, key, dimensions)
    data = _pixel_bytes(path, header, content[start:], width * height * count * CHANNELS)
    pixels = np.frombuffer(data, np.uint8).reshape(count, height, width, CHANNELS)
    mpp = tiff.square(spacing[0] * 1000, spacing[1] * 1000)
    return MetaImage(pixels, mpp, (offset[0], offset[1]))


def _header(path, content):
    """({key: text}, where the pixels start) of a file; ElementDataFile is the last key."""
    header, start = {}, 0
    while "ElementDataFile" not in header:
        end = content.find(b"\n", start, LONGEST_HEADER)
        line = content[start:end].decode("ascii", "replace")
        key, equals, value = line.partition("=")
        key = key.strip()
        if end < 0 or not equals or not re.fullmatch(r"\w+", key):
            raise UserError(f"{path}: not a MetaImage (.mha), or cut off")
        if key in header:
            raise UserError(f"{path}: its header has {key} twice")
        header[key] = value.strip()
        start = end + 1
    for key in ("DimSize", "ElementType"):
        if key not in header:
            raise UserError(f"{path}: its header has no {key}")
    return header, start


def _check_kind(path, header, dimensions):
    """UserError unless the pixels are RGB of 8 bits, in this file, and lie as they are shown."""
    if header["ElementDataFile"] != "LOCAL":
        raise UserError(
            f"{path}: its pixels are in another file, which is not followed; write one file (.mha)"
        )
    if header.get("ObjectType", "Image") != "Image":
        raise UserError(f"{path}: holds no image (ObjectType)")
    channels = header.get("ElementNumberOfChannels", "1")
    kind = header["ElementType"].removesuffix("_ARRAY")
    if kind != "MET_UCHAR" or channels != str(CHANNELS):
        raise UserError(
            f"{path}: {channels} channels of {kind[:20]}; RGB is needed (3 of MET_UCHAR)"
        )
    if not _flag(path, header, "BinaryData", default=True):
        raise UserError(f"{path}: its pixels are written as text; binary data are needed")
    for key in ("TransformMatrix", "Rotation", "Orientation"):
        if key not in header:
            continue
        matrix = np.reshape(_numbers(path, header, key, dimensions**2), (dimensions, dimensions))
        if not np.allclose(matrix, np.eye(dimensions)):
            raise UserError(f"{path}: is turned or mirrored ({key}); write it without")


def _pixel_bytes(path, header, data, expected):
    """The bytes of the pixels, decompressed; UserError unless there are `expected` of them."""
    if _flag(path, header, "CompressedData", default=False):
        decoder = zlib.decompressobj()
        try:
            plain = decoder.decompress(data, expected + 1)
        except zlib.error:
            raise UserError(f"{path}: its pixels are damaged; copy it again") from None
        if len(plain) == expected and not decoder.eof:
            raise UserError(f"{path}: its pixels are cut off or damaged; copy it again")
        data = plain
    if len(data) != expected:
        raise UserError(
            f"{path}: holds {len(data):,} bytes of pixels, its header announces {expected:,}; copy "
            "it again"
        )
    return data


def _flag(path, header, key, default):
    value = header.get(key, str(default)).lower()
    if value not in TRUE + FALSE:
        raise UserError(f"{path}: {key} is {value[:20]!r}, True or False is needed")
    return value in TRUE


def _numbers(path, header, key, count=None, whole=False):
    """The numbers of a key; UserError if they are not finite, whole or as many as needed."""
    try:
        if whole:
            numbers = [int(text) for text in header[key].split()]
        else:
            numbers = [float(text) for text in header[key].split()]
    except ValueError:
        numbers = []
    if not numbers or count not in (None, len(numbers)) or not np.isfinite(numbers).all():
        raise UserError(f"{path}: {key} is {header[key][:40]!r} in its header")
    return numbers
