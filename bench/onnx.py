"""Images per second of the exported model: against torch, and against what torch's own exporter
writes, in one run.

    python bench/onnx.py                CPU: dinov2-s in fp32, fp16 and int8; GPU: h-optimus-0 in
    half precision
    python bench/onnx.py --quick        the demo's encoder in few rounds
    python bench/onnx.py --weights W    with published weights instead of random ones
    python bench/onnx.py --json FILE --batches 1 8 64 256
        fp16 against torch in bf16 alone, eager and with compiled blocks; figures as JSON
        (bench/gpu.sh)

All variants take the same uint8 patches and give probabilities. They take turns batch by batch, so
that a machine that slows down slows all of them; medians are compared. What a precision costs is
measured too: the head is an l2 probe fitted by torch on embeddings of the demo's training cases,
and every variant is judged by its AUROC on the test cases. Status 1 where a goal is missed."""

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:1] = [
    str(ROOT),
    str(ROOT / "tests"),
]  # not this folder: its onnx.py and classify.py would hide the real ones

import onnx
import onnxruntime
import torch
from onnx_models import METADATA, lacks_cuda, write_model
from onnx_models import patches as noise

import common
import data
import evaluate
import flags
import logistic
import models
from dataset.patches import Patches
from encoders import layers
from onnx_model import graph, session

BATCHES = 1, 8, 64
PLAIN = 18  # opset of the plain exporter's graph: there it writes attention as products and softmax


# ---------------------------------------------------------------- a classifier that knows the demo


def fit_head(model, count):
    """Fit the head on `count` of the demo's training patches → (test patches, their labels)."""
    annotations, choices = flags.from_source({"data": "demo", "fit": "resize"})
    split, generator = data.make_split(annotations), np.random.default_rng(0)
    train, test = (
        generator.permutation(annotations.rows(ids))[:count] for ids in (split.train, split.test)
    )
    reader = Patches(annotations, size=model.encoder.size, fit=choices.fit, crop=choices.crop)
    embeddings = models.predict(
        model, reader.read(train), output="embedding", progress="fitting the head"
    )
    (fit,) = logistic.fit(
        embeddings, annotations.label[train], [(np.arange(len(train)), 1.0)], "l2", standardize=True
    )
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(fit.weight)[None])
        model.head.bias.fill_(fit.bias)
    return reader.read(test), annotations.label[test]


# ------------------------------------------------------ the variants: uint8 patches → probabilities


def write_plain(path, model):
    """What torch.onnx.export makes of `model`, with metadata, so that it runs as the others do."""
    device, size = model.head.weight.device, model.encoder.size
    images = torch.zeros(2, size, size, 3, dtype=torch.uint8)

    class Probability(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, patches):
            return torch.sigmoid(self.model(patches))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Probability().eval(),
            (images.to(device),),
            path,
            input_names=["patches"],
            verbose=False,
            output_names=["probability"],
            dynamo=True,
            opset_version=PLAIN,
            external_data=True,
            dynamic_shapes=({0: torch.export.Dim("N", min=1, max=4096)},),
        )
    proto = onnx.load(path, load_external_data=False)
    kinds = [node.op_type for node in proto.graph.node]
    assert "Attention" not in kinds and kinds.count("Softmax") == len(model.encoder.blocks), (
        "attention is not loose"
    )
    proto.metadata_props.add(key="format", value=session.FORMAT)
    facts = {"input": "uint8", "precision": "as torch's", "opset": PLAIN}
    for key, value in {**METADATA, **facts, "size": size, "patch": size}.items():
        proto.metadata_props.add(key=key, value=json.dumps(value))
    onnx.save(proto, path)


def runtime(path, device, threads, largest, live=False):
    """A Classifier on this device; largest: most patches of a call; live: see Classifier."""
    classifier = session.Classifier(
        path, device, threads=threads, batch_size=largest, warm_up=False, live=live
    )
    assert classifier.device.startswith(device), classifier.note
    return classifier


def torch_variant(model, onednn=False, compiled=False):
    """onednn: float32 products as encoders.layers.linear makes them on CPUs; others who run torch
    have MKL's.
    """
    network = torch.compile(model, dynamic=False) if compiled else model

    @torch.no_grad()  # inference_mode does not go with torch.compile: "Cannot set version_counter"
    def run(patches):
        layers.ONEDNN = onednn
        return torch.sigmoid(network(patches))

    return run


