"""Images per second and memory of the encoders, against timm on the same machine in one run.

    python bench/encode.py [--quick] [--model dinov2-s] [--batch-size 16]
    python bench/encode.py --embeddings FILE
        a long pass over patches in the host's memory, as probe.py makes it, against timm on images
        that lie ready on the device; figures as JSON (bench/gpu.sh)

The variants take turns batch by batch, so that a machine that slows down slows all of them; medians
are compared. Memory is the peak of a fresh process (CPU) or of the allocator (GPU) during one
batch. On a GPU ViT-g is measured at batch 128 in bf16, with the share of the rate that the machine
reaches in a plain matrix product of that precision."""

import argparse
import copy
import dataclasses
import importlib.util
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import references

import common
import models
from encoders.table import flops

GPU_MODEL, GPU_BATCH = "h-optimus-0", 128


def pair(name, device):
    """Our encoder and timm's with equal weights, fp32, in evaluation mode; both give the class
    token's embedding (Swin: the mean).
    """
    ours = models.load_encoder(name, "random", device, pool=pool_of(name))
    return ours, references.fill_counterpart(references.counterpart(name), ours, device)


def pool_of(name):
    spec = models.find_encoder(name)
    return spec.pool if spec.family == "Swin" else "cls"


def variants(name, device, compiled):
    """{label: function images → embeddings}, the reference first."""
    ours, theirs = pair(name, device)
    half = copy.deepcopy(ours).bfloat16()

    def autocast(x):
        with torch.autocast(device, torch.bfloat16):
            return theirs(x)

    functions = {
        "timm fp32": theirs,
        "timm bf16 autocast": autocast,
        "ours fp32": ours,
        "ours bf16": lambda x: half(x.bfloat16()),
    }
    if device == "cuda":
        del functions["timm fp32"], functions["ours fp32"]
    if compiled:
        half_compiled = torch.compile(half, fullgraph=True)
        functions["timm bf16 autocast, compiled"] = torch.compile(autocast)
        functions["ours bf16, compiled"] = lambda x: half_compiled(x.bfloat16())
        if device == "cpu":
            functions["timm fp32, compiled"] = torch.compile(theirs)
            functions["ours fp32, compiled"] = torch.compile(ours, fullgraph=True)
    return functions


def compile_blocks(network):
    """Compile each block of timm's network by itself: seconds instead of minutes for the whole, and
    nearly as fast.
    """
    torch._dynamo.config.recompile_limit = 64  # one per shape and form of call
    for block in network.blocks:
        block.compile(dynamic=False)


DRY_RUN = "to try the script: two blocks of each network"


def shorten(name):
    """What --dry-run does to this encoder, ours and timm's."""
    table = references.TIMM if name in references.TIMM else references.EQUIVALENT
    constructor, arguments = table[name]
    table[name] = constructor, {**arguments, "depth": 2}
    models.ENCODERS[name] = dataclasses.replace(models.ENCODERS[name], depth=2)


class NoTime(Exception):
    """What comes last in a benchmark is left out."""


def why(error):
    """What a cell says that was not measured: {"missing": why it could not be} or {"failed": what
    went wrong}.
    """
    if isinstance(error, NoTime):
        return {"missing": "no time left"}
    if isinstance(error, ModuleNotFoundError) and error.name in ("timm", "peft"):
        return {"missing": f"{error.name} is not installed"}
    return {"failed": f"{type(error).__name__}: {common.first_line(error)}"}


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def times(functions, images, device, rounds, limit=float("inf")):
    """Seconds per batch of every function, in turns; those that fail (no compiler) are left out,
    with a line.

    Rounds end early, after four, where they take longer than `limit` seconds in all.
    """
    works = {}
    for label, function in functions.items():
        try:
            for _ in range(2):
                function(images)
            works[label] = function
        except (
            Exception
        ) as error:  # whatever a compiler throws; eager variants have nothing to throw
            if "compiled" not in label:
                raise
            print(f"{label}: left out ({type(error).__name__})", file=sys.stderr)
    seconds, begun = {label: [] for label in works}, time.perf_counter()
    for done in range(rounds):
        if done >= 4 and time.perf_counter() - begun > limit:
            break
        for label, function in works.items():
            wait(device)
            start = time.perf_counter()
            function(images)
            wait(device)
            seconds[label].append(time.perf_counter() - start)
    return seconds


