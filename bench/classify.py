"""10,000 candidates on a slide and in a folder of slides, end to end, against the model alone and
against a plain loop.

    model alone    the classifier on patches that are already in memory, 64 per call
    classify.py    the whole command: candidates from a MIDOG JSON, the slide read, probabilities
                   written
    folder         the command on 20 slides, each with its share of the candidates
    plain loop     OpenSlide's read_region, Pillow's convert, ONNX Runtime on batches of 64, one
                   after the other

    python bench/classify.py
        CPU: dinov2-s (random weights) in int8; GPU: h-optimus-0 in fp16
    python bench/classify.py --quick
        the demo's encoder, 500 candidates
    python bench/classify.py --json FILE
        the command's and the model's candidates per second alone, as JSON (bench/gpu.sh)

The slide is made of the demo's images: 16,384 px square in JPEG tiles of 256 px, as in an .svs; the
candidates are the cells annotated there. Latency is that of one call for 1, 8 and 64 cells: of the
model on patches in memory, of Classifier.score on the slide, of the plain loop, and of one that
classifies each cell as soon as it is read. Exit status 1 if the command reaches less than 0.9 of
the rate of the model alone, on the slide or on the folder."""

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
# Instead of this folder, whose onnx.py and classify.py would hide the real ones.
sys.path[:1] = [str(ROOT), str(ROOT / "tests")]

import jpeg_tiff
import onnxruntime
import openslide
import torch
from onnx_models import lacks_cuda, write_model
from PIL import Image

import common
import flags
import models
from dataset import slides
from onnx_model import graph, session

SIDE = 16  # images along a side of the slide
SLIDES = 20  # of the folder
GOAL = 0.9  # of the rate of the model alone


def make_slide(path, demo, side):
    """A tiled TIFF of side x side demo images → centres (x, y) of the cells annotated on it."""
    size = 1024  # px, of an image
    each = size // jpeg_tiff.TILE  # tiles along a side of an image
    names = np.unique(demo.image)
    chosen = np.random.default_rng(0).choice(names, (side, side))
    tiles = {}
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


def plain_loop(model, slide, device, threads, batch=64):
    """The loop that one writes first: a function, points [n, 2] → probabilities."""
    providers = ["CPUExecutionProvider"]
    if device == "cuda":
        providers.insert(0, "CUDAExecutionProvider")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    runtime = onnxruntime.InferenceSession(str(model), options, providers=providers)
    handle = openslide.OpenSlide(str(slide))

    def score(points):
        probabilities = []
        for i in range(0, len(points), batch):
            patches = []
            for x, y in points[i : i + batch].tolist():
                corner = slides.corner(x, 224), slides.corner(y, 224)
                region = handle.read_region(corner, 0, (224, 224))
                patches.append(np.asarray(region.convert("RGB")))
            probabilities.append(runtime.run(None, {"patches": np.stack(patches)})[0])
        return np.concatenate(probabilities)

    return score


def command(model, slide, points, device, threads, folder):
    """classify.py as a process → (probabilities, seconds in all, candidates/s that it prints)."""
    write_candidates(folder / "in.json", slide, points)
    seconds, rate = run(model, slide, folder / "in.json", folder / "out.json", device, threads)
    written = json.loads((folder / "out.json").read_text())["annotations"]
    return np.array([annotation["probability"] for annotation in written]), seconds, rate


def command_on_folder(model, slide, points, device, threads, folder):
    """The same on SLIDES slides, which are one file under many names → (seconds in all,
    candidates/s that it prints).
    """
    slide_folder, candidates = folder / "slides", folder / "candidates"
    slide_folder.mkdir()
    candidates.mkdir()
    for i in range(SLIDES):
        one = slide_folder / f"{i}.tif"
        os.link(slide, one)
        write_candidates(candidates / f"{i}.json", one, points[i::SLIDES])
    return run(model, slide_folder, candidates, folder / "scored", device, threads)


def run(model, slide, candidates, out, device, threads):
    """classify.py → (seconds in all, candidates/s that it prints)."""
    places = ["--slide", slide, "--candidates", candidates, "--out", out]
    words = [ROOT / "classify.py", model, *places, "--device", device, "--threads", threads]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *map(str, words)], check=True, capture_output=True, text=True
    )
    seconds = time.perf_counter() - start
    return seconds, float(re.search(r"([\d.]+) candidates/s", done.stdout)[1])


def alone(classifier, patches, batches):
    start = time.perf_counter()
    for _ in range(batches):
        classifier(patches)
    return batches * len(patches) / (time.perf_counter() - start)


def latency(function, batches):
    """(p50, p99) in ms of a call with one of the batches."""
    seconds = []
    for batch in batches:
        start = time.perf_counter()
        function(batch)
        seconds.append(time.perf_counter() - start)
    return 1000 * np.percentile(seconds, [50, 99])


