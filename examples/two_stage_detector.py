"""A complete two-stage detector of mitotic figures: hand-made candidates, then an exported model.

    python examples/two_stage_detector.py MODEL.onnx --data data/demo     detect, and measure
    python examples/two_stage_detector.py MODEL.onnx --slide S.svs        detect on a slide

First stage: dark blobs in the haematoxylin channel, as bright against their surroundings as a
mitotic figure is. It finds nearly all of them, and ten times as many other nuclei. Second stage:
`Classifier.score` scores every one. Written to --out: mitotic-figures.json of each image in the
MIDOG challenge's format (millimetres), and with --data detection.json (F1 of both stages) and
detection.png.

Replace `blobs` by a detector of your own, and the rest stays as it is."""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
from common import UserError
from dataset import formats, slides
from onnx_model import session

WORKING = 0.5  # µm/px of the first stage: enough to see that something is a dark blob
TILE, MARGIN = 1024, 48  # px at that resolution
INNER, OUTER = 2.0, 6.0  # µm, standard deviations of the two blurs: a figure, and its surroundings
APART = 6.0  # µm: of two blobs that are nearer, the weaker is dropped
LEAST = 0.02  # optical density above the surroundings, below which nothing is a candidate
MATCH = 7.5  # µm: a detection this near to an annotation has found it (as in the MIDOG challenge)

# Optical densities of haematoxylin, eosin and the remainder, in red, green and blue (Ruifrok &
# Johnston 2001)
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])


# ---------------------------------------------------------------- first stage


def haematoxylin(pixels):
    """Amount of haematoxylin float32 [h, w] in uint8 RGB."""
    density = -np.log((pixels.astype(np.float32) + 1) / 256)
    return np.maximum(density @ np.linalg.inv(STAINS)[:, 0].astype(np.float32), 0)


def blur(image, sigma, known=None):
    """Gaussian blur by three box filters, each a difference of cumulative sums; of the pixels that
    are `known`.
    """
    if known is not None and not known.all():
        return blur(image * known, sigma) / np.maximum(blur(known.astype(np.float32), sigma), 1e-3)
    radius = max(1, round((12 * sigma**2 / 3 + 1) ** 0.5 / 2 - 0.5))
    for axis in (0, 1) * 3:
        border = [(0, 0), (0, 0)]
        border[axis] = (radius + 1, radius)
        sums = np.cumsum(np.pad(image, border, mode="edge"), axis=axis, dtype=np.float64)
        starts = np.arange(image.shape[axis])
        width = 2 * radius + 1
        box = np.take(sums, starts + width, axis=axis) - np.take(sums, starts, axis=axis)
        image = (box / width).astype(np.float32)
    return image


def blobs(image, mpp):
    """Candidates of an image → x, y (level-0 px), score; `mpp`: its µm/px."""
    width, height = slides.dimensions(image)
    scale = WORKING / mpp  # level-0 px per px here
    step = TILE - 2 * MARGIN
    candidates, levels = [], []
    for top in np.arange(0, height / scale, step):
        for left in np.arange(0, width / scale, step):
            center = (np.array([left, top]) - MARGIN + TILE / 2) * scale
            tile = slides.read(image, *center, TILE, mpp=WORKING, source_mpp=mpp)
            if (tile.min(axis=2) > 225).mean() > 0.995:
                continue  # glass
            amount = haematoxylin(tile)
            levels.append(np.percentile(amount, 99))

            # Only what lies on the image counts as surroundings.
            offsets = (np.arange(TILE) + 0.5 - TILE / 2) * scale
            columns, rows = center[0] + offsets, center[1] + offsets
            known = np.outer(
                (0 <= rows) & (rows < height),
                (0 <= columns) & (columns < width),
            )
            score = blur(amount, INNER / WORKING, known) - blur(amount, OUTER / WORKING, known)
            for x, y in peaks(score):
                cx, cy = columns[x], rows[y]
                if 0 <= cx < width and 0 <= cy < height:
                    candidates.append((cx, cy, score[y, x]))
    if not candidates:
        return np.zeros(0), np.zeros(0), np.zeros(0)
    x, y, score = np.array(candidates).T
    score /= np.median(levels)  # slides are stained to different strengths
    keep = strongest(x, y, score, APART / mpp)
    return x[keep], y[keep], score[keep]


