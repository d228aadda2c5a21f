"""Patches of a dataset: cut out of its images, or ready-made files brought to size. No torch."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

import slides
from cli import UserError


class Patches:
    """uint8 RGB patches of an annotation table, by row number.

    fit: what becomes of ready-made patches smaller than `size`: "resize" (to size, keeping the aspect ratio) or "pad"
    (white). Larger ones are cropped at the centre. mpp: resample images to these microns per pixel.
    """

    def __init__(self, annotations, size=224, fit="resize", mpp=None, source_mpp=None, workers=4):
        if fit not in ("resize", "pad"):
            raise UserError(f"--fit {fit}: resize or pad")
        self.annotations, self.size, self.fit, self.mpp, self.source_mpp = annotations, size, fit, mpp, source_mpp
        self.images = np.unique(annotations.image)
        self.pool = ThreadPoolExecutor(workers) if workers > 1 else None

    def __len__(self):
        return len(self.annotations)

    def read(self, rows, size=None):
        """Annotated patches → uint8 [n, size, size, 3]. A larger `size` than the classifier's is a margin for
        rotation; ready-made patches, which have none, are reflected at their border."""
        a = self.annotations
        return self._all([(a.image[row], a.x[row], a.y[row]) for row in rows], size or self.size)

    def read_sample(self, sample, size=None):
        """Patches of a Sampler's epoch (or a part of it), annotated and random → uint8 [n, size, size, 3]."""
        return self._all([(self.images[s["image"]], s["x"], s["y"]) for s in sample], size or self.size)

    def _all(self, places, size):
        patches = np.empty((len(places), size, size, 3), np.uint8)

        def one(i):
            image, x, y = places[i]
            path = self.annotations.image_path(image)
            patches[i] = (self._ready_made(path, size) if self.annotations.kind == "patches" else
                          slides.read(path, x, y, size, self.mpp, self.source_mpp))
        # Reading and decoding release the interpreter's lock, so threads help.
        for _ in (self.pool.map if self.pool else map)(one, range(len(places))):
            pass
        return patches

    def _ready_made(self, path, size):
        width, height = slides.dimensions(path)
        wide = max(width, height) if self.fit == "resize" else max(width, height, self.size)
        patch = slides.read(path, width / 2, height / 2, wide)  # square, white where the file is not
        if min(width, height) < self.size and self.fit == "resize":
            scale = self.size / min(width, height)
            image = Image.fromarray(patch).resize((round(wide * scale),) * 2, Image.Resampling.BICUBIC)
            patch = np.asarray(image)
        have = min(len(patch), max(size, self.size))
        start = (len(patch) - have) // 2
        patch = patch[start:start + have, start:start + have]
        if have < size:
            before = (size - have) // 2
            patch = np.pad(patch, ((before, size - have - before),) * 2 + ((0, 0),), mode="reflect")
        return patch

    def fingerprint(self):
        """Hash of what the pixels depend on: size and time of every image, and how patches are cut."""
        digest = hashlib.sha256(repr((self.size, self.fit, self.mpp, self.source_mpp)).encode())
        for image in self.images:
            try:
                stat = self.annotations.image_path(image).stat()
            except FileNotFoundError:
                raise UserError(f"{self.annotations.image_path(image)}: no such image; name the images' folder with "
                                "--images") from None
            digest.update(f"{image} {stat.st_size} {stat.st_mtime_ns}".encode())
        return digest.hexdigest()[:16]
