"""Patches of a dataset: cut out of its images, out of the store of crops, or ready-made files.

The store of crops (`python data.py D --cache`) is one pass over the images, each decoded once:
every annotation's window with the margin that rotation needs, and every position of the pool of
random patches (images.random_pool), as one uint8 memory map. The sampler draws random patches from
that pool also without a store, and the store keeps raw pixels of level 0: so patches are byte for
byte the same with and without it, only the speed differs."""

import csv
import glob
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
from dataset import images as image_facts
from dataset import memmap, slides

FINGERPRINT = 2  # of the fingerprints; 1 did not hold each image's scale, content and place
AT_ONCE = 64  # crops written together
TISSUE_GREEN = 217  # of 255: both stains absorb green; glass does not
TISSUE_SHARE = 0.25


def margin(size=224):
    """Side of the window that a patch of `size` px is rotated in without a corner outside."""
    return math.ceil(size * math.sqrt(2) / 32) * 32


class Patches:
    """uint8 RGB patches of an annotation table, by row number.

    fit: what becomes of ready-made patches smaller than `size`: "resize" (to size, keeping the
    aspect ratio) or "pad" (white). Larger ones are cropped at the centre. crop: a patch shows so
    many px (of the ready-made file; at `mpp`; or of level 0) and is enlarged to `size`. mpp:
    resample images to these microns per pixel; source_mpp: those of the images, if neither the
    annotations nor the files give them. jitter: the Sampler's, as far as it is used. cache: folder
    of the store of crops (default: $MITOSIS_CACHE, else .crops beside the images); False: never use
    one.

    An existing store is used if it is fresh; one line says that a stale or damaged one is not.
    read_sample, the reading of training, builds a store if the images cannot be read at random
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
        crop=None,
    ):
        if fit not in ("resize", "pad"):
            raise UserError(f"--fit {fit}: resize or pad")
        self.annotations = annotations
        self.size = size
        self.fit = fit
        self.crop = crop
        self.mpp = mpp
        self.source_mpp = source_mpp
        self.workers = workers
        self.cache = cache
        self.jitter = jitter
        self.images, self.image_of = annotations.codes("image")
        self._wide = {}  # (number of the image, size) → side at level 0
        self._layout = None
        self._fresh()

    def _fresh(self):
        """What belongs to this process alone: the opened store, threads, a lock."""
        self._crops = None
        self._looked = self._asked = False
        self._new_threads()

    def _new_threads(self):
        self._process = os.getpid()
        self._threads = None
        self._lock = threading.Lock()

    def __getstate__(self):  # for spawned processes, which open the store themselves
        own = ("_crops", "_threads", "_lock", "_process", "_looked", "_asked")
        return {key: value for key, value in vars(self).items() if key not in own}

    def __setstate__(self, state):
        vars(self).update(state)
        self._fresh()

    def __len__(self):
        return len(self.annotations)

    def read(self, rows, size=None):
        """Annotated patches → uint8 [n, size, size, 3]. A larger `size` than the classifier's is a
        margin for rotation; ready-made patches, which have none, are reflected at their border."""
        a = self.annotations
        places = [
            (self.image_of[row], a.x[row], a.y[row], row) for row in np.asarray(rows).tolist()
        ]
        return self._all(places, size)

    def read_sample(self, sample, size=None):
        """Patches of a Sampler's epoch (or a part of it), annotated and random → uint8 [n, size,
        size, 3].
        """
        self._use_store(build=True)
        number = 0  # of random crops per image in the store
        if self._crops is not None:
            number = self.layout["number"]
        # The crop of an annotation has the number of its row; behind them come the images' pools.
        crop = len(self.annotations) + sample["image"] * number + sample["pool"]
        crop = np.where(sample["row"] >= 0, sample["row"], crop)
        stored = (sample["row"] >= 0) | (sample["pool"] < number)
        columns = sample["image"], sample["x"], sample["y"], np.where(stored, crop, -1)
        return self._all(list(zip(*(column.tolist() for column in columns))), size)

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
        """Side at level 0 of a window of `size` px on an image (its number in self.images)."""
        side = self.shown(size)
        if self.mpp is None:
            return side
        if (image, size) not in self._wide:
            source = self.source_mpp or (self.annotations.mpp or {}).get(str(self.images[image]))
            self._wide[image, size] = slides.source_size(self.path(image), side, self.mpp, source)
        return self._wide[image, size]

    def shown(self, size):
        """Side in px, at `mpp` if that is given, of the square that a window of `size` px shows; if
        --crop enlarges it, an even number more than the crop, so that both have one centre.
        """
        if not self.crop:
            return size
        return self.crop + 2 * math.ceil(self.crop * (size - self.size) / (2 * self.size))

    def enlarged(self, pixels, size):
        """The middle of uint8 [shown(size), …] enlarged by size / crop → [size, size, 3].

        A margin shows what the patch itself shows, at the same places: the patch is its middle.
        """
        side = self.crop * size / self.size  # not a whole number for a margin
        start = (len(pixels) - side) / 2
        box = (start, start, start + side, start + side)
        image = Image.fromarray(pixels)
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))

    def _resampled(self, window, size):
        """A window of level 0, uint8 [wide, wide, 3], as [size, size, 3]."""
        if not self.crop:
            return slides.resample(window, size)
        return self.enlarged(slides.resample(window, self.shown(size)), size)

    def path(self, image):
        """Path of an image (its number in self.images)."""
        return self.annotations.image_path(self.images[image])

    def _all(self, places, size):
        """Patches at (number of the image, x, y, number of its crop in the store, or -1)."""
        size = size or self.size
        patches = np.empty((len(places), size, size, 3), np.uint8)
        self._use_store()
        crops = self._crops
        layout = None if crops is None else self.layout

        def one(i):  # fills patches[i]
            image, x, y, crop = places[i]
            if self.annotations.kind == "patches":
                patches[i] = self._ready_made(self.path(image), size)
                return
            wide = self.wide(image, size)
            left, top = slides.corner(x, wide), slides.corner(y, wide)
            if crops is not None and crop >= 0:
                x0, y0 = left - layout["left"][crop], top - layout["top"][crop]
                if 0 <= min(x0, y0) and max(x0, y0) + wide <= layout["side"]:
                    window = crops[crop, y0 : y0 + wide, x0 : x0 + wide]
                    patches[i] = self._resampled(window, size)
                    return
            slide = slides.open_slide(self.path(image))
            patches[i] = self._resampled(slide.window(left, top, wide), size)

        # Reading and decoding release the interpreter's lock, so threads help.
        if self.workers > 1:
            for _ in self._threads.map(one, range(len(places))):
                pass
        else:
            for i in range(len(places)):
                one(i)
        return patches

    def _ready_made(self, path, size):
        """One ready-made file as uint8 [size, size, 3]."""
        slide = slides.open_slide(path)
        width, height = slide.width, slide.height
        if self.crop:
            return self._ready_made_crop(path, min(width, height), size)
        # 1. A square with the whole file in it, white around it.
        wide = max(width, height)
        if self.fit == "pad":
            wide = max(wide, self.size)
        patch = slides.read(path, width / 2, height / 2, wide)
        # 2. Smaller files are enlarged.
        if min(width, height) < self.size and self.fit == "resize":
            side = round(wide * self.size / min(width, height))
            image = Image.fromarray(patch).resize((side, side), Image.Resampling.BICUBIC)
            patch = np.asarray(image)
        # 3. Its middle, and a reflected border if more is asked for.
        inner = min(len(patch), max(size, self.size))
        start = (len(patch) - inner) // 2
        patch = patch[start : start + inner, start : start + inner]
        if inner < size:
            before = (size - inner) // 2
            border = (before, size - inner - before)
            patch = np.pad(patch, (border, border, (0, 0)), mode="reflect")
        return patch

    def _ready_made_crop(self, path, shorter, size):
        """The middle of a ready-made file, enlarged; a margin is the file's own as far as it goes,
        then reflected. shorter: its shorter side in px.
        """
        if shorter < self.crop:
            raise UserError(f"{path}: is smaller than the {self.crop} px of --crop")
        side = self.shown(size)
        inner = min(side, shorter - (shorter - self.crop) % 2)  # its centre is the crop's, too
        slide = slides.open_slide(path)
        pixels = slides.read(path, slide.width / 2, slide.height / 2, inner)
        border = ((side - inner) // 2,) * 2
        pixels = np.pad(pixels, (border, border, (0, 0)), mode="reflect")
        return self.enlarged(pixels, size)

    def fingerprint(self, times=True):
        """Hash of what the pixels depend on: the images' content and how patches are cut, with each
        image's scale. times: see images.content."""
        settings = [FINGERPRINT, self.size, self.fit]
        if self.crop:
            settings.append(f"crop {self.crop}")
        if self.annotations.kind == "points":
            settings += [self.wide(i, self.size) for i in range(len(self.images))]
        digest = hashlib.sha256(repr(settings).encode())
        digest.update(image_facts.content(self.annotations, times))
        return digest.hexdigest()[:16]

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
            number = image_facts.pool_size(a)
            x, y = [a.x], [a.y]
            for name in self.images.tolist():
                random_x, random_y = image_facts.random_pool(a, name, number, window)
                x.append(random_x)
                y.append(random_y)
            pools = np.repeat(np.arange(len(self.images)), number)
            self._layout = {
                "side": side,
                "number": number,
                "image": np.concatenate([self.image_of, pools]),
                "left": slides.corners(np.concatenate(x), side),
                "top": slides.corners(np.concatenate(y), side),
            }
        return self._layout

    def store_path(self):
        folder = self.cache or os.environ.get("MITOSIS_CACHE") or self.annotations.root / ".crops"
        return Path(folder) / f"{self.annotations.name}-{self.layout['side']}"

    def store_fingerprint(self):
        layout = self.layout
        places = np.stack([layout["image"], layout["left"], layout["top"]]).astype("<i8")
        return {
            "version": FINGERPRINT,
            "annotations": self.annotations.fingerprint(),
            "side": layout["side"],
            "random crops": layout["number"],
            "window": self.window,
            "images": image_facts.content(self.annotations).hex()[:16],
            "places": hashlib.sha256(places.tobytes()).hexdigest()[:16],
        }

    def _use_store(self, build=False):
        """Open the store once if it is fresh; `build`: make it if random reads would be too slow
        without.
        """
        if self._process != os.getpid():  # threads do not survive a fork, and a lock may be held
            self._new_threads()
        with self._lock:
            if self._threads is None and self.workers > 1:
                self._threads = ThreadPoolExecutor(self.workers)
            if self.cache is False or self.annotations.kind == "patches" or self._crops is not None:
                return
            stale = None
            if not self._looked:
                stale = self._open_store()
                self._looked = True
            slow = None
            if build and not self._asked and self._crops is None:
                slow = self._too_slow()
            if slow:
                print(
                    f"{self.annotations.name}: {slow}; building a store of crops first "
                    "(MITOSIS_CACHE=DIR puts it elsewhere)",
                    flush=True,
                )
                build_store(self, min(4, os.cpu_count() or 1))
                self._open_store()
            elif stale:
                print(f"{stale}; not used: python data.py … --cache rebuilds it", flush=True)
            self._asked |= build

    def _open_store(self):
        """Open the store if it exists and is fresh; returns what is wrong with one that is not."""
        # First whether there is one: the fingerprint looks at every image.
        if not memmap.files(self.store_path())[1].exists():
            return None
        try:
            self._crops = memmap.open_store(
                self.store_path(), self.store_fingerprint(), verify=False
            )
        except memmap.Missing:
            pass
        except (memmap.Stale, memmap.Damaged) as error:
            return str(error)
        return None

    def _too_slow(self):
        """Why random reads need the store, or None: images that are decoded whole and do not fit in
        memory.
        """
        slow = total = 0
        for image in range(len(self.images)):
            facts = slides.facts(self.path(image))
            if not facts.random_access:
                slow += 1
                total += 3 * facts.width * facts.height
        if total <= slides.DECODED_BYTES:
            return None
        return f"{slow:,} images of {total / 1e9:.1f} GB decoded cannot be read at random"


