"""MetaImage: what ITK writes is read, everything else is one line."""

import zlib

import numpy as np
import pytest

from common import UserError
from dataset import mha

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), np.uint8)  # N, H, W, RGB


def write(path, pixels=PIXELS, changes=None, compressed=False, data=None):
    """A file as ITK writes it; changes: {key: text, or None to leave it out}."""
    count, height, width, channels = pixels.shape
    size, dimensions = f"{width} {height}", 2
    if count > 1:
        size, dimensions = f"{size} {count}", 3
    header = {
        "ObjectType": "Image",
        "NDims": str(dimensions),
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": str(compressed),
        "TransformMatrix": " ".join(f"{v:g}" for v in np.eye(dimensions).ravel()),
        "Offset": " ".join(["0"] * dimensions),
        "CenterOfRotation": " ".join(["0"] * dimensions),
        "ElementSpacing": "0.00025 0.00025 1" if count > 1 else "0.00025 0.00025",
        "DimSize": size,
        "ElementNumberOfChannels": str(channels),
        "ElementType": "MET_UCHAR",
        **(changes or {}),
        "ElementDataFile": (changes or {}).get("ElementDataFile", "LOCAL"),
    }
    if data is None:
        data = pixels.tobytes()
        if compressed:
            data = zlib.compress(data)
    lines = [f"{key} = {value}\n" for key, value in header.items() if value is not None]
    path.write_bytes("".join(lines).encode() + data)
    return path


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_pixels_and_scale(tmp_path, count, compressed):
    image = mha.read(write(tmp_path / "a.mha", PIXELS[:count], compressed=compressed))
    assert np.array_equal(image.pixels, PIXELS[:count]) and image.pixels.dtype == np.uint8
    assert image.mpp == pytest.approx(0.25) and image.offset == (0, 0)


def test_as_simpleitk_reads_it(tmp_path):
    itk = pytest.importorskip("SimpleITK")
    ours = mha.read(write(tmp_path / "a.mha", changes={"Offset": "1.5 -2 0"}))
    theirs = itk.ReadImage(str(tmp_path / "a.mha"))
    assert np.array_equal(itk.GetArrayFromImage(theirs), ours.pixels)
    assert theirs.GetOrigin()[:2] == ours.offset
    itk.WriteImage(theirs, str(tmp_path / "b.mha"), useCompression=True)
    assert np.array_equal(mha.read(tmp_path / "b.mha").pixels, PIXELS)


def test_the_offset_is_kept_and_no_spacing_is_no_scale(tmp_path):
    changes = {"Offset": "0.5 -1.25 0", "ElementSpacing": None}
    image = mha.read(write(tmp_path / "a.mha", changes=changes))
    assert image.offset == (0.5, -1.25) and image.mpp is None
    image = mha.read(write(tmp_path / "a.mha", changes={"ElementSpacing": "0.0005 0.00025 1"}))
    assert image.mpp is None  # no square pixels


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"ElementDataFile": "other.raw"}, "another file, which is not followed"),
        ({"ElementDataFile": "LIST"}, "another file"),
        ({"ElementType": "MET_USHORT"}, "3 channels of MET_USHORT"),
        ({"ElementNumberOfChannels": "1"}, "1 channels of MET_UCHAR"),
        ({"DimSize": None}, "no DimSize"),
        ({"ElementType": None}, "no ElementType"),
        ({"DimSize": "7 5 -3"}, "holds no pixels"),
        ({"DimSize": "7 x 3"}, "DimSize is"),
        ({"DimSize": "7 5 3 2"}, "2 dimensions"),
        ({"NDims": "2"}, "2 dimensions"),
        ({"DimSize": "7 5 4"}, "announces 420"),
        ({"DimSize": "700000 500000 3"}, "decoding takes about"),
        ({"ElementSpacing": "nan 1 1"}, "ElementSpacing is"),
        ({"ElementSpacing": "0.1 0.1"}, "ElementSpacing is"),
        ({"TransformMatrix": "-1 0 0 0 1 0 0 0 1"}, "turned or mirrored"),
        ({"TransformMatrix": "1 0 0 1"}, "TransformMatrix is"),
        ({"CompressedData": "maybe"}, "True or False"),
        ({"CompressedData": "True"}, "damaged"),
        ({"BinaryData": "False"}, "written as text"),
        ({"ObjectType": "Mesh"}, "no image"),
    ],
)
def test_what_is_refused(tmp_path, changes, words):
    with pytest.raises(UserError, match=words) as refused:
        mha.read(write(tmp_path / "a.mha", changes=changes))
    assert "\n" not in str(refused.value)


def test_files_that_are_none_or_cut_off(tmp_path):
    path = write(tmp_path / "a.mha", compressed=True)
    whole = path.read_bytes()
    end = whole.index(b"LOCAL\n") + 6
    for cut in (0, 5, end - 3, end, len(whole) - 20):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError):
            mha.read(path)
    path.write_bytes(b"ObjectType = Image\nObjectType = Image\n" + whole)
    with pytest.raises(UserError, match="twice"):
        mha.read(path)
    path.write_bytes(b"x" * 100_000)
    with pytest.raises(UserError, match="not a MetaImage"):
        mha.read(path)
    with pytest.raises(UserError, match="no such image"):
        mha.read(tmp_path / "none.mha")


def test_no_more_is_decompressed_than_announced(tmp_path):
    """A small file that would grow to 100 MB."""
    bomb = zlib.compress(bytes(100_000_000))
    with pytest.raises(UserError, match="holds 316 bytes"):
        mha.read(write(tmp_path / "a.mha", compressed=True, data=bomb))
    short = zlib.compress(PIXELS.tobytes()[:-1])
    with pytest.raises(UserError, match="holds 314 bytes"):
        mha.read(write(tmp_path / "a.mha", compressed=True, data=short))


def test_damaged_files_are_refused_or_read(tmp_path):
    """Bytes changed, cut and inserted: an error of one line, or pixels of the announced size."""
    generator = np.random.default_rng(0)
    for compressed in (False, True):
        whole = write(tmp_path / "a.mha", compressed=compressed).read_bytes()
        for _ in range(150):
            content = bytearray(whole)
            for _ in range(generator.integers(1, 4)):
                place = int(generator.integers(len(content)))
                content[place : place + int(generator.integers(2))] = generator.bytes(1)
            (tmp_path / "b.mha").write_bytes(content)
            try:
                image = mha.read(tmp_path / "b.mha")
            except UserError as error:
                assert "\n" not in str(error)
            else:
                assert image.pixels.dtype == np.uint8 and image.pixels.shape[3] == 3
