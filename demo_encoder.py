"""Pretraining of the demo's small encoder (demo_encoder.safetensors, shipped with the repository).

    python demo_encoder.py          writes demo_encoder.safetensors anew: about 15 minutes on 2 cores

A ViT of the same code as the real encoders learns, on synthetic tissue of other seeds than the demo's, to read off what
a nucleus in the middle of a patch looks like (area, axes, density, texture, raggedness of the edge, eosin around it,
pigment) and what surrounds it (how crowded, how pink). It is told nothing of mitosis: the targets are measured on every
nucleus in the same way. It stands in for a foundation model so that probe and LoRA mean something without a download,
and knows nothing about real tissue.
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
import cli
import demo
import models
import runs

SEED = 20_000  # far from the seeds that a demo dataset is made with
CENTRE, OTHERS = 6, 28  # patch tokens that are kept while training: 6 × 6 in the middle, and a few elsewhere


def paint(number):
    """An image of a laboratory between two of the demo's: (pixels, places [n, 2], targets [n, T])."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([SEED, number])))
    a, b = (demo.DOMAINS[name] for name in rng.choice(list(demo.DOMAINS), 2, replace=False))
    t = rng.random()
    domain = demo.Domain(*(tuple(np.array(getattr(a, f.name)) * t + np.array(getattr(b, f.name)) * (1 - t))
                           if isinstance(getattr(a, f.name), tuple) else getattr(a, f.name) * t
                           + getattr(b, f.name) * (1 - t) for f in fields(a)))
    pixels, _, nuclei = demo.paint(rng, domain)
    places = np.array([(x, y) for x, y, _ in nuclei], np.float32)
    own = np.stack([attributes for _, _, attributes in nuclei])
    near = (np.abs(places[:, None] - places[None]).max(-1) < 56).sum(1, keepdims=True) / 8
    around = np.stack([(own[np.abs(places - place).max(-1) < 112]).mean(0)[[0, 3, 6]] for place in places])
    return pixels, places, np.concatenate([own, near, around], axis=1).astype(np.float32)


def crop(image, x, y, size):
    """[size, size, 3] around (x, y), reflected at the border."""
    half = size // 2
    rows = np.arange(round(float(y)) - half, round(float(y)) - half + size)
    columns = np.arange(round(float(x)) - half, round(float(x)) - half + size)
    last = demo.SIZE - 1
    return image[np.ix_(last - np.abs(last - np.abs(rows)), last - np.abs(last - np.abs(columns)))]


def embed_part(encoder, images, generator):
    """The class embedding from a part of the patch tokens: all in the middle, some elsewhere. [B, D]"""
    grid = encoder.grid
    middle = torch.zeros(grid, grid, dtype=torch.bool)
    start = (grid - CENTRE) // 2
    middle[start:start + CENTRE, start:start + CENTRE] = True
    middle, rest = middle.flatten().nonzero()[:, 0], (~middle).flatten().nonzero()[:, 0]
    rest = rest[torch.randperm(len(rest), generator=generator)[:OTHERS]]
    x = encoder.tokens(images)[:, torch.cat([torch.arange(encoder.prefix), encoder.prefix + middle,
                                             encoder.prefix + rest])]
    for block in encoder.blocks:
        x = block(x)
    return encoder.norm(x)[:, 0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(Path(__file__).parent / "demo_encoder.safetensors"), metavar="PATH")
    parser.add_argument("--images", type=int, default=120, help="images that are painted (default: 120)")
    parser.add_argument("--steps", type=int, default=900, help="steps of 64 patches (default: 900)")
    args = parser.parse_args()
    torch.manual_seed(SEED)

    with ProcessPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        painted = list(cli.progress(pool.map(paint, range(args.images)), total=args.images, desc="painting",
                                    unit="images"))
    index = np.concatenate([np.stack([np.full(len(t), i), np.arange(len(t))], 1) for i, (_, _, t) in
                            enumerate(painted)])
    targets = np.concatenate([t for _, _, t in painted])
    mean, std = targets.mean(0), targets.std(0)

    device = models.resolve_device("auto")
    spec = models.find_encoder("demo")
    encoder = models.load_encoder("demo", "random", device).train()
    model = models.PatchClassifier(encoder)
    readout = torch.nn.Linear(spec.dim, targets.shape[1]).to(device)
    parameters = [*encoder.parameters(), *readout.parameters()]
    optimizer = torch.optim.AdamW([{"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.05},
                                   {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}], lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=args.steps, pct_start=0.1)
    rng, generator = np.random.default_rng(SEED), torch.Generator().manual_seed(SEED)
    batch, size, recent, start = 64, augment.margin(models.SIZE), [], time.time()
    with cli.progress(total=args.steps, desc="pretraining", unit="steps") as bar:
        for step in range(args.steps):
            rows = rng.integers(len(index), size=batch)
            # Every second patch shows one of the dense nuclei, which are few.
            dense = rng.random(batch) < 0.5
            for i in np.flatnonzero(dense):
                image = rng.integers(len(painted))
                rows[i] = np.flatnonzero(index[:, 0] == image)[-1 - rng.integers(40)]
            crops = np.stack([crop(painted[i][0], *painted[i][1][j], size) for i, j in index[rows]])
            images = augment.augment(torch.from_numpy(crops).to(device), (SEED, step, range(batch)), models.SIZE)
            wanted = torch.from_numpy((targets[rows] - mean) / std).to(device)
            loss = F.mse_loss(readout(embed_part(encoder, (images - model.mean) / model.std, generator)), wanted)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            recent = recent[-49:] + [loss.item()]
            bar.set_postfix_str(f"unexplained variance {np.mean(recent):.3f}", refresh=False)
            bar.update()
    state = {name: tensor.detach().half().contiguous().cpu() for name, tensor in encoder.state_dict().items()}
    with runs.atomic(args.out) as temporary:
        save_file(state, temporary, metadata={
            "licence": "MIT", "made by": f"demo_encoder.py --images {args.images} --steps {args.steps}",
            "unexplained variance": f"{np.mean(recent):.3f}"})
    print(f"{args.out}: unexplained variance of the attributes {np.mean(recent):.3f}, {time.time() - start:.0f} s")


if __name__ == "__main__":
    cli.command(main)
