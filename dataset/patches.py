"""Patches of a dataset: cut out of its images, out of the store of crops, or ready-made files. No
torch.

The store of crops (`python data.py D --cache`) is one pass over the images, each decoded once:
every annotation's window with the margin that rotation needs, and every position of the pool of
random patches (sampler.random_pool), as one uint8 memory map. The sampler draws random patches from
that pool also where there is no store, and the store keeps raw pixels of level 0: so patches are
byte for byte the same with and without it, only the speed differs."""

import csv
import hashlib
import math
import multiprocessing
import os
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
from PIL import Image

import common
from common import UserError
from dataset import memmap, sampler, slides

AT_ONCE = 64  # crops written together
TISSUE_GREEN = 217  # of 255: both stains absorb green; glass does not
TISSUE_SHARE = 0.25


def margin(size=224):
    """Side of the window that a patch of `size` px is rotated in without a corner outside
    (augment.margin).
    """
    return math.ceil(size * math.sqrt(2) / 32) * 32


class Patches:
    """uint8 RGB patches of an annotation table, by row number.

    fit: what becomes of ready-made patches smaller than `size`: "resize" (to size, keeping the
    aspect ratio) or "pad" (white). Larger ones are cropped at the centre. mpp: resample images to
    these microns per pixel; source_mpp: those of the images, where neither the annotations nor the
    files tell. jitter: the Sampler's, as far as it is used. cache: folder of the store of crops
    (default: $MITOSIS_CACHE, else .crops beside the images); False: never use one.

    A store that is there and fresh is used; a stale or damaged one is not, which is said in one
    line. read_sample, the reading of training, builds it where the images cannot be read at random
    and are too large to be kept decoded."""

    def __init__(
        self,
        annotations,
        size=224,
        fit="resize",
        mpp=None,
        source_mpp=None,
        workers=4,
        cache=None,
        jitter=0.0,
    ):
        if fit not in ("resize", "pad"):
            raise UserError(f"--fit {fit}: resize or pad")
        self.annotations, self.size, self.fit, self.mpp, self.source_mpp = (
            annotations,
            size,
            fit,
            mpp,
            source_mpp,
        )
        self.workers, self.cache, self.jitter = workers, cache, jitter
        self.images, self.image_of = annotations.codes("image")
        self._wide, self._layout = {}, None
        self._fresh()

    def _fresh(self):
        self._crops, self._looked, self._asked = None, False, False
        self._process, self._threads, self._lock = os.getpid(), None, threading.Lock()

    def __getstate__(self):  # for processes that are spawned: they open the store themselves
        return {
            key: value
            for key, value in vars(self).items()
            if key not in ("_crops", "_threads", "_lock", "_process", "_looked", "_asked")
        }

    def __setstate__(self, state):
        vars(self).update(state)
        self._fresh()

    def __len__(self):
        return len(self.annotations)

    def read(self, rows, size=None):
        """Annotated patches → uint8 [n, size, size, 3]. A larger `size` than the classifier's is a
        margin for rotation; ready-made patches, which have none, are reflected at their border."""
        a = self.annotations
        return self._all(
            [(self.image_of[row], a.x[row], a.y[row], row) for row in np.asarray(rows).tolist()],
            size,
        )

    def read_sample(self, sample, size=None):
        """Patches of a Sampler's epoch (or a part of it), annotated and random → uint8 [n, size,
        size, 3].
        """
        self._use_store(build=True)
        number = self.layout["number"] if self._crops is not None else 0
        first = len(self.annotations)
        return self._all(
            [
                (
                    image,
                    x,
                    y,
                    row if row >= 0 else first + image * number + pool if pool < number else None,
                )
                for row, image, x, y, pool in zip(
                    *(sample[name].tolist() for name in ("row", "image", "x", "y", "pool"))
                )
            ],
            size,
        )

    def tissue(self, sample):
        """Which positions of a sample show tissue: a quarter of the patch at least is darker than
        glass in the green channel. bool [n]; the Sampler's `accept` for --tissue."""
        green = self.read_sample(sample, self.size)[..., 1]
        return (green < TISSUE_GREEN).mean((1, 2)) >= TISSUE_SHARE

    @property
    def window(self):
        """Side in px of level 0 that a patch covers, the largest over the images: the Sampler's
        `window`.
        """
        return float(max(self.wide(i, self.size) for i in range(len(self.images))))

    def wide(self, image, size):
        """Side at level 0, in px, of a window of `size` px on an image (its number in self.images)."""
        if self.mpp is None:
            return size
        if (image, size) not in self._wide:
            name = str(self.images[image])
            source = self.source_mpp or (self.annotations.mpp or {}).get(name)
            self._wide[image, size] = slides.source_size(
                self.annotations.image_path(name), size, self.mpp, source
            )
        return self._wide[image, size]

    def _all(self, places, size):
        """Patches at (number of the image, x, y, row of the store or None)."""
        size = size or self.size
        patches = np.empty((len(places), size, size, 3), np.uint8)
        self._use_store()
        crops, layout = self._crops, self.layout if self._crops is not None else None

        def one(i):
            image, x, y, row = places[i]
            if self.annotations.kind == "patches":
                patches[i] = self._ready_made(self.annotations.image_path(self.images[image]), size)
                return
            wide = self.wide(image, size)
            if crops is not None and row is not None:
                left = slides.corner(x, wide) - layout["left"][row]
                top = slides.corner(y, wide) - layout["top"][row]
                if 0 <= min(left, top) and max(left, top) + wide <= layout["side"]:
                    patches[i] = slides.resample(
                        crops[row, top : top + wide, left : left + wide], size
                    )
                    return
            slide = slides.open_slide(self.annotations.image_path(self.images[image]))
            patches[i] = slides.resample(
                slide.window(slides.corner(x, wide), slides.corner(y, wide), wide), size
            )

        # Reading and decoding release the interpreter's lock, so threads help.
        for _ in (self._threads.map if self.workers > 1 else map)(one, range(len(places))):
            pass
        return patches

    def _ready_made(self, path, size):
        width, height = slides.dimensions(path)
        wide = max(width, height) if self.fit == "resize" else max(width, height, self.size)
        patch = slides.read(
            path, width / 2, height / 2, wide
        )  # square, white where the file is not
        if min(width, height) < self.size and self.fit == "resize":
            scale = self.size / min(width, height)
            image = Image.fromarray(patch).resize(
                (round(wide * scale),) * 2, Image.Resampling.BICUBIC
            )
            patch = np.asarray(image)
        have = min(len(patch), max(size, self.size))
        start = (len(patch) - have) // 2
        patch = patch[start : start + have, start : start + have]
        if have < size:
            before = (size - have) // 2
            patch = np.pad(patch, ((before, size - have - before),) * 2 + ((0, 0),), mode="reflect")
        return patch

    def fingerprint(self):
        """Hash of what the pixels depend on: size and time of every image, and how patches are cut."""
        digest = hashlib.sha256(repr((self.size, self.fit, self.mpp, self.source_mpp)).encode())
        digest.update(self._image_files())
        return digest.hexdigest()[:16]

    def _image_files(self):
        digest = hashlib.sha256()
        for image in self.images:
            try:
                stat = self.annotations.image_path(image).stat()
            except FileNotFoundError:
                raise UserError(
                    f"{self.annotations.image_path(image)}: no such image; name the images' "
                    "folder with "
                    "--images"
                ) from None
            digest.update(f"{image} {stat.st_size} {stat.st_mtime_ns}".encode())
        return digest.digest()

    # ------------------------------------------------------------ the store of crops

    @property
    def layout(self):
        """What the store holds: side (px at level 0), number (random crops per image), and for each
        of its rows image (number), left, top. The rows are those of the table, then `number` of
        each image's pool."""
        if self._layout is None:
            a, window = self.annotations, self.window
            side = max(self.wide(i, margin(self.size)) for i in range(len(self.images)))
            side += 2 * math.ceil(self.jitter * window)
            number = sampler.pool_size(a)
            x, y = np.concatenate(
                [
                    [a.x, a.y],
                    *(
                        sampler.random_pool(a, name, number, window)
                        for name in self.images.tolist()
                    ),
                ],
                axis=1,
            )
            left, top = (
                np.floor(c - side / 2 + 0.5).astype(np.int64) for c in (x, y)
            )  # slides.corner
            image = np.r_[self.image_of, np.repeat(np.arange(len(self.images)), number)]
            self._layout = {
                "side": side,
                "number": number,
                "image": image,
                "left": left,
                "top": top,
            }
        return self._layout

    def store_path(self):
        folder = self.cache or os.environ.get("MITOSIS_CACHE") or self.annotations.root / ".crops"
        return Path(folder) / f"{self.annotations.name}-{self.layout['side']}"

    def store_fingerprint(self):
        return {
            "version": 1,
            "annotations": self.annotations.fingerprint(),
            "side": self.layout["side"],
            "random crops": self.layout["number"],
            "window": self.window,
            "images": hashlib.sha256(self._image_files()).hexdigest()[:16],
        }

    def _use_store(self, build=False):
        """Open the store once where it is fresh; `build`: make it where random reads would be too
        slow without.
        """
        if self._process != os.getpid():  # threads do not survive a fork, and a lock may be held
            self._process, self._threads, self._lock = os.getpid(), None, threading.Lock()
        with self._lock:
            if self._threads is None and self.workers > 1:
                self._threads = ThreadPoolExecutor(self.workers)
            if self.cache is False or self.annotations.kind == "patches" or self._crops is not None:
                return
            stale = self._open_store() if not self._looked else None
            self._looked = True
            if build and not self._asked and self._crops is None and (slow := self._too_slow()):
                print(
                    f"{self.annotations.name}: {slow}; a store of crops is built first (another "
                    "place for it: "
                    "MITOSIS_CACHE=DIR)",
                    flush=True,
                )
                build_store(self, min(4, os.cpu_count() or 1))
                self._open_store()
            elif stale:
                print(f"{stale}; not used: python data.py … --cache builds it anew", flush=True)
            self._asked |= build

    def _open_store(self):
        """Open the store where it is there and fresh; returns what is wrong with one that is not."""
        try:
            if memmap.files(self.store_path())[1].exists():  # the fingerprint looks at every image
                self._crops = memmap.open_store(
                    self.store_path(), self.store_fingerprint(), verify=False
                )
        except memmap.Missing:
            pass
        except (memmap.Stale, memmap.Damaged) as error:
            return str(error)

    def _too_slow(self):
        """Why random reads need the store, or None: images that are decoded whole and do not fit in
        memory.
        """
        slow = total = 0
        for image in self.images:
            slide = slides.open_slide(self.annotations.image_path(image))
            if not slide.random_access:
                slow, total = slow + 1, total + 3 * slide.width * slide.height
        return (
            f"{slow:,} images of {total / 1e9:.1f} GB decoded cannot be read at random"
            if total > slides.DECODED_BYTES
            else None
        )


