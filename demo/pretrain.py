"""Pretraining of the demo's small encoder (demo/encoder.safetensors, shipped with the repository).

    python -m demo.pretrain         writes demo/encoder.safetensors anew: about 25 minutes on 2
    cores

A ViT of the same code as the real encoders learns on synthetic tissue of other seeds than the
demo's. Its class token learns what the nucleus in the middle of a patch looks like (area, axes,
density, texture, raggedness of the edge, …) and what surrounds it; its patch tokens learn how much
haematoxylin, eosin and pigment lies where, whatever stain and scanner. It is told nothing of
mitosis: the targets are measured on every nucleus in the same way. It stands in for a foundation
model so that probe and LoRA mean something without a download, and knows nothing about real tissue.
"""

import argparse
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import augment
import common
import models
from demo import synthetic

SEED = 20_000  # far from the seeds that a demo dataset is made with
CENTRE, OTHERS = (
    6,
    28,
)  # patch tokens that are kept while training: 6 × 6 in the middle, and a few elsewhere
CELL = 4  # px: side of the squares that the patch tokens say the stains of
JITTER = 0.2
DENSE = (
    synthetic.MITOTIC_PER_IMAGE + synthetic.LOOK_ALIKES_PER_IMAGE
)  # the last nuclei of an image, few and dense


