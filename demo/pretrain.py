"""Pretraining of the demo's small encoder (demo/encoder.safetensors, part of the repository).

    python -m demo.pretrain     writes demo/encoder.safetensors again; about 3 minutes on 2 cores

A ViT of the same code as the real encoders learns on synthetic tissue of other seeds than the
demo's. Its embedding learns what the nucleus in the middle of a patch looks like (area, axes,
density, texture, raggedness of the edge, …) and what surrounds it; its patch tokens learn how much
haematoxylin, eosin and pigment lies where, whatever the stain and the scanner. It sees no label:
the targets are measured on every nucleus in the same way, dividing or not. It stands in for a
foundation model, so that probe and LoRA mean something without a download. It knows nothing about
real tissue."""

import argparse
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import augment
import common
import models
from common import UserError
from demo import synthetic

SEED = 20_000  # of the images: far from the seeds that a demo dataset is made with
WEIGHTS, READOUTS, BATCHES = 3, 1, 7  # seeds
STEPS = 750
BATCH = 64
PEAK_LR = 2e-3
CELL = 4  # px: side of the squares whose stains the patch tokens predict
JITTER = 0.2
# The last nuclei of an image are the annotated cells, which are few and dense: half of a batch.
DENSE = synthetic.MITOTIC_PER_IMAGE + synthetic.LOOK_ALIKES_PER_IMAGE
DENSE_SHARE = 0.5
CONTEXT = 96  # px: side of the windows over which the stains are standardised
NEAR, AROUND = 56, 112  # px: half sides of the windows in which neighbours are counted, averaged
AVERAGED = [synthetic.ATTRIBUTES.index(name) for name in ("area", "density", "eosin")]


