"""A DICOM whole-slide image of JPEG tiles (PS3.3 A.32.8), as small as OpenSlide accepts it."""

import io
import struct

TILE = 256
SLIDE, JPEG_BASELINE = "1.2.840.10008.5.1.4.1.1.77.1.6", "1.2.840.10008.1.2.4.50"
LONG = ("OB", "SQ", "UT")  # value representations with a length of 32 bits


def element(tag, kind, value):
    """One data element, explicit VR, little endian."""
    group, number = tag >> 16, tag & 0xFFFF
    if kind == "US":
        value = struct.pack("<H", value)
    elif kind == "UL":
        value = struct.pack("<I", value)
    elif isinstance(value, str):
        value = value.encode()
        value += (b"\0" if kind == "UI" else b" ") * (len(value) % 2)
    head = struct.pack("<HH2s", group, number, kind.encode())
    if kind in LONG:
        return head + struct.pack("<HI", 0, len(value)) + value
    return head + struct.pack("<H", len(value)) + value


def item(content):
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(content)) + content


def write(path, image, mpp, series="1.2.3.6", instance="1.2.3.4", derived=False):
    """Write a square PIL image, a multiple of TILE px wide; mpp: µm/px.

    Files of one series, each with an instance of its own, are the levels of one slide; all but the
    largest are derived."""
    kind = "ORIGINAL\\PRIMARY\\VOLUME\\NONE"
    if derived:
        kind = "DERIVED\\PRIMARY\\VOLUME\\RESAMPLED"
    side = image.width
    frames = []
    for y in range(0, side, TILE):
        for x in range(0, side, TILE):
            buffer = io.BytesIO()
            image.crop((x, y, x + TILE, y + TILE)).save(
                buffer, "jpeg", quality=95, subsampling="4:2:2"
            )
            frames.append(buffer.getvalue() + b"\0" * (buffer.tell() % 2))
    spacing = f"{mpp / 1000:.6f}\\{mpp / 1000:.6f}"
    measures = item(element(0x00280030, "DS", spacing))
    groups = item(element(0x00289110, "SQ", measures))
    meta = (
        element(0x00020001, "OB", b"\0\1")
        + element(0x00020002, "UI", SLIDE)
        + element(0x00020003, "UI", instance)
        + element(0x00020010, "UI", JPEG_BASELINE)
        + element(0x00020012, "UI", "1.2.3")
    )
    dataset = [
        (0x00080008, "CS", kind),
        (0x00080016, "UI", SLIDE),
        (0x00080018, "UI", instance),
        (0x00080060, "CS", "SM"),
        (0x0020000D, "UI", "1.2.3.5"),
        (0x0020000E, "UI", series),
        (0x00209311, "CS", "TILED_FULL"),
        (0x00280002, "US", 3),  # samples per pixel
        (0x00280004, "CS", "YBR_FULL_422"),
        (0x00280006, "US", 0),
        (0x00280008, "IS", str(len(frames))),
        (0x00280010, "US", TILE),
        (0x00280011, "US", TILE),
        (0x00280100, "US", 8),  # bits allocated, stored, high
        (0x00280101, "US", 8),
        (0x00280102, "US", 7),
        (0x00280103, "US", 0),
        (0x00480006, "UL", side),
        (0x00480007, "UL", side),
        (0x00480302, "UL", 1),
        (0x00480303, "UL", 1),
        (0x52009229, "SQ", groups),
    ]
    with open(path, "wb") as file:
        file.write(bytes(128) + b"DICM" + element(0x00020000, "UL", len(meta)) + meta)
        file.writelines(element(*entry) for entry in dataset)
        # Encapsulated pixel data: an empty table of offsets, the frames, the end.
        file.write(struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, 0xFFFFFFFF) + item(b""))
        file.writelines(item(frame) for frame in frames)
        file.write(struct.pack("<HHI", 0xFFFE, 0xE0DD, 0))
