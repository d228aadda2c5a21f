"""The images of an annotation table: size, scale, content, and the random positions on them.

What the annotation file says of an image is checked against the image itself: `find_problems` lists
what differs, for the report of data.py; `check` prints it before a training, and refuses what
cannot be meant."""

import hashlib
import math
from collections import Counter

import numpy as np

import common
from common import UserError
from dataset import slides, tiff
from dataset.annotations import PATCH, file_stem
from dataset.draws import generator

# Random positions of all images together: a full run draws 100 × 320, from about two thirds of the
# images.
POOL = 64_000

MOST_OUTSIDE = 0.05  # share of centres outside their image that may be mistakes of an annotator
SAME_SCALE = 1.02  # µm/px that differ by less are one scale
BLOCKS, BLOCK = 8, 4096  # what of a file's content is part of its fingerprint


def image_size(annotations, image):
    """(width, height) of an image in px; the annotation file's word if the image is not here."""
    path = annotations.image_path(image)
    if not path.exists() and image in annotations.sizes:
        return annotations.sizes[image]
    return slides.dimensions(path)


def source_mpp(annotations, image):
    """µm/px of an image: by the annotation file (or --source-mpp), else by the image; or None."""
    known = (annotations.mpp or {}).get(str(image))
    return known or slides.microns_per_pixel(annotations.image_path(image))


# ---------------------------------------------------------------- random positions


def pool_size(annotations):
    """Random positions per image: POOL in all, but not so many that they cover an image of mean
    area over 4 times.
    """
    names = annotations.codes("image")[0].tolist()
    sizes = [image_size(annotations, name) for name in names]
    area = sum(width * height for width, height in sizes) / len(names)
    return max(1, min(math.ceil(POOL / len(names)), math.ceil(4 * area / PATCH**2)))


def random_pool(annotations, image, number, window=PATCH):
    """x, y of the first `number` random positions of an image: uniform over the positions whose
    whole window lies inside, in the middle if the image is smaller than the window.

    A pure function of the file's name, the image's size and the window."""
    u = generator("pool", file_stem(str(image))).random((number, 2))
    center = []
    for axis, extent in enumerate(image_size(annotations, image)):
        low = min(window, extent) / 2
        high = extent - low
        center.append(low + u[:, axis] * (high - low))
    return tuple(center)


# ---------------------------------------------------------------- content


def content(annotations, times=True):
    """Digest of the image files: name, size, a sample of the bytes and (`times`) its last change.

    Caches ask for the time, which gives every change away; runs do not: a copied dataset is the
    same dataset."""
    digest = hashlib.sha256()
    for image in annotations.codes("image")[0].tolist():
        digest.update(f"{image} ".encode())
        digest.update(file_content(annotations.image_path(image), times))
    return digest.digest()


