"""Slides that are folders of DICOM files."""

import dicom_wsi
import numpy as np
import pytest
from dicom_wsi import element, item
from onnx_models import patches
from PIL import Image

from common import UserError
from dataset import annotations, dicom, formats, slides
from scoring import match


def picture(seed=0, side=512):
    return Image.fromarray(patches(1, seed=seed, size=side)[0])


def pyramid(folder, seed=0, series="1.2.3.6"):
    """A slide of two levels, a file each; the larger one is not the first by name."""
    folder.mkdir(parents=True)
    image = picture(seed)
    dicom_wsi.write(folder / "0.dcm", image.resize((256, 256)), 0.5, series, "1.2.3.4.2", True)
    dicom_wsi.write(folder / "1.dcm", image, 0.25, series, "1.2.3.4.1")
    return image


def test_a_folder_of_one_series_is_one_slide(tmp_path):
    image = pyramid(tmp_path / "case" / "A1")
    opened = dicom.slide_in(tmp_path / "case" / "A1")
    assert opened == tmp_path / "case" / "A1" / "0.dcm"
    assert slides.dimensions(opened) == (512, 512)
    assert slides.microns_per_pixel(opened) == pytest.approx(0.25)
    window = slides.read(opened, 256, 256, 224)
    middle = np.asarray(image)[144:368, 144:368]
    assert np.abs(window.astype(int) - middle).mean() < 6  # the noise that JPEG takes away
    assert slides.held(tmp_path / "case" / "A1") == opened
    assert dicom.name_of(opened) == "A1"
    index = annotations.ImageFiles(tmp_path)
    assert index.slides == {"case/A1": "case/A1/0.dcm"}
    for name in ("A1", "case/A1", "A1.svs", "1.dcm", "elsewhere/case/A1.dcm"):
        assert index.find(name)[0] == "case/A1/0.dcm", name


def test_files_of_several_series_are_several_slides(tmp_path):
    for name, series in (("a.dcm", "1.2.1"), ("b.dcm", "1.2.2")):
        dicom_wsi.write(tmp_path / name, picture(), 0.25, series)
    assert dicom.slide_in(tmp_path) is None
    assert annotations.ImageFiles(tmp_path).slides == {"a.dcm": "a.dcm", "b.dcm": "b.dcm"}
    assert annotations.dicom_slide(tmp_path) is None
    assert dicom.name_of(tmp_path / "a.dcm") == "a.dcm"


def test_other_images_beside_it_make_a_folder_of_images(tmp_path):
    pyramid(tmp_path / "a")
    picture().save(tmp_path / "a" / "b.png")
    names = annotations.ImageFiles(tmp_path).slides
    assert list(names) == ["a/0.dcm", "a/1.dcm", "a/b.png"]


def test_folders_tell_slides_of_one_name_apart(tmp_path):
    for case, series in (("x", "1.2.1"), ("y", "1.2.2")):
        pyramid(tmp_path / case / "HE", series=series)
    index = annotations.ImageFiles(tmp_path)
    assert index.find("y/HE")[0] == "y/HE/0.dcm"
    with pytest.raises(UserError, match="several files"):
        index.find("HE")


def test_the_slide_of_a_folder_has_its_name_and_those_of_its_files(tmp_path):
    pyramid(tmp_path / "A1")
    table = tmp_path / "c.csv"
    opened = tmp_path / "A1" / "0.dcm"
    for names, expected in (
        (["A1", "B"], [opened, None]),
        (["A1/1.dcm"], [opened]),
        (["", ""], [opened, opened]),
    ):
        table.write_text("\n".join(["filename,x,y", *(f"{name},9,9" for name in names)]))
        candidates = formats.read_candidates(table)
        assert match.find_images(candidates, tmp_path / "A1") == (expected, []), names
    table.write_text("filename,x,y\nB,9,9\n")
    with pytest.raises(UserError, match="no candidates on it"):
        match.find_images(formats.read_candidates(table), tmp_path / "A1")


def header(*elements):
    return bytes(128) + b"DICM" + b"".join(elements)


SERIES = element(0x0020000E, "UI", "1.2.9")


def undefined(tag, *items):
    """A sequence that ends by a mark, of items that do."""
    start = element(tag, "SQ", b"")[:-4] + b"\xff\xff\xff\xff"
    text = b""
    for content in items:
        text += b"\xfe\xff\x00\xe0\xff\xff\xff\xff" + content + b"\xfe\xff\x0d\xe0" + bytes(4)
    return start + text + b"\xfe\xff\xdd\xe0" + bytes(4)


@pytest.mark.parametrize(
    "content, expected",
    [
        (header(SERIES), "1.2.9"),
        # The series of another file, inside sequences of either kind, is not this one's.
        (
            header(element(0x00081115, "SQ", item(element(0x0020000E, "UI", "1.1"))), SERIES),
            "1.2.9",
        ),
        (header(undefined(0x00081115, element(0x0020000E, "UI", "1.1")), SERIES), "1.2.9"),
        (header(undefined(0x00081115, undefined(0x00081199, SERIES)), SERIES), "1.2.9"),
        (header(element(0x00280002, "US", 3), SERIES), None),
        (header(SERIES[:9]), None),
        (header(undefined(0x00081115, SERIES)[:20]), None),
        (header(undefined(0x00081115)[:-8] + b"abcdefgh"), None),
        (b"no DICOM", None),
        (b"", None),
    ],
)
def test_the_series_of_a_header(content, expected, tmp_path):
    (tmp_path / "a.dcm").write_bytes(content)
    assert dicom.series(tmp_path / "a.dcm") == expected


def test_damaged_files_are_no_slide_and_raise_nothing(tmp_path):
    """Cut off anywhere in the header, or with a byte of it changed."""
    pyramid(tmp_path / "whole")
    content = (tmp_path / "whole/1.dcm").read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "a/1.dcm"
    path.parent.mkdir()
    found = set()
    for place in rng.integers(128, 900, 150).tolist():
        path.write_bytes(content[:place])
        found.add(dicom.slide_of([path]))
        damaged = bytearray(content[:3000])
        damaged[place] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        dicom.slide_of([path])
        assert dicom.slide_in(tmp_path / "whole") is not None
    assert None in found


def test_datasets_name_a_slide_by_its_folder(tmp_path):
    for name, series in (("A1", "1.2.1"), ("A2", "1.2.2")):
        pyramid(tmp_path / "slides" / name, series=series)
    rows = ["filename,x,y,label", "A1,100,120,1", "A2.dcm,130,140,0", "A1,200,210,0"]
    (tmp_path / "table.csv").write_text("\n".join(rows))
    table = annotations.load_dataset(tmp_path / "table.csv", images=tmp_path / "slides")
    assert table.image.tolist() == ["A1/0.dcm", "A1/0.dcm", "A2/0.dcm"] and not table.missing
    assert table.case.tolist() == ["A1", "A1", "A2"]
    window = slides.read(table.path(2), table.x[2], table.y[2], 64)
    expected = np.asarray(picture())[140 - 32 : 140 + 32, 130 - 32 : 130 + 32]
    assert np.abs(window.astype(int) - expected).mean() < 8
