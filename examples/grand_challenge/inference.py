"""An algorithm for both tracks of the MIDOG 2025 challenge, in the container that Grand Challenge
runs: one image in /input, one JSON in /output.

    python inference.py                                                    in the container
    python inference.py --input DIR --output DIR --model MODEL.onnx        anywhere else

Track 1, detection: a region as TIFF or .mha → mitotic-figures.json, "Multiple points" in mm. The
first stage finds blobs of haematoxylin, the exported model scores them.

Track 2, atypical mitotic figures: a stack of at most 16 patches, multi-page TIFF or .mha →
multiple-mitotic-figure-classification.json, a list of {class, confidence} in the order of the
stack. The challenge reads a confidence as that of the class beside it.

Which track it is, inputs.json says."""

import argparse
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import common
from common import UserError
from dataset import formats, mha, slides
from onnx_model import reading, session
from scoring import blobs

MOST_PATCHES = 16  # in a stack
CLASSES = ("normal", "atypical")  # the challenge's names
ATYPICAL = re.compile(r"atypical|\bAMF\b", re.IGNORECASE)


# ---------------------------------------------------------------- the input


def socket(folder):
    """The slug of the one input that inputs.json lists."""
    inputs = common.read_json(folder / "inputs.json")
    try:
        slugs = [entry["interface"]["slug"] for entry in inputs]
    except (TypeError, KeyError):
        raise UserError(f"{folder / 'inputs.json'}: not a list of inputs") from None
    if len(slugs) != 1 or slugs[0] not in TRACKS:
        raise UserError(
            f"{folder / 'inputs.json'}: one input is needed, {' or '.join(TRACKS)}; it lists "
            f"{', '.join(map(str, slugs)) or 'none'}"
        )
    return slugs[0]


def only_image(folder):
    """The one image in an input's folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    images = [path for path in folder.iterdir() if path.suffix.lower() in (".tif", ".tiff", ".mha")]
    if len(images) != 1:
        raise UserError(f"{folder}: one .tif, .tiff or .mha is needed, it has {len(images)}")
    return images[0]


def read_region(path):
    """(the path, or uint8 [H, W, 3] of a .mha; µm/px or None; place of the first pixel in mm)."""
    if path.suffix.lower() != ".mha":
        return path, slides.microns_per_pixel(path), (0.0, 0.0)
    image = mha.read(path)
    if len(image.pixels) != 1:
        raise UserError(f"{path}: a stack of {len(image.pixels)} images; one region is needed")
    return image.pixels[0], image.mpp, image.offset


def read_stack(path):
    """(patches, each uint8 [H, W, 3]; µm/px or None)."""
    if path.suffix.lower() != ".mha":
        return slides.pages(path, MOST_PATCHES), slides.microns_per_pixel(path)
    image = mha.read(path)
    if len(image.pixels) > MOST_PATCHES:
        raise UserError(f"{path}: holds {len(image.pixels)} patches, at most {MOST_PATCHES}")
    return list(image.pixels), image.mpp


# ---------------------------------------------------------------- the tracks


def detect(path, classifier, mpp):
    """Track 1 → the content of mitotic-figures.json."""
    if any(ATYPICAL.search(label) for label in classifier.labels):
        raise UserError(f"{classifier.path}: tells atypical from normal figures; track 2 is its")
    image, own_mpp, (left, top) = read_region(path)
    mpp = mpp or own_mpp
    if mpp is None:
        raise UserError(f"{path}: its µm/px is unknown, and the points must be in mm; give --mpp")
    x, y, _, _ = blobs.find(image, mpp)
    probability = classifier.score(image, x, y, mpp=mpp)
    figures = int((probability >= classifier.threshold).sum())
    print(f"{path.name}: {len(x)} candidates, {figures} mitotic figures")
    pixel = mpp / 1000  # mm
    return formats.challenge.content_of(
        x + left / pixel, y + top / pixel, probability, classifier.threshold, mpp
    )


def warnings_of(readers):
    """Why the probabilities of a stack may be wrong."""
    found = {reader.warning for reader in readers} - {None}
    for reader in readers:
        side = min(reader.width, reader.height)
        if side < round(reader.side):
            found.add(
                f"patches of {side} px, where the model was trained on {reader.side:.0f} px; the "
                "rest is white"
            )
    return sorted(found)


def classify(path, classifier, mpp):
    """Track 2 → the content of multiple-mitotic-figure-classification.json."""
    atypical = [label for label in (0, 1) if ATYPICAL.search(classifier.labels[label])]
    if len(atypical) != 1:
        raise UserError(
            f"{classifier.path}: its classes are {', '.join(classifier.labels)}; one must be "
            "called atypical (or AMF); train on such labels, or export again"
        )
    patches, own_mpp = read_stack(path)
    readers = [reading.SlideReader(classifier.metadata, patch, mpp or own_mpp) for patch in patches]
    for warning in warnings_of(readers):
        print(f"warning: {path.name}: {warning}", file=sys.stderr)
    x, y = np.array([(reader.width / 2, reader.height / 2) for reader in readers]).T
    probability = reading.score(classifier, readers, np.arange(len(readers)), x, y)
    content = []
    for p in probability.tolist():
        label = int(p >= classifier.threshold)
        confidence = (1 - p, p)[label]
        content.append({"class": CLASSES[label == atypical[0]], "confidence": confidence})
    count = sum(one["class"] == CLASSES[1] for one in content)
    print(f"{path.name}: {len(content)} patches, {count} atypical")
    return content


# slug of the input → (its folder, name of the output, what makes it)
TRACKS = {
    "histopathology-region-of-interest-cropout": (
        "images/histopathology-roi-cropout",
        "mitotic-figures.json",
        detect,
    ),
    "stacked-histopathology-roi-cropouts": (
        "images/stacked-histopathology-roi-cropouts",
        "multiple-mitotic-figure-classification.json",
        classify,
    ),
}


# ---------------------------------------------------------------- the command


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="Both tracks of the MIDOG 2025 challenge: an image in, a JSON out."
    )
    parser.add_argument(
        "--input",
        type=Path,
        default=Path("/input"),
        metavar="DIR",
        help="folder with inputs.json and images/ (default: /input)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("/output"),
        metavar="DIR",
        help="folder of the JSON (default: /output)",
    )
    parser.add_argument(
        "--model",
        default="/opt/ml/model/model.onnx",
        metavar="MODEL.onnx",
        help="made by export.py (default: /opt/ml/model/model.onnx)",
    )
    parser.add_argument(
        "--mpp", type=float, metavar="M", help="µm/px of the image (default: what its file says)"
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cuda, cuda:1 or cpu (default: auto)"
    )
    return parser.parse_args()


def main():
    args = parse_arguments()
    if args.mpp is not None and not 0.01 <= args.mpp <= 100:
        raise UserError(f"--mpp {args.mpp}: µm/px between 0.01 and 100 are needed")
    folder, name, run = TRACKS[socket(args.input)]
    path = only_image(args.input / folder)
    common.check_output("--output", args.output / name, [path, args.model])
    classifier = session.Classifier(args.model, args.device)
    print(f"{args.model}: {classifier.note}")
    if classifier.input != "uint8" or classifier.threshold is None:
        raise UserError(f"{args.model}: a classifier exported with --input uint8 is needed")
    common.write_json(args.output / name, run(path, classifier, args.mpp))
    print(f"written: {args.output / name}")


if __name__ == "__main__":
    common.command(main)
