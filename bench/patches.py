"""Training-ready patches per second: read, augment, float32 [3, 224, 224] in [0, 1].

    store      the crop store and augment.augment on batches; heavy: as --augment heavy does it
    direct     slides.read of each window and augment.augment on batches
    ordinary   OpenSlide, Pillow and torchvision v2, sample by sample, in a DataLoader

All three read the same places of the same tiled slides with the margin for rotation, and apply the
same operations with the same probabilities: rotation by any angle (p 0.5) out of the larger crop,
flips (p 0.5 each), colour jitter of 0.1 (p 0.5), Gaussian blur of 5 px, sigma 0.1 to 1 (p 0.1). The
three take turns; each number is the median over the rounds, per second of the clock and per second
of processor time (of all threads and processes; it does not suffer from what else the machine
does). Everything uses `--cores` cores: threads of the batched ones, workers of the DataLoader (none
where it is 1).

    python bench/patches.py             four synthetic slides of 4,000 px (JPEG tiles, like .svs),
    1,280 patches a turn
    python bench/patches.py --quick     one slide, 128 patches a turn
    python bench/patches.py --data D    slides of one's own
"""

import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import openslide
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import jpeg_tiff

import augment
import common
import data
import flags
from dataset import images, patches, slides

SIZE, MARGIN, BATCH = 224, augment.margin(224), 16


# ---------------------------------------------------------------- slides