def paint(number):
    """An image of a laboratory between two of the demo's.

    (pixels uint8 [S, S, 3], stains float16 [S / CELL, S / CELL, 3], places [n, 2], targets [n, T])
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([SEED, number])))
    a, b = (
        synthetic.DOMAINS[name] for name in rng.choice(list(synthetic.DOMAINS), 2, replace=False)
    )
    t = rng.random()

    def between(name):
        first, second = (np.array(getattr(domain, name)) for domain in (a, b))
        mixed = first * t + second * (1 - t)
        return tuple(mixed) if mixed.ndim else float(mixed)

    domain = synthetic.Domain(*(between(f.name) for f in fields(a)))
    pixels, tissue = synthetic.paint(rng, domain, measured=True)
    stains = np.stack([tissue.H, tissue.E, tissue.P], axis=-1) * tissue.gap[..., None]
    side = synthetic.SIZE // CELL
    stains = stains.reshape(side, CELL, side, CELL, 3).mean((1, 3)).astype(np.float16)
    places = np.array([(x, y) for x, y, _ in tissue.nuclei], np.float32)
    own = np.stack([attributes for _, _, attributes in tissue.nuclei])
    far = np.abs(places[:, None] - places[None]).max(-1)
    crowd = (far < 56).sum(1, keepdims=True) / 8
    around = np.stack([own[row < 112].mean(0)[[0, 3, 6]] for row in far])
    return pixels, stains, places, np.concatenate([own, crowd, around], axis=1).astype(np.float32)


def crop(image, x, y, size):
    """[size, size, C] with its middle at (x, y), reflected at the border."""
    rows, columns = (np.arange(c - size // 2, c - size // 2 + size) for c in (y, x))
    last = len(image) - 1
    return image[np.ix_(last - np.abs(last - np.abs(rows)), last - np.abs(last - np.abs(columns)))]


def batch_of(painted, index, targets, rng, size):
    """Random patches uint8 [B, 224, 224, 3], stains float32 [B, 56, 56, 3], targets [B, T], turned
    and flipped.
    """
    images, stains, wanted = [], [], []
    for dense in rng.random(size) < 0.5:
        if dense:
            number = rng.integers(len(painted))
            row = index[number + 1] - 1 - rng.integers(DENSE)
        else:
            row = rng.integers(len(targets))
            number = np.searchsorted(index, row, side="right") - 1
        pixels, stain, places, _ = painted[number]
        # To a multiple of CELL, so that both crops show the same.
        x, y = (CELL * int(np.floor(c / CELL + 0.5)) for c in places[row - index[number]])
        pair = (
            crop(pixels, x, y, models.SIZE),
            crop(stain, x // CELL, y // CELL, models.SIZE // CELL),
        )
        turns, flip = rng.integers(4), rng.integers(2)
        pair = [np.rot90(part[:, ::-1] if flip else part, turns) for part in pair]
        images.append(pair[0])
        stains.append(pair[1])
        wanted.append(targets[row])
    return tuple(
        torch.from_numpy(np.stack(part))
        for part in (images, np.stack(stains).astype(np.float32), wanted)
    )


def recolour(images, rng):
    """Colour jitter and blur of float images [B, 3, S, S], stronger than the augmentation of
    training runs.
    """
    for operation, middle, half in (
        (augment.brightness, 1, JITTER),
        (augment.contrast, 1, JITTER),
        (augment.saturation, 1, JITTER),
        (augment.hue, 0, JITTER / 4),
    ):
        amount = torch.from_numpy(
            rng.uniform(middle - half, middle + half, len(images)).astype(np.float32)
        )
        images = operation(images, amount.to(images.device).view(-1, 1, 1, 1))
    blurred = rng.random(len(images)) < 0.2
    images[blurred] = augment.blur(images[blurred], rng.uniform(0.3, 1.2, blurred.sum()))
    return images


def some_tokens(encoder, images, generator):
    """Tokens after the final norm, for a part of the patches only: (x [B, 1 + K, D], which patches
    [K]).
    """
    grid = encoder.grid
    middle = torch.zeros(grid, grid, dtype=torch.bool)
    start = (grid - CENTRE) // 2
    middle[start : start + CENTRE, start : start + CENTRE] = True
    middle, rest = middle.flatten().nonzero()[:, 0], (~middle).flatten().nonzero()[:, 0]
    kept = torch.cat([middle, rest[torch.randperm(len(rest), generator=generator)[:OTHERS]]]).to(
        images.device
    )
    x = encoder.tokens(images)
    x = torch.cat([x[:, : encoder.prefix], x[:, encoder.prefix :][:, kept]], dim=1)
    for block in encoder.blocks:
        x = block(x)
    return encoder.norm(x), kept


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", default=str(Path(__file__).parent / "encoder.safetensors"), metavar="PATH"
    )
    parser.add_argument(
        "--images", type=int, default=150, help="images that are painted (default: 150)"
    )
    parser.add_argument(
        "--steps", type=int, default=1200, help="steps of 64 patches (default: 1200)"
    )
    args = parser.parse_args()
    torch.manual_seed(SEED)

    with ProcessPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        painted = list(
            common.progress(
                pool.map(paint, range(args.images)),
                total=args.images,
                desc="painting",
                unit="images",
            )
        )
    index = np.cumsum([0] + [len(places) for _, _, places, _ in painted])
    targets = np.concatenate([t for *_, t in painted])
    targets = (targets - targets.mean(0)) / targets.std(0)
    every = np.concatenate([stains.reshape(-1, 3)[::97] for _, stains, *_ in painted]).astype(
        np.float32
    )
    stain_mean, stain_std = torch.from_numpy(every.mean(0)), torch.from_numpy(every.std(0) + 0.02)

    device = models.resolve_device("auto")
    spec = models.find_encoder("demo")
    encoder = models.load_encoder("demo", "random", device).train()
    model = models.PatchClassifier(encoder)  # for its normalisation
    per_token = (spec.patch // CELL) ** 2 * 3
    readout = torch.nn.Linear(spec.dim, targets.shape[1]).to(device)
    dense = torch.nn.Linear(spec.dim, per_token).to(device)
    parameters = [*encoder.parameters(), *readout.parameters(), *dense.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.05},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=1e-3,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.5e-3, total_steps=args.steps, pct_start=0.1
    )
    rng, generator = np.random.default_rng(SEED), torch.Generator().manual_seed(SEED)
    recent, start = [], time.time()
    with common.progress(total=args.steps, desc="pretraining", unit="steps") as bar:
        for _ in range(args.steps):
            images, stains, wanted = batch_of(painted, index, targets, rng, 64)
            images = recolour(images.to(device).permute(0, 3, 1, 2).float() / 255, rng)
            x, kept = some_tokens(encoder, (images - model.mean) / model.std, generator)
            stains = (stains - stain_mean) / stain_std
            side = spec.patch // CELL
            stains = (
                stains.unfold(1, side, side)
                .unfold(2, side, side)
                .flatten(1, 2)
                .flatten(2)[:, kept.cpu()]
            )
            whole = F.mse_loss(readout(x[:, 0]), wanted.to(device))
            parts = F.mse_loss(dense(x[:, encoder.prefix :]), stains.to(device))
            optimizer.zero_grad()
            (whole + parts).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            recent = recent[-49:] + [(whole.item(), parts.item())]
            left = np.mean(recent, axis=0)
            bar.set_postfix_str(
                f"unexplained: nuclei {left[0]:.3f}, stains {left[1]:.3f}", refresh=False
            )
            bar.update()
    state = {
        name: tensor.detach().half().contiguous().cpu()
        for name, tensor in encoder.state_dict().items()
    }
    with common.atomic(args.out) as temporary:
        save_file(
            state,
            temporary,
            metadata={
                "licence": "MIT",
                "made by": f"demo/pretrain.py --images {args.images} --steps {args.steps}",
                "unexplained variance": f"nuclei {left[0]:.3f}, stains {left[1]:.3f}",
            },
        )
    print(
        f"{args.out}: unexplained variance of nuclei {left[0]:.3f}, of stains {left[1]:.3f}; "
        f"{time.time() - start:.0f} s"
    )


if __name__ == "__main__":
    common.command(main)
