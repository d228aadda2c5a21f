"""Seconds and memory of one training step: timm + peft, and ours, on the same machine in one run.

    python bench/lora_step.py [--quick]
        ViT-S/16 on the CPU; ViT-g/14 with registers in bf16 on a GPU
    python bench/lora_step.py --memory-only --device cuda
        the peaks alone, for H-optimus-0 on a small GPU
    python bench/lora_step.py --count [--model M]
        the peak on a GPU counted, without one
    python bench/lora_step.py --together 5
        is a step of 5 × 16 patches faster than five of 16? If not, training five adapters side by
        side on one frozen encoder cannot be faster either
    python bench/lora_step.py --alone FILE --batch-size 16 64
        one variant after the other, each with the GPU's memory to itself; figures as JSON
        (bench/gpu.sh)

A step: forward and backward pass of a batch of 16, LoRA of rank 16 with dropout 0.1 on qkv, proj,
fc1, fc2 and one logit, fused Adam on what is trained. Weights are noise, images too; reading and
augmentation are bench/patches.py's. The variants take turns step by step; medians are compared.
Memory is the peak of a fresh process that does nothing else (CPU: above that of the imports; GPU:
of the allocator).

peft is used as its users do: float32 weights, with and without autocast, dropout by torch. "Engine"
is the step of train.py as it is: patches from the host's memory, augmentation and all.
"""

import argparse
import functools
import gc
import math
import statistics
import subprocess
import sys
import time
import types
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests"), str(HERE)]

import references
import small
from encode import (
    DRY_RUN,
    UNTIL,
    NoTime,
    compile_blocks,
    flops,
    matmul_rate,
    peak,
    raise_failed,
    shorten,
    times,
    wait,
    why,
)

import common
import engine
import lora
import models
from dataset.patches import margin
from encoders import dropout

WARM_UP = 6  # steps on a GPU before the clock: they compile, find out what fits, capture the graph
DEFAULT_MODEL = {"cpu": "lunit-s16", "cuda": "h-optimus-0"}
BLOCKS = r"blocks\.\d+\..*\.(qkv|proj|fc1|fc2)"
# label → (whose, method, precision, how: "eager" | "compiled": the whole network | "blocks": each
# of them | "engine": as train.py does it)
VARIANTS = {
    "peft fp32": ("peft", "lora", torch.float32, "eager"),
    "peft bf16 autocast": ("peft", "lora", torch.bfloat16, "eager"),
    "peft fp32, compiled": ("peft", "lora", torch.float32, "compiled"),
    "peft bf16 autocast, compiled": ("peft", "lora", torch.bfloat16, "compiled"),
    "peft bf16 autocast, blocks compiled": ("peft", "lora", torch.bfloat16, "blocks"),
    "timm fp32, all trained": ("peft", "full", torch.float32, "eager"),
    "timm bf16 autocast, all trained": ("peft", "full", torch.bfloat16, "eager"),
    "ours fp32": ("ours", "lora", torch.float32, "eager"),
    "ours bf16": ("ours", "lora", torch.bfloat16, "eager"),
    "ours fp32, compiled": ("ours", "lora", torch.float32, "compiled"),
    "ours bf16, compiled": ("ours", "lora", torch.bfloat16, "compiled"),
    "ours bf16, checkpointing": ("ours", "lora", torch.bfloat16, "eager"),
    "ours bf16, engine": ("ours", "lora", torch.bfloat16, "engine"),
    "ours bf16 autocast, all trained, engine": ("ours", "full", torch.bfloat16, "engine"),
}
PEFT, PEFT_COMPILED = "peft bf16 autocast", "peft bf16 autocast, blocks compiled"
OURS = "ours bf16, engine"
TRAINED, OURS_TRAINED = "timm bf16 autocast, all trained", "ours bf16 autocast, all trained, engine"


