"""The demo's picture: the scored candidates of an image, with the truth.

    python -m demo.picture demo-out/scored.json --out demo-out/scored.png

A ring is a cell that the model calls a mitotic figure, a square one that it calls a look-alike. The
mark is whole if the call is right, dashed and crossed out if it is wrong."""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

import common
from common import UserError
from reporting import overlay

BAND = 64  # px: height of the legend


def scored_cells(scored, annotations):
    """The scored candidates of one image: (its file name, x, y, probability, label that was called,
    true label), the last five arrays [n]. UserError if the two files do not belong together.
    """
    truth, content = common.read_json(annotations), common.read_json(scored)
    try:
        category = {a["id"]: a["category_id"] for a in truth["annotations"]}
        names = {c["id"]: c["name"] for c in content["categories"]}
        files = {i["id"]: i["file_name"] for i in content["images"]}
        cells = [a for a in content["annotations"] if "probability" in a]
        if not cells:
            raise UserError(f"{scored}: holds no scored candidate; classify.py adds the scores")
        image = cells[0]["image_id"]
        rows = []
        for cell in cells:
            if cell["image_id"] == image:
                left, top, right, bottom = cell["bbox"]
                called = cell["class"] == names[1]
                true = category[cell["id"]] == 1
                place = (left + right) / 2, (top + bottom) / 2
                rows.append((*place, cell["probability"], int(called), int(true)))
        return files[image], *np.array(rows).T
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{scored}: not the scored candidates of {annotations} in MIDOG's format"
        ) from None


def draw(image, x, y, probability, called, true):
    """The picture [PIL image] of one image's scored cells, with a legend below."""
    view, left, top, scale = overlay.view_around(image, x, y, longest=2000)
    picture = Image.new("RGB", (view.width, view.height + BAND), "white")
    picture.paste(view)
    marks = overlay.Marks(picture, scale)
    for i in np.argsort(called == true)[::-1]:  # the wrong ones on top
        cx, cy = (x[i] - left) * scale, (y[i] - top) * scale
        mark(marks, cx, cy, called[i], called[i] == true[i], f"{probability[i]:.2f}")
    place, line = 20 + marks.radius, view.height + BAND // 2
    for label, name in ((1, "called mitotic figure"), (0, "called look-alike")):
        for right, word in ((True, "right"), (False, "wrong")):
            count = int(((called == label) & ((called == true) == right)).sum())
            mark(marks, place, line, label, right, "")
            text = f"{name}, {word}: {count}"
            marks.text(place + marks.radius + 8, line, text, "black")
            place += picture.width // 4
    return picture


def mark(marks, x, y, label, right, text):
    marks.mark(x, y, int(label), text, square=label == 0, dashed=not right)
    if not right:
        marks.cross(x, y)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scored", metavar="SCORED", help="what classify.py wrote of the candidates")
    parser.add_argument(
        "--annotations",
        default="data/demo/MIDOG.json",
        metavar="JSON",
        help="the truth, with the images beside it (default: data/demo/MIDOG.json)",
    )
    parser.add_argument("--out", required=True, metavar="PNG", help="picture to write")
    args = parser.parse_args()
    name, x, y, probability, called, true = scored_cells(args.scored, args.annotations)
    image = Path(args.annotations).parent / name
    common.check_output("--out", args.out, [args.scored, args.annotations, image])
    picture = draw(image, x, y, probability, called, true)
    with common.atomic(args.out) as temporary:
        picture.save(temporary, format="PNG")
    print(f"{args.out}: {int((called == true).sum())} of {len(true)} cells of {name} called right")


if __name__ == "__main__":
    common.command(main)
