"""A complete two-stage detector of mitotic figures: hand-made candidates, then an exported model.

    python examples/two_stage_detector.py MODEL.onnx --data data/demo      detect, and measure
    against annotations
    python examples/two_stage_detector.py MODEL.onnx --slide S.svs         detect on a slide

First stage: dark blobs in the haematoxylin channel, as bright against their surroundings as a
mitotic figure is. It finds nearly all of them, and ten times as many other nuclei. Second stage:
`session.Classifier` scores every one. Written to --out: per image mitotic-figures.json in the MIDOG
challenge's format (millimetres), and with --data detection.json (F1 of both stages) and
detection.png.

Replace `blobs` by a detector of your own, and the rest stays as it is. No torch.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
from common import UserError
from dataset import candidates as formats
from dataset import slides
from onnx_model import session

WORKING = 0.5  # µm/px of the first stage: enough to see that something is a dark blob
TILE, MARGIN = 1024, 48  # px at that resolution
INNER, OUTER = 2.0, 6.0  # µm, standard deviations of the two blurs: a figure, and its surroundings
APART = 6.0  # µm: of two blobs that are nearer, the weaker is dropped
MATCH = 7.5  # µm: a detection this near to an annotation has found it (as in the MIDOG challenge)

# Optical densities of haematoxylin, eosin and what is left, in red, green and blue (Ruifrok &
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
        width = [(radius + 1, radius) if a == axis else (0, 0) for a in (0, 1)]
        sums = np.cumsum(np.pad(image, width, mode="edge"), axis=axis, dtype=np.float64)
        n = image.shape[axis]
        ends = np.take(sums, np.arange(2 * radius + 1, 2 * radius + 1 + n), axis=axis)
        image = ((ends - np.take(sums, np.arange(n), axis=axis)) / (2 * radius + 1)).astype(
            np.float32
        )
    return image


def blobs(image, mpp):
    """Candidates of an image → x, y (level-0 px), score; `mpp`: its µm/px."""
    width, height = slides.dimensions(image)
    step, scale = TILE - 2 * MARGIN, WORKING / mpp  # level-0 px per px here
    found, levels = [], []
    for top in np.arange(0, height / scale, step):
        for left in np.arange(0, width / scale, step):
            center = (np.array([left, top]) - MARGIN + TILE / 2) * scale
            tile = slides.read(image, *center, TILE, mpp=WORKING, source_mpp=mpp)
            if (tile.min(axis=2) > 225).mean() > 0.995:
                continue  # glass
            amount = haematoxylin(tile)
            levels.append(np.percentile(amount, 99))
            known = np.outer(
                *(
                    (0 <= c) & (c < full)
                    for c, full in zip(
                        (center[:, None] + (np.arange(TILE) + 0.5 - TILE / 2) * scale)[::-1],
                        (height, width),
                    )
                )
            )
            score = blur(amount, INNER / WORKING, known) - blur(amount, OUTER / WORKING, known)
            around = np.stack(
                [np.roll(score, (a, b), (0, 1)) for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b]
            )
            ys, xs = np.nonzero((score > around.max(axis=0)) & (score > 0.02))
            inside = (xs >= MARGIN) & (xs < TILE - MARGIN) & (ys >= MARGIN) & (ys < TILE - MARGIN)
            for x, y in zip(xs[inside], ys[inside]):
                place = center + (np.array([x, y]) + 0.5 - TILE / 2) * scale
                if 0 <= place[0] < width and 0 <= place[1] < height:
                    found.append((*place, score[y, x]))
    if not found:
        return np.zeros(0), np.zeros(0), np.zeros(0)
    x, y, score = np.array(found).T
    score /= np.median(levels)  # slides are stained to different strengths
    keep = strongest(x, y, score, APART / mpp)
    return x[keep], y[keep], score[keep]


def strongest(x, y, score, distance):
    """Rows that are left when, of two nearer than `distance`, the weaker goes."""
    cells, keep = {}, []
    for i in np.argsort(-score, kind="stable"):
        cell = int(x[i] // distance), int(y[i] // distance)
        near = [
            j
            for a in (-1, 0, 1)
            for b in (-1, 0, 1)
            for j in cells.get((cell[0] + a, cell[1] + b), ())
        ]
        if all((x[i] - x[j]) ** 2 + (y[i] - y[j]) ** 2 >= distance**2 for j in near):
            cells.setdefault(cell, []).append(i)
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
    """Precision, recall and F1 of all thresholds on a score, over several images together."""
    scores, hits, total = [], [], 0
    for one in images:
        scores.append(one[key])
        hits.append(match(one["x"], one["y"], one[key], one["truth"], MATCH / one["mpp"]))
        total += len(one["truth"])
    scores, hits = np.concatenate(scores), np.concatenate(hits)
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(hits[order])
    precision, recall = found / np.arange(1, len(order) + 1), found / max(total, 1)
    return scores[order], precision, recall, 2 * found / (np.arange(1, len(order) + 1) + total)


def at(images, key, threshold):
    """(F1, precision, recall) of the detections with a score of at least `threshold`."""
    scores, precision, recall, f1 = curve(images, key)
    n = int((scores >= threshold).sum())
    return (
        (float(f1[n - 1]), float(precision[n - 1]), float(recall[n - 1])) if n else (0.0, 0.0, 0.0)
    )


def best(images, key):
    scores, _, _, f1 = curve(images, key)
    return float(scores[int(np.argmax(f1))]) if len(f1) else 0.5


# ---------------------------------------------------------------- the command


def annotated_images(args):
    """Annotated images with their mitotic figures, in two parts: (to choose thresholds on, held
    out).
    """
    import data

    table = data.load_dataset(args.data, images=args.images)
    split_file = (
        Path(args.split) if args.split else Path(args.model).resolve().parent / "split.json"
    )
    parts = [np.unique(table.image)] * 2
    if args.split or split_file.exists():  # one that is named must be there
        split = data.load_split(split_file, table)
        parts = [np.unique(table.image[table.rows(ids)]) for ids in (split.val, split.test)]
    else:
        print(
            f"note: no {split_file}: it is unknown which images the model was trained on; the "
            "figures below flatter "
            "it",
            file=sys.stderr,
        )

    def truth(name):
        rows = (table.image == name) & (table.label == 1)
        return np.stack([table.x[rows], table.y[rows]], axis=1)

    return [[(table.image_path(name), truth(name)) for name in names] for names in parts]


def draw(path, images, threshold, first, second):
    """Left: first stage; middle: both; right: precision and recall of all thresholds, on the
    held-out images.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = max(images, key=lambda one: len(one["truth"]))
    width, height = slides.dimensions(shown["image"])
    side = min(width, height, 1200)
    cx, cy = np.median(shown["truth"], axis=0) if len(shown["truth"]) else (width / 2, height / 2)
    left, top = (
        int(np.clip(c - side / 2, 0, full - side)) for c, full in ((cx, width), (cy, height))
    )
    pixels = slides.read(shown["image"], left + side / 2, top + side / 2, side)
    figure, axes = plt.subplots(1, 3, figsize=(16, 5.6), constrained_layout=True)
    for axis, key, limit, result, title in (
        (axes[0], "blob", threshold["blob"], first, "first stage alone"),
        (axes[1], "probability", threshold["probability"], second, "both stages"),
    ):
        axis.imshow(pixels)
        chosen = shown[key] >= limit
        hit = match(
            shown["x"][chosen],
            shown["y"][chosen],
            shown[key][chosen],
            shown["truth"],
            MATCH / shown["mpp"],
        )
        for flag, colour, label in ((True, "#1a9850", "found"), (False, "#d73027", "false")):
            these = hit == flag
            axis.scatter(
                shown["x"][chosen][these] - left,
                shown["y"][chosen][these] - top,
                s=160,
                facecolors="none",
                edgecolors=colour,
                linewidths=1.8,
                label=f"{label} ({these.sum()})",
            )
        axis.scatter(
            *(shown["truth"] - (left, top)).T,
            marker="+",
            s=60,
            c="black",
            linewidths=1,
            label=f"annotated ({len(shown['truth'])})",
        )
        axis.set(
            xlim=(0, side),
            ylim=(side, 0),
            xticks=[],
            yticks=[],
            title=f"{title}: F1 {result[0]:.3f} on all images",
        )
        axis.legend(loc="lower right", fontsize=8)
    for key, colour, label in (
        ("blob", "#7f7f7f", "first stage"),
        ("probability", "#1f77b4", "both stages"),
    ):
        _, precision, recall, _ = curve(images, key)
        axes[2].plot(recall, precision, color=colour, label=label)
    for result, colour in ((first, "#7f7f7f"), (second, "#1f77b4")):
        axes[2].plot(result[2], result[1], "o", color=colour)
    axes[2].set(
        xlabel="recall",
        ylabel="precision",
        xlim=(0, 1),
        ylim=(0, 1.02),
        title=f"{len(images)} held-out images, {sum(len(one['truth']) for one in images)} mitotic "
        "figures",
    )
    axes[2].legend()
    with common.atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