def theirs(name, device, method):
    """timm's network with a head of one logit, adapted by peft."""
    import peft

    network = references.timm_model(name, img_size=224).to_empty(device=device)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.02)
    if method == "lora":
        network = peft.get_peft_model(
            network, peft.LoraConfig(r=16, lora_alpha=16, lora_dropout=0.1, target_modules=BLOCKS)
        )
    return torch.nn.Sequential(
        network, torch.nn.Linear(models.ENCODERS[name].dim, 1, device=device)
    )


def ours(name, device, dtype):
    encoder = models.load_encoder(name, "random", device, dtype, pool="cls")
    lora.add_lora(encoder)
    return models.PatchClassifier(encoder).to(device)


class Step:
    """One variant, ready to run: step() is one step of training."""

    def __init__(self, label, name, device, batch):
        whose, method, dtype, how = VARIANTS[label]
        self.device, self.batch = device, batch
        self.count = 0  # of steps done
        if whose == "peft":
            self.model = theirs(name, device, method).train()
        else:
            self.model = ours(name, device, dtype).train()
        if "checkpointing" in label:
            for block in self.model.encoder.blocks:
                block.forward = functools.partial(
                    torch.utils.checkpoint.checkpoint,
                    block.forward,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.parameters = sum(p.numel() for p in trained)
        self.optimizer = torch.optim.Adam(trained, lr=1e-4, fused=True)
        self.images = torch.rand(batch, 3, 224, 224, device=device)
        self.labels = (torch.arange(batch, device=device) % 2).float()
        self.encoder = None
        if whose == "ours":
            self.encoder = self.model.encoder
        self.autocast = torch.autocast(
            device, dtype, enabled=whose == "peft" and dtype != torch.float32
        )
        self.forward = self.model
        if how == "compiled":
            self.forward = torch.compile(self.model)
        elif how == "blocks":
            network = self.model[0].get_base_model() if method == "lora" else self.model[0]
            compile_blocks(network)

    def __call__(self):
        self.optimizer.zero_grad(set_to_none=True)
        if self.encoder is not None:
            lora.set_step(self.encoder, 0, self.count, range(self.batch))
            self.count += 1
        with self.autocast:
            logits = self.forward(self.images).view(-1)
        torch.nn.functional.binary_cross_entropy_with_logits(logits.float(), self.labels).backward()
        self.optimizer.step()
        wait(self.device)


class EngineStep:
    """The step of train.py, on patches in the host's memory."""

    def __init__(self, label, name, device, batch):
        _, method, dtype, _ = VARIANTS[label]
        self.device, self.batch = torch.device(device), batch
        self.count = 0  # of steps done
        # As train.load_base: frozen weights where and as they are used, else float32.
        place = (device, dtype) if method == "lora" else ("cpu", torch.float32)
        base = models.load_encoder(name, "random", *place, pool="cls")
        settings = small.training_settings(method, model=name, pool="cls", batch_size=batch)
        patches = settings.epochs * settings.epoch_size  # of a run by the protocol
        compiled = models.should_compile("auto", self.device, patches, base.spec)
        self.model, parameters = engine.make_model(settings, base, self.device, compiled=compiled)
        self.model.train()
        self.parameters = sum(p.numel() for p in parameters.values())
        side = models.find_encoder(name).size
        patches = types.SimpleNamespace(size=side)
        self.engine = engine.Engine(
            settings, self.model, parameters, None, patches, self.device, dtype
        )
        shape = (batch, margin(side), margin(side), 3)
        self.images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
        if device == "cuda":
            self.images = self.images.pin_memory()  # as models.reading does
        self.samples = np.arange(batch)
        self.labels = (self.samples % 2).astype(np.int8)

    def __call__(self):
        self.engine.step(self.count, self.images, self.samples, self.labels, self.batch)
        self.count += 1
        wait(self.device.type)


def make_step(label, name, device, batch):
    kind = EngineStep if VARIANTS[label][3] == "engine" else Step
    return kind(label, name, device, batch)


def memory_child(name, label, device, batch):
    before = peak()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = make_step(label, name, device, batch)
    for _ in range(WARM_UP if device == "cuda" else 2):
        step()
    used = peak() - before
    if device == "cuda":
        used = torch.cuda.max_memory_allocated() / 2**20
    print(used)


def memory(name, label, device, batch, more=()):
    """MiB, or None if the variant does not run. more: further flags."""
    out = subprocess.run(
        [
            sys.executable,
            __file__,
            "--memory",
            label,
            "--model",
            name,
            "--batch-size",
            str(batch),
            "--device",
            device,
            *more,
        ],
        capture_output=True,
        text=True,
    )
    if out.returncode:
        return None
    return float(out.stdout.split()[-1])


class Counter(TorchDispatchMode):
    """Bytes of all live tensors, now and at most, in blocks of 512 as torch's CUDA allocator counts
    them.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.live = {}  # storage → its bytes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self.live:
                size = math.ceil(storage.nbytes() / 512) * 512
                self.live[storage._cdata] = size
                weakref.finalize(storage, self.free, storage._cdata)
                self.now += size
                self.peak = max(self.peak, self.now)
        return result

    def free(self, key):
        self.now -= self.live.pop(key, 0)


def count(name, batch):
    """Print the bytes of all tensors of a LoRA step in bf16, as on a GPU.

    Fake tensors: nothing is computed. They are on the CPU, whose attention saves the same tensors
    as a GPU's. Library caches and the allocator's waste come on top.
    """
    kernels = SimpleNamespace(  # as those for GPUs: no memory but that of the result
        drop=lambda x, *_: torch.empty_like(x), add_kept=lambda total, *_: total
    )
    dropout.kernels_for = lambda x: kernels
    with FakeTensorMode(allow_non_fake_inputs=True), Counter() as counter:
        torch.set_default_dtype(torch.bfloat16)
        encoder = models.build(models.ENCODERS[name], pool="cls")
        torch.set_default_dtype(torch.float32)
        lora.add_lora(encoder)
        model = models.PatchClassifier(encoder).train()
        network = counter.now
        optimizer = torch.optim.Adam(
            [p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True
        )
        images, labels = torch.rand(batch, 3, 224, 224), torch.zeros(batch)
        for step in range(2):  # Adam's moments exist from the second on
            optimizer.zero_grad(set_to_none=True)
            lora.set_step(encoder, 0, step, range(batch))
            logits = model(images).view(-1)
            torch.nn.functional.binary_cross_entropy_with_logits(logits.float(), labels).backward()
            optimizer.step()
    print(
        f"{name}, LoRA in bf16, batch {batch}: network and adapters {network / 2**30:.2f} GiB, "
        f"peak during a step {counter.peak / 2**30:.2f} GiB"
    )


def together(name, device, batch, count, rounds):
    """Print the seconds of `count` steps of `batch` patches and of one step of count × batch.

    Separate adapters for the parts of a batch would add small products to the large step, so the
    ratio bounds what they could gain.
    """
    print(
        f"{name}, {device}, {torch.get_num_threads()} threads; medians of {rounds} rounds in "
        "turns\n"
    )
    print(f"| variant | {count} steps of {batch}, s | one of {count * batch}, s | ratio |")
    print("|---|---|---|---|")
    for label in ("ours fp32", "ours bf16")[device == "cuda" :]:
        small = Step(label, name, device, batch)
        large = Step(label, name, device, count * batch)
        seconds = {"small": [], "large": []}
        for _ in range(rounds + 1):
            start = time.perf_counter()
            for _ in range(count):
                small()
            middle = time.perf_counter()
            large()
            seconds["small"].append(middle - start)
            seconds["large"].append(time.perf_counter() - middle)
        # the first round warms up
        one, other = (statistics.median(values[1:]) for values in seconds.values())
        print(f"| {label} | {one:.2f} | {other:.2f} | {one / other:.2f} |", flush=True)


def measure(labels, name, device, batch, rounds):
    """Run the variants in turns → ({label: seconds per step}, {label: trained parameters}).

    Compiled variants are left out if the compiler fails.
    """
    steps = {}
    for label in labels:
        step = make_step(label, name, device, batch)
        try:
            for _ in range(WARM_UP if device == "cuda" else 2):
                step()
        except Exception as error:  # whatever a compiler throws
            if "compiled" not in label:
                raise
            print(f"{label}: left out ({type(error).__name__})", file=sys.stderr)
            continue
        steps[label] = step
    seconds = {label: [] for label in steps}
    for _ in range(rounds):
        for label, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[label].append(time.perf_counter() - start)
    parameters = {label: step.parameters for label, step in steps.items()}
    del step, steps
    if device == "cuda":
        torch.cuda.empty_cache()
    return seconds, parameters


def alone(label, name, device, batch, rounds, seconds, rate):
    """Figures of one variant that has the device to itself: {"variant", "batch", "ms", "spread",
    "gib", "reserved_gib", "share", "ready_s"}, or {"variant", "batch"} and why not.

    gib: peak of the tensors; reserved_gib: of what the allocator held for them, graphs included;
    share: of the rate of a matrix product alone, for LoRA; ready_s: from nothing to the first timed
    step; graph: whether the step was captured (ours). At most `rounds` steps are timed, and from
    the fourth on for `seconds` at most.
    """
    cell = {"variant": label, "batch": batch}
    begun, base = time.perf_counter(), 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
    try:
        step = make_step(label, name, device, batch)
        for _ in range(WARM_UP):
            step()
        cell["ready_s"] = time.perf_counter() - begun
        taken = times({"step": lambda _: step()}, None, device, rounds, seconds)["step"]
    except Exception as error:  # whatever a compiler or a driver throws: the others go on
        return cell | why(error)
    median = statistics.median(taken)
    cell |= {"ms": 1000 * median, "spread": (max(taken) - min(taken)) / 2 / median}
    cell["steps"], cell["trained"] = len(taken), step.parameters
    if VARIANTS[label][1] == "lora":
        cell["share"] = lora_operations(name, batch) / median / rate
    if device == "cuda":
        if isinstance(step, EngineStep):
            cell["graph"] = step.engine.replays is not None
        cell["gib"] = (torch.cuda.max_memory_allocated() - base) / 2**30
        cell["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    return cell


def one_after_the_other(path, name, device, batches, full, rounds, seconds, until):
    """Measure peft and ours for each batch size, and training end to end if `full`; `path` is
    written after each.

    What matters comes first: no cell begins after `until` seconds. UserError at the end if one
    failed.
    """
    begun = time.perf_counter()
    rate = matmul_rate(device, torch.bfloat16, 5)
    figures = {"model": name, "device": device, "product_tflops": rate / 1e12, "cells": []}
    first, *others = batches
    todo = [(label, first) for label in (PEFT, OURS, PEFT_COMPILED)]
    if full:
        todo.append((TRAINED, first))
    todo += [(label, batch) for batch in others for label in (PEFT, OURS)]
    if full:
        todo.append((OURS_TRAINED, first))
    todo += [(PEFT_COMPILED, batch) for batch in others]
    for label, batch in todo:
        if time.perf_counter() - begun > until:
            cell = {"variant": label, "batch": batch} | why(NoTime())
        else:
            cell = alone(label, name, device, batch, rounds, seconds, rate)
        figures["cells"].append(cell)
        common.write_json(path, figures)
        print(cell, flush=True)
        gc.collect()
        torch.compiler.reset()
        if device == "cuda":
            torch.cuda.empty_cache()
    raise_failed(figures["cells"])


def lora_operations(name, batch):
    """Of a step's frozen products: forward, and the gradient of the input; none of the weights."""
    return 2 * batch * flops(models.ENCODERS[name])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="three turns, nothing compiled")
    parser.add_argument("--device", help="cuda or cpu (default: cuda if available)")
    parser.add_argument(
        "--model", help="encoder (default: lunit-s16, a ViT-S/16, on the CPU, h-optimus-0 on a GPU)"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        nargs="+",
        default=[16],
        metavar="B",
        help="default: 16; several with --alone",
    )
    parser.add_argument("--rounds", type=int, help="steps per variant (default: 8, with --quick 3)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, metavar="V", help="only these")
    parser.add_argument("--memory-only", action="store_true", help="no times")
    parser.add_argument(
        "--count", action="store_true", help="instead: the memory of a step on a GPU, counted"
    )
    parser.add_argument(
        "--together", type=int, metavar="N", help="instead: N batches one by one and in one step"
    )
    parser.add_argument(
        "--alone",
        metavar="FILE",
        help=f"instead: {PEFT}, {OURS}, {PEFT_COMPILED}, one after the other; figures go to FILE",
    )
    parser.add_argument(
        "--full", action="store_true", help="with --alone: training end to end as well"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=60,
        help="with --alone: of the steps of a variant, at most (default: 60)",
    )
    parser.add_argument("--until", type=float, default=math.inf, help="with --alone: " + UNTIL)
    parser.add_argument("--dry-run", action="store_true", help=DRY_RUN)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = args.model or DEFAULT_MODEL[device]
    if args.dry_run:
        shorten(name)
    if args.alone:
        rounds = args.rounds or 20
        return one_after_the_other(
            args.alone,
            name,
            device,
            args.batch_size,
            args.full,
            rounds,
            args.seconds,
            args.until,
        )
    if len(args.batch_size) > 1 or args.full:
        parser.error("several --batch-size, and --full, need --alone")
    (batch,) = args.batch_size
    if args.memory:
        return memory_child(name, args.memory, device, batch)
    if args.count:
        return count(args.model or "h-optimus-0", batch)
    if args.together:
        return together(name, device, batch, args.together, args.rounds or 5)
    labels = args.variants or []
    if not labels:
        for label, (_, _, dtype, how) in VARIANTS.items():
            slow = how in ("compiled", "blocks") and args.quick
            if not slow and not (device == "cuda" and dtype == torch.float32):
                labels.append(label)
    rounds = args.rounds or (3 if args.quick else 8)
    seconds, parameters = {}, {}
    if not args.memory_only:
        seconds, parameters = measure(labels, name, device, batch, rounds)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rate = matmul_rate(device, dtype, 5)
    operations = lora_operations(name, batch)
    reference = labels[0]
    print(
        f"{name}, batch {batch}, {device}, torch {torch.__version__}, {torch.get_num_threads()} "
        f"threads; medians of {rounds} steps in turns; matrix product alone "
        f"{rate / 1e12:.2f} TFLOP/s ({models.name_of(dtype)})\n"
    )
    print(
        f"| variant | trained | s per step | × {reference} | spread | of the product's rate | "
        "peak MiB |"
    )
    print("|---|---|---|---|---|---|---|")
    for label in labels:
        mebibytes = memory(name, label, device, batch, ["--dry-run"] * args.dry_run)
        used = "–" if mebibytes is None else f"{mebibytes:,.0f}"
        if label not in seconds:
            print(f"| {label} | – | – | – | – | – | {used} |")
            continue
        median = statistics.median(seconds[label])
        spread = (max(seconds[label]) - min(seconds[label])) / median
        share = "–"
        if VARIANTS[label][1] == "lora":
            share = f"{operations / median / rate:.2f}"
        print(
            f"| {label} | {parameters[label] / 1e6:.2f} M | {median:.3f} | "
            f"{statistics.median(seconds[reference]) / median:.2f} | ±{50 * spread:.0f}% | "
            f"{share} | {used} |"
        )


if __name__ == "__main__":
    common.command(main)
