"""A synthetic H&E-like dataset in MIDOG's format, to try everything without a download. No torch.

    python -m demo.synthetic      data/demo: 40 TIFF images of 1024 px at 0.25 µm/px, five domains,
    and MIDOG.json

Tissue is painted as concentrations of haematoxylin and eosin, and turned into colour by Beer and
Lambert's law with the stain, the scanner, the sharpness and the noise of its domain. Mitotic
figures and look-alikes get their darkness from one distribution, so that shape and texture tell
them apart, not colour. It shows that the programs work; it says nothing about how a model does on
tissue."""

import argparse
import os
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import common
from common import UserError

SIZE = 1024  # px
MPP = 0.25  # µm/px
IMAGES_PER_DOMAIN = 8
MITOTIC_PER_IMAGE, LOOK_ALIKES_PER_IMAGE = 18, 22
MITOTIC = ("prometaphase", "metaphase side", "metaphase end", "anaphase", "telophase")
LOOK_ALIKE = ("pyknotic", "apoptotic", "hyperchromatic", "elongated", "pigment")
# What measure() says of any nucleus, dividing or not: demo/pretrain.py learns to see these, not the
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
    """Noise in [0, 1] with features of about `cell` px."""
    grid = rng.random((size // cell + 3, size // cell + 3)).astype(np.float32)
    wide = (size // cell + 3) * cell
    big = np.asarray(Image.fromarray(grid).resize((wide, wide), Image.Resampling.BICUBIC))
    return np.clip(big[cell : cell + size, cell : cell + size], 0, 1)


def blurred(image, sigma):
    """Gaussian blur of the first two axes, reflected at the border."""
    radius = max(1, int(3 * sigma + 0.5))
    weights = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    weights = (weights / weights.sum()).astype(np.float32)
    for axis in (0, 1):
        padded = np.pad(
            image,
            [(radius, radius) if a == axis else (0, 0) for a in range(image.ndim)],
            mode="reflect",
        )
        image = sum(
            w * np.take(padded, range(i, i + image.shape[axis]), axis)
            for i, w in enumerate(weights)
        )
    return image


def step(distance, softness):
    """1 inside (distance < 0), 0 outside, with a soft edge."""
    return 1 / (1 + np.exp(np.clip(distance / softness, -30, 30)))


class Stamp:
    """Coordinates around a place, turned by an angle: x along the long axis."""

    def __init__(self, x, y, radius, angle=0.0):
        self.x0, self.y0 = max(0, int(x) - radius), max(0, int(y) - radius)
        self.x1, self.y1 = min(SIZE, int(x) + radius + 1), min(SIZE, int(y) + radius + 1)
        v, u = np.mgrid[self.y0 : self.y1, self.x0 : self.x1].astype(np.float32)
        u, v = u - np.float32(x), v - np.float32(y)
        c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        self.u, self.v = c * u + s * v, c * v - s * u
        self.place = slice(self.y0, self.y1), slice(self.x0, self.x1)


def outline(stamp, a, b, rng, rough):
    """Signed distance (about px) from an ellipse with half axes a, b whose radius wobbles by the
    fraction `rough`.
    """
    theta = np.arctan2(stamp.v / b, stamp.u / a)
    wobble = np.ones_like(theta)
    for k in range(2, 7):
        wobble += (
            rough / k**0.7 * (2 * rng.random() - 1) * np.cos(k * theta + 6.2832 * rng.random())
        )
    return (np.hypot(stamp.u / a, stamp.v / b) - wobble) * min(a, b)


def blobs(stamp, centers, radii, softness):
    """Union of soft discs: chromosomes, fragments, granules."""
    shape = np.zeros_like(stamp.u)
    for (cx, cy), r in zip(centers, radii):
        shape = np.maximum(shape, step(np.hypot(stamp.u - cx, stamp.v - cy) - r, softness))
    return shape


# ---------------------------------------------------------------- cells


def plate(rng, stamp, x, length, thick, bend):
    """A plate of chromosomes seen from the side, at distance x: a ragged bar across the axis, arms
    sticking out.
    """
    n = int(length * 0.9)
    t = np.linspace(-1, 1, n)
    centers = [
        (
            x + bend * (u * u - 0.4) + (rng.random() - 0.5) * thick * 0.5,
            u * length / 2 + (rng.random() - 0.5) * 2,
        )
        for u in t
    ]
    radii = [thick / 2 * (0.75 + 0.5 * rng.random()) * (1 - 0.35 * u * u) for u in t]
    for _ in range(rng.integers(2, 6)):  # arms
        u = 2 * rng.random() - 1
        side = 1 if rng.random() < 0.5 else -1
        for reach in (0.6, 1.0):
            centers.append(
                (
                    x + bend * (u * u - 0.4) + side * thick * reach * (0.6 + 0.4 * rng.random()),
                    u * length / 2,
                )
            )
            radii.append(1.3 + 0.7 * rng.random())
    return blobs(stamp, centers, radii, 0.7)


def mitotic_shape(kind, rng, stamp, size):
    """Chromatin of a mitotic figure [0, 1]: condensed, no membrane, ragged. `size`: about 1."""
    if kind == "prometaphase":
        n = rng.integers(9, 16)
        spread = 8.0 * size
        angles, distances = 6.2832 * rng.random(n), spread * np.sqrt(rng.random(n))
        centers = [(d * np.cos(a) * 1.2, d * np.sin(a) * 0.9) for a, d in zip(angles, distances)]
        return blobs(stamp, centers, 2.2 + 2.2 * rng.random(n), 0.7)
    if kind == "metaphase side":
        return plate(
            rng,
            stamp,
            0.0,
            (23 + 10 * rng.random()) * size,
            (6.5 + 3 * rng.random()) * size,
            3 * (rng.random() - 0.5),
        )
    if kind == "metaphase end":
        n, radius = rng.integers(11, 17), (8 + 3 * rng.random()) * size
        angles = 6.2832 * (np.arange(n) + 0.5 * rng.random(n)) / n
        centers = [
            (
                radius * (0.85 + 0.3 * rng.random()) * np.cos(a),
                radius * (0.85 + 0.3 * rng.random()) * np.sin(a),
            )
            for a in angles
        ]
        return blobs(stamp, centers, 2.8 + 1.8 * rng.random(n), 0.8)
    apart = (8 + 5 * rng.random() if kind == "anaphase" else 15 + 5 * rng.random()) * size
    length = (19 + 8 * rng.random() if kind == "anaphase" else 15 + 6 * rng.random()) * size
    thick, bend = (
        (5 + 2 * rng.random()) * size,
        (3 + 3 * rng.random()) * (1 if kind == "anaphase" else 0.3),
    )
    return np.maximum(
        plate(rng, stamp, -apart, length, thick, bend),
        plate(rng, stamp, apart, length, thick, -bend),
    )


def look_alike_shape(kind, rng, stamp, size):
    """Chromatin of a look-alike [0, 1]: dense like a mitotic figure's, but smooth, round or inside
    a membrane.
    """
    if kind in ("pyknotic", "apoptotic"):
        if rng.random() < 0.45:  # fragments: smooth balls of different sizes
            n = rng.integers(2, 6)
            angles, distances = 6.2832 * rng.random(n), (5 + 8 * rng.random(n)) * size
            centers = [(d * np.cos(a), d * np.sin(a)) for a, d in zip(angles, distances)]
            return blobs(stamp, centers, (2.5 + 4.5 * rng.random(n)) * size, 0.8)
        a = (8 + 4 * rng.random()) * size
        return step(outline(stamp, a, a * (0.75 + 0.25 * rng.random()), rng, 0.05), 0.9)
    if kind == "hyperchromatic":
        a = (11 + 5 * rng.random()) * size
        shape = step(outline(stamp, a, a * (0.65 + 0.3 * rng.random()), rng, 0.16), 1.0)
        return shape * (
            0.75 + 0.4 * (smooth_noise(rng, 128, 5)[: shape.shape[0], : shape.shape[1]])
        )
    if kind == "elongated":
        b = (3.6 + 2.2 * rng.random()) * size
        bent = Stamp.__new__(Stamp)
        bent.u, bent.v = stamp.v, stamp.u + 0.012 * (rng.random() - 0.5) * stamp.v**2
        return step(outline(bent, (13 + 6 * rng.random()) * size, b, rng, 0.07), 0.9)
    n = rng.integers(9, 22)  # pigment: round granules, loosely together
    angles, distances = 6.2832 * rng.random(n), 12 * size * np.sqrt(rng.random(n))
    centers = [(d * np.cos(a), d * np.sin(a)) for a, d in zip(angles, distances)]
    return blobs(stamp, centers, 1.2 + 2.0 * rng.random(n), 0.6)


class Tissue:
    """One image in the making: concentrations of haematoxylin (H), eosin (E) and brown pigment (P)."""

    def __init__(self, rng):
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
        along = (
            x * np.cos(angle)
            + y * np.sin(angle)
            + 40 * (octaves[3] - 0.5)
            + 160 * (octaves[4] - 0.5)
        )
        stripes = (
            0.5
            + 0.25 * np.sin(along / 3.3 + 5 * octaves[2])
            + 0.25 * np.sin(along / 7.7 + 9 * octaves[3])
        )
        self.stroma = step(0.56 - smooth_noise(rng, SIZE, 170), 0.03)
        self.E += self.stroma * (0.30 * stripes - 0.05)
        # 0 where the slide is empty.
        self.gap = step(0.14 - smooth_noise(rng, SIZE, 110), 0.012)
        self.places = []
        self.cells = []
        self.nuclei = []  # (x, y, attributes) of every nucleus that was painted
        self.nucleus_size = 0.85 + 0.3 * rng.random()
        self.darkness = 0.9 + 0.25 * rng.random()

    def free(self, x, y, distance):
        return all(
            (x - a) ** 2 + (y - b) ** 2 >= (max(distance, d)) ** 2 for a, b, d in self.places
        )

    def cytoplasm(self, x, y, radius, eosin, clear):
        """A cell's body: `eosin` in it, a `clear` zone in its middle, a faint membrane."""
        stamp = Stamp(x, y, int(radius * 1.6), 6.2832 * self.rng.random())
        edge = outline(
            stamp,
            radius * (1 + 0.15 * self.rng.random()),
            radius * (0.85 + 0.15 * self.rng.random()),
            self.rng,
            0.08,
        )
        body = step(edge, 1.5)
        self.E[stamp.place] = self.E[stamp.place] * (1 - body) + body * (
            eosin + 0.10 * self.fine[stamp.place]
        )
        self.E[stamp.place] += 0.12 * np.exp(-((edge / 1.6) ** 2))
        self.H[stamp.place] *= 1 - 0.7 * body
        self.E[stamp.place] *= 1 - clear * step(np.hypot(stamp.u, stamp.v) - 0.62 * radius, 2.5)

    def nucleus(self, x, y, stromal):
        """An ordinary nucleus: membrane, chromatin, nucleoli."""
        rng = self.rng
        if stromal:
            a, b = (
                (11 + 7 * rng.random()) * self.nucleus_size,
                (4 + 2.5 * rng.random()) * self.nucleus_size,
            )
        else:
            a = (11 + 6 * rng.random()) * self.nucleus_size
            b = a * (0.7 + 0.3 * rng.random())
            self.cytoplasm(x, y, a * (1.5 + 0.5 * rng.random()), 0.28 + 0.30 * rng.random(), 0.0)
        stamp = Stamp(x, y, int(a * 1.5) + 4, 6.2832 * rng.random())
        edge = outline(stamp, a, b, rng, 0.07)
        inside = step(edge, 0.9)
        texture = self.fine[stamp.place]
        level = (0.42 + 0.35 * rng.random()) * self.darkness * (1.25 if stromal else 1.0)
        chromatin = level * (0.45 + 1.1 * texture) + 0.25 * level * np.exp(-((edge / 1.5) ** 2))
        for _ in range(rng.integers(0, 4)):
            u, v, r = a * (rng.random() - 0.5), b * (rng.random() - 0.5), 1.5 + 1.6 * rng.random()
            chromatin = chromatin + 0.5 * level * step(np.hypot(stamp.u - u, stamp.v - v) - r, 0.6)
        self.H[stamp.place] = self.H[stamp.place] * (1 - inside) + inside * chromatin
        self.E[stamp.place] *= 1 - 0.6 * inside
        self.measure(x, y, stamp, inside)

    def measure(self, x, y, stamp, shape):
        """Note the ATTRIBUTES of what was just painted: logarithms of px, concentrations; `edge` is
        perimeter / sqrt(area), `filled` the share of the ellipse of equal axes, `peaked` the
        kurtosis along the long axis, `hollow` the share of the area that lies outside the mean
        radius."""
        area = max(float(shape.sum()), 1.0)
        w = shape / area
        u, v = stamp.u - (w * stamp.u).sum(), stamp.v - (w * stamp.v).sum()
        mean, half = (
            ((w * u * u).sum() + (w * v * v).sum()) / 2,
            ((w * u * u).sum() - (w * v * v).sum()) / 2,
        )
        apart = np.hypot(half, (w * u * v).sum())
        direction = np.arctan2((w * u * v).sum(), half) / 2
        along = u * np.cos(direction) + v * np.sin(direction)
        absorbing = self.H[stamp.place] + self.P[stamp.place]
        density = (w * absorbing).sum()
        texture = np.sqrt((w * (absorbing - density) ** 2).sum())
        edge = np.hypot(*np.gradient(shape)).sum() / np.sqrt(area)
        around = (1 - shape) * step(np.hypot(stamp.u, stamp.v) - 26, 2)
        eosin = (around * self.E[stamp.place]).sum() / max(float(around.sum()), 1.0)
        self.nuclei.append(
            (
                float(x),
                float(y),
                np.array(
                    [
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
                    ],
                    np.float32,
                ),
            )
        )

    def annotated(self, x, y, kind):
        """A mitotic figure or a look-alike; returns what is known of it."""
        rng = self.rng
        mitotic = kind in MITOTIC
        size = (0.85 + 0.3 * rng.random()) * self.nucleus_size
        angle = 6.2832 * rng.random()
        radius = (22 + 8 * rng.random()) * size
        # Body, clearing and darkness come from the same distributions for both classes: no colour
        # tells them apart.
        eosin = 0.22 + 0.35 * rng.random() ** 1.5
        if kind == "apoptotic" or rng.random() < 0.15:
            eosin += 0.25 * rng.random()
            radius *= 0.85
        self.cytoplasm(x, y, radius, eosin, 0.5 * rng.random())
        stamp = Stamp(x, y, 44, angle)
        shape = (mitotic_shape if mitotic else look_alike_shape)(kind, rng, stamp, size)
        if kind == "apoptotic":  # shrunken cell: a rim of dense eosin, a halo around it
            rim = np.hypot(stamp.u, stamp.v)
            self.E[stamp.place] += 0.35 * step(rim - 15 * size, 1.2)
            self.E[stamp.place] *= 1 - 0.7 * np.exp(-(((rim - 20 * size) / 2.5) ** 2))
        texture = 0.85 + 0.3 * self.fine[stamp.place]
        # One distribution of the whole absorbance (px) for both classes; its density is bounded to
        # stay plausible.
        mass = (260 + 260 * rng.random()) * size * size
        level = np.clip(mass / max(float(shape.sum()), 1.0), 0.75, 1.75) * self.darkness
        if kind == "pigment":
            self.P[stamp.place] = np.maximum(self.P[stamp.place], 0.75 * level * shape)
            self.H[stamp.place] += 0.25 * level * shape
        else:
            self.H[stamp.place] = np.maximum(
                self.H[stamp.place] * (1 - 0.6 * shape), level * shape * texture
            )
            self.E[stamp.place] *= 1 - 0.5 * shape
        self.cells.append({"x": float(x), "y": float(y), "kind": kind, "label": int(mitotic)})
        self.measure(x, y, stamp, shape)

    def compose(self, domain):
        """uint8 [SIZE, SIZE, 3]: absorbance to light, optics, sensor."""
        rng = self.rng
        h, e = (s * (0.9 + 0.2 * rng.random()) for s in domain.strength)
        tissue = self.gap
        brown = np.array((0.45, 0.68, 0.92), np.float32)
        absorbance = (
            (self.H * tissue * np.float32(1.5 * h))[..., None]
            * np.array(domain.haematoxylin, np.float32)
            + (self.E * tissue * np.float32(e))[..., None] * np.array(domain.eosin, np.float32)
            + (self.P * tissue * np.float32(1.5))[..., None] * brown
        )
        light = blurred(np.exp(-absorbance), domain.blur) ** np.float32(domain.gamma)
        grey = (
            rng.random(light.shape, dtype=np.float32)
            + rng.random(light.shape, dtype=np.float32)
            - 1
        ) * np.float32(2.45 * domain.noise)  # triangular, of standard deviation `noise`
        pixels = light * np.array(domain.white, np.float32) + grey
        return np.clip(np.floor(pixels + np.float32(0.5)), 0, 255).astype(np.uint8)


def paint(rng, domain, mitotic=MITOTIC_PER_IMAGE, look_alikes=LOOK_ALIKES_PER_IMAGE, nuclei=430):
    """One image: (uint8 [SIZE, SIZE, 3], its Tissue, which knows the annotated cells and all
    nuclei).
    """
    tissue = Tissue(rng)
    kinds = [MITOTIC[i] for i in rng.choice(5, mitotic, p=(0.26, 0.28, 0.14, 0.17, 0.15))]
    kinds += [LOOK_ALIKE[i] for i in rng.choice(5, look_alikes, p=(0.26, 0.20, 0.24, 0.22, 0.08))]
    kinds = [kinds[i] for i in rng.permutation(len(kinds))]
    spots = []
    while len(spots) < len(kinds):
        x, y = 40 + rng.random(2) * (SIZE - 80)
        if tissue.gap[int(y), int(x)] > 0.95 and tissue.free(x, y, 70):
            spots.append((x, y))
            tissue.places.append((x, y, 46))
    for _ in range(nuclei * 4):
        if len(tissue.places) >= nuclei:
            break
        x, y = rng.random(2) * SIZE
        stromal = tissue.stroma[int(y), int(x)] > 0.5
        if tissue.gap[int(y), int(x)] > 0.9 and tissue.free(x, y, 26 + 12 * rng.random()):
            tissue.places.append((x, y, 26))
            tissue.nucleus(x, y, stromal)
    for (x, y), kind in zip(spots, kinds):
        tissue.annotated(x, y, kind)
    return tissue.compose(domain), tissue


# ---------------------------------------------------------------- the dataset


def make_image(job):
    folder, number, file_name, name, seed = job
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, number])))
    pixels, tissue = paint(rng, DOMAINS[name])
    Image.fromarray(pixels).save(
        Path(folder) / file_name,
        compression="tiff_adobe_deflate",
        resolution_unit="cm",
        x_resolution=10000 / MPP,
        y_resolution=10000 / MPP,
    )
    return number, file_name, name, tissue.cells