def paint(number):
    """An image of a laboratory between two of the demo's.

    (pixels uint8 [S, S, 3], stains float16 [S / CELL, S / CELL, 3], places [n, 2], targets [n, T])
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([SEED, number])))
    names = rng.choice(list(synthetic.DOMAINS), 2, replace=False)
    first, second = (synthetic.DOMAINS[name] for name in names)
    t = rng.random()
    mixed = []
    for field in fields(synthetic.Domain):
        a, b = (np.array(getattr(domain, field.name)) for domain in (first, second))
        mixed.append(a * t + b * (1 - t))
    pixels, tissue = synthetic.paint(rng, synthetic.Domain(*mixed), measured=True)
    stains = np.stack([tissue.H, tissue.E, tissue.P], axis=-1) * tissue.gap[..., None]
    side = synthetic.SIZE // CELL
    stains = stains.reshape(side, CELL, side, CELL, 3).mean((1, 3)).astype(np.float16)
    places = np.array([(x, y) for x, y, _ in tissue.nuclei], np.float32)
    nuclei = np.stack([attributes for _, _, attributes in tissue.nuclei])
    distance = np.abs(places[:, None] - places[None]).max(-1)
    crowd = (distance < NEAR).sum(1, keepdims=True) / 8
    around = np.stack([nuclei[row < AROUND].mean(0)[AVERAGED] for row in distance])
    return pixels, stains, places, np.concatenate([nuclei, crowd, around], 1).astype(np.float32)


def crop(image, x, y, size):
    """[size, size, C] with its middle at (x, y), reflected at the border."""
    last = len(image) - 1
    rows, columns = (np.arange(c - size // 2, c - size // 2 + size) for c in (y, x))
    rows, columns = (last - np.abs(last - np.abs(places)) for places in (rows, columns))
    return image[np.ix_(rows, columns)]


class Nuclei:
    """All nuclei of the painted images, with standardised targets and stains."""

    def __init__(self, painted):
        self.painted = painted
        places, targets, dense = [], [], []
        for number, (_, _, centres, values) in enumerate(painted):
            # To a multiple of CELL, so that crops of pixels and of stains show the same.
            squares = np.floor(centres / CELL + 0.5).astype(int)
            places.append(np.column_stack([np.full(len(squares), number), CELL * squares]))
            targets.append(values)
            dense.append(np.arange(len(values)) >= len(values) - DENSE)
        self.places = np.concatenate(places)  # number of the image, x, y
        self.dense = np.flatnonzero(np.concatenate(dense))
        targets = np.concatenate(targets)
        self.targets = (targets - targets.mean(0)) / targets.std(0)
        some = [self.stains(row, CONTEXT) for row in range(0, len(targets), 50)]
        some = np.stack(some).astype(np.float32).reshape(-1, 3)
        self.stain_mean, self.stain_std = some.mean(0), some.std(0) + 0.02

    def pixels(self, row, size):
        number, x, y = self.places[row]
        return crop(self.painted[number][0], x, y, size)

    def stains(self, row, size):
        number, x, y = self.places[row]
        return crop(self.painted[number][1], x // CELL, y // CELL, size // CELL)

    def batch(self, rng, count, size):
        """Patches around random nuclei, all turned and flipped alike: images uint8 [B, size, size,
        3], stains float32 [B, size / CELL, size / CELL, 3], targets [B, T].
        """
        dense = int((rng.random(count) < DENSE_SHARE).sum())
        rows = np.concatenate(
            [rng.choice(self.dense, dense), rng.integers(len(self.targets), size=count - dense)]
        )
        images = np.stack([self.pixels(row, size) for row in rows])
        stains = np.stack([self.stains(row, size) for row in rows]).astype(np.float32)
        stains = (stains - self.stain_mean) / self.stain_std
        turns, flip = int(rng.integers(4)), bool(rng.integers(2))
        turned = []
        for part in (images, stains):
            part = np.rot90(part, turns, (1, 2))
            if flip:
                part = part[:, :, ::-1]
            turned.append(torch.from_numpy(np.ascontiguousarray(part)))
        return *turned, torch.from_numpy(self.targets[rows])


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
        amount = rng.uniform(middle - half, middle + half, len(images)).astype(np.float32)
        amount = torch.from_numpy(amount).to(images.device)
        images = operation(images, amount.view(-1, 1, 1, 1))
    blurred = rng.random(len(images)) < 0.2
    images[blurred] = augment.blur(images[blurred], rng.uniform(0.3, 1.2, blurred.sum()))
    return images


def initialise(encoder):
    """Random weights from which the encoder learns fast: products keep the scale of their input."""
    models.randomise(encoder, "cpu", torch.float32)
    generator = torch.Generator().manual_seed(WEIGHTS)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.startswith("blocks") and parameter.dim() == 2:
                parameter.normal_(0, 0.7 / parameter.shape[1] ** 0.5, generator=generator)
            elif name == "patch_embed.proj.weight":
                parameter.normal_(0, 1 / parameter[0].numel() ** 0.5, generator=generator)


def pretrain(encoder, nuclei, steps):
    """Train the encoder in place; returns the unexplained variance of (nuclei, stains) over the
    last 50 steps.
    """
    device = next(encoder.parameters()).device
    spec, side = encoder.spec, encoder.spec.patch // CELL
    model = models.PatchClassifier(encoder)  # for its normalisation
    torch.manual_seed(READOUTS)
    readout = torch.nn.Linear(encoder.embed_dim, nuclei.targets.shape[1]).to(device)
    stain_readout = torch.nn.Linear(spec.dim, side * side * 3).to(device)
    parameters = [*encoder.parameters(), *readout.parameters(), *stain_readout.parameters()]
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.05},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LR, total_steps=steps, pct_start=0.1
    )
    rng, recent = np.random.default_rng(BATCHES), []
    with common.progress(total=steps, desc="pretraining", unit="steps") as bar:
        for _ in range(steps):
            images, stains, targets = nuclei.batch(rng, BATCH, encoder.size)
            images = recolour(images.to(device).permute(0, 3, 1, 2).float() / 255, rng)
            tokens = encoder.tokens((images - model.mean) / model.std)
            for block in encoder.blocks:
                tokens = block(tokens)
            tokens = encoder.norm(tokens)[:, encoder.prefix :]  # [B, grid², dim]
            # Each token predicts the side × side squares of its patch: [B, grid², 3 side²].
            squares = stains.unfold(1, side, side).unfold(2, side, side).flatten(1, 2).flatten(2)
            nucleus_loss = F.mse_loss(readout(tokens.mean(dim=1)), targets.to(device))
            stain_loss = F.mse_loss(stain_readout(tokens), squares.to(device))
            optimizer.zero_grad()
            (nucleus_loss + stain_loss).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            recent = [*recent[-49:], (nucleus_loss.item(), stain_loss.item())]
            unexplained = np.mean(recent, axis=0)
            bar.set_postfix_str(
                f"unexplained: nuclei {unexplained[0]:.3f}, stains {unexplained[1]:.3f}",
                refresh=False,
            )
            bar.update()
    return unexplained


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        default=str(Path(__file__).parent / "encoder.safetensors"),
        metavar="PATH",
        help="file to write (default: demo/encoder.safetensors)",
    )
    parser.add_argument(
        "--images", type=int, default=150, help="images that are painted (default: 150)"
    )
    parser.add_argument(
        "--steps", type=int, default=STEPS, help=f"steps of {BATCH} patches (default: {STEPS})"
    )
    args = parser.parse_args()
    for name in ("images", "steps"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: at least 1")

    start = time.time()
    painted = synthetic.map_in_processes(paint, range(args.images), "painting")
    spec = models.find_encoder("demo")
    # The patches are only as large as what the encoder reads of them.
    encoder = models.ViT(spec, size=spec.field)
    initialise(encoder)
    encoder.to(models.resolve_device("auto")).train()
    nuclei, stains = pretrain(encoder, Nuclei(painted), args.steps)
    state = {}
    for name, tensor in encoder.state_dict().items():
        state[name] = tensor.detach().half().contiguous().cpu()
    metadata = {
        "licence": "MIT",
        "made by": f"demo/pretrain.py --images {args.images} --steps {args.steps}",
        "unexplained variance": f"nuclei {nuclei:.3f}, stains {stains:.3f}",
    }
    with common.atomic(args.out) as temporary:
        save_file(state, temporary, metadata=metadata)
    print(
        f"{args.out}: unexplained variance of nuclei {nuclei:.3f}, of stains {stains:.3f}; "
        f"{time.time() - start:.0f} s"
    )


if __name__ == "__main__":
    common.command(main)
