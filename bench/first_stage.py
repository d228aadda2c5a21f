"""Recall and candidates per mm² of the hand-made first stage (scoring/blobs.py).

    python bench/first_stage.py --data demo                         images with annotated figures
    python bench/first_stage.py --patches patches/*.png --mpp 0.25  a figure in the middle of each
    python bench/first_stage.py --slides slide.svs tiles/*.png --mpp 0.25     no annotations

A figure is found if a candidate lies within 7.5 µm of it, one to one. Candidates are counted per
mm² of tissue. One row per least score of a candidate: what a stricter first stage would lose."""

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common
import data
from common import UserError
from dataset import slides
from dataset.annotations import by_image
from reporting import detection
from scoring import blobs

LEAST = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)


def searched(path, mpp, figures_x=(), figures_y=()):
    """The candidates of an image with its figures, as detection.score_images() wants them."""
    mpp = mpp or slides.microns_per_pixel(path)
    found = blobs.find(path, mpp)
    slides.close(path)
    return {
        "x": found.x,
        "y": found.y,
        "score": found.score,
        "figures_x": np.asarray(figures_x),
        "figures_y": np.asarray(figures_y),
        "mpp": mpp,
        "tissue": found.tissue.area(mpp),
    }


def annotated(source, folder):
    """[(path, figures' x, y)] of the images of a dataset."""
    table, images = data.load_dataset(source, images=folder), []
    for name, rows in by_image(table).items():
        figures = rows[table.label[rows] == 1]
        images.append((table.image_path(name), table.x[figures], table.y[figures]))
    return images


def centred(path):
    """(path, the middle of the image)."""
    width, height = slides.dimensions(path)
    return path, [width / 2], [height / 2]


def rows_of(images):
    """A line of the table per least score."""
    rows = []
    figures = sum(len(image["figures_x"]) for image in images)
    area = sum(image["tissue"] for image in images)
    for least in LEAST:
        kept = []
        for image in images:
            strong = image["score"] >= least
            kept.append({**image, **{key: image[key][strong] for key in ("x", "y", "score")}})
        curve = detection.at(detection.score_images(kept, key="score"))
        recall = "–"
        if figures:
            recall = f"{curve['tp'] / figures:.3f}"
        candidates = sum(len(image["x"]) for image in kept)
        density = "–"
        if area:
            density = f"{candidates / area:.0f}"
        rows.append([f"{least:g}", len(images), figures, recall, candidates, density])
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", metavar="D", help="annotated images, as for train.py")
    parser.add_argument(
        "--patches",
        nargs="+",
        default=[],
        metavar="P",
        help="a mitotic figure in the middle of each",
    )
    parser.add_argument("--images", metavar="DIR", help="folder of the images of --data")
    parser.add_argument("--slides", nargs="+", default=[], metavar="S", help="not annotated")
    parser.add_argument("--mpp", type=float, metavar="M", help="µm/px (default: the files')")
    parser.add_argument("--limit", type=int, metavar="N", help="so many images (default: all)")
    args = parser.parse_args()
    images = [(path, (), ()) for path in args.slides]
    images += map(centred, args.patches)
    if args.data:
        images += annotated(args.data, args.images)
    if not images:
        raise UserError("--data, --patches or --slides is needed")
    if args.limit:  # spread over the list
        images = images[:: -(-len(images) // args.limit)]
    measured = []
    with common.progress(images, desc="images", unit="images") as bar:
        for path, x, y in bar:
            measured.append(searched(path, args.mpp, x, y))
    header = ["least score", "images", "figures", "recall", "candidates", "per mm²"]
    print(common.table(rows_of(measured), header, right=range(1, 6)))


if __name__ == "__main__":
    common.command(main)