def latencies(classifier, slide, points, patches, plain, one_by_one, calls):
    """Rows (way, cells, p50, p99 in ms) of 1, 8 and 64 cells anywhere on the slide."""
    rng, rows = np.random.default_rng(2), []
    for n in (1, 8, 64):
        places = [points[rng.integers(0, len(points), n)] for _ in range(calls)]
        for way, function, batches in (
            ("the model alone", classifier, [patches[:n]] * calls),
            ("Classifier.score", lambda part: classifier.score(slide, *part.T), places),
            ("plain loop", plain, places),
            ("plain loop, one by one", one_by_one, places),
        ):
            latency(function, batches[:2])
            rows.append((way, n, *latency(function, batches)))
    return rows


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
    parser.add_argument(
        "--calls", type=int, help="whose latency is measured, each way (default: 200; --quick: 20)"
    )
    parser.add_argument("--quick", action="store_true", help="the demo's encoder, 500 candidates")
    parser.add_argument("--json", metavar="FILE", help="takes the figures")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.json and (missing := lacks_cuda(device)):
        return common.write_json(args.json, {"missing": missing})
    name, precision, count, side = "dinov2-s", "int8", args.candidates, SIDE
    if device == "cuda":
        name, precision = "h-optimus-0", "fp16"
    if args.quick:
        name, count, side = "demo", min(500, count), 6
    name, precision = args.model or name, args.precision or precision
    weights = None if name == "demo" else args.weights
    demo = flags.from_source({"data": "demo", "fit": "resize"})[0]

    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        folder = Path(folder)
        slide, model = folder / "slide.tif", folder / "model.onnx"
        points = make_slide(slide, demo, side)
        points = np.random.default_rng(1).permutation(points)[:count]
        some = points[: min(args.plain, count)]
        patches = np.stack([slides.read(slide, x, y, 224) for x, y in points[:64]])
        network = models.PatchClassifier(models.load_encoder(name, weights, device)).eval()
        with graph.activation_peaks(network.encoder) as peaks:  # as export.py does
            models.predict(network, patches[:16], progress=None)
        write_model(model, network.cpu(), precision, inline=False, peaks=dict(peaks))
        classifier = session.Classifier(model, device, threads=args.threads)
        batches = max(2, min(40, count // 256))

        rates = [alone(classifier, patches, batches)]
        scored, seconds, printed = command(model, slide, points, device, args.threads, folder)
        rates.append(alone(classifier, patches, batches))
        folder_seconds, folder_printed = command_on_folder(
            model, slide, points, device, args.threads, folder
        )
        rates.append(alone(classifier, patches, batches))
        if args.json:
            figures = {"model": name, "precision": precision, "device": device}
            figures |= {"candidates": count, "alone": float(np.mean(rates))}
            figures |= {"slide": printed, "slide_from_start": count / seconds}
            figures |= {"folder": folder_printed, "folder_from_start": count / folder_seconds}
            return common.write_json(args.json, figures)
        loop = plain_loop(model, slide, device, args.threads)
        one_by_one = plain_loop(model, slide, device, args.threads, batch=1)
        start = time.perf_counter()
        plain = loop(some)
        plain_rate = len(some) / (time.perf_counter() - start)
        rates.append(alone(classifier, patches, batches))
        calls = args.calls or (20 if args.quick else 200)
        waits = latencies(classifier, slide, points, patches, loop, one_by_one, calls)
    base = float(np.mean(rates))
    # Not 0 for int8: the batches differ, and with them the scales of the activations.
    difference = float(np.abs(plain - scored[: len(some)]).max())
    print(
        f"\n{name} ({weights or 'shipped'} weights), {precision}, {device}, {args.threads} "
        f"threads, onnxruntime {onnxruntime.__version__}; {len(points):,} candidates on a slide of "
        f"{side * 1024:,} px square\n"
    )
    print("| way | candidates | candidates/s | × model alone |\n|---|---|---|---|")
    for label, n, rate in (
        ("model alone", 4 * batches * 64, base),
        ("classify.py, reading and scoring", count, printed),
        ("classify.py, from start to exit", count, count / seconds),
        (f"classify.py, a folder of {SLIDES} slides", count, folder_printed),
        ("the folder, from start to exit", count, count / folder_seconds),
        ("plain loop", len(some), plain_rate),
    ):
        print(f"| {label} | {n:,} | {rate:.1f} | {rate / base:.2f} |")
    print("\n| latency | cells | p50 | p99 |\n|---|---|---|---|")
    for way, cells, p50, p99 in waits:
        print(f"| {way} | {cells} | {p50:.1f} ms | {p99:.1f} ms |")
    print(
        "\nthe model alone, before, between and after: "
        f"{', '.join(f'{rate:.1f}' for rate in rates)}/s; largest difference between the "
        f"probabilities of the command and of the loop: {difference:.1e}"
    )
    return min(printed, folder_printed) / base < GOAL and not args.quick


if __name__ == "__main__":
    common.command(main)
