"""A complete two-stage detector of mitotic figures: hand-made candidates, then an exported model.

    python examples/two_stage_detector.py MODEL.onnx --data data/demo     detect, and measure
    python examples/two_stage_detector.py MODEL.onnx --slide S.svs        detect on a slide

First stage: `scoring.blobs`, dark blobs of haematoxylin; it finds nearly all mitotic figures, and
ten times as many other nuclei. Second stage: `Classifier.score` scores every one. With --data the
scores of both stages are also combined, by their product and by logistic regression; thresholds and
weights come from validation images, the figures from held-out ones. Written to --out:
mitotic-figures.json of each image in the MIDOG challenge's format (millimetres), and with --data
detection.json (F1, and mitotic counts per mm² against the truth) and detection.png.

Replace `blobs.find` by a detector of your own, and the rest stays as it is. For a slide without
annotations, `python classify.py MODEL.onnx --slide S --candidates blobs --out O` does the same."""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
from common import UserError
from dataset import formats, slides
from onnx_model import session
from reporting import detection
from scoring import blobs, count

SCORES = {  # name → what it is of an image's dict
    "first stage": "score",
    "classifier": "probability",
    "product": "product",
    "logistic": "logistic",
}


# ---------------------------------------------------------------- both stages


def detect(image, classifier, given_mpp=None):
    """Both stages on one image → dict of arrays x, y (px), score (first stage), probability, and
    mpp (µm/px) and tissue (mm²).
    """
    mpp = given_mpp or slides.microns_per_pixel(image) or classifier.mpp
    if mpp is None:
        raise UserError(f"{image}: its µm/px is unknown, and the model's too; give --mpp")
    first = blobs.find(image, mpp)
    probability = classifier.score(image, first.x, first.y, mpp=mpp)
    return {
        "x": first.x,
        "y": first.y,
        "score": first.score,
        "probability": probability,
        "mpp": mpp,
        "tissue": first.tissue.area(mpp),
    }


def annotated_images(args):
    """Annotated images with their mitotic figures, in two parts: (to choose thresholds on, held
    out); each [(path, x [n], y [n])], px.
    """
    import data

    table = data.load_dataset(args.data, images=args.images)
    split_file = Path(args.model).resolve().parent / "split.json"
    if args.split:
        split_file = Path(args.split)
    if args.split or split_file.exists():  # one that is named must exist
        split = data.load_split(split_file, table)
        parts = [np.unique(table.image[table.rows(ids)]) for ids in (split.val, split.test)]
    else:
        print(
            f"note: no {split_file}, so it is unknown which images the model was trained on; the "
            "figures below flatter it",
            file=sys.stderr,
        )
        parts = [np.unique(table.image)] * 2

    def with_truth(name):
        rows = (table.image == name) & (table.label == 1)
        return table.image_path(name), table.x[rows], table.y[rows]

    return [[with_truth(name) for name in names] for names in parts]


def measure(images, classifier, mpp):
    """`detect` on annotated images → its dicts, with image and the truth (figures_x, figures_y)."""
    results = []
    with common.progress(images, desc="images", unit="images") as bar:
        for path, x, y in bar:
            truth = {"image": path, "figures_x": x, "figures_y": y}
            results.append(detect(path, classifier, mpp) | truth)
    return results


# ---------------------------------------------------------------- how good it is


def report(tuning, held_out, classifier, out):
    """Print and write how good each score is → the classifier's threshold, chosen on `tuning`."""
    for how in detection.COMBINATIONS:
        detection.add_combined(tuning, held_out, how)
        for image in (*tuning, *held_out):
            image[how] = image.pop("combined")
    results = {}
    for name, key in SCORES.items():
        threshold = detection.best(detection.score_images(tuning, key=key))["threshold"]
        results[name] = judged(held_out, key, threshold)
    results["classifier, its own threshold"] = judged(held_out, "probability", classifier.threshold)
    rows = []
    for name, values in results.items():
        numbers = [values[key] for key in ("f1", "precision", "recall")]
        rows.append([name, *(f"{number:.3f}" for number in numbers), f"{values['error']:.1f}"])
    header = ("on held-out images", "F1", "precision", "recall", "error of the count per mm²")
    print(common.table(rows, header, right=(1, 2, 3, 4)))
    figures = sum(len(one["figures_x"]) for one in held_out)
    area = sum(one["tissue"] for one in held_out)
    print(
        f"{figures} mitotic figures on {len(held_out)} images, {area:.2f} mm² of tissue; "
        "thresholds and weights from validation images; error: mean over the images"
    )
    content = {
        "scores": results,
        "images": len(held_out),
        "mitotic_figures": figures,
        "candidates": sum(len(one["x"]) for one in held_out),
        "tissue_mm2": area,
    }
    common.write_json(out / "detection.json", content)
    draw(out / "detection.png", held_out, results)
    print(f"figure: {out / 'detection.png'}")
    return results["classifier"]["threshold"]


def judged(images, key, threshold):
    """detection.at() of a score from a threshold on, with the counts per mm² of tissue: counts
    [(detected, true)] of each image, and the mean of their differences.
    """
    counts = []
    for one in images:
        size = slides.dimensions(one["image"])
        found = one[key] >= threshold
        pair = []
        for x, y in ((one["x"][found], one["y"][found]), (one["figures_x"], one["figures_y"])):
            counted = count.count(x, y, one["mpp"], size, tissue=one["tissue"])
            pair.append(counted.per_mm2 or 0.0)
        counts.append(pair)
    error = float(np.mean([abs(found - true) for found, true in counts]))
    values = detection.at(detection.score_images(images, key=key), threshold)
    return {**values, "counts": counts, "error": error}