def build_store(patches, workers=2):
    """Build the store of crops of a dataset if it is missing or stale, or continue it; returns its
    path.

    patches: Patches, or Annotations. workers: processes; each decodes one image at a time, so
    memory is bounded by about five times the largest image per process. Every image is decoded
    once. A kill costs the images in work. Prints beforehand how much disk space it needs.
    UserError: images broken (all are named), disk too small."""
    if not isinstance(patches, Patches):
        patches = Patches(patches)
    a = patches.annotations
    if a.kind == "patches":
        raise UserError(f"{a.name}: ready-made patches need no store of crops")
    path, fingerprint = patches.store_path(), patches.store_fingerprint()
    path.parent.mkdir(parents=True, exist_ok=True)
    # A second process waits, and finds it done.
    with common.exclusive(path.with_name(path.name + ".build")):
        for rest in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # of a killed build
            rest.unlink(missing_ok=True)
        try:
            memmap.open_store(path, fingerprint)
            print(f"{path}: already built, fresh and complete", flush=True)
            return path
        except memmap.Missing:
            pass
        except (memmap.Stale, memmap.Damaged) as error:
            print(f"{error}; rebuilding it", flush=True)
            for file in memmap.files(path):
                file.unlink(missing_ok=True)
        side, rows = patches.layout["side"], len(patches.layout["left"])
        shape = (rows, side, side, 3)
        print(
            f"crops of {a.name}: {len(a):,} annotated and {rows - len(a):,} random ones of {side} "
            f"px from {len(patches.images):,} images; {rows * side * side * 3 / 1e9:.1f} GB in "
            f"{path.parent}, which has {shutil.disk_usage(path.parent).free / 1e9:.1f} GB free",
            flush=True,
        )
        with memmap.Writer(path, shape, np.uint8, fingerprint) as writer:
            todo = writer.todo
        if 0 < len(todo) < rows:
            print(f"continuing: {rows - len(todo):,} of {rows:,} crops exist", flush=True)
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
        places = zip(layout["image"], layout["left"], layout["top"])
        for row, (image, left, top) in enumerate(places):
            annotated = ("", "")
            if row < len(a):
                annotated = a.id[row], int(a.label[row])
            writer.writerow([row, patches.images[image], left, top, *annotated])