@torch.inference_mode()
def matmul_rate(device, dtype, rounds):
    """Operations per second in a product as large as those of the encoder."""
    size = 8192 if device == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = times({"product": lambda x: a @ b}, None, device, rounds)["product"]
    return 2 * size**3 / statistics.median(seconds)


UNTIL = "seconds from the start, after which no variant begins (default: as long as it takes)"


def embedding_rates(path, name, device, batch, batches, rounds, limit, until):
    """Images per second of models.predict and of timm; `path` is written after each variant.

    batches: of `batch` patches in a pass; no variant begins after `until` seconds. UserError at
    the end if one failed.
    """
    started = time.perf_counter()
    ours, theirs = models.load_encoder(name, "random", device, pool=pool_of(name)), None
    if importlib.util.find_spec("timm"):
        theirs = references.fill_counterpart(references.counterpart(name), ours, device)
    product = matmul_rate(device, torch.bfloat16, 5)
    figures = {"model": name, "device": device, "batch": batch, "cells": []}
    figures["product_tflops"] = product / 1e12
    images = torch.randn(batch, 3, ours.size, ours.size, device=device)

    @torch.no_grad()  # inference_mode does not go with torch.compile
    def autocast(_):
        for _ in range(batches):
            with torch.autocast(device, torch.bfloat16):
                theirs(images)

    shape = (batches * batch, ours.size, ours.size, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    model = models.PatchClassifier(ours.bfloat16()).eval()
    # As probe.py does in a pass over a dataset.
    if models.should_compile("auto", torch.device(device), models.COMPILE_FROM, ours.spec):
        models.compile_blocks(ours)

    def predict(_):
        models.predict(model, pixels, batch_size=batch, output="embedding", progress=None)

    for label, function in (
        ("timm bf16 autocast", autocast),
        ("ours, models.predict", predict),
        ("timm bf16 autocast, blocks compiled", autocast),
    ):
        cell, begun = {"variant": label}, time.perf_counter()
        try:
            if time.perf_counter() - started > until:
                raise NoTime
            if theirs is None and function is autocast:
                raise ModuleNotFoundError("timm", name="timm")
            if "compiled" in label:
                compile_blocks(theirs)
            function(None)
            cell["ready_s"] = time.perf_counter() - begun
            seconds = times({"pass": function}, None, device, rounds, limit)["pass"]
            rate = len(pixels) / statistics.median(seconds)
            cell |= {
                "per_s": rate,
                "spread": (max(seconds) - min(seconds)) / 2 / len(pixels) * rate,
            }
            cell["share"] = flops(models.ENCODERS[name]) * rate / product
        except Exception as error:  # whatever a compiler or a driver throws: the others go on
            cell |= why(error)
        figures["cells"].append(cell)
        common.write_json(path, figures)
        print(cell, flush=True)
    raise_failed(figures["cells"])


def raise_failed(cells):
    """UserError if one of the measured cells has "failed"."""
    failed = []
    for cell in cells:
        if "failed" in cell:
            batch = f", batch {cell['batch']}" if "batch" in cell else ""
            failed.append(f"{cell['variant']}{batch}: {cell['failed']}")
    if failed:
        raise common.UserError("; ".join(failed))


def cpu_memory(name, label, batch):
    """Peak memory (MiB) of a fresh process that loads one variant and runs a batch, above that of
    the imports.
    """
    out = subprocess.run(
        [sys.executable, __file__, "--memory", label, "--model", name, "--batch-size", str(batch)],
        check=True,
        capture_output=True,
        text=True,
    )
    return float(out.stdout)


def peak():
    """Peak memory of this process, MiB. Linux: VmHWM, since ru_maxrss is handed down by the parent
    process.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**10
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS: bytes


@torch.inference_mode()
def memory_child(name, label, batch):
    ours = label.startswith("ours")
    images = torch.randn(batch, 3, 224, 224)
    before = peak()
    if ours:
        with torch.device("meta"):
            network = models.build(models.ENCODERS[name], pool=pool_of(name)).eval()
    else:
        network = references.counterpart(name)
    if label == "ours bf16":
        network, images = network.bfloat16(), images.bfloat16()
    references.make_empty(network)
    for tensor in network.parameters():
        tensor.normal_(0, 0.02)
    with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in label):
        network(images)
    print(peak() - before)


def gpu_memory(function, images):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function(images)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing compiled")
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument(
        "--model", help=f"encoder (default: dinov2-s on the CPU, {GPU_MODEL} on a GPU)"
    )
    parser.add_argument(
        "--batch-size", type=int, help=f"default: 16 on the CPU, {GPU_BATCH} on a GPU"
    )
    parser.add_argument(
        "--rounds", type=int, help="batches per variant (default: 12, with --quick 4)"
    )
    parser.add_argument(
        "--batches", type=int, default=8, help="with --embeddings: of a pass (default: 8)"
    )
    parser.add_argument(
        "--seconds", type=float, default=120, help="of rounds, from the fourth on (default: 120)"
    )
    parser.add_argument(
        "--embeddings", metavar="FILE", help="instead: passes of models.predict; figures go to FILE"
    )
    parser.add_argument(
        "--until", type=float, default=float("inf"), help="with --embeddings: " + UNTIL
    )
    parser.add_argument("--dry-run", action="store_true", help=DRY_RUN)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = args.model or (GPU_MODEL if device == "cuda" else "dinov2-s")
    batch = args.batch_size or (GPU_BATCH if device == "cuda" else 16)
    if args.dry_run:
        shorten(name)
    if args.memory:
        return memory_child(name, args.memory, batch)
    rounds = args.rounds or (4 if args.quick else 12)
    if args.embeddings:
        return embedding_rates(
            args.embeddings,
            name,
            device,
            batch,
            args.batches,
            rounds,
            args.seconds,
            args.until,
        )
    functions = variants(name, device, compiled=not args.quick)
    images = torch.randn(batch, 3, 224, 224, device=device)
    torch.set_grad_enabled(
        False
    )  # inference_mode does not go with torch.compile: "Cannot set version_counter"
    seconds = times(functions, images, device, rounds, args.seconds)
    rate = {label: batch / statistics.median(s) for label, s in seconds.items()}
    reference = "timm bf16 autocast" if device == "cuda" else "timm fp32"
    product = {
        dtype: matmul_rate(device, dtype, rounds)
        for dtype in ((torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16))
    }
    expected = functions[reference](images).float()
    print(
        f"{name}, batch {batch}, {device}, torch {torch.__version__}, {torch.get_num_threads()} "
        "threads; "
        f"{flops(models.ENCODERS[name]) / 1e9:.1f} GFLOP an image; medians of "
        f"{len(seconds[reference])} batches in "
        "turns\n"
    )
    print(
        f"| variant | images/s | × {reference} | spread | of the matrix-product rate | peak MiB | "
        "difference |"
    )
    print("|---|---|---|---|---|---|---|")
    for label, s in seconds.items():
        embeddings = functions[label](images).float()
        off = ((embeddings - expected).norm() / expected.norm()).item()
        share = (
            flops(models.ENCODERS[name])
            * rate[label]
            / product[torch.bfloat16 if "bf16" in label else torch.float32]
        )
        if device == "cuda":
            memory = f"{gpu_memory(functions[label], images):,.0f}"
        else:
            memory = "–" if "compiled" in label else f"{cpu_memory(name, label, batch):,.0f}"
        spread = (max(s) - min(s)) / statistics.median(s)
        print(
            f"| {label} | {rate[label]:.1f} | {rate[label] / rate[reference]:.2f} | "
            f"±{50 * spread:.0f}% | "
            f"{share:.2f} | {memory} | {off:.0e} |"
        )
    print(
        "\nMatrix product alone: "
        + ", ".join(f"{models.name_of(d)} {r / 1e12:.2f} TFLOP/s" for d, r in product.items())
        + ". Memory: on the CPU parameters and activations, on a GPU activations."
    )


if __name__ == "__main__":
    common.command(main)
