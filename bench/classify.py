"""10,000 candidates on a slide, end to end, against the model alone and against the loop that one
writes first.

    model alone    the classifier on patches that are in memory already, 64 per call
    classify.py    the command as it stands: candidates from a MIDOG JSON, the slide read,
                   probabilities written
    plain loop     OpenSlide's read_region, Pillow's convert, ONNX Runtime on batches of 64, one
    after the other

    python bench/classify.py            CPU: dinov2-s (random weights) in int8; GPU: h-optimus-0 in
    fp16
    python bench/classify.py --quick    the demo's encoder, 500 candidates

The slide is made of the demo's images: 16,384 px square in JPEG tiles of 256 px, as in an .svs; the
candidates are the cells annotated there. Latency is that of the class, from array to probability.
Status 1 where the command comes to less than 0.9 of the model alone."""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:1] = [
    str(ROOT),
    str(ROOT / "tests"),
]  # not this folder: its onnx.py and classify.py would hide the real ones

import jpeg_tiff
import onnxruntime
import openslide
import torch
from onnx_models import write_model
from PIL import Image

import common
import flags
import models
from dataset import slides
from onnx_model import (
    graph,
    session,
)

SIDE = 16  # images along a side of the slide
WANTED = 0.9


def make_slide(path, demo, side):
    """A tiled TIFF of side x side demo images → centres (x, y) of the cells annotated on it."""
    names, generator = np.unique(demo.image), np.random.default_rng(0)
    chosen, size = generator.choice(names, (side, side)), 1024
    tiles, each = {}, size // jpeg_tiff.TILE
    for name in names:
        tiles[name] = jpeg_tiff.cut(Image.open(demo.image_path(name)).convert("RGB"))
    jpeg_tiff.write(
        path,
        [
            tiles[chosen[row // each, column // each]][row % each, column % each]
            for row in range(side * each)
            for column in range(side * each)
        ],
        side * size,
    )
    assert openslide.OpenSlide.detect_format(str(path)) is not None
    place = {name: np.stack([demo.x, demo.y], axis=1)[demo.image == name] for name in names}
    return np.concatenate(
        [
            place[chosen[row, column]] + (column * size, row * size)
            for row in range(side)
            for column in range(side)
        ]
    )


def write_candidates(path, slide, points):
    boxes = [[x - 25, y - 25, x + 25, y + 25] for x, y in points.tolist()]
    path.write_text(
        json.dumps(
            {
                "images": [{"id": 1, "file_name": slide.name}],
                "categories": [{"id": 1, "name": "mitotic figure"}],
                "annotations": [
                    {"id": i, "image_id": 1, "category_id": 1, "bbox": box}
                    for i, box in enumerate(boxes)
                ],
            }
        )
    )


def plain_loop(model, slide, points, device, threads):
    """What one writes first → probabilities."""
    providers = (
        ["CUDAExecutionProvider", "CPUExecutionProvider"]
        if device == "cuda"
        else ["CPUExecutionProvider"]
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(model), options, providers=providers)
    handle, found = openslide.OpenSlide(str(slide)), []
    for i in range(0, len(points), 64):
        corners = [
            (slides.corner(x, 224), slides.corner(y, 224)) for x, y in points[i : i + 64].tolist()
        ]
        batch = np.stack(
            [
                np.asarray(handle.read_region(corner, 0, (224, 224)).convert("RGB"))
                for corner in corners
            ]
        )
        found.append(session.run(None, {"patches": batch})[0])
    return np.concatenate(found)


def command(model, slide, points, device, threads, folder):
    """classify.py as a process → (probabilities, seconds in all, candidates/s that it prints)."""
    write_candidates(folder / "in.json", slide, points)
    start = time.perf_counter()
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "classify.py"),
            str(model),
            "--slide",
            str(slide),
            "--candidates",
            str(folder / "in.json"),
            "--out",
            str(folder / "out.json"),
            "--device",
            device,
            "--threads",
            str(threads),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - start
    written = json.loads((folder / "out.json").read_text())["annotations"]
    rate = float(re.search(r"([\d.]+) candidates/s", done.stdout)[1])
    return np.array([annotation["probability"] for annotation in written]), seconds, rate


def alone(classifier, patches, batches):
    start = time.perf_counter()
    for _ in range(batches):
        classifier(patches)
    return batches * len(patches) / (time.perf_counter() - start)


def latency(classifier, patches, runs):
    """(p50, p99) in ms of a call."""
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        classifier(patches)
        seconds.append(time.perf_counter() - start)
    return 1000 * np.percentile(seconds, [50, 99])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", help="encoder (default: dinov2-s on the CPU, h-optimus-0 on a GPU)"
    )
    parser.add_argument(
        "--weights", default="random", help="its published weights (default: random)"
    )
    parser.add_argument("--precision", help="default: int8 on the CPU, fp16 on a GPU")
    parser.add_argument(
        "--candidates", type=int, default=10_000, help="default: 10000; --quick: 500"
    )
    parser.add_argument(
        "--plain", type=int, default=1500, help="candidates of the plain loop (default: 1500)"
    )
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="of the CPU (default: all)"
    )
    parser.add_argument("--quick", action="store_true", help="the demo's encoder, 500 candidates")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = args.model or (
        "demo" if args.quick else "h-optimus-0" if device == "cuda" else "dinov2-s"
    )
    precision = args.precision or ("fp16" if device == "cuda" else "int8")
    count, side = (min(500, args.candidates), 6) if args.quick else (args.candidates, SIDE)
    weights = None if name == "demo" else args.weights
    demo = flags.from_source({"data": "demo", "fit": "resize"})[0]

    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        folder = Path(folder)
        slide, model = folder / "slide.tif", folder / "model.onnx"
        points = make_slide(slide, demo, side)
        points = np.random.default_rng(1).permutation(points)[:count]
        some = points[: min(args.plain, count)]
        patches = np.stack([slides.read(slide, x, y, 224) for x, y in points[:64]])
        network = models.PatchClassifier(models.load_encoder(name, weights)).eval()
        with graph.activation_peaks(network.encoder) as peaks:  # as export.py does
            models.predict(network, patches[:16], progress=None)
        write_model(model, network, precision, inline=False, peaks=dict(peaks))
        classifier = session.Classifier(model, device, threads=args.threads)
        batches = max(2, min(40, count // 256))

        rates = [alone(classifier, patches, batches)]
        scored, seconds, printed = command(model, slide, points, device, args.threads, folder)
        rates.append(alone(classifier, patches, batches))
        start = time.perf_counter()
        plain = plain_loop(model, slide, some, device, args.threads)
        plain_rate = len(some) / (time.perf_counter() - start)
        rates.append(alone(classifier, patches, batches))
        waits = {
            batch: latency(classifier, patches[:batch], 20 if args.quick else 200)
            for batch in (1, 8)
        }
    base = float(np.mean(rates))
    # batches are put together differently, so an int8 model scales its activations differently
    off = float(np.abs(plain - scored[: len(some)]).max())
    print(
        f"\n{name} ({weights or 'shipped'} weights), {precision}, {device}, {args.threads} "
        "threads, onnxruntime "
        f"{onnxruntime.__version__}; {len(points):,} candidates on a slide of {side * 1024:,} px "
        "square\n"
    )
    print("| way | candidates | candidates/s | × model alone |\n|---|---|---|---|")
    for label, n, rate in (
        ("model alone", 3 * batches * 64, base),
        ("classify.py, reading and scoring", count, printed),
        ("classify.py, from start to exit", count, count / seconds),
        ("plain loop", len(some), plain_rate),
    ):
        print(f"| {label} | {n:,} | {rate:.1f} | {rate / base:.2f} |")
    print("\n| latency | p50 | p99 |\n|---|---|---|")
    for batch, (p50, p99) in waits.items():
        print(f"| batch {batch} | {p50:.1f} ms | {p99:.1f} ms |")
    print(
        "\nthe model alone, before, between and after: "
        f"{', '.join(f'{rate:.1f}' for rate in rates)}/s; largest "
        f"difference between the command's probabilities and the loop's: {off:.1e}"
    )
    return printed / base < WANTED and not args.quick


if __name__ == "__main__":
    common.command(main)
