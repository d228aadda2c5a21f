"""Device-hours of the paper's whole grid: six encoders with LoRA and three baselines, 65 runs each.

    python bench/gpu_hours.py                                      measures here, a few minutes on a
    CPU
    python bench/gpu_hours.py --model h-optimus-0 --lora A B --full A B --infer A B --read A B C
    figures of a GPU

Two ways of doing the same work are added up:

    ours       LoRA in bf16 on frozen bf16 weights, end to end under autocast in bf16; patches from
               the store, augmented
               in batches; validation patches decoded once, validated with merged weights in batches
               of 64
    ordinary   timm and peft in float32; OpenSlide, Pillow and torchvision sample by sample in a
               DataLoader, validation
               patches read again in every epoch; validated unmerged in the batches of training

65 runs: 4 fractions x 5 repeats on each of 2 datasets, and 5 domains x 5 repeats. A run trains on
100 x 1,280 patches whatever the fraction, validates on all its validation annotations 100 times,
and tests once.

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
import patches as reading
from encode import flops, times

import common
import data
import lora
import models
from dataset import patches

LORA = ("phikon", "uni", "virchow", "virchow2", "prov-gigapath", "h-optimus-0")
FULL = ("resnet50", "vit-b", "vit-h")
RESNET50 = (
    8.2e9  # operations of a forward pass at 224 px (4.1 G multiplications), torchvision's count
)
EPOCHS, EPOCH_SIZE, REPEATS, FRACTIONS, DOMAINS = 100, 1280, 5, 4, 5
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
VALIDATED = sum(runs * EPOCHS * val for runs, val, _ in EXPERIMENTS)
ONCE = sum(runs * (val + test) for runs, val, test in EXPERIMENTS)  # after the training


# ---------------------------------------------------------------- measuring, patches per second (ours, ordinary)


def network(kind, name, device, rounds, batch=16):
    """kind: lora | full | infer. End to end, ours is float32 weights under autocast, timm's network
    or ours alike.
    """
    if kind == "infer":
        ours, theirs = (
            lora_step.Step(label, name, device, batch).model.eval()
            for label in ("ours bf16", "peft fp32")
        )
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
        labels = (
            ("ours bf16", "peft fp32")
            if kind == "lora"
            else ("timm bf16 autocast, all trained", "timm fp32, all trained")
        )
        steps, count = [lora_step.Step(label, name, device, batch) for label in labels], batch
        mine, ordinary = (lambda _, step=step: step() for step in steps)
    found = times({"ours": mine, "ordinary": ordinary}, None, device, rounds)
    return tuple(count / statistics.median(found[who]) for who in ("ours", "ordinary"))


class Unaugmented(reading.Ordinary):
    """Validation patches as most people read them."""

    as_tensor = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])

    def __getitem__(self, i):
        image, x, y = self.places[i]
        if image not in self.slides:
            self.slides[image] = openslide.OpenSlide(self.paths[image])
        corner = int(x - models.SIZE / 2), int(y - models.SIZE / 2)
        return self.as_tensor(
            self.slides[image].read_region(corner, 0, (models.SIZE,) * 2).convert("RGB")
        )


def reading(device, rounds):
    """(ours augmented, ordinary augmented, ordinary for validation), all cores, a synthetic slide."""
    cores = torch.get_num_threads()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        annotations = reading.synthetic(Path(folder), 1, 3000)
        store = patches.Patches(annotations, cache=Path(folder) / "store", workers=cores)
        patches.build_store(store, cores)
        sample = data.Sampler(annotations, annotations.id, epoch_size=128).epoch(0)
        paths = [str(annotations.image_path(image)) for image in np.unique(annotations.image)]
        plain = Unaugmented(paths, sample[["image", "x", "y"]].tolist())

        def validation(_):
            for _ in DataLoader(plain, 16, num_workers=0 if cores == 1 else cores):
                pass

        found = times(
            {
                "ours": lambda _: reading.batched(store, sample, device, 0),
                "ordinary": lambda _: reading.ordinary(paths, sample, cores),
                "validation": validation,
            },
            None,
            device,
            rounds,
        )
    return tuple(len(sample) / statistics.median(seconds) for seconds in found.values())


# ---------------------------------------------------------------- adding up


def hours(trained, inferred, read, reread, together):
    """(hours of training, of validation and tests) of 65 runs from patches per second.

    reread: of reading for validation; None: every validation patch is read once and kept.
    """
    both = max if together else lambda a, b: a + b
    passes = VALIDATED + ONCE
    training = both(TRAINED / trained, TRAINED / read)
    validation = both(passes / inferred, passes / reread if reread else ONCE / read)
    return training / 3600, validation / 3600


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        help="the encoder that is measured (default: lunit-s16, a ViT-S/16, on the CPU, "
        "h-optimus-0 on a GPU)",
    )
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="measurements, whose median counts (default: 3)"
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
    args = parser.parse_args()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = args.model or ("h-optimus-0" if device == "cuda" else "lunit-s16")
    rates, how = {}, {}
    for kind in ("lora", "full", "infer", "read"):
        given = getattr(args, kind)
        rates[kind] = given or (
            reading(device, args.rounds)
            if kind == "read"
            else network(kind, name, device, args.rounds)
        )
        how[kind] = "given" if given else "measured here"
    per_patch = {
        n: RESNET50 if n == "resnet50" else flops(models.find_encoder(n))
        for n in (*LORA, *FULL, name)
    }

    machine = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    print(f"{name} on {machine}, torch {torch.__version__}; patches per second, ours and ordinary:")
    for kind, text in (
        ("lora", "a LoRA step"),
        ("full", "an end-to-end step"),
        ("infer", "validation"),
        ("read", "reading and augmenting; ordinary reading for validation"),
    ):
        print(f"    {', '.join(f'{rate:,.1f}' for rate in rates[kind])}   {text} ({how[kind]})")
    print(
        f"\n{RUNS} runs of a model: {TRAINED / 1e6:.1f} M patches trained on, "
        f"{VALIDATED / 1e6:.1f} M validated, "
        f"{ONCE / 1e6:.1f} M after the training. {'' if name in (*LORA, *FULL) else 'All '}hours "
        "are scaled by "
        f"GFLOP from {name} ({per_patch[name] / 1e9:.1f}).\n"
    )
    rows, sums = [], np.zeros(6)
    for model in (*LORA, *FULL):
        kind, scale = "lora" if model in LORA else "full", per_patch[name] / per_patch[model]
        found = [
            hours(
                scale * rates[kind][who],
                scale * rates["infer"][who],
                rates["read"][who],
                (None, rates["read"][2])[who],
                device != "cpu",
            )
            for who in (0, 1)
        ]
        row = [f"{model}, {'LoRA' if kind == 'lora' else 'end to end'}", per_patch[model] / 1e9]
        numbers = [h for pair in found for h in (*pair, sum(pair))]
        sums += numbers
        rows.append(
            [
                row[0],
                f"{row[1]:.1f}",
                *(f"{h:,.0f}" for h in numbers),
                f"{numbers[5] / numbers[2]:.1f}",
            ]
        )
    rows.append(["whole grid", "", *(f"{h:,.0f}" for h in sums), f"{sums[5] / sums[2]:.1f}"])
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