def build(folder, seed=None, images_per_domain=IMAGES_PER_DOMAIN):
    """Write the dataset into `folder`, which appears whole; nothing is done where it is there.
    Returns its JSON's path.

    seed: None takes the dataset that is there, else paints that of 0; UserError where one of
    another seed is there. The annotations are the same on every machine, the pixels within one grey
    level. About 20 s on two cores, 90 MB."""
    folder = Path(folder)
    annotations_file = folder / "MIDOG.json"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with common.exclusive(folder.parent / f".{folder.name}.lock"):
        if annotations_file.exists():
            if (
                seed is not None
                and (have := common.read_json(annotations_file)["info"].get("seed")) != seed
            ):
                raise UserError(
                    f"{folder}: holds the dataset of seed {have}, not {seed}; remove it or choose "
                    "another "
                    "--out"
                )
            return annotations_file
        if folder.exists() and any(folder.iterdir()):
            raise UserError(
                f"{folder}: is there and holds no MIDOG.json; remove it or choose another --out"
            )
        seed = seed or 0
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            # Not 001.tiff: these are the names of MIDOG's images.
            jobs = [
                (
                    str(temporary),
                    i * images_per_domain + k + 1,
                    f"{name}{k + 1:02d}.tiff",
                    name,
                    seed,
                )
                for i, name in enumerate(DOMAINS)
                for k in range(images_per_domain)
            ]
            with ProcessPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
                made = list(
                    common.progress(
                        pool.map(make_image, jobs),
                        total=len(jobs),
                        desc="demo dataset",
                        unit="images",
                    )
                )
            common.write_json(temporary / "MIDOG.json", as_midog(made, seed))
            temporary.chmod(0o755)
            if folder.exists():
                folder.rmdir()
            temporary.rename(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return annotations_file


def as_midog(made, seed):
    images, annotations = [], []
    for number, file_name, name, cells in made:
        images.append(
            {
                "id": number,
                "file_name": file_name,
                "width": SIZE,
                "height": SIZE,
                "tumor_type": name,
                "license": 1,
            }
        )
        for cell in cells:
            x, y = round(cell["x"]), round(cell["y"])
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": 1 if cell["label"] else 2,
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
        help="another seed paints other tissue (default: that of the dataset which "
        "is there, else 0)",
    )
    args = parser.parse_args()
    if args.seed is not None and args.seed < 0:
        raise UserError(f"--seed {args.seed}: 0 or more")
    path = build(args.out, args.seed)
    content = common.read_json(path)
    mitotic = sum(a["category_id"] == 1 for a in content["annotations"])
    print(
        f"{path.parent}: {len(content['images'])} images, {mitotic} mitotic figures, "
        f"{len(content['annotations']) - mitotic} look-alikes (synthetic)"
    )


if __name__ == "__main__":
    common.command(main)