def write_slide(path, size, seed):
    """A slide of blurred noise in the colours of H&E, in JPEG tiles of 256 px."""
    rng = np.random.default_rng(seed)
    noise = sum(
        np.asarray(
            Image.fromarray(rng.random((size // k + 1, size // k + 1), dtype=np.float32)).resize(
                (size, size), Image.Resampling.BICUBIC
            )
        )
        * weight
        for k, weight in ((1, 0.15), (4, 0.35), (32, 0.5))
    )
    pixels = (
        (np.array([245, 235, 245]) - noise[..., None] * np.array([120, 170, 90]))
        .clip(0, 255)
        .astype(np.uint8)
    )
    jpeg_tiff.write(path, list(jpeg_tiff.cut(Image.fromarray(pixels)).values()), size)


def synthetic(folder, slides, size, each=500):
    rng, names = np.random.default_rng(0), [f"{i + 1:03d}.tif" for i in range(slides)]
    for seed, name in enumerate(names):
        write_slide(folder / name, size, seed)
    image = np.repeat(names, each)
    return data.Annotations(
        np.arange(len(image)).astype(str),
        image,
        image,
        np.full(len(image), "all"),
        rng.uniform(200, size - 200, len(image)),
        rng.uniform(200, size - 200, len(image)),
        (np.arange(len(image)) % 4 == 0).astype(np.int8),
        "synthetic",
        folder,
        sizes={name: (size, size) for name in names},
        all_images=names,
    )


# ---------------------------------------------------------------- the three ways


class Ordinary:
    """A map-style dataset as most people write it: one sample after the other, transforms on the
    PIL image.
    """

    def __init__(self, paths, places):
        self.paths, self.places, self.slides = paths, places, {}
        self.rotate = v2.Compose(
            [v2.RandomRotation(180, v2.InterpolationMode.BILINEAR), v2.CenterCrop(SIZE)]
        )
        self.centre = v2.CenterCrop(SIZE)
        self.rest = v2.Compose(
            [
                v2.RandomHorizontalFlip(0.5),
                v2.RandomVerticalFlip(0.5),
                v2.RandomApply([v2.ColorJitter(0.1, 0.1, 0.1, 0.1)], 0.5),
                v2.RandomApply([v2.GaussianBlur(5, (0.1, 1.0))], 0.1),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
            ]
        )

    def __len__(self):
        return len(self.places)

    def __getitem__(self, i):
        image, x, y = self.places[i]
        if image not in self.slides:
            self.slides[image] = openslide.OpenSlide(self.paths[image])
        corner = int(np.floor(x - MARGIN / 2 + 0.5)), int(np.floor(y - MARGIN / 2 + 0.5))
        patch = self.slides[image].read_region(corner, 0, (MARGIN, MARGIN)).convert("RGB")
        patch = self.rotate(patch) if torch.rand(()) < 0.5 else self.centre(patch)
        return self.rest(patch)


def ordinary(paths, sample, cores):
    loader = DataLoader(
        Ordinary(paths, sample[["image", "x", "y"]].tolist()),
        BATCH,
        num_workers=0 if cores == 1 else cores,
        worker_init_fn=lambda _: torch.set_num_threads(1),
    )
    return sum(len(batch) for batch in loader)


def batched(patches, sample, device, step, heavy=False):
    for i in range(0, len(sample), BATCH):
        images = torch.from_numpy(patches.read_sample(sample[i : i + BATCH], MARGIN)).to(device)
        keys = (0, step + i, np.arange(len(images)))
        stain = augment.HEAVY_STAIN if heavy else 0.0
        batch = augment.augment(images, keys, SIZE, stain, heavy)
    if device != "cpu":
        torch.cuda.synchronize()
    assert batch.shape[1:] == (3, SIZE, SIZE)
    return len(sample)


def processor_time():
    """Seconds of this process's threads and of its processes that have ended."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def random_reads_of_a_png(folder, width, height):
    """(seconds of the first read of a PNG, median seconds of the next 200)."""
    tile = np.random.default_rng(0).integers(100, 250, (height // 10, width // 10, 3), np.uint8)
    Image.fromarray(np.tile(tile, (10, 10, 1))).save(folder / "a.png", compress_level=1)
    seconds = []
    for x, y in np.random.default_rng(1).uniform(0, (width, height), (201, 2)):
        start = time.perf_counter()
        slides.read(folder / "a.png", x, y, SIZE)
        seconds.append(time.perf_counter() - start)
    slides.close(folder / "a.png")
    return seconds[0], np.median(seconds[1:])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_arguments(parser)
    parser.add_argument("--quick", action="store_true", help="a minute rather than some")
    parser.add_argument(
        "--cores",
        type=int,
        nargs="+",
        default=[1],
        help="cores to use; several are measured one after the other (default: 1)",
    )
    parser.add_argument("--rounds", type=int, help="turns of each way (default: 5; --quick: 3)")
    args = parser.parse_args()
    rounds = args.rounds or (3 if args.quick else 5)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        folder = Path(folder)
        a = (
            flags.from_arguments(args)
            if args.data
            else synthetic(folder, *((1, 3000) if args.quick else (4, 4000)))
        )
        images.POOL = 4000  # random positions: enough for a turn, and quickly stored
        patches.build_store(patches.Patches(a, cache=folder / "store"), os.cpu_count() or 1)
        drawn = data.Sampler(a, a.id, epoch_size=128 if args.quick else 1280)
        paths = [str(a.image_path(image)) for image in np.unique(a.image)]
        devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
        rows, different = [], 0
        png = (3500, 2500) if args.quick else (7000, 5000)
        first, others = random_reads_of_a_png(folder, *png)
        for cores in args.cores:
            torch.set_num_threads(cores)
            stored = patches.Patches(a, cache=folder / "store", workers=cores)
            direct = patches.Patches(a, cache=False, workers=cores)
            ways = {f"store, {d}": lambda s, k, d=d: batched(stored, s, d, k) for d in devices}
            ways |= {
                "store, cpu, heavy": lambda s, k: batched(stored, s, "cpu", k, heavy=True),
                "store, read only": lambda s, k: len(stored.read_sample(s, MARGIN)),
                "direct, cpu": lambda s, k: batched(direct, s, "cpu", k),
                "direct, read only": lambda s, k: len(direct.read_sample(s, MARGIN)),
                "ordinary": lambda s, k: ordinary(paths, s, cores),
            }
            speed = {name: [] for name in ways}
            for k in range(rounds + 1):  # the first warms up
                sample = drawn.epoch(k)
                for name, way in ways.items():
                    start, busy = time.perf_counter(), processor_time()
                    n = way(sample, 10_000 * k)
                    speed[name].append(
                        (n / (time.perf_counter() - start), n / (processor_time() - busy))
                    )
                different += int(
                    (
                        stored.read_sample(sample[:64], MARGIN)
                        != direct.read_sample(sample[:64], MARGIN)
                    ).any()
                )
            speed = {name: np.array(found[1:]) for name, found in speed.items()}
            for name, found in speed.items():
                clock, busy = np.median(found, 0)
                times = np.median(found, 0) / np.median(speed["ordinary"], 0)
                rows.append(
                    [
                        name,
                        cores,
                        f"{clock:,.0f}",
                        f"{found[:, 0].min():,.0f} to {found[:, 0].max():,.0f}",
                        f"{times[0]:.1f}",
                        f"{busy:,.0f}",
                        f"{times[1]:.1f}",
                    ]
                )
    print(f"\npatches that differ between the store and direct reads: {different}")
    print(
        f"random reads of a PNG of {png[0]:,} x {png[1]:,} px without a store: the first "
        f"{first:.2f} s, the others "
        f"{1000 * others:.2f} ms\n"
    )
    header = [
        "way",
        "cores",
        "patches/s",
        "range",
        "× ordinary",
        "patches per CPU second",
        "× ordinary",
    ]
    for row in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(str(cell) for cell in row)} |")


if __name__ == "__main__":
    common.command(main)