def file_content(path, times=True):
    """Digest of one image file; for a format of several files (MRXS) also of its folder."""
    if not path.exists():
        raise UserError(f"{path}: no such image; name the images' folder with --images")
    slides.regular_file(path)
    digest, status = hashlib.sha256(), path.stat()
    with open(path, "rb") as file:
        last = max(0, status.st_size - BLOCK)
        for start in sorted({last * i // (BLOCKS - 1) for i in range(BLOCKS)}):
            file.seek(start)
            digest.update(file.read(BLOCK))
    files = [status]
    companion = path.with_suffix("")
    if path.suffix.lower() == ".mrxs" and companion.is_dir():
        files += [file.stat() for file in sorted(companion.iterdir())]
    for status in files:
        digest.update(f"{status.st_size} {status.st_mtime_ns if times else ''}\n".encode())
    return digest.digest()


# ---------------------------------------------------------------- checks


class Problems:
    """What is wrong with a dataset's images: `lines` for the user; `errors` are those among them
    that no training can ignore.
    """

    def __init__(self):
        self.lines, self.errors = [], []
        self.sizes = {}  # image → (width, height), as far as known
        self.scales = Counter()  # µm/px or None → number of images

    def error(self, line):
        self.lines.append(line)
        self.errors.append(line)


def find_problems(annotations, mpp=None):
    """Problems of the images of a table, each looked at once (not decoded).

    mpp: µm/px that patches are resampled to, if they are."""
    problems = Problems()
    _implausible(annotations, problems)
    facts = _facts(annotations, problems)
    problems.sizes = dict(annotations.sizes) | {name: fact[:2] for name, fact in facts.items()}
    _notes_of_files(facts, problems)
    if annotations.kind == "patches":
        _patch_sizes(facts, problems)
    else:
        _sizes_of_file(annotations, facts, problems)
        _outside(annotations, problems)
        _scales(annotations, facts, mpp, problems)
    return problems


def check(annotations, mpp=None, quiet=False):
    """Print the problems of a dataset's images, unless `quiet`; UserError if patches cannot be
    meant so.
    """
    problems = find_problems(annotations, mpp)
    if problems.errors:
        raise UserError(f"{annotations.name}: {problems.errors[0]}")
    if not quiet:
        for line in problems.lines:
            print(common.printable(f"{annotations.name}: {line}"), flush=True)


def examples(names, most=3):
    """The first few names, as text."""
    shown = ", ".join(str(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown}, …"


def _facts(annotations, problems):
    """{image: slides.Facts} of the images that are present and readable."""
    missing, facts, broken = set(annotations.missing), {}, []
    present = [name for name in np.unique(annotations.image).tolist() if name not in missing]
    for name in common.progress(present, desc="images", unit="images"):
        try:
            facts[name] = slides.facts(annotations.image_path(name))
        except UserError as error:
            broken.append(str(error))
    if broken:
        more = "" if len(broken) <= 3 else f" (and {len(broken) - 3:,} more)"
        problems.error(f"{len(broken):,} images cannot be read: {'; '.join(broken[:3])}{more}")
    return facts


def _implausible(annotations, problems):
    bad = [
        f"{name} ({value:g} µm/px)"
        for name, value in (annotations.mpp or {}).items()
        if tiff.plausible(value) is None
    ]
    if bad:
        problems.error(
            f"the annotation file gives µm/px that no microscope has: {examples(bad)}; correct "
            "it, or give --source-mpp"
        )


def _notes_of_files(facts, problems):
    by_note = {}
    for name, fact in facts.items():
        for note in fact.notes:
            by_note.setdefault(note, []).append(name)
    for note, names in by_note.items():
        others = "" if len(names) == 1 else f" (and {len(names) - 1:,} more images like it)"
        problems.lines.append(f"{names[0]} {note}{others}")


def patch_side(annotations, fit="resize", size=PATCH):
    """Side in px that is used of ready-made patches, as Patches cuts them: of the most frequent
    size, if there are several.
    """
    sides = Counter()
    for name in annotations.codes("image")[0].tolist():
        width, height = image_size(annotations, name)
        side = min(width, height)
        if fit == "pad":
            side = max(width, height)
        sides[min(size, side)] += 1
    return sides.most_common(1)[0][0]


def check_crop(annotations, crop):
    """UserError if a ready-made patch has fewer than `crop` px at one of its sides."""
    for name in annotations.codes("image")[0].tolist():
        width, height = image_size(annotations, name)
        if min(width, height) < crop:
            raise UserError(
                f"{annotations.name}: --crop {crop}: {name} is {width} x {height} px; give at most "
                f"{min(width, height)}"
            )


def _patch_sizes(facts, problems):
    sizes = Counter(fact[:2] for fact in facts.values())
    if len(sizes) > 1:
        shown = [f"{w} x {h} px ({n:,})" for (w, h), n in sizes.most_common()]
        problems.lines.append(
            f"the patches have {len(sizes):,} sizes: {examples(shown)}; each is cropped or resized "
            "by itself (--fit), so a cell's scale may differ between them; an exported model reads "
            "windows of the most frequent size"
        )


def _sizes_of_file(annotations, facts, problems):
    other = [
        name for name, fact in facts.items() if annotations.sizes.get(name, fact[:2]) != fact[:2]
    ]
    if other:
        name = other[0]
        width, height = annotations.sizes[name]
        more = "" if len(other) == 1 else f" (and {len(other) - 1:,} more images differ)"
        problems.lines.append(
            f"{name} is {facts[name].width} x {facts[name].height} px, the annotation file says "
            f"{width} x {height}: is it the right file?{more}"
        )


def outside(annotations, sizes):
    """Row indices of annotations whose centre is not on their image, as far as `sizes` tells its
    extent.
    """
    unknown = (np.inf, np.inf)
    size = [sizes.get(image) or unknown for image in annotations.image.tolist()]
    size = np.array(size, np.float64).reshape(-1, 2)
    low = (annotations.x < 0) | (annotations.y < 0)
    return np.flatnonzero(low | (annotations.x >= size[:, 0]) | (annotations.y >= size[:, 1]))


def places(annotations, rows, most=4):
    """The first few of the rows as text: image (x, y)."""
    return examples(
        [
            f"{annotations.image[row]} ({annotations.x[row]:g}, {annotations.y[row]:g})"
            for row in rows[: most + 1]
        ],
        most,
    )


def _outside(annotations, problems):
    rows = outside(annotations, problems.sizes)
    if not len(rows):
        return
    line = (
        f"{len(rows):,} of {len(annotations):,} centres lie outside their image: "
        f"{places(annotations, rows)}"
    )
    if len(rows) > MOST_OUTSIDE * len(annotations):
        problems.error(f"{line}; are these the right images, and pixels of level 0?")
    else:
        problems.lines.append(line)


def _scales(annotations, facts, mpp, problems):
    """Images whose µm/px are unknown, differ, or are others by the annotation file."""
    known, unknown, contrary = {}, [], []
    for name, fact in facts.items():
        said = (annotations.mpp or {}).get(name)
        value = said or fact.mpp
        problems.scales[None if value is None else round(float(value), 3)] += 1
        if value is None:
            unknown.append(name)
        else:
            known[name] = value
        if said and fact.mpp and not 1 / 1.1 < said / fact.mpp < 1.1:
            contrary.append(f"{name} ({fact.mpp:.4g}, taken as {said:.4g})")
    if contrary:
        problems.lines.append(
            f"{len(contrary):,} images have other µm/px by their own files: {examples(contrary)}"
        )
    if mpp is not None:
        return  # what is unknown is an error when it is read
    if known and max(known.values()) > SAME_SCALE * min(known.values()):
        text = ", ".join(
            f"{value:g} ({number:,})"
            for value, number in sorted(problems.scales.items(), key=str)
            if value is not None
        )
        problems.lines.append(
            f"the images have different µm/px: {text}; a model trained on them knows no µm/px of "
            f"its own: --mpp {max(known.values()):.3g} resamples all to one scale"
        )
    if known and unknown:
        problems.lines.append(
            f"the µm/px of {len(unknown):,} images are unknown, those of the others are known: "
            f"{examples(unknown)}; --source-mpp gives them"
        )
