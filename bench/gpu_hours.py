"""Device-hours of the paper's whole grid: six encoders with LoRA and three baselines, 65 runs each.

    python bench/gpu_hours.py
        measures on this machine, a few minutes on a CPU
    python bench/gpu_hours.py --model h-optimus-0 --lora A B --full A B --infer A B --read A B C
        adds up rates that were measured on a GPU; --device cuda where there is none

Two ways of doing the same work are added up:

    ours       LoRA in bf16 on frozen bf16 weights, end to end under autocast in bf16; patches from
               the store, augmented in batches; validation patches decoded once, validated with
               merged weights in batches of 64
    ordinary   timm and peft in float32; OpenSlide, Pillow and torchvision sample by sample in a
               DataLoader, validation patches read again in every epoch; validated unmerged in the
               batches of training

65 runs: 4 fractions x 5 repeats on each of 2 datasets, and 5 domains x 5 repeats. A run trains on
100 x 1,280 patches whatever the fraction, validates on all its validation annotations 100 times,
and tests once. With --val-patches N, as train.py has it, it validates on N of them 100 times and on
all of them with the best three models: both ways of working, so that the ratio compares the same.

Patches per second of ONE encoder are measured, or given as `--lora OURS ORDINARY` and so on. The
other encoders' are scaled by their operations per patch, which is an estimate: a small network uses
a GPU worse than a large one, and ResNet50's convolutions are no matrix products of a transformer.
On a GPU reading runs beside the network and the slower of the two counts; on a CPU both need the
same cores and their times are added."""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import openslide
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests"), str(HERE)]

import lora_step
import patches as bench_patches  # bench/patches.py
from encode import flops, times

import checkpoint
import common
import data
import lora
import models
from dataset import patches
from encoders.table import SIZE

LORA = ("phikon", "uni", "virchow", "virchow2", "prov-gigapath", "h-optimus-0")
FULL = ("resnet50", "vit-b", "vit-h")
RESNET50 = 8.2e9  # operations per patch of 224 px (4.1 G multiplications), torchvision's count
EPOCHS = 100
EPOCH_SIZE = 1280
REPEATS = 5
FRACTIONS = 4
DOMAINS = 5
CCMCT, MIDOG = 72_845, 20_552  # annotations
# (runs, annotations for validation, annotations in the tests) of each experiment; 20% and 20% of
# the rest
EXPERIMENTS = [
    (FRACTIONS * REPEATS, 0.16 * CCMCT, 0.2 * CCMCT),
    (FRACTIONS * REPEATS, 0.16 * MIDOG, 0.2 * MIDOG),
    (DOMAINS * REPEATS, 0.16 * MIDOG / DOMAINS, (0.2 + DOMAINS - 1) * MIDOG / DOMAINS),
]
RUNS = sum(runs for runs, _, _ in EXPERIMENTS)
TRAINED = RUNS * EPOCHS * EPOCH_SIZE


# ---------------------------------------------------------------- measuring


def network_rates(kind, name, device, rounds, batch=16):
    """Patches per second (ours, ordinary) of kind "lora", "full" or "infer".

    End to end, ours is float32 weights under autocast: timm's network and ours are alike there.
    """
    if kind == "infer":
        ours = lora_step.Step("ours bf16", name, device, batch).model.eval()
        theirs = lora_step.Step("peft fp32", name, device, batch).model.eval()
        pixels = np.random.default_rng(0).integers(0, 256, (64, 224, 224, 3), np.uint8)
        images = torch.rand(batch, 3, 224, 224, device=device)

        def mine(_):
            with lora.folded(ours):
                models.predict(ours, pixels, progress=None)

        @torch.no_grad()
        def ordinary(_):
            for _ in range(64 // batch):
                theirs(images).cpu()

        count = 64
    else:
        labels = ("timm bf16 autocast, all trained", "timm fp32, all trained")
        if kind == "lora":
            labels = ("ours bf16", "peft fp32")
        our_step, their_step = (lora_step.Step(label, name, device, batch) for label in labels)

        def mine(_):
            our_step()

        def ordinary(_):
            their_step()

        count = batch
    seconds = times({"ours": mine, "ordinary": ordinary}, None, device, rounds)
    return tuple(count / statistics.median(seconds[who]) for who in ("ours", "ordinary"))


class Unaugmented(bench_patches.Ordinary):
    """Validation patches as most people read them."""

    as_tensor = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])

    def __getitem__(self, i):
        image, x, y = self.places[i]
        if image not in self.slides:
            self.slides[image] = openslide.OpenSlide(self.paths[image])
        corner = int(x - SIZE / 2), int(y - SIZE / 2)
        return self.as_tensor(self.slides[image].read_region(corner, 0, (SIZE,) * 2).convert("RGB"))