def _fill_all(patches, path, shape, fingerprint, todo, workers):
    """Write the rows `todo`, in `workers` processes that share the images among them."""
    image = patches.layout["image"][todo]
    order = np.argsort(image, kind="stable")
    tasks = []  # the rows of each image
    if len(todo):
        tasks = np.split(todo[order], np.flatnonzero(np.diff(image[order])) + 1)
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
    """_fill by several processes; returns one line for each image that cannot be read."""
    # Forked, if possible: nothing is imported again, and a main module without a guard does no
    # harm.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if "fork" in methods else "spawn")
    processes, pipes, broken, killed = [], [], [], []
    done = np.memmap(memmap.files(path)[2], np.uint8, "r")
    before = reported = int(done.sum())
    try:
        for i in range(workers):
            receive, send = context.Pipe(duplex=False)
            task = send, os.getpid(), patches, path, shape, fingerprint, tasks[i::workers]
            processes.append(context.Process(target=_work, args=task))
            processes[-1].start()
            send.close()
            pipes.append(receive)
        # Each process sends one message at its end; a pipe that closes without one was killed.
        running = dict(zip(pipes, processes))
        while running:
            for pipe in wait(list(running), timeout=0.5):
                try:
                    message = pipe.recv()
                    if isinstance(message, OSError):
                        raise message
                    broken += message
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
        status = ", ".join(str(process.exitcode) for process in killed)
        raise UserError(
            f"{len(killed)} of {workers} processes ended (exit status {status}; too little "
            f"memory?) after {reported - before:,} crops; run the same command again, it "
            "continues; --workers 1 needs less memory"
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
    left, top = layout["left"], layout["top"]
    with memmap.Writer(path, shape, np.uint8, fingerprint, shared=True) as writer:
        for rows in tasks:
            image = patches.path(layout["image"][rows[0]])
            rows = rows[np.lexsort((left[rows], top[rows] // 512))]  # neighbours share tiles
            try:
                for i in range(0, len(rows), AT_ONCE):
                    if parent is not None and os.getppid() != parent:
                        return broken  # it was killed; nobody is left to report to
                    part = np.sort(rows[i : i + AT_ONCE])
                    slide = slides.open_slide(image)
                    crops = [slide.window(int(left[row]), int(top[row]), side) for row in part]
                    writer.write(part, np.stack(crops))
                    if bar is not None:
                        bar.update(len(part))
            except UserError as error:
                broken.append(str(error))
            slides.close(image)
    return broken