def draw(path, images, results):
    """Left: first stage; middle: both; right: precision and recall of all thresholds, on the
    held-out images.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(16, 5.6), constrained_layout=True)
    example = max(images, key=lambda one: len(one["figures_x"]))
    for axis, name in zip(axes, ("first stage", "classifier")):
        draw_image(axis, example, SCORES[name], results[name]["threshold"])
        axis.set_title(f"{name}: F1 {results[name]['f1']:.3f} on all images")
    for name, key in SCORES.items():
        curve = detection.score_images(images, key=key)
        (line,) = axes[2].plot(
            curve["tp"] / max(curve["figures"], 1),
            curve["tp"] / (curve["tp"] + curve["fp"]),
            label=name,
        )
        axes[2].plot(results[name]["recall"], results[name]["precision"], "o", c=line.get_color())
    figures = sum(len(one["figures_x"]) for one in images)
    axes[2].set(
        xlabel="recall",
        ylabel="precision",
        xlim=(0, 1),
        ylim=(0, 1.02),
        title=f"{len(images)} held-out images, {figures} mitotic figures",
    )
    axes[2].legend()
    with common.atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


def draw_image(axis, one, key, threshold):
    """A part of an image with its annotations, and its detections from `threshold` on."""
    width, height = slides.dimensions(one["image"])
    side = min(width, height, 1200)
    truth = np.stack([one["figures_x"], one["figures_y"]], axis=1)
    center = np.array([width / 2, height / 2])
    if len(truth):
        center = np.median(truth, axis=0)
    left = int(np.clip(center[0] - side / 2, 0, width - side))
    top = int(np.clip(center[1] - side / 2, 0, height - side))
    axis.imshow(slides.read(one["image"], left + side / 2, top + side / 2, side))

    rows = one[key] >= threshold
    shown = {**one, **{name: one[name][rows] for name in ("x", "y", "probability")}}
    hit = detection.found_by(shown)
    for which, colour, label in ((hit, "#1a9850", "found"), (~hit, "#d73027", "false")):
        axis.scatter(
            shown["x"][which] - left,
            shown["y"][which] - top,
            s=160,
            facecolors="none",
            edgecolors=colour,
            linewidths=1.8,
            label=f"{label} ({which.sum()})",
        )
    axis.scatter(
        *(truth - (left, top)).T,
        marker="+",
        s=60,
        c="black",
        linewidths=1,
        label=f"annotated ({len(truth)})",
    )
    axis.set(xlim=(0, side), ylim=(side, 0), xticks=[], yticks=[])
    axis.legend(loc="lower right", fontsize=8)


# ---------------------------------------------------------------- the command


def refuse_twice(images):
    """UserError if two images would be written to one folder of --out."""
    by_name = {}
    for image in map(Path, images):
        if image.stem in by_name:
            raise UserError(
                f"{by_name[image.stem]} and {image} are both called {image.stem}, so one's result "
                "would replace the other's; give them one at a time, each with its own --out"
            )
        by_name[image.stem] = image


def save(out, one, threshold):
    content = formats.challenge.content_of(
        one["x"], one["y"], one["probability"], threshold, one["mpp"]
    )
    common.write_json(out / one["image"].stem / "mitotic-figures.json", content)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="A complete two-stage detector: blobs of haematoxylin, then MODEL."
    )
    parser.add_argument("model", metavar="MODEL.onnx", help="made by export.py")
    parser.add_argument(
        "--data", metavar="D", help="annotated images: file or folder as for train.py"
    )
    parser.add_argument(
        "--images", metavar="DIR", help="folder of the images (default: beside the annotations)"
    )
    parser.add_argument(
        "--split", metavar="FILE", help="split.json of the model's run (default: beside the model)"
    )
    parser.add_argument(
        "--slide", nargs="+", default=[], metavar="S", help="slides or images without annotations"
    )
    parser.add_argument(
        "--mpp", type=float, help="µm/px (default: what the file says, else the model's)"
    )
    parser.add_argument(
        "--out",
        default="detections",
        metavar="DIR",
        help="folder to write to (default: detections)",
    )
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu (default: auto)")
    return parser.parse_args()


def main():
    args = parse_arguments()
    if not args.data and not args.slide:
        raise UserError("--data (annotated images) or --slide is needed")
    if args.mpp is not None and not 0.01 <= args.mpp <= 100:
        raise UserError(f"--mpp {args.mpp}: µm/px between 0.01 and 100 are needed")
    refuse_twice(args.slide)
    classifier = session.Classifier(args.model, args.device)
    out = Path(args.out)
    print(f"{args.model}: {classifier.note}")

    threshold = classifier.threshold
    if args.data:
        tuning, held_out = annotated_images(args)
        refuse_twice([path for path, *_ in held_out] + args.slide)
        tuning, held_out = (measure(images, classifier, args.mpp) for images in (tuning, held_out))
        threshold = report(tuning, held_out, classifier, out)
        for one in held_out:
            save(out, one, threshold)
    for slide in map(Path, args.slide):
        one = {**detect(slide, classifier, args.mpp), "image": slide}
        save(out, one, threshold)
        found = one["probability"] >= threshold
        counted = count.count(
            one["x"][found],
            one["y"][found],
            one["mpp"],
            slides.dimensions(slide),
            tissue=one["tissue"],
        )
        print(f"{slide}: {len(found)} candidates, {count.text(counted)}")
    print(f"written: {out}/*/mitotic-figures.json")


if __name__ == "__main__":
    common.command(main)