def reading_rates(device, rounds):
    """Patches per second of a synthetic slide on all cores.

    Returns (ours augmented, ordinary augmented, ordinary for validation).
    """
    cores = torch.get_num_threads()
    workers = 0 if cores == 1 else cores
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        annotations = bench_patches.synthetic(Path(folder), 1, 3000)
        store = patches.Patches(annotations, cache=Path(folder) / "store", workers=cores)
        patches.build_store(store, cores)
        sample = data.Sampler(annotations, annotations.id, epoch_size=128).epoch(0)
        paths = [str(annotations.image_path(image)) for image in np.unique(annotations.image)]
        plain = Unaugmented(paths, sample[["image", "x", "y"]].tolist())

        def validation(_):
            for _ in DataLoader(plain, 16, num_workers=workers):
                pass

        times_of_each = times(
            {
                "ours": lambda _: bench_patches.batched(store, sample, device, 0),
                "ordinary": lambda _: bench_patches.ordinary(paths, sample, cores),
                "validation": validation,
            },
            None,
            device,
            rounds,
        )
    return tuple(len(sample) / statistics.median(seconds) for seconds in times_of_each.values())


# ---------------------------------------------------------------- adding up


def predictions(val_patches=None):
    """What 65 runs predict, in patches: (in the pseudo-epochs, after them, different ones of all).

    val_patches: of train.py; None: all of the validation set.
    """
    during = after = different = 0
    for runs, val, test in EXPERIMENTS:
        sample, whole, read_again = val, 1, 0  # the chosen model predicts the whole set once more
        if val_patches is not None and val_patches < val:
            sample, whole, read_again = val_patches, checkpoint.KEPT, val_patches
        during += runs * EPOCHS * sample
        after += runs * (whole * val + test)
        different += runs * (read_again + val + test)
    return during, after, different


def hours(trained, inferred, read, reread, together, val_patches=None):
    """(hours of training, of validation and tests) of 65 runs from patches per second.

    reread: of reading for validation; None: every validation patch is read once and kept.
    """
    during, after, different = predictions(val_patches)
    reading = (during + after) / reread if reread else different / read
    training = [TRAINED / trained, TRAINED / read]
    validation = [(during + after) / inferred, reading]
    both = max if together else sum
    return both(training) / 3600, both(validation) / 3600


def grid(rates, scales, together, val_patches):
    """{model: hours of training, of validation and of both; ours, then ordinary}.

    rates: {"lora", "full", "infer", "read": patches per second}; scales: {model: its speed as a
    multiple of these rates}.
    """
    table = {}
    for model, scale in scales.items():
        kind, numbers = "lora" if model in LORA else "full", []
        for who, reread in ((0, None), (1, rates["read"][2])):
            training, validation = hours(
                scale * rates[kind][who],
                scale * rates["infer"][who],
                rates["read"][who],
                reread,
                together,
                val_patches,
            )
            numbers += [training, validation, training + validation]
        table[model] = numbers
    return table


