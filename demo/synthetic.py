"""A synthetic H&E-like dataset in MIDOG's format, to try everything without a download.

    python -m demo.synthetic      data/demo: 40 TIFF images of 1024 px at 0.25 µm/px from five
                                  domains, and MIDOG.json

Tissue is painted as concentrations of haematoxylin and eosin. Beer and Lambert's law turns them
into colour with the stain, the scanner, the sharpness and the noise of the domain. Mitotic figures
and look-alikes draw their darkness from one distribution: shape and texture tell them apart, colour
does not. Results on it show that the programs work; they say nothing about real tissue."""

import argparse
import io
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import common
from common import UserError

SIZE = 1024  # px
MPP = 0.25  # µm/px
IMAGES_PER_DOMAIN = 8
MITOTIC_PER_IMAGE = 18
LOOK_ALIKES_PER_IMAGE = 22
NUCLEI_PER_IMAGE = 430  # as far as the tissue has room for them
MITOTIC = ("prometaphase", "metaphase side", "metaphase end", "anaphase", "telophase")
MITOTIC_SHARE = (0.26, 0.28, 0.14, 0.17, 0.15)
LOOK_ALIKE = ("pyknotic", "apoptotic", "hyperchromatic", "elongated", "pigment")
LOOK_ALIKE_SHARE = (0.26, 0.20, 0.24, 0.22, 0.08)
TURN = 6.2832  # of an angle, rad: these digits belong to the dataset
# What `attributes` measures on any nucleus, dividing or not. demo/pretrain.py learns these, not the
# classes.
ATTRIBUTES = (
    "area",
    "length",
    "width",
    "density",
    "texture",
    "edge",
    "eosin",
    "pigment",
    "filled",
    "peaked",
    "hollow",
)


@dataclass(frozen=True)
class Domain:
    """Stain, scanner and optics of a laboratory."""

    haematoxylin: tuple  # absorbance of red, green, blue at concentration 1
    eosin: tuple
    strength: tuple  # of both
    white: tuple  # colour of the empty slide
    blur: float  # px, sigma of the optics
    noise: float  # of the sensor, grey levels
    gamma: float = 1.0