def build_store(patches, workers=2):
    """Build the store of crops of a dataset where it is missing or stale, or continue it; returns
    its path.

    patches: Patches, or Annotations. workers: processes; each decodes one image at a time, so
    memory is bounded by about five times the largest image per process. Every image is decoded
    once. A kill costs the images in work. Says before it starts what it needs on the disk.
    UserError: images broken (all are named), disk too small."""
    if not isinstance(patches, Patches):
        patches = Patches(patches)
    a = patches.annotations
    if a.kind == "patches":
        raise UserError(f"{a.name}: ready-made patches need no store of crops")
    path, layout, fingerprint = patches.store_path(), patches.layout, patches.store_fingerprint()
    path.parent.mkdir(parents=True, exist_ok=True)
    with common.exclusive(
        path.with_name(path.name + ".build")
    ):  # a second process waits, and finds it done
        try:
            memmap.open_store(path, fingerprint)
            print(f"{path}: there, fresh and whole", flush=True)
            return path
        except memmap.Missing:
            pass
        except (memmap.Stale, memmap.Damaged) as error:
            print(f"{error}; building it anew", flush=True)
            for file in memmap.files(path):
                file.unlink(missing_ok=True)
        side, rows = layout["side"], len(layout["left"])
        shape = (rows, side, side, 3)
        print(
            f"crops of {a.name}: {len(a):,} annotated and {rows - len(a):,} random ones of {side} "
            "px out of "
            f"{len(patches.images):,} images; {rows * side * side * 3 / 1e9:.1f} GB in "
            f"{path.parent}, where "
            f"{shutil.disk_usage(path.parent).free / 1e9:.1f} GB are free",
            flush=True,
        )
        with memmap.Writer(path, shape, np.uint8, fingerprint) as writer:
            todo = writer.todo
        if 0 < len(todo) < rows:
            print(f"continuing: {rows - len(todo):,} of {rows:,} crops are there", flush=True)
        _fill_all(patches, path, shape, fingerprint, todo, workers)
        with common.atomic(path.with_name(path.name + ".csv")) as temporary:
            _write_index(patches, temporary)
        with memmap.Writer(path, shape, np.uint8, fingerprint) as writer:
            writer.finish()
    return path