def variants(model, seen, device, threads, folder, compiled):
    """{label: function uint8 [N, 224, 224, 3] → probabilities [N]}, the reference first; `seen`:
    some real patches.
    """
    with graph.activation_peaks(model.encoder) as peaks:
        models.predict(model, seen, progress=None)
    half, float32 = copy.deepcopy(model), model.cpu()
    half.encoder.to(torch.bfloat16)
    functions = {}
    if device == "cpu":
        functions["torch fp32"] = torch_variant(float32)
        functions["torch fp32 by oneDNN"] = torch_variant(float32, layers.ONEDNN)
    functions["torch bf16"] = torch_variant(half)
    if compiled:
        if device == "cpu":
            functions["torch fp32, compiled"] = torch_variant(float32, compiled=True)
        functions["torch bf16, compiled"] = torch_variant(half, compiled=True)
    precisions = ("fp32", "fp16", "int8") if device == "cpu" else ("fp16",)
    facts = {"size": model.encoder.size, "patch": model.encoder.size}
    for precision in precisions:
        path = folder / f"{precision}.onnx"
        write_model(path, float32, precision, metadata=facts, inline=False, peaks=dict(peaks))
        functions[f"ONNX Runtime {precision}"] = runtime(path, device, threads, max(BATCHES))
    path, plain, label = folder / "plain.onnx", float32, "plain exporter's graph fp32"
    if device == "cuda":
        plain, label = half, "plain exporter's graph fp16"
        half.encoder.to(torch.float16)
    try:
        write_plain(path, plain)
        functions[label] = runtime(path, device, threads, max(BATCHES))
    except torch.onnx.OnnxExporterError as error:  # seen for Swin, in torch 2.14
        print(f"{label}: left out, torch cannot write it ({type(error).__name__})", file=sys.stderr)
    half.encoder.to(torch.bfloat16)
    return functions


def against_torch(path, model, seen, batches, rounds, device, threads, folder, limit, until):
    """Images per second of the exported model in fp16 and of torch in bf16, for each batch size;
    `path` is written after each cell.

    seen: some patches, uint8 [n, S, S, 3]; limit: seconds of a cell's rounds, from the fourth
    on; no cell begins after `until` seconds. UserError at the end if a cell failed.
    """
    begun = time.perf_counter()
    figures = {"model": model.encoder.spec.name, "device": device, "cells": []}
    with graph.activation_peaks(model.encoder) as peaks:
        models.predict(model, seen, progress=None)
    half, float32 = copy.deepcopy(model), model.cpu()
    half.encoder.to(torch.bfloat16)
    functions = {"torch bf16": torch_variant(half)}
    if missing := lacks_cuda(device):
        figures["cells"].append({"variant": "ONNX Runtime fp16", "missing": missing})
    else:
        file = folder / "fp16.onnx"
        facts = {"size": model.encoder.size, "patch": model.encoder.size}
        write_model(file, float32, "fp16", metadata=facts, inline=False, peaks=dict(peaks))
        exported = runtime(file, device, threads, max(batches), live=device == "cuda")
        functions["ONNX Runtime fp16"], figures["session"] = exported, exported.note
    # Last: what is compiled once stays so.
    functions["torch bf16, blocks compiled"] = torch_variant(half)
    for label, function in functions.items():
        if "compiled" in label:
            models.compile_blocks(half.encoder)
        for batch in batches:
            images = np.resize(seen, (batch, *seen.shape[1:]))
            cell = {"variant": label, "batch": batch}
            if time.perf_counter() - begun > until:
                cell["missing"] = "no time left"
            else:
                cell |= rate_of(function, images, device, rounds, limit)
            figures["cells"].append(cell)
            common.write_json(path, figures)
            print(cell, flush=True)
    failed = [cell for cell in figures["cells"] if "failed" in cell]
    if failed:
        raise common.UserError(f"{len(failed)} cells, first: {failed[0]['failed']}")


def rate_of(function, images, device, rounds, limit):
    """{"per_s": images per second, "spread"} of one variant, or {"failed": why}."""
    try:
        (taken,) = seconds_per_batch({"": function}, images, device, rounds, limit).values()
    except Exception as error:  # whatever a compiler or a driver throws: the others go on
        return {"failed": f"{type(error).__name__}: {common.first_line(error)}"}
    median = statistics.median(taken)
    return {"per_s": len(images) / median, "spread": (max(taken) - min(taken)) / 2 / median}


def given(function, patches, device):
    """The patches in the form that a variant takes them without a copy."""
    if isinstance(function, session.Classifier) and device == "cpu":
        return patches
    return torch.from_numpy(patches).to(device)


def seconds_per_batch(functions, patches, device, rounds, limit=float("inf")):
    """{label: seconds of every round}, the variants in turns.

    Rounds end early, after four, where they take longer than `limit` seconds in all.
    """
    inputs = {label: given(function, patches, device) for label, function in functions.items()}
    for label, function in functions.items():  # allocates, chooses kernels, compiles for this shape
        function(inputs[label]), function(inputs[label])
    seconds, begun = {label: [] for label in functions}, time.perf_counter()
    for done in range(rounds):
        if done >= 4 and time.perf_counter() - begun > limit:
            break
        for label, function in functions.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            function(inputs[label])
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[label].append(time.perf_counter() - start)
    return seconds