DOMAINS = {
    "A": Domain((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (1.00, 0.62), (243, 241, 243), 0.7, 2.0),
    "B": Domain((0.72, 0.62, 0.22), (0.10, 0.92, 0.20), (1.18, 0.48), (238, 239, 246), 1.1, 3.0),
    "C": Domain((0.58, 0.76, 0.36), (0.05, 0.88, 0.16), (0.85, 0.85), (247, 243, 240), 0.9, 2.5),
    "D": Domain(
        (0.68, 0.66, 0.36), (0.14, 0.95, 0.08), (1.25, 0.70), (232, 236, 238), 1.5, 3.5, 1.1
    ),
    "E": Domain(
        (0.60, 0.72, 0.20), (0.08, 0.96, 0.28), (0.92, 0.55), (250, 247, 249), 0.5, 4.0, 0.92
    ),
}


# ---------------------------------------------------------------- brushes


def smooth_noise(rng, size, cell):
    """Noise in [0, 1], float32 [size, size], with features of about `cell` px."""
    nodes = size // cell + 3
    grid = rng.random((nodes, nodes)).astype(np.float32)
    wide = nodes * cell
    noise = np.asarray(Image.fromarray(grid).resize((wide, wide), Image.Resampling.BICUBIC))
    return np.clip(noise[cell : cell + size, cell : cell + size], 0, 1)


def blurred(image, sigma):
    """Gaussian blur of [H, W, C] over the first two axes, reflected at the border."""
    radius = max(1, int(3 * sigma + 0.5))
    weights = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    weights = (weights / weights.sum()).astype(np.float32)
    for axis in (0, 1):
        margins = [(0, 0)] * image.ndim
        margins[axis] = (radius, radius)
        # The blurred axis first, so that a slice of it shifts the image.
        padded = np.moveaxis(np.pad(image, margins, mode="reflect"), axis, 0)
        length = image.shape[axis]
        total = weights[0] * padded[:length]
        for i in range(1, len(weights)):
            total += weights[i] * padded[i : i + length]
        image = np.moveaxis(total, 0, axis)
    return image


def step(distance, softness):
    """1 inside (distance < 0), 0 outside, with a soft edge."""
    return 1 / (1 + np.exp(np.clip(distance / softness, -30, 30)))


class Stamp:
    """Coordinates around a place, turned by `angle`: u along the long axis, v across it (px).

    `place` selects the same pixels from an image. A stamp ends at the image's border."""

    def __init__(self, x, y, radius, angle=0.0):
        left, top = max(0, int(x) - radius), max(0, int(y) - radius)
        right, bottom = min(SIZE, int(x) + radius + 1), min(SIZE, int(y) + radius + 1)
        v, u = np.mgrid[top:bottom, left:right].astype(np.float32)
        u, v = u - np.float32(x), v - np.float32(y)
        c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        self.u, self.v = c * u + s * v, c * v - s * u
        self.place = slice(top, bottom), slice(left, right)


def outline(u, v, a, b, rng, rough):
    """Signed distance (about px) from an ellipse with half axes a, b whose radius wobbles by the
    fraction `rough`, at the coordinates u, v of a Stamp.
    """
    theta = np.arctan2(v / b, u / a)
    wobble = np.ones_like(theta)
    for k in range(2, 7):
        amplitude = rough / k**0.7 * (2 * rng.random() - 1)
        wobble += amplitude * np.cos(k * theta + TURN * rng.random())
    return (np.hypot(u / a, v / b) - wobble) * min(a, b)


def discs(stamp, centers, radii, softness):
    """Union of soft discs: chromosomes, fragments, granules."""
    shape = np.zeros_like(stamp.u)
    for (cx, cy), r in zip(centers, radii):
        shape = np.maximum(shape, step(np.hypot(stamp.u - cx, stamp.v - cy) - r, softness))
    return shape


# ---------------------------------------------------------------- cells


def plate(rng, stamp, x, length, thick, bend):
    """A plate of chromosomes seen from the side, at distance x: a ragged bar across the axis from
    which arms stick out.
    """
    centers, radii = [], []
    heights = np.linspace(-1, 1, int(length * 0.9))
    for t in heights:
        off_axis = x + bend * (t * t - 0.4) + (rng.random() - 0.5) * thick * 0.5
        centers.append((off_axis, t * length / 2 + (rng.random() - 0.5) * 2))
    for t in heights:
        radii.append(thick / 2 * (0.75 + 0.5 * rng.random()) * (1 - 0.35 * t * t))
    for _ in range(rng.integers(2, 6)):  # arms
        t = 2 * rng.random() - 1
        side = -1
        if rng.random() < 0.5:
            side = 1
        for reach in (0.6, 1.0):
            arm = side * thick * reach * (0.6 + 0.4 * rng.random())
            centers.append((x + bend * (t * t - 0.4) + arm, t * length / 2))
            radii.append(1.3 + 0.7 * rng.random())
    return discs(stamp, centers, radii, 0.7)


def mitotic_shape(kind, rng, stamp, size):
    """Chromatin of a mitotic figure [0, 1]: condensed, no membrane, ragged. `size`: about 1."""
    if kind == "prometaphase":
        n = rng.integers(9, 16)
        angles = TURN * rng.random(n)
        distances = 8.0 * size * np.sqrt(rng.random(n))
        centers = np.stack([distances * np.cos(angles) * 1.2, distances * np.sin(angles) * 0.9], 1)
        return discs(stamp, centers, 2.2 + 2.2 * rng.random(n), 0.7)
    if kind == "metaphase side":
        length = (23 + 10 * rng.random()) * size
        thick = (6.5 + 3 * rng.random()) * size
        return plate(rng, stamp, 0.0, length, thick, 3 * (rng.random() - 0.5))
    if kind == "metaphase end":
        n = rng.integers(11, 17)
        radius = (8 + 3 * rng.random()) * size
        angles = TURN * (np.arange(n) + 0.5 * rng.random(n)) / n
        centers = []
        for angle in angles:
            cx = radius * (0.85 + 0.3 * rng.random()) * np.cos(angle)
            cy = radius * (0.85 + 0.3 * rng.random()) * np.sin(angle)
            centers.append((cx, cy))
        return discs(stamp, centers, 2.8 + 1.8 * rng.random(n), 0.8)
    if kind == "anaphase":
        apart = (8 + 5 * rng.random()) * size
        length = (19 + 8 * rng.random()) * size
        curvature = 1
    else:  # telophase
        apart = (15 + 5 * rng.random()) * size
        length = (15 + 6 * rng.random()) * size
        curvature = 0.3
    thick = (5 + 2 * rng.random()) * size
    bend = (3 + 3 * rng.random()) * curvature
    first = plate(rng, stamp, -apart, length, thick, bend)
    return np.maximum(first, plate(rng, stamp, apart, length, thick, -bend))


def look_alike_shape(kind, rng, stamp, size):
    """Chromatin of a look-alike [0, 1]: as dense as a mitotic figure's, but smooth, round or inside
    a membrane. `size`: about 1.
    """
    if kind in ("pyknotic", "apoptotic"):
        if rng.random() < 0.45:  # fragments: smooth balls of different sizes
            n = rng.integers(2, 6)
            angles, distances = TURN * rng.random(n), (5 + 8 * rng.random(n)) * size
            centers = np.stack([distances * np.cos(angles), distances * np.sin(angles)], 1)
            return discs(stamp, centers, (2.5 + 4.5 * rng.random(n)) * size, 0.8)
        a = (8 + 4 * rng.random()) * size
        b = a * (0.75 + 0.25 * rng.random())
        return step(outline(stamp.u, stamp.v, a, b, rng, 0.05), 0.9)
    if kind == "hyperchromatic":
        a = (11 + 5 * rng.random()) * size
        b = a * (0.65 + 0.3 * rng.random())
        shape = step(outline(stamp.u, stamp.v, a, b, rng, 0.16), 1.0)
        height, width = shape.shape
        return shape * (0.75 + 0.4 * smooth_noise(rng, 128, 5)[:height, :width])
    if kind == "elongated":
        b = (3.6 + 2.2 * rng.random()) * size
        across = stamp.u + 0.012 * (rng.random() - 0.5) * stamp.v**2  # bent
        a = (13 + 6 * rng.random()) * size
        return step(outline(stamp.v, across, a, b, rng, 0.07), 0.9)
    n = rng.integers(9, 22)  # pigment: round granules, loosely together
    angles, distances = TURN * rng.random(n), 12 * size * np.sqrt(rng.random(n))
    centers = np.stack([distances * np.cos(angles), distances * np.sin(angles)], 1)
    return discs(stamp, centers, 1.2 + 2.0 * rng.random(n), 0.6)


# ---------------------------------------------------------------- an image


class Tissue:
    """One image in the making: concentrations of haematoxylin (H), eosin (E) and brown pigment (P),
    each float32 [SIZE, SIZE].

    cells: {x, y, kind, label} of every annotated cell. nuclei, with `measured` only: (x, y,
    ATTRIBUTES) of every nucleus in the order of painting, the annotated cells last."""

    def __init__(self, rng, measured=False):
        self.rng = rng
        octaves = [smooth_noise(rng, SIZE, cell) for cell in (4, 9, 20, 60, 200)]
        self.fine = (octaves[0] + octaves[1]) / 2  # chromatin
        self.E = 0.20 + 0.25 * octaves[2] + 0.30 * octaves[3]
        self.H = 0.03 + 0.05 * octaves[2] * octaves[3]
        self.P = np.zeros((SIZE, SIZE), np.float32)
        # Fibres of the stroma: stripes along a direction that drifts, where a slow noise says there
        # is stroma.
        y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
        angle = np.float32(3.1416 * rng.random())
        drift = 40 * (octaves[3] - 0.5)
        along = x * np.cos(angle) + y * np.sin(angle) + drift + 160 * (octaves[4] - 0.5)
        narrow = 0.25 * np.sin(along / 3.3 + 5 * octaves[2])
        stripes = 0.5 + narrow + 0.25 * np.sin(along / 7.7 + 9 * octaves[3])
        self.stroma = step(0.56 - smooth_noise(rng, SIZE, 170), 0.03)
        self.E += self.stroma * (0.30 * stripes - 0.05)
        # 0 where the slide is empty.
        self.gap = step(0.14 - smooth_noise(rng, SIZE, 110), 0.012)
        # x, y and reach (px) of what has a place already.
        self.taken = np.empty((NUCLEI_PER_IMAGE, 3))
        self.taken_count = 0
        self.cells = []
        self.nuclei = []
        self.measured = measured
        self.nucleus_size = 0.85 + 0.3 * rng.random()
        self.darkness = 0.9 + 0.25 * rng.random()

    def take(self, x, y, reach):
        self.taken[self.taken_count] = x, y, reach
        self.taken_count += 1

    def is_free(self, x, y, distance):
        a, b, reach = self.taken[: self.taken_count].T
        return np.all((x - a) ** 2 + (y - b) ** 2 >= np.maximum(distance, reach) ** 2)

    def cytoplasm(self, x, y, radius, eosin, clear):
        """A cell's body: `eosin` in it, a `clear` zone in its middle, a faint membrane."""
        stamp = Stamp(x, y, int(radius * 1.6), TURN * self.rng.random())
        a = radius * (1 + 0.15 * self.rng.random())
        b = radius * (0.85 + 0.15 * self.rng.random())
        edge = outline(stamp.u, stamp.v, a, b, self.rng, 0.08)
        body = step(edge, 1.5)
        inside = body * (eosin + 0.10 * self.fine[stamp.place])
        self.E[stamp.place] = self.E[stamp.place] * (1 - body) + inside
        self.E[stamp.place] += 0.12 * np.exp(-((edge / 1.6) ** 2))
        self.H[stamp.place] *= 1 - 0.7 * body
        self.E[stamp.place] *= 1 - clear * step(np.hypot(stamp.u, stamp.v) - 0.62 * radius, 2.5)

    def nucleus(self, x, y, stromal):
        """An ordinary nucleus: membrane, chromatin, nucleoli."""
        rng = self.rng
        if stromal:
            a = (11 + 7 * rng.random()) * self.nucleus_size
            b = (4 + 2.5 * rng.random()) * self.nucleus_size
            condensed = 1.25
        else:
            a = (11 + 6 * rng.random()) * self.nucleus_size
            b = a * (0.7 + 0.3 * rng.random())
            condensed = 1.0
            self.cytoplasm(x, y, a * (1.5 + 0.5 * rng.random()), 0.28 + 0.30 * rng.random(), 0.0)
        stamp = Stamp(x, y, int(a * 1.5) + 4, TURN * rng.random())
        edge = outline(stamp.u, stamp.v, a, b, rng, 0.07)
        inside = step(edge, 0.9)
        texture = self.fine[stamp.place]
        level = (0.42 + 0.35 * rng.random()) * self.darkness * condensed
        chromatin = level * (0.45 + 1.1 * texture) + 0.25 * level * np.exp(-((edge / 1.5) ** 2))
        for _ in range(rng.integers(0, 4)):
            u, v = a * (rng.random() - 0.5), b * (rng.random() - 0.5)
            r = 1.5 + 1.6 * rng.random()
            chromatin = chromatin + 0.5 * level * step(np.hypot(stamp.u - u, stamp.v - v) - r, 0.6)
        self.H[stamp.place] = self.H[stamp.place] * (1 - inside) + inside * chromatin
        self.E[stamp.place] *= 1 - 0.6 * inside
        if self.measured:
            self.nuclei.append((float(x), float(y), self.attributes(stamp, inside)))

    def annotated(self, x, y, kind):
        """A mitotic figure or a look-alike; notes it in `cells`."""
        rng = self.rng
        mitotic = kind in MITOTIC
        size = (0.85 + 0.3 * rng.random()) * self.nucleus_size
        angle = TURN * rng.random()
        radius = (22 + 8 * rng.random()) * size
        # Body, clearing and darkness come from the same distributions for both classes: no colour
        # tells them apart.
        eosin = 0.22 + 0.35 * rng.random() ** 1.5
        if kind == "apoptotic" or rng.random() < 0.15:
            eosin += 0.25 * rng.random()
            radius *= 0.85
        self.cytoplasm(x, y, radius, eosin, 0.5 * rng.random())
        stamp = Stamp(x, y, 44, angle)
        if mitotic:
            shape = mitotic_shape(kind, rng, stamp, size)
        else:
            shape = look_alike_shape(kind, rng, stamp, size)
        if kind == "apoptotic":  # shrunken cell: a rim of dense eosin, a halo around it
            distance = np.hypot(stamp.u, stamp.v)
            self.E[stamp.place] += 0.35 * step(distance - 15 * size, 1.2)
            self.E[stamp.place] *= 1 - 0.7 * np.exp(-(((distance - 20 * size) / 2.5) ** 2))
        texture = 0.85 + 0.3 * self.fine[stamp.place]
        # The absorbance summed over the cell has one distribution for both classes; the density is
        # bounded to stay plausible.
        mass = (260 + 260 * rng.random()) * size * size
        level = np.clip(mass / max(float(shape.sum()), 1.0), 0.75, 1.75) * self.darkness
        if kind == "pigment":
            self.P[stamp.place] = np.maximum(self.P[stamp.place], 0.75 * level * shape)
            self.H[stamp.place] += 0.25 * level * shape
        else:
            background = self.H[stamp.place] * (1 - 0.6 * shape)
            self.H[stamp.place] = np.maximum(background, level * shape * texture)
            self.E[stamp.place] *= 1 - 0.5 * shape
        self.cells.append({"x": float(x), "y": float(y), "kind": kind, "label": int(mitotic)})
        if self.measured:
            self.nuclei.append((float(x), float(y), self.attributes(stamp, shape)))

    def attributes(self, stamp, shape):
        """The ATTRIBUTES of what was just painted as `shape`, float32 [11].

        Logarithms of px, concentrations; `edge` is perimeter / sqrt(area), `filled` the share of
        the ellipse of equal axes, `peaked` the kurtosis along the long axis, `hollow` the share of
        the area that lies outside the mean radius."""
        area = max(float(shape.sum()), 1.0)
        w = shape / area
        u, v = stamp.u - (w * stamp.u).sum(), stamp.v - (w * stamp.v).sum()
        # The two variances along the axes of the shape: mean ± apart.
        mean = ((w * u * u).sum() + (w * v * v).sum()) / 2
        half = ((w * u * u).sum() - (w * v * v).sum()) / 2
        covariance = (w * u * v).sum()
        apart = np.hypot(half, covariance)
        direction = np.arctan2(covariance, half) / 2
        along = u * np.cos(direction) + v * np.sin(direction)
        absorbing = self.H[stamp.place] + self.P[stamp.place]
        density = (w * absorbing).sum()
        texture = np.sqrt((w * (absorbing - density) ** 2).sum())
        edge = np.hypot(*np.gradient(shape)).sum() / np.sqrt(area)
        around = (1 - shape) * step(np.hypot(stamp.u, stamp.v) - 26, 2)
        eosin = (around * self.E[stamp.place]).sum() / max(float(around.sum()), 1.0)
        values = [
            np.log(area),
            np.log(np.sqrt(mean + apart)),
            np.log(np.sqrt(max(mean - apart, 0.25))),
            density,
            np.log(texture + 0.01),
            np.log(edge),
            eosin,
            (w * self.P[stamp.place]).sum(),
            area / (4 * np.pi * np.sqrt(max(mean**2 - apart**2, 0.1))),
            (w * along**4).sum() / max((w * along**2).sum() ** 2, 1e-3),
            (w * (u * u + v * v > 2 * mean)).sum(),
        ]
        return np.array(values, np.float32)

    def compose(self, domain):
        """uint8 [SIZE, SIZE, 3]: absorbance to light, optics, sensor."""
        rng = self.rng
        h, e = (s * (0.9 + 0.2 * rng.random()) for s in domain.strength)
        brown = np.array((0.45, 0.68, 0.92), np.float32)
        absorbance = (
            (self.H * self.gap * np.float32(1.5 * h))[..., None]
            * np.array(domain.haematoxylin, np.float32)
            + (self.E * self.gap * np.float32(e))[..., None] * np.array(domain.eosin, np.float32)
            + (self.P * self.gap * np.float32(1.5))[..., None] * brown
        )
        light = blurred(np.exp(-absorbance), domain.blur) ** np.float32(domain.gamma)
        # Triangular noise of standard deviation `noise`.
        noise = rng.random(light.shape, dtype=np.float32)
        noise = (noise + rng.random(light.shape, dtype=np.float32) - 1) * np.float32(
            2.45 * domain.noise
        )
        pixels = light * np.array(domain.white, np.float32) + noise
        return np.clip(np.floor(pixels + np.float32(0.5)), 0, 255).astype(np.uint8)


def paint(rng, domain, measured=False):
    """One image: (uint8 [SIZE, SIZE, 3], its Tissue).

    measured: the Tissue notes the attributes of all nuclei."""
    tissue = Tissue(rng, measured)
    # The annotated cells get their places first, so that they find room; they are painted last.
    chosen = rng.choice(len(MITOTIC), MITOTIC_PER_IMAGE, p=MITOTIC_SHARE)
    kinds = [MITOTIC[i] for i in chosen]
    chosen = rng.choice(len(LOOK_ALIKE), LOOK_ALIKES_PER_IMAGE, p=LOOK_ALIKE_SHARE)
    kinds += [LOOK_ALIKE[i] for i in chosen]
    kinds = [kinds[i] for i in rng.permutation(len(kinds))]
    spots = []
    while len(spots) < len(kinds):
        x, y = 40 + rng.random(2) * (SIZE - 80)
        if tissue.gap[int(y), int(x)] > 0.95 and tissue.is_free(x, y, 70):
            spots.append((x, y))
            tissue.take(x, y, 46)
    for _ in range(NUCLEI_PER_IMAGE * 4):
        if tissue.taken_count == NUCLEI_PER_IMAGE:
            break
        x, y = rng.random(2) * SIZE
        stromal = tissue.stroma[int(y), int(x)] > 0.5
        if tissue.gap[int(y), int(x)] > 0.9 and tissue.is_free(x, y, 26 + 12 * rng.random()):
            tissue.take(x, y, 26)
            tissue.nucleus(x, y, stromal)
    for (x, y), kind in zip(spots, kinds):
        tissue.annotated(x, y, kind)
    return tissue.compose(domain), tissue


# ---------------------------------------------------------------- processes


def end_with_parent():
    """For a worker process: Ctrl-C is the parent's to handle, and nobody outlives it, however it
    ends.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def map_in_processes(function, jobs, desc):
    """[function(job) for job in jobs] on all cores, with a progress bar."""
    workers = min(8, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, initializer=end_with_parent) as pool:
        try:
            results = pool.map(function, jobs)
            return list(common.progress(results, total=len(jobs), desc=desc, unit="images"))
        except BrokenProcessPool:
            raise UserError(
                f"{desc}: a worker process was killed (too little memory?); run the same command "
                "again"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# ---------------------------------------------------------------- the dataset


def make_image(job):
    """Paint and write one image; returns (number, file name, domain, cells)."""
    folder, number, file_name, domain, seed = job
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, number])))
    pixels, tissue = paint(rng, DOMAINS[domain])
    # Encoded in memory: where the disk is full, Pillow's TIFF writer loses what the system said.
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(
        encoded,
        format="TIFF",
        compression="tiff_adobe_deflate",
        resolution_unit="cm",
        x_resolution=10000 / MPP,
        y_resolution=10000 / MPP,
    )
    (Path(folder) / file_name).write_bytes(encoded.getbuffer())
    return number, file_name, domain, tissue.cells


def build(folder, seed=None, images_per_domain=IMAGES_PER_DOMAIN):
    """Make the dataset in `folder`, which appears whole; a dataset that exists is kept. Returns the
    path of its JSON.

    seed: None accepts a dataset of any seed, and paints that of 0 if there is none; UserError if
    the folder holds another seed's. The annotations are the same on every machine, the pixels
    within one grey level. About 10 s on two cores, 100 MB."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: this is a file; name a folder for the dataset")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with common.exclusive(folder.parent / f".{folder.name}.lock"):
        if (folder / "MIDOG.json").exists():
            check_seed(folder, seed)
        elif folder.exists() and any(folder.iterdir()):
            raise UserError(
                f"{folder}: exists and holds no MIDOG.json; remove it or choose another --out"
            )
        else:
            # What a process that was killed left behind: nobody else is painting now.
            for remains in folder.parent.glob(f".{folder.name}.*.part"):
                shutil.rmtree(remains, ignore_errors=True)
            paint_dataset(folder, seed or 0, images_per_domain)
    return folder / "MIDOG.json"