def table_row(label, gflop, numbers):
    """numbers: hours of training, of validation and of both; ours, then ordinary."""
    return [label, gflop, *(f"{h:,.0f}" for h in numbers), f"{numbers[5] / numbers[2]:.1f}"]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        help="encoder to measure (default: lunit-s16, a ViT-S/16, on the CPU, h-optimus-0 on a "
        "GPU)",
    )
    parser.add_argument("--device", help="cuda or cpu (default: cuda if available)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="measurements; their median counts (default: 3)"
    )
    two = {"type": float, "nargs": 2, "metavar": ("OURS", "ORDINARY")}
    parser.add_argument(
        "--lora", **two, help="patches per second of LoRA steps (default: measured)"
    )
    parser.add_argument("--full", **two, help="of end-to-end steps (default: measured)")
    parser.add_argument("--infer", **two, help="of validation (default: measured)")
    parser.add_argument(
        "--read",
        type=float,
        nargs=3,
        metavar=("OURS", "ORDINARY", "VALIDATION"),
        help="of reading and augmenting, and of ordinary reading for validation (default: "
        "measured)",
    )
    parser.add_argument(
        "--val-patches",
        type=int,
        metavar="N",
        help="count validation as train.py --val-patches N does it (default: on all, the protocol)",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="takes the hours of the whole grid (bench/gpu.sh)"
    )
    args = parser.parse_args()
    if args.val_patches is not None and args.val_patches < 2:
        raise common.UserError(f"--val-patches {args.val_patches}: give a number from 2")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = args.model or lora_step.DEFAULT_MODEL[device]
    rates, how = {}, {}
    for kind in ("lora", "full", "infer", "read"):
        rates[kind] = getattr(args, kind)
        how[kind] = "given"
        if rates[kind]:
            continue
        how[kind] = "measured here"
        if kind == "read":
            rates[kind] = reading_rates(device, args.rounds)
        else:
            rates[kind] = network_rates(kind, name, device, args.rounds)
    per_patch = {n: flops(models.find_encoder(n)) for n in (*LORA, *FULL, name) if n != "resnet50"}
    per_patch["resnet50"] = RESNET50

    machine = f"CPU, {torch.get_num_threads()} threads"
    if device != "cpu":
        machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "a GPU"
    print(f"{name} on {machine}, torch {torch.__version__}; patches per second, ours and ordinary:")
    for kind, text in (
        ("lora", "a LoRA step"),
        ("full", "an end-to-end step"),
        ("infer", "validation"),
        ("read", "reading and augmenting; ordinary reading for validation"),
    ):
        print(f"    {', '.join(f'{rate:,.1f}' for rate in rates[kind])}   {text} ({how[kind]})")
    during, after, _ = predictions(args.val_patches)
    print(
        f"\n{RUNS} runs of a model: {TRAINED / 1e6:.1f} M patches trained on, "
        f"{during / 1e6:.1f} M validated, {after / 1e6:.1f} M after the training. "
        f"The hours of other encoders are scaled by GFLOP from {name} "
        f"({per_patch[name] / 1e9:.1f}).\n"
    )
    scales = {model: per_patch[name] / per_patch[model] for model in (*LORA, *FULL)}
    table, rows = grid(rates, scales, device != "cpu", args.val_patches), []
    for model, numbers in table.items():
        method = "LoRA" if model in LORA else "end to end"
        rows.append(table_row(f"{model}, {method}", f"{per_patch[model] / 1e9:.1f}", numbers))
    sums = np.sum(list(table.values()), 0)
    rows.append(table_row("whole grid", "", sums))
    figures = {"ours": sums[2], "ordinary": sums[5]}
    if args.val_patches is not None:
        table = grid(rates, scales, device != "cpu", None)
        sums = np.sum(list(table.values()), 0)
        rows.append(table_row("validated on all", "", sums))
        figures |= {"ours_on_all": sums[2], "ordinary_on_all": sums[5]}
    if args.json:
        figures |= {"val_patches": args.val_patches, "rates": rates, "how": how}
        common.write_json(args.json, {"model": name, "device": device, **figures})
    print(
        common.table(
            rows,
            (
                "model",
                "GFLOP",
                "ours: train",
                "validate",
                "hours",
                "ordinary: train",
                "validate",
                "hours",
                "ratio",
            ),
            right=range(1, 9),
        )
    )


if __name__ == "__main__":
    common.command(main)