def _write_index(patches, path):
    """What each row of the store is, as a CSV: for readers other than Patches."""
    a, layout = patches.annotations, patches.layout
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["row", "image", "left", "top", "id", "label"])
        for row, (image, left, top) in enumerate(
            zip(layout["image"], layout["left"], layout["top"])
        ):
            annotated = (a.id[row], int(a.label[row])) if row < len(a) else ("", "")
            writer.writerow([row, patches.images[image], left, top, *annotated])


def _fill_all(patches, path, shape, fingerprint, todo, workers):
    """Write the rows `todo`, in `workers` processes that share the images among them."""
    image = patches.layout["image"][todo]
    order = np.argsort(image, kind="stable")
    tasks = np.split(todo[order], np.flatnonzero(np.diff(image[order])) + 1) if len(todo) else []
    workers = min(workers, len(tasks))
    with common.progress(total=len(todo), desc="crops", unit="crops") as bar:
        if workers <= 1 or multiprocessing.current_process().daemon:  # daemons may have no children
            broken = _fill(patches, path, shape, fingerprint, tasks, bar=bar)
        else:
            broken = _fill_in_processes(patches, path, shape, fingerprint, tasks, workers, bar)
    if broken:
        raise UserError(
            f"{len(broken):,} images cannot be read, the crops of the others are kept: "
            f"{'; '.join(broken)}"
        )


