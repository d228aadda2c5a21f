"""A look at the pixels: does a sample of patches show what patches of cells show?

A wrong slide, scale, origin or unit gives no error, only patches of glass, of nothing, or of tissue
at random places. One line says so, with counts and the likely cause."""

import numpy as np

from dataset.draws import generator, shuffled
from dataset.slides import facts

GLASS = 217  # green of 255: both stains absorb green; glass does not
NUCLEUS_SHARE = 0.005  # of a patch: less stain than this is no cell
BLACK = 40  # of 255: stained tissue has brighter pixels in every patch
GREY = 4  # of 255: the largest difference of channels in a grey image, after compression
SUSPICIOUS = 0.1  # share of patches from which on it is said
FEWEST_POINTS = 20  # for a statement on the centres
CERTAIN = 3  # standard errors by which centres are darker than what surrounds them

CAUSE = "wrong slide, scale, origin or unit of the coordinates?"

SAMPLE = 200  # patches
DECODE = 150_000_000  # px of images that are decoded for the look, at most
IMAGES = 40


def sample_rows(annotations):
    """Rows to look at: up to SAMPLE of them, on few images if these have to be decoded whole."""
    rng = generator("look")
    names, image_of = annotations.codes("image")
    if annotations.kind == "patches":
        return np.sort(shuffled(rng, np.arange(len(annotations)))[:SAMPLE])
    chosen, decoded = [], 0
    for image in shuffled(rng, np.arange(len(names))).tolist():
        fact = facts(annotations.image_path(names[image]))
        if not fact.random_access:
            decoded += fact.width * fact.height
        if chosen and (decoded > DECODE or len(chosen) == IMAGES):
            break
        chosen.append(image)
    rows = np.flatnonzero(np.isin(image_of, chosen))
    return np.sort(shuffled(rng, rows)[:SAMPLE])


def suspicion(patches, points=True):
    """One line on patches that cannot be those of cells, or None.

    patches: uint8 [n, size, size, 3], the cell in the middle; points: whether they were cut out by
    coordinates, and not ready-made."""
    if not len(patches):
        return None
    patches = np.asarray(patches)
    few = patches[:, ::2, ::2]  # a quarter of the pixels says the same
    pixels = few.reshape(len(few), -1, 3)
    largest, smallest = pixels.max(2), pixels.min(2)  # of a pixel's channels
    constant = np.ptp(pixels, axis=1).max(1) <= 2
    black = ~constant & ((largest >= BLACK).mean(1) < 0.01)
    blank = ((pixels[..., 1] < GLASS).mean(1) < NUCLEUS_SHARE) & ~black
    constant &= ~blank
    coloured = (largest - smallest > GREY).mean(1) >= 0.01
    grey = ~coloured & ~constant & ~blank & ~black
    kinds = [
        (blank, "blank (no stained tissue)", CAUSE),
        (constant, "of one colour", "a mask, or missing tiles, instead of the image?"),
        (black, "nearly black", "more than 8 bits per channel, or a mask, instead of the image?"),
        (grey, "grey", "a single channel instead of the RGB image?"),
    ]
    if not points:
        kinds[0] = (blank, kinds[0][1], "empty files, or cut-outs of the wrong places?")
    lines = [
        f"{kind.sum():,} are {text} ({cause})"
        for kind, text, cause in kinds
        if kind.mean() >= SUSPICIOUS
    ]
    if not lines and points:
        lines = _centres(patches[~(blank | constant | black)])
    if not lines:
        return None
    return f"of {len(patches):,} patches looked at, {'; '.join(lines)}"


def contrast(patches):
    """How much darker the middle of each patch is than what surrounds it, in grey levels of the
    green channel: float [n].
    """
    size = patches.shape[1]
    axis = (np.arange(size) - (size - 1) / 2) / size
    radius = np.hypot(axis[:, None], axis[None])
    green = patches[..., 1].astype(np.float32)
    # Of 224 px at 0.25 µm/px: a disc of 8 µm, and a ring from 17 to 50 µm around it.
    middle, ring = radius < 0.07, (radius > 0.15) & (radius < 0.45)
    return green[:, ring].mean(1) - green[:, middle].mean(1)


def _centres(patches):
    """A line if the middles of the patches are no different from their surroundings, as a list."""
    if len(patches) < FEWEST_POINTS:
        return []
    difference = contrast(patches)
    error = difference.std(ddof=1) / np.sqrt(len(patches))
    if difference.mean() >= CERTAIN * error and error > 0:
        return []
    return [
        f"the {len(patches):,} with tissue are no darker in the middle than around it "
        f"({difference.mean():+.1f} of 255 levels on average): the places do not look like those "
        f"of cells ({CAUSE})"
    ]