def check_seed(folder, seed):
    """UserError if the demo dataset in `folder` is of another seed than `seed` (None: any)."""
    content = common.read_json(folder / "MIDOG.json")
    if not isinstance(content, dict) or not isinstance(content.get("info"), dict):
        raise UserError(f"{folder}: holds no demo dataset; remove it or choose another --out")
    existing = content["info"].get("seed")
    if seed is not None and existing != seed:
        raise UserError(
            f"{folder}: holds the dataset of seed {existing}, not {seed}; remove it or choose "
            "another --out"
        )


def paint_dataset(folder, seed, images_per_domain):
    """Paint the images of all domains beside `folder`, then rename."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        jobs = []
        for name in DOMAINS:
            for k in range(1, images_per_domain + 1):
                # Not 001.tiff: these are the names of MIDOG's images.
                jobs.append((str(temporary), len(jobs) + 1, f"{name}{k:02d}.tiff", name, seed))
        images = map_in_processes(make_image, jobs, "demo dataset")
        common.write_json(temporary / "MIDOG.json", as_midog(images, seed))
        temporary.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        common.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def as_midog(painted, seed):
    """The annotations in the format of MIDOG.json. painted: make_image's results, of all images."""
    images, annotations = [], []
    for number, file_name, domain, cells in painted:
        images.append(
            {
                "id": number,
                "file_name": file_name,
                "width": SIZE,
                "height": SIZE,
                "tumor_type": domain,
                "license": 1,
            }
        )
        for cell in cells:
            x, y = round(cell["x"]), round(cell["y"])
            category = 2
            if cell["label"] == 1:
                category = 1
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": category,
                    "bbox": [x - 25, y - 25, x + 25, y + 25],
                    "cell": cell["kind"],
                }
            )
    return {
        "info": {
            "description": "Synthetic H&E for trying programs: no tissue of any patient",
            "version": "1.0",
            "seed": seed,
        },
        "licenses": [{"id": 1, "name": "MIT"}],
        "images": images,
        "categories": [
            {"id": 1, "name": "mitotic figure"},
            {"id": 2, "name": "not mitotic figure"},
        ],
        "annotations": annotations,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        default=os.path.join(os.environ.get("MITOSIS_ROOT", "data"), "demo"),
        metavar="DIR",
        help="folder of the dataset (default: $MITOSIS_ROOT/demo, or data/demo)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        help="paints other tissue (default: the seed of the existing dataset, else 0)",
    )
    args = parser.parse_args()
    if args.seed is not None and args.seed < 0:
        raise UserError(f"--seed {args.seed}: 0 or more")
    path = build(args.out, args.seed)
    categories = [a["category_id"] for a in common.read_json(path)["annotations"]]
    images = len(list(path.parent.glob("*.tiff")))
    print(
        f"{path.parent}: {images} images, {categories.count(1)} mitotic figures, "
        f"{categories.count(2)} look-alikes (synthetic)"
    )


if __name__ == "__main__":
    common.command(main)