def refuse_twice(images):
    """UserError where two images would be written to one folder of --out."""
    seen = {}
    for image in map(Path, images):
        if image.stem in seen:
            raise UserError(
                f"{seen[image.stem]} and {image} are both called {image.stem}, so one's result "
                "would "
                "replace the other's; give them one at a time, each with its own --out"
            )
        seen[image.stem] = image


def main():
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
        "--out", default="detections", metavar="DIR", help="where to (default: detections)"
    )
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu (default: auto)")
    args = parser.parse_args()
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
        measured = []
        for part in (tuning, held_out):
            with common.progress(part, desc="images", unit="images") as bar:
                measured.append(
                    [
                        {**detect(path, classifier, args.mpp), "image": path, "truth": truth}
                        for path, truth in bar
                    ]
                )
        tuning, held_out = measured
        threshold = best(tuning, "probability")
        own = best(
            held_out, "blob"
        )  # the best that the first stage can do, chosen on the very images it is judged on
        first, second = at(held_out, "blob", own), at(held_out, "probability", threshold)
        rows = [
            ("first stage, its best threshold on these images", *first),
            ("both stages, threshold from validation images", *second),
            (
                "both stages, the model's own threshold",
                *at(held_out, "probability", classifier.threshold),
            ),
        ]
        print(
            common.table(
                [(name, *(f"{v:.3f}" for v in values)) for name, *values in rows],
                ("on held-out images", "F1", "precision", "recall"),
                right=(1, 2, 3),
            )
        )
        common.write_json(
            out / "detection.json",
            {
                "first": dict(zip(("f1", "precision", "recall"), first), threshold=own),
                "both": dict(zip(("f1", "precision", "recall"), second), threshold=threshold),
                "images": len(held_out),
                "mitotic_figures": sum(len(one["truth"]) for one in held_out),
                "candidates": sum(len(one["x"]) for one in held_out),
            },
        )
        draw(
            out / "detection.png", held_out, {"blob": own, "probability": threshold}, first, second
        )
        print(f"figure: {out / 'detection.png'}")
        for one in held_out:
            save(out, one, threshold)
    for slide in map(Path, args.slide):
        one = {**detect(slide, classifier, args.mpp), "image": slide}
        save(out, one, threshold)
        print(
            f"{slide}: {len(one['x'])} candidates, {int((one['probability'] >= threshold).sum())} "
            "mitotic figures"
        )
    print(f"written: {out}/*/mitotic-figures.json")


def save(out, one, threshold):
    content = formats.challenge(one["x"], one["y"], one["probability"], threshold, one["mpp"])
    common.write_json(out / one["image"].stem / "mitotic-figures.json", content)


if __name__ == "__main__":
    common.command(main)