def _fill_in_processes(patches, path, shape, fingerprint, tasks, workers, bar):
    # Forked, where possible: nothing is imported again, and a main module without a guard does no
    # harm.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if "fork" in methods else "spawn")
    processes, pipes, broken, killed = [], [], [], []
    done = np.memmap(memmap.files(path)[2], np.uint8, "r")
    before = reported = int(done.sum())
    try:
        for i in range(workers):
            receive, send = context.Pipe(duplex=False)
            processes.append(
                context.Process(
                    target=_work,
                    args=(send, os.getpid(), patches, path, shape, fingerprint, tasks[i::workers]),
                )
            )
            processes[-1].start()
            send.close()
            pipes.append(receive)
        running = dict(zip(pipes, processes))
        while running:
            for pipe in wait(list(running), timeout=0.5):
                try:
                    found = pipe.recv()
                    if isinstance(found, OSError):
                        raise found
                    broken += found
                except EOFError:
                    killed.append(running[pipe])
                del running[pipe]
            bar.update(int(done.sum()) - reported)
            reported = int(done.sum())
        for process in processes:
            process.join()
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
                process.join()
    if killed:
        raise UserError(
            f"{len(killed)} of {workers} processes ended (exit status "
            f"{', '.join(str(p.exitcode) for p in killed)}; too little memory?) after "
            f"{reported - before:,}"
            " crops; run the same command again, it continues; --workers 1 needs less memory"
        )
    return broken


def _work(pipe, parent, *task):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its children
    try:
        pipe.send(_fill(*task, parent=parent))
    except OSError as error:  # a full disk, say
        pipe.send(OSError(error.errno, error.strerror, error.filename))


def _fill(patches, path, shape, fingerprint, tasks, parent=None, bar=None):
    """Write the rows of each task, which lie on one image; returns one line for each image that
    cannot be read.
    """
    layout, side, broken = patches.layout, patches.layout["side"], []
    with memmap.Writer(path, shape, np.uint8, fingerprint, shared=True) as writer:
        for rows in tasks:
            image = patches.annotations.image_path(patches.images[layout["image"][rows[0]]])
            rows = rows[
                np.lexsort((layout["left"][rows], layout["top"][rows] // 512))
            ]  # neighbours share tiles
            try:
                for i in range(0, len(rows), AT_ONCE):
                    if parent is not None and os.getppid() != parent:
                        return broken  # it was killed; nobody is left to report to
                    part = np.sort(rows[i : i + AT_ONCE])
                    slide = slides.open_slide(image)
                    writer.write(
                        part,
                        np.stack(
                            [
                                slide.window(
                                    int(layout["left"][row]), int(layout["top"][row]), side
                                )
                                for row in part
                            ]
                        ),
                    )
                    if bar is not None:
                        bar.update(len(part))
            except UserError as error:
                broken.append(str(error))
            slides.close(image)
    return broken