def probabilities(function, patches, device):
    parts = [
        function(given(function, patches[i : i + 64], device)) for i in range(0, len(patches), 64)
    ]
    return np.concatenate(
        [part if isinstance(part, np.ndarray) else part.float().cpu().numpy() for part in parts]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", help="encoder (default: dinov2-s on the CPU, h-optimus-0 on a GPU)"
    )
    parser.add_argument(
        "--weights", default="random", help="its published weights (default: random)"
    )
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="of the CPU (default: all)"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        nargs=len(BATCHES),
        metavar="N",
        help=f"per batch size {BATCHES} (default: 20 10 5; --quick: 5 3 2)",
    )
    parser.add_argument(
        "--patches", type=int, default=512, help="to fit the head on (default: 512)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="the demo's encoder, few rounds, nothing compiled"
    )
    parser.add_argument("--json", metavar="FILE", help="instead: fp16 against torch, to FILE")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=BATCHES, help="with --json (default: 1 8 64)"
    )
    parser.add_argument(
        "--seconds", type=float, default=60, help="with --json: of a cell, at most (default: 60)"
    )
    parser.add_argument(
        "--until",
        type=float,
        default=float("inf"),
        help="with --json: seconds from the start, after which no cell begins",
    )
    args = parser.parse_args()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = args.model
    if not name:
        name = "h-optimus-0" if device == "cuda" else "dinov2-s"
        if args.quick:
            name = "demo"
    weights = None if name == "demo" else args.weights
    rounds = args.rounds or ((5, 3, 2) if args.quick else (20, 10, 5))
    torch.set_num_threads(args.threads)
    model = models.PatchClassifier(models.load_encoder(name, weights, device)).eval()
    if args.json:
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
            return against_torch(
                args.json,
                model,
                noise(16, size=model.encoder.size),
                args.batches,
                max(rounds),
                device,
                args.threads,
                Path(folder),
                args.seconds,
                args.until,
            )

    patches, labels = fit_head(model, args.patches)
    with tempfile.TemporaryDirectory() as folder:
        functions = variants(
            model, patches[:16], device, args.threads, Path(folder), compiled=not args.quick
        )
        areas = {
            label: evaluate.auroc(labels, probabilities(f, patches, device))
            for label, f in functions.items()
        }
        rate = {label: [] for label in functions}
        for batch, count in zip(BATCHES, rounds):
            times = seconds_per_batch(
                functions, np.resize(patches, (batch, *patches.shape[1:])), device, count
            )
            for label, seconds in times.items():
                rate[label].append(batch / statistics.median(seconds))
    first = next(iter(functions))
    print(
        f"\n{name} ({weights or 'shipped'} weights), {device}, {args.threads} threads, torch "
        f"{torch.__version__}, "
        f"onnxruntime {onnxruntime.__version__}; images/s, medians of "
        f"{'/'.join(map(str, rounds))} batches in turns; "
        f"AUROC on {len(labels)} test patches of the demo\n"
    )
    print(
        "| variant | "
        + " | ".join(f"batch {batch}" for batch in BATCHES)
        + f" | × {first}, batch {BATCHES[-1]} | "
        "AUROC | change |\n" + "|---" * (len(BATCHES) + 4) + "|"
    )
    for label, values in rate.items():
        print(
            f"| {label} | "
            + " | ".join(f"{value:.1f}" for value in values)
            + f" | {values[-1] / rate[first][-1]:.2f} | {areas[label]:.4f} | "
            f"{areas[label] - areas[first]:+.4f} |"
        )
    print()
    return goals(rate, areas, device) and not args.quick


def goals(rate, areas, device):
    """Print each goal and what was measured → True if one is missed."""

    def over(a, b, i=-1):
        return rate[a][i] / rate[b][i]

    if device == "cuda":
        plain = "plain exporter's graph fp16"
        rows = [
            ("ONNX Runtime fp16", "torch bf16, compiled", 0.9),
            ("ONNX Runtime fp16", plain, 1.3),
        ]
    else:
        rows = [
            ("ONNX Runtime fp32", "torch fp32", 1.0),
            ("ONNX Runtime fp32", "torch fp32, compiled", 1.0),
            ("ONNX Runtime int8", "torch fp32", 2.3),
            ("ONNX Runtime int8", "torch fp32, compiled", 2.3),
        ]
    missed = False
    for a, b, wanted in rows:
        if a in rate and b in rate:
            missed |= over(a, b) < wanted
            print(
                f"{a} against {b}: "
                + ", ".join(
                    f"{over(a, b, i):.2f}× at batch {batch}" for i, batch in enumerate(BATCHES)
                )
                + f" (wanted at batch {BATCHES[-1]}: {wanted}×)"
            )
    return missed


if __name__ == "__main__":
    common.command(main)
