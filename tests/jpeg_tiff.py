"""A tiled TIFF of JPEG tiles, as in an .svs, which neither Pillow nor tifffile (without a codec)
can write.
"""

import io
import struct

TILE, MPP = 256, 0.25  # px, µm/px


def cut(image):
    """JPEG tiles of a PIL image, {(row, column): bytes}; those over the border are filled up with
    black.
    """
    tiles = {}
    for row in range(-(-image.height // TILE)):
        for column in range(-(-image.width // TILE)):
            buffer, x, y = io.BytesIO(), column * TILE, row * TILE
            image.crop((x, y, x + TILE, y + TILE)).save(
                buffer, "jpeg", quality=80, subsampling="4:2:0"
            )
            tiles[row, column] = buffer.getvalue()
    return tiles


def write(path, tiles, size, orientation=1):
    """A square image of `size` px from its tiles, row by row, with an orientation tag."""
    start, offsets, counts = 8, [], [len(tile) for tile in tiles]
    for count in counts:
        offsets.append(start)
        start += count
    arrays = {
        258: struct.pack("<3H", 8, 8, 8),
        282: struct.pack("<2I", round(10000 / MPP), 1),
        283: struct.pack("<2I", round(10000 / MPP), 1),
        324: struct.pack(f"<{len(tiles)}I", *offsets),
        325: struct.pack(f"<{len(tiles)}I", *counts),
    }
    short, long, rational = 3, 4, 5
    entries = [
        (256, long, 1, size),
        (257, long, 1, size),
        (258, short, 3, None),
        (259, short, 1, 7),  # JPEG
        (262, short, 1, 6),  # YCbCr
        (274, short, 1, orientation),
        (277, short, 1, 3),
        (282, rational, 1, None),
        (283, rational, 1, None),
        (284, short, 1, 1),
        (296, short, 1, 3),
        (322, long, 1, TILE),
        (323, long, 1, TILE),
        (324, long, len(tiles), None),
        (325, long, len(tiles), None),
        (530, short, 2, 2 | 2 << 16),
    ]
    with open(path, "wb") as file:
        file.write(struct.pack("<2sHI", b"II", 42, start + sum(map(len, arrays.values()))))
        file.writelines(tiles)
        for tag, array in arrays.items():
            arrays[tag] = file.tell()
            file.write(array)
        file.write(struct.pack("<H", len(entries)))
        for tag, kind, count, value in entries:
            file.write(
                struct.pack("<2H2I", tag, kind, count, arrays[tag] if value is None else value)
            )
        file.write(struct.pack("<I", 0))