def peaks(score):
    """(x, y) of the local maxima of a tile's score, its margin left out."""
    shifts = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if (a, b) != (0, 0)]
    around = np.max([np.roll(score, shift, (0, 1)) for shift in shifts], axis=0)
    y, x = np.nonzero((score > around) & (score > LEAST))
    inside = (np.minimum(x, y) >= MARGIN) & (np.maximum(x, y) < TILE - MARGIN)
    return zip(x[inside], y[inside])


def strongest(x, y, score, distance):
    """Rows that remain if, of two nearer than `distance`, the weaker goes."""
    cells, keep = {}, []  # cells of a grid as wide as `distance`: only neighbours can be too near
    for i in np.argsort(-score, kind="stable"):
        column, row = int(x[i] // distance), int(y[i] // distance)
        near = []
        for a in (-1, 0, 1):
            for b in (-1, 0, 1):
                near += cells.get((column + a, row + b), [])
        if all((x[i] - x[j]) ** 2 + (y[i] - y[j]) ** 2 >= distance**2 for j in near):
            cells.setdefault((column, row), []).append(i)
            keep.append(i)
    return np.array(keep, dtype=np.int64)


# ---------------------------------------------------------------- both stages


def detect(image, classifier, given_mpp=None):
    """Both stages on one image → dict of arrays x, y, blob, probability, and its mpp."""
    mpp = given_mpp or slides.microns_per_pixel(image) or classifier.mpp
    if mpp is None:
        raise UserError(f"{image}: its µm/px is unknown, and the model's too; give --mpp")
    x, y, blob = blobs(image, mpp)
    probability = classifier.score(image, x, y, mpp=mpp)
    return {"x": x, "y": y, "blob": blob, "probability": probability, "mpp": mpp}


def match(x, y, score, truth, distance):
    """Greedy matching, best score first, each annotation once → bool [n]: which detections are
    hits.
    """
    free, hit = np.ones(len(truth), bool), np.zeros(len(x), bool)
    for i in np.argsort(-score, kind="stable"):
        if free.any():
            squared = np.where(free, ((truth - (x[i], y[i])) ** 2).sum(axis=1), np.inf)
            j = int(np.argmin(squared))
            if squared[j] <= distance**2:
                free[j], hit[i] = False, True
    return hit


def curve(images, key):
    """Scores from the highest, and precision, recall and F1 of the detections down to each, over
    several images together.
    """
    scores, hits, total = [], [], 0
    for one in images:
        scores.append(one[key])
        hits.append(match(one["x"], one["y"], one[key], one["truth"], MATCH / one["mpp"]))
        total += len(one["truth"])
    scores, hits = np.concatenate(scores), np.concatenate(hits)
    order = np.argsort(-scores, kind="stable")
    correct, detections = np.cumsum(hits[order]), np.arange(1, len(order) + 1)
    precision, recall = correct / detections, correct / max(total, 1)
    return scores[order], precision, recall, 2 * correct / (detections + total)


def at(images, key, threshold):
    """(F1, precision, recall) of the detections with a score of at least `threshold`."""
    scores, precision, recall, f1 = curve(images, key)
    n = int((scores >= threshold).sum())
    if n == 0:
        return 0.0, 0.0, 0.0
    return float(f1[n - 1]), float(precision[n - 1]), float(recall[n - 1])


def best(images, key):
    """The threshold of the highest F1; 0.5 without detections."""
    scores, _, _, f1 = curve(images, key)
    if not len(f1):
        return 0.5
    return float(scores[int(np.argmax(f1))])


# ---------------------------------------------------------------- the command


def annotated_images(args):
    """Annotated images with their mitotic figures, in two parts: (to choose thresholds on, held
    out); each [(path, truth float [n, 2])].
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
        return table.image_path(name), np.stack([table.x[rows], table.y[rows]], axis=1)

    return [[with_truth(name) for name in names] for names in parts]


def measure(images, classifier, mpp):
    """`detect` on annotated images → its dicts, with image and truth."""
    results = []
    with common.progress(images, desc="images", unit="images") as bar:
        for path, truth in bar:
            results.append({**detect(path, classifier, mpp), "image": path, "truth": truth})
    return results


def report(tuning, held_out, classifier, out):
    """Print and write how good both stages are → the threshold, chosen on `tuning`."""
    threshold = best(tuning, "probability")
    # The best that the first stage can do, chosen on the very images that it is judged on.
    flattering = best(held_out, "blob")
    first = at(held_out, "blob", flattering)
    both = at(held_out, "probability", threshold)
    stored = at(held_out, "probability", classifier.threshold)
    rows = []
    for name, values in (
        ("first stage, its best threshold on these images", first),
        ("both stages, threshold from validation images", both),
        ("both stages, the model's own threshold", stored),
    ):
        rows.append([name, *(f"{value:.3f}" for value in values)])
    header = ("on held-out images", "F1", "precision", "recall")
    print(common.table(rows, header, right=(1, 2, 3)))
    names = ("f1", "precision", "recall")
    common.write_json(
        out / "detection.json",
        {
            "first": dict(zip(names, first), threshold=flattering),
            "both": dict(zip(names, both), threshold=threshold),
            "images": len(held_out),
            "mitotic_figures": sum(len(one["truth"]) for one in held_out),
            "candidates": sum(len(one["x"]) for one in held_out),
        },
    )
    thresholds = {"blob": flattering, "probability": threshold}
    draw(out / "detection.png", held_out, thresholds, first, both)
    print(f"figure: {out / 'detection.png'}")
    return threshold


def draw(path, images, threshold, first, both):
    """Left: first stage; middle: both; right: precision and recall of all thresholds, on the
    held-out images.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(16, 5.6), constrained_layout=True)
    example = max(images, key=lambda one: len(one["truth"]))
    draw_image(axes[0], example, "blob", threshold["blob"])
    axes[0].set_title(f"first stage alone: F1 {first[0]:.3f} on all images")
    draw_image(axes[1], example, "probability", threshold["probability"])
    axes[1].set_title(f"both stages: F1 {both[0]:.3f} on all images")
    for key, colour, label, chosen in (
        ("blob", "#7f7f7f", "first stage", first),
        ("probability", "#1f77b4", "both stages", both),
    ):
        _, precision, recall, _ = curve(images, key)
        axes[2].plot(recall, precision, color=colour, label=label)
        axes[2].plot(chosen[2], chosen[1], "o", color=colour)
    figures = sum(len(one["truth"]) for one in images)
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
    center = np.array([width / 2, height / 2])
    if len(one["truth"]):
        center = np.median(one["truth"], axis=0)
    left = int(np.clip(center[0] - side / 2, 0, width - side))
    top = int(np.clip(center[1] - side / 2, 0, height - side))
    axis.imshow(slides.read(one["image"], left + side / 2, top + side / 2, side))

    rows = one[key] >= threshold
    x, y = one["x"][rows], one["y"][rows]
    hit = match(x, y, one[key][rows], one["truth"], MATCH / one["mpp"])
    for which, colour, label in ((hit, "#1a9850", "found"), (~hit, "#d73027", "false")):
        axis.scatter(
            x[which] - left,
            y[which] - top,
            s=160,
            facecolors="none",
            edgecolors=colour,
            linewidths=1.8,
            label=f"{label} ({which.sum()})",
        )
    axis.scatter(
        *(one["truth"] - (left, top)).T,
        marker="+",
        s=60,
        c="black",
        linewidths=1,
        label=f"annotated ({len(one['truth'])})",
    )
    axis.set(xlim=(0, side), ylim=(side, 0), xticks=[], yticks=[])
    axis.legend(loc="lower right", fontsize=8)


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
        refuse_twice([path for path, _ in held_out] + args.slide)
        tuning, held_out = (measure(images, classifier, args.mpp) for images in (tuning, held_out))
        threshold = report(tuning, held_out, classifier, out)
        for one in held_out:
            save(out, one, threshold)
    for slide in map(Path, args.slide):
        one = {**detect(slide, classifier, args.mpp), "image": slide}
        save(out, one, threshold)
        figures = int((one["probability"] >= threshold).sum())
        print(f"{slide}: {len(one['x'])} candidates, {figures} mitotic figures")
    print(f"written: {out}/*/mitotic-figures.json")


if __name__ == "__main__":
    common.command(main)
