"""Annotations, datasets, splits, the patch sampler. `python data.py D` tells what a dataset holds. No torch.

    python data.py midog2022                          counts, cases, problems, planned splits of a known dataset
    python data.py my.sqlite --images slides/         the same for one's own annotations
    python data.py midog2022 --cache                  build the store of crops that training reads from
    python data.py --download midog2022               fetch a public dataset (resumable)
"""

import argparse
import hashlib
import math
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

import cli
import readers
import runs
from cli import UserError

PATCH = 224  # px
NEAR = PATCH / 2  # two centres nearer than this lie in each other's patch
TEST_SHARE = VAL_SHARE = 0.2
MAX_FILES = 2_000_000  # looked through for images, before --images was probably a mistake


# ---------------------------------------------------------------- known datasets

@dataclass(frozen=True)
class Known:
    """A public dataset: what its files must hold."""
    title: str
    files: tuple  # annotation files, the preferred first
    counts: tuple = None  # mitotic figures, hard negatives
    images: int = None  # labelled ones
    profile: str = None
    licence: str = None
    mpp: float = None  # µm/px, where all slides share it
    address: str = None
    domains: dict = field(default_factory=dict)  # domain → (first file number, last, description, counts or None)
    official_test: tuple = ()  # cases


KNOWN = {
    "ccmct": Known(
        "canine cutaneous mast cell tumour, 32 slides (MITOS_WSI_CCMCT, variant ODAEL)",
        ("MITOS_WSI_CCMCT_ODAEL.sqlite", "MITOS_WSI_CCMCT_ODAEL_binary_labels.csv"), (44880, 27965), 32, "ccmct",
        "CC BY-NC-ND", 0.25, "https://ndownloader.figshare.com/files/16261571",
        official_test=(
            "f26e9fcef24609b988be", "dd4246ab756f6479c841", "f3741e764d39ccc4d114", "c91a842257ed2add5134",
            "8c9f9618fcaca747b7c3", "add0a9bbc53d1d9bac4c", "c86cd41f96331adf3856", "be10fa37ad6e88e1f406",
            "96274538c93980aad8d6", "552c51bfb88fd3e65ffe", "1018715d369dd0df2fc0")),
    "cmc": Known("canine mammary carcinoma (MITOS_WSI_CMC)", ("MITOS_WSI_CMC_CODAEL_TR_ROI.sqlite",
                                                              "MITOS_WSI_CMC_CODAEL.sqlite"),
                 profile="cmc", address="https://github.com/DeepMicroscopy/MITOS_WSI_CMC"),
    "midog2021": Known(
        "human breast cancer by four scanners (MIDOG 2021 training set)", ("MIDOG.json", "MIDOG.sqlite"),
        (1721, 2714), 150, "midog", "CC BY-NC-ND", address="https://github.com/DeepMicroscopy/MIDOG",
        domains={"Hamamatsu XR": (1, 50, "scanner", None), "Hamamatsu S360": (51, 100, "scanner", None),
                 "Aperio CS2": (101, 150, "scanner", None), "unlabelled": (151, 200, "scanner", None)}),
    "midog2022": Known(
        "five tumour types (MIDOG 2022 training set)",
        ("MIDOG2022_training_png.json", "MIDOG2022_training.json", "MIDOG2022_training_png.sqlite",
         "MIDOG2022_training.sqlite", "MIDOG2022_training_png.csv", "MIDOG2022_training_tiff.csv"),
        (9501, 11051), 354, "midog", None, address="https://zenodo.org/records/6547151",
        domains={"A": (250, 299, "canine cutaneous mast cell tumour", (2327, 1366)),
                 "B": (195, 249, "canine lymphoma", (3959, 4257)),
                 "C": (1, 150, "human breast cancer", (1721, 2714)),
                 "D": (300, 354, "human neuroendocrine tumour", (639, 1762)),
                 "E": (151, 194, "canine lung cancer", (855, 952)),
                 "unlabelled": (355, 405, "unlabelled", None)}),
    "midogpp": Known(
        "seven tumour types (MIDOG++)",
        ("MIDOGpp.json", "MIDOG++.json", "MIDOGpp.sqlite", "MIDOG++.sqlite", "MIDOGpp.csv",
         "MultiDomainMitoticFigureDataset.json.gz", "MultiDomainMitoticFigureDataset.json"),
        (11937, 14349), 503, "midog", "CC0 (its JSON)", address="https://figshare.com/ndownloader/files/40283737",
        domains={"human breast cancer": (1, 200, "", (1721, 2714)),
                 "canine lung cancer": (201, 244, "", (855, 951)),
                 "canine lymphosarcoma": (245, 299, "", (3959, 4257)),
                 "canine cutaneous mast cell tumor": (300, 349, "", (2327, 1366)),
                 "human neuroendocrine tumor": (350, 404, "", (639, 1761)),
                 "canine soft tissue sarcoma": (405, 504, "", (1286, 2375)),
                 "human melanoma": (505, 553, "", (1150, 925))}),
}


def root_folder():
    return Path(os.environ.get("MITOSIS_ROOT") or "data")


def recognise(path, table):
    """Name of the known dataset that an annotation file is, or None: by its published name and its images' names."""
    for name, known in KNOWN.items():
        if path.name not in known.files:
            continue
        stems = {Path(image).stem for image in table.images}
        numbered = [int(stem) for stem in stems if re.fullmatch(r"\d{3}", stem)]
        # MIDOG.json is a name that other files have too; the numbers must be the published ones, and nearly all there.
        if path.stem == "MIDOG" and len(set(table.image)) < 0.9 * known.images:
            continue
        if known.domains and (len(numbered) < len(stems) or max(numbered) >
                              max(last for _, last, *_ in known.domains.values())):
            continue
        return name
    return None


def domain_of(known, image):
    """A known dataset's domain of an image, by the file's number; None where the number says nothing."""
    stem = Path(image).stem
    if re.fullmatch(r"\d{1,4}", stem, re.ASCII):
        for domain, (first, last, *_) in KNOWN[known].domains.items():
            if first <= int(stem) <= last:
                return domain
    return None


def _midog_number(case, known):
    """A MIDOG case as its MIDOG++ number, so that cases of 2021, 2022 and ++ can be compared."""
    if not re.fullmatch(r"\d{1,3}", case, re.ASCII):
        return None
    n = int(case)
    if known == "midog2022":
        n = n if n <= 150 else n + 50 if n <= 346 else n + 51 if n <= 353 else 397 if n == 354 else -n
    return f"midog{n}"


def shared_cases(a, b):
    """Cases that two datasets have in common, as named in `b` (sorted): a test on them would be no test.

    The MIDOG datasets number the same slides differently, which is taken into account.
    """
    def keys(annotations):
        family = annotations.known in ("midog2021", "midog2022", "midogpp")
        return {(_midog_number(str(case), annotations.known) if family else None) or str(case): str(case)
                for case in np.unique(annotations.case)}
    first, second = keys(a), keys(b)
    return sorted(second[key] for key in first.keys() & second.keys())


# ---------------------------------------------------------------- annotations

@dataclass
class Annotations:
    """Annotations of a dataset: arrays of equal length N, and what is known of their images.

    id, image, case, domain: str. image is the path below `root`. x, y: float64, px at level 0, the centre (NaN for
    ready-made patches). label: int8, 1 mitotic figure, 0 hard negative. The table is sorted by image.
    """
    id: np.ndarray
    image: np.ndarray
    case: np.ndarray
    domain: np.ndarray
    x: np.ndarray
    y: np.ndarray
    label: np.ndarray
    name: str
    root: Path
    kind: str = "points"  # or "patches"
    source: Path = None  # the annotation file
    known: str = None  # key of KNOWN
    licence: str = None
    mpp: dict = None  # image → µm/px, where known beside the image file itself
    sizes: dict = field(default_factory=dict)  # image → (width, height), where the annotation file tells
    all_images: list = field(default_factory=list)  # labelled and unlabelled
    missing: list = field(default_factory=list)  # images that are not below root
    notes: list = field(default_factory=list)
    _kept: dict = field(default_factory=dict, init=False, repr=False, compare=False)  # what was sorted once

    def __len__(self):
        return len(self.id)

    def take(self, index):
        """The annotations of a mask or of row indices; the images' facts stay."""
        return replace(self, **{name: getattr(self, name)[index]
                                for name in ("id", "image", "case", "domain", "x", "y", "label")})

    def order(self):
        """The rows in the order of their ids."""
        if self._kept.get("id", (None,))[0] is not self.id:
            self._kept["id"] = self.id, np.argsort(self.id, kind="stable")
        return self._kept["id"][1]

    def codes(self, column):
        """(names, code): the sorted different values of a column, and for each row which it has."""
        values = getattr(self, column)
        if self._kept.get(column, (None,))[0] is not values:
            self._kept[column] = values, np.unique(values, return_inverse=True)
        return self._kept[column][1]

    def rows(self, ids):
        """Row indices of annotation ids, in their order; UserError for an id that is not there."""
        order, ids = self.order(), np.asarray(ids, dtype=str)
        if len(ids) == 0:
            return np.zeros(0, np.int64)
        at = np.searchsorted(self.id[order], ids).clip(max=len(order) - 1)
        found = order[at] if len(order) else at
        wrong = self.id[found] != ids if len(order) else np.ones(len(ids), bool)
        if wrong.any():
            raise UserError(f"{self.name}: there is no annotation {str(ids[np.argmax(wrong)])!r}; the ids belong to "
                            "another dataset")
        return found

    def path(self, i):
        """Path of the image of row i (or of an image's name), below `root`."""
        return self.image_path(self.image[i])

    def image_path(self, image):
        return self.root / readers.image_name(self.name, str(image))

    def fingerprint(self):
        """Hex digest of the table: ids, file names, cases, domains, positions and labels; not of the pixels."""
        digest = hashlib.sha256()
        # The file's name only: where below root it lies, and in which format, may differ between machines.
        stem = {image: _stem(image) for image in np.unique(self.image).tolist()}
        for column in (self.id, [stem[image] for image in self.image.tolist()], self.case, self.domain):
            digest.update(("\x1f".join(np.asarray(column, dtype=str).tolist()) + "\x1e").encode())
        for column in (self.x, self.y, self.label):
            digest.update((np.asarray(column, "<f8") + 0.0).tobytes())
        return digest.hexdigest()[:32]


def load_dataset(path, images=None, classes=None, profile=None, columns=None, name=None, mpp=None):
    """Annotations of a known dataset (its name), a folder, or an annotation file.

    images: folder of the image files (default: beside the annotations; subfolders are searched). classes: dict, see
    readers.parse_classes; profile: a name of readers.PROFILES; columns: dict, see readers.parse_columns; name: what
    to call it in run folders; mpp: µm/px of all images, where their files do not say it.
    Annotations whose image is not there are dropped, with a note, unless no image is there at all: then the table
    is of use without pixels. UserError: not found, unreadable, ambiguous.
    """
    source, known = _find(path)
    guessed = known
    if known is None and source.is_file():
        guessed = next((key for key, k in KNOWN.items() if source.name in k.files and k.profile == "ccmct"), None)
    sqlite = source.name.lower().endswith((".sqlite", ".sqlite3", ".db"))
    if sqlite and not classes and not profile and guessed:
        profile = KNOWN[guessed].profile
    table = readers.read(source, classes, profile, columns)
    known = known or recognise(source, table)
    root = Path(images) if images is not None else source if source.is_dir() else source.parent
    if not root.is_dir():
        raise UserError(f"{root}: no such folder of images (--images)")
    notes = list(table.notes)
    place = _locate(list(table.images), root, notes)
    missing = [image for image, found in place.items() if found is None]
    gone = set() if len(missing) == len(place) else set(missing)
    place = {image: found or image for image, found in place.items()}
    if len(set(place.values())) < len(place):
        twice = next(found for found in place.values() if list(place.values()).count(found) > 1)
        raise UserError(f"{source}: two of its images are the file {twice}; name them by their paths below {root}")

    keep = [i for i, image in enumerate(table.image) if image not in gone]
    dropped = len(table.image) - len(keep)
    if dropped:
        what = "patches" if table.kind == "patches" else "annotations"
        files = "" if table.kind == "patches" else f" on {len(set(table.image) & gone):,} images"
        notes.append(f"{dropped:,} of {len(table.image):,} {what} dropped{files}: their files are not under {root}")
    if not keep:
        raise UserError(f"{source}: none of the images with annotations is under {root}; give --images FOLDER")
    if table.kind == "patches":
        present = _count_images(root)
        if gone or len(missing) < len(place):
            notes.append(f"{len(keep):,} of the {present:,} image files under {root} are listed in {source.name}")
    numbered = _numbers_files(table)
    if table.kind == "patches" and all(case is None for case in table.case):
        notes.append("no column of cases: every patch counts as a case of its own, so patches of one patient may lie "
                     "on both sides of a split")
    mitos2014 = all(re.fullmatch(r"[AH]\d\d_\d\d[A-D][a-d]", Path(image).stem) for image in table.images)
    cases, domains = [], []
    numbered_domain = {image: domain_of(known, image) for image in table.images} if known else {}
    for i in keep:
        image, stem = table.image[i], _stem(table.image[i])
        case = table.case[i]
        if case is None or numbered:
            # The fields of MITOS 2014, as A03_00Aa, are pieces of one slide, A03.
            case = stem[:3] if mitos2014 and case is None else stem
        cases.append(case)
        domains.append(numbered_domain.get(image) or table.domain[i] or table.image_domain.get(image) or "all")
    order = sorted(range(len(keep)), key=lambda j: place[table.image[keep[j]]])
    rows = [keep[j] for j in order]
    size = {place[image]: size for image, size in table.images.items() if size and image not in gone}
    known_mpp = {place[image]: value for image, value in table.mpp.items()}
    if mpp is None and known and KNOWN[known].mpp:
        known_mpp = {found: KNOWN[known].mpp for found in place.values()} | known_mpp
    if mpp is not None:
        known_mpp = {found: float(mpp) for found in place.values()}
    return Annotations(
        id=np.array([table.id[i] for i in rows], dtype=str),
        image=np.array([place[table.image[i]] for i in rows], dtype=str),
        case=np.array([cases[j] for j in order], dtype=str),
        domain=np.array([domains[j] for j in order], dtype=str),
        x=np.array([table.x[i] for i in rows], dtype=np.float64),
        y=np.array([table.y[i] for i in rows], dtype=np.float64),
        label=np.array([table.label[i] for i in rows], dtype=np.int8),
        name=name or known or _plain_name(path, source), root=root, kind=table.kind, source=source, known=known,
        licence=(KNOWN[known].licence if known else None) or table.licence, mpp=known_mpp or None, sizes=size,
        all_images=sorted(found for image, found in place.items() if image not in gone), missing=sorted(missing),
        notes=notes)


def _stem(image):
    """The file's name without folder and suffix (only an image's: "01.4" stays what it is)."""
    name = image.rsplit("/", 1)[-1]
    base, dot, suffix = name.rpartition(".")
    return base if dot and base and f".{suffix.lower()}" in readers.IMAGE_SUFFIXES else name


def _plain_name(path, source):
    # A folder's name says more than that of the file in it, which is often annotations.json.
    name = source.name if Path(path).is_file() or source.is_dir() else source.resolve().parent.name
    for suffix in (".gz", ".geojson", ".json", ".sqlite3", ".sqlite", ".csv", ".tsv", ".txt", ".db"):
        name = name[:-len(suffix)] if name.lower().endswith(suffix) and len(name) > len(suffix) else name
    return "".join(c if c.isalnum() or c in "-_.+" else "_" for c in name).lstrip(".") or "data"


def _numbers_files(table):
    """Whether the case column only numbers the image files, one number each (the benchmark's `slide`).

    The file's name then says the same and stays the same in all formats of the dataset.
    """
    pairs = {(image, case) for image, case in zip(table.image, table.case)}
    images = {image for image, _ in pairs}
    cases = {case for _, case in pairs}
    return (table.kind == "points" and None not in cases and len(pairs) == len(images) == len(cases)
            and all(re.fullmatch(r"\d+", case, re.ASCII) for case in cases))


def _find(path):
    """(annotation file or folder, key of KNOWN or None) of what --data says."""
    text = str(path)
    if text == "demo" and not Path(text).exists():
        return _annotation_file(demo_folder(), None), None
    if text in KNOWN:
        folder = root_folder() / text
        if not folder.is_dir():
            how = f"fetch it with python data.py --download {text}, or " if text in DOWNLOADABLE else ""
            raise UserError(f"{folder}: the dataset {text} is not there; {how}set MITOSIS_ROOT to the folder that "
                            f"holds {text}/")
        return _annotation_file(folder, text), text
    path = Path(text)
    if path.is_dir():
        known = path.resolve().name if path.resolve().name in KNOWN else None
        return _annotation_file(path, known), known
    if path.is_file():
        return path, None
    if (root_folder() / text).is_dir() and re.fullmatch(r"[\w.+-]+", text):
        return _annotation_file(root_folder() / text, None), None
    raise UserError(f"{text}: neither a known dataset ({', '.join(KNOWN)}, demo) nor a file or folder that is there")


DOWNLOADABLE = ("ccmct", "midog2022", "midogpp")


def demo_folder():
    """Folder of the demo dataset, which is made where it is missing; said loudly."""
    folder = root_folder() / "demo"
    if not folder.is_dir() or not any(folder.glob("*.json")):
        import demo
        print(f"the synthetic demo dataset is made in {folder} (some seconds)", flush=True)
        demo.build(folder)
    return folder


def _annotation_file(folder, known):
    """The annotation file in a folder: a known dataset's, or the only one there."""
    for name in KNOWN[known].files if known else ():
        if (folder / name).is_file():
            return folder / name
    found = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")
                   and p.name.lower().endswith((".json", ".json.gz", ".sqlite", ".sqlite3", ".csv")))
    if len(found) == 1:
        return found[0]
    if not found and any(p.name.lower().endswith((".geojson", ".geojson.gz")) for p in folder.iterdir()):
        return folder
    raise UserError(f"{folder}: holds {'no annotation file' if not found else f'{len(found)} annotation files'}"
                    f"{' (' + ', '.join(p.name for p in found[:6]) + ')' if found else ''}; give the file itself as "
                    "--data and its images with --images")


# ---------------------------------------------------------------- finding the images

def _walk(root):
    """Paths of the image files below root, relative to it; hidden folders are left out."""
    seen = 0
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(files):
            seen += 1
            if seen > MAX_FILES:
                raise UserError(f"{root}: more than {MAX_FILES:,} files; give the images' own folder with --images")
            if name.lower().endswith(readers.IMAGE_SUFFIXES) and not name.startswith("."):
                yield os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")


def _count_images(root):
    return sum(1 for _ in _walk(root))


def _locate(names, root, notes):
    """{name in the annotation file: path below root, or None}; subfolders and other image suffixes are tried."""
    place = {name: name if (root / name).is_file() else None for name in names}
    lost = [name for name, found in place.items() if found is None]
    if not lost:
        return place
    by_name, by_stem = {}, {}
    for found in _walk(root):
        by_name.setdefault(found.rsplit("/", 1)[-1], []).append(found)
        by_stem.setdefault(_stem(found), []).append(found)
    renamed = 0
    for name in lost:
        exact = by_name.get(name.rsplit("/", 1)[-1], [])
        found = [path for path in exact if path.endswith("/" + name)] or exact
        if not found:
            found = by_stem.get(_stem(name), [])
            renamed += len(found) == 1
        if len(found) > 1:
            raise UserError(f"{name}: there are several such files under {root} ({', '.join(found[:3])}); give the "
                            "right folder with --images, or paths in the annotation file")
        place[name] = found[0] if found else None
    if renamed:
        notes.append(f"{renamed:,} images were found under the same name with another suffix")
    return place


# ---------------------------------------------------------------- neighbours

def near_pairs(xa, ya, xb, yb, distance, chebyshev=False):
    """Pairs (i, j) with point i of a within `distance` of point j of b: Euclidean, or the larger of |dx| and |dy|.

    Returns two index arrays. Memory stays bounded: candidates (|dx| ≤ distance) are expanded a million at a time.
    """
    order = np.argsort(xb, kind="stable")
    xs, ys = np.asarray(xb)[order], np.asarray(yb)[order]
    low, high = np.searchsorted(xs, xa - distance, "left"), np.searchsorted(xs, xa + distance, "right")
    count, first, second = high - low, [], []
    start, ends = 0, np.cumsum(count)
    while start < len(count):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + 1_000_000, "right")))
        part = count[start:stop]
        i = np.repeat(np.arange(start, stop), part)
        j = np.arange(len(i)) - np.repeat(np.cumsum(part) - part, part) + np.repeat(low[start:stop], part)
        dx, dy = np.abs(xa[i] - xs[j]), np.abs(ya[i] - ys[j])
        close = (np.maximum(dx, dy) if chebyshev else np.hypot(dx, dy)) <= distance
        first.append(i[close])
        second.append(order[j[close]])
        start = stop
    none = np.zeros(0, np.int64)
    return np.concatenate(first or [none]), np.concatenate(second or [none])


def by_image(annotations, rows=None):
    """{image: its row indices}, of all rows or of those given."""
    rows = np.arange(len(annotations)) if rows is None else np.asarray(rows)
    images = annotations.image[rows]
    order = np.argsort(images, kind="stable")
    names, starts = np.unique(images[order], return_index=True)
    return dict(zip(names.tolist(), np.split(rows[order], starts[1:])))


# ---------------------------------------------------------------- splits

@dataclass
class Split:
    """Ids (str arrays) of train, val and test; `others`: name of a further test set → ids (the other domains)."""
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    others: dict = field(default_factory=dict)
    pool: int = 0  # size of the training pool that the fraction was taken from
    settings: dict = field(default_factory=dict)  # fold, frac, domain, seed, by, val_frac
    dataset: dict = field(default_factory=dict)  # name, fingerprint
    cases: dict = field(default_factory=dict)  # set → names of its cases

    def save(self, path):
        runs.write_json(path, {
            "format": "mitosis-split", "version": 1, "dataset": self.dataset, "settings": self.settings,
            "pool": self.pool, "cases": self.cases,
            "ids": {"train": self.train, "val": self.val, "test": self.test}, "others": self.others})


def _rng(*key):
    """A generator of its own for each (seed, what it is for, …): the same on every machine."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def _shuffle(rng, items):
    # By sorting random numbers: the stream of .random() is stable between NumPy's versions, .permutation() need not be.
    return items[np.argsort(rng.random(len(items)), kind="stable")]


def _choose_cases(annotations, rows, share, rng, leave=1):
    """Cases out of `rows` that hold about `share` of its annotations in each domain; at least `leave` are left per
    domain. Returns a mask over rows.

    Cases are taken in random order wherever that brings the sum nearer to the target. Such draws are repeated until
    one comes within 0.5 points, with a tenth of the cases at least (one case of 21% is no test set) and both
    classes on both sides; else the best of 200 is taken.
    """
    # Codes are in the order of the names, so numbers do for drawing.
    names, case = np.unique(annotations.codes("case")[1][rows], return_inverse=True)
    label = annotations.label[rows]
    domains, domain = np.unique(annotations.codes("domain")[1][rows], return_inverse=True)
    table = np.zeros((len(names), len(domains)), np.int64)
    np.add.at(table, (case, domain), 1)
    home = table.argmax(1)  # a case that spans domains counts for the one where it has most
    size, positive = table.sum(1), np.bincount(case, weights=label, minlength=len(names))
    few = [d for d in range(len(domains)) if (home == d).sum() < 5]
    groups = [np.flatnonzero(home == d) for d in range(len(domains)) if d not in few]
    groups += [np.flatnonzero(np.isin(home, few))] if few else []
    chosen = np.zeros(len(names), bool)
    for group in groups:
        if len(group) < leave + 1:
            continue
        total, mitotic = size[group].sum(), positive[group].sum()
        target, least, best = share * total, math.ceil(0.1 * len(group)), None
        for _ in range(200):
            taken, n, m = [], 0, 0
            for c in _shuffle(rng, group):
                if abs(n + size[c] - target) < abs(n - target) and len(taken) < len(group) - leave:
                    taken.append(c)
                    n, m = n + size[c], m + positive[c]
            one_class = sum(k <= 0 for k in (m, n - m, mitotic - m, (total - mitotic) - (n - m)))
            score = (one_class, max(0, least - len(taken)), abs(n - target))
            if best is None or score < best[0]:
                best = score, taken
            if score[:2] == (0, 0) and score[2] <= 0.005 * total:
                break
        chosen[best[1]] = True
    return chosen[case]


def make_split(annotations, fold=0, frac=1.0, domain=None, seed=0, by="case", val_frac=1.0):
    """The split of the protocol: 20% test, 20% of the rest validation, `frac` of what is then left for training.

    fold: repeat, 0 …; the test set is the same in all. frac in (0, 1]: nested fractions of the training pool, by
    annotation, both classes always present. domain: train on this one alone, the others are further test sets.
    by: "case"; "annotation", as the paper's published code draws (leaks); "official", the published test slides.
    val_frac shrinks validation. A pure function of the table and these. UserError: not possible with this dataset.
    """
    for flag, value in (("--frac", frac), ("--val-frac", val_frac)):
        if not (isinstance(value, (int, float)) and 0 < value <= 1):
            raise UserError(f"{flag} {value}: a fraction in (0, 1] is needed; 10% is 0.1")
    if by not in ("case", "annotation", "official"):
        raise UserError(f"--split {by}: case, annotation or official")
    if not (isinstance(fold, (int, np.integer)) and fold >= 0):
        raise UserError(f"--fold {fold}: a number from 0 is needed")
    # In the order of the ids, so that the order of the file does not matter.
    rows, others = annotations.order(), {}
    if domain is not None:
        domain = resolve_domain(annotations, domain)
        inside = annotations.domain[rows] == domain
        for other in np.unique(annotations.domain):
            if other != domain:
                others[str(other)] = annotations.id[rows[annotations.domain[rows] == other]]
        if not others:
            raise UserError(f"--domain {domain}: {annotations.name} has no other domain to test on")
        rows = rows[inside]
    if by == "official":
        official = KNOWN[annotations.known].official_test if annotations.known else ()
        if not official:
            raise UserError(f"--split official: {annotations.name} has no published test slides (ccmct has)")
        in_test = np.isin(annotations.case[rows], official)
        if not in_test.any() or in_test.all():
            raise UserError("--split official: the published test slides, or all others, are not among the images")
    elif by == "case":
        if len(np.unique(annotations.codes("case")[1][rows])) < 3:
            raise UserError(f"{annotations.name}: a split by case needs 3 cases at least (train, validation, test)"
                            f"{f' in domain {domain}' if domain else ''}; --split annotation ignores cases and leaks")
        in_test = _choose_cases(annotations, rows, TEST_SHARE, _rng("test", seed, domain, by), leave=2)
    else:
        in_test = np.zeros(len(rows), bool)
        in_test[_shuffle(_rng("test", seed, domain, by), np.arange(len(rows)))[:round(TEST_SHARE * len(rows))]] = True
    test, rest = rows[in_test], rows[~in_test]
    rng = _rng("val", seed, domain, by, int(fold))
    if by == "annotation":
        in_val = np.zeros(len(rest), bool)
        in_val[_shuffle(rng, np.arange(len(rest)))[:round(VAL_SHARE * len(rest))]] = True
    else:
        in_val = _choose_cases(annotations, rest, VAL_SHARE, rng)
    val, pool = rest[in_val], rest[~in_val]
    train = _fraction(annotations, pool, frac, _rng("frac", seed, domain, by, int(fold)), "the training pool")
    if val_frac < 1:
        val = _fraction(annotations, val, val_frac, _rng("val-frac", seed, domain, by, int(fold)), "validation")
    split = Split(annotations.id[train], annotations.id[val], annotations.id[test], others, len(pool),
                  {"fold": int(fold), "frac": float(frac), "domain": domain, "seed": seed, "by": by,
                   "val_frac": float(val_frac)},
                  {"name": annotations.name, "fingerprint": annotations.fingerprint()})
    names, case = annotations.codes("case")
    split.cases = {name: names[np.unique(case[part])].tolist()
                   for name, part in (("train", train), ("val", val), ("test", test))}
    check_split(annotations, split)
    return split


def _fraction(annotations, rows, frac, rng, what):
    """The first `frac` of a fixed random order of rows that starts with one of each class: so fractions are nested."""
    order = _shuffle(rng, rows)
    label = annotations.label[order]
    if len(order) == 0 or label.all() or not label.any():
        raise UserError(f"{annotations.name}: {what} holds {'no annotation' if not len(order) else 'one class only'}; "
                        "the dataset is too small for this split")
    first = np.sort([np.argmax(label == 1), np.argmax(label == 0)])
    order = np.concatenate([order[first], np.delete(order, first)])
    return order[:max(2, round(frac * len(order)))]


def resolve_domain(annotations, domain):
    """A domain by its name or, for known datasets, its description; UserError lists what there is."""
    present = [str(d) for d in np.unique(annotations.domain)]
    known = KNOWN[annotations.known].domains if annotations.known else {}
    for name in present:
        if str(domain).lower() in (name.lower(), known[name][2].lower() if name in known else None):
            return name
    raise UserError(f"--domain {domain}: {annotations.name} has the domains {', '.join(present)}")


def check_split(annotations, split):
    """Assert that no annotation and (unless drawn by annotation) no case is on two sides; UserError if one is."""
    sets = {"train": split.train, "val": split.val, "test": split.test} | \
        {f"domain {name}": ids for name, ids in split.others.items()}
    names, case = annotations.codes("case")
    side = np.full(len(annotations), -1)
    sides = np.zeros((len(names), len(sets)), bool)  # case × set
    for number, (name, ids) in enumerate(sets.items()):
        rows = annotations.rows(ids)
        taken = rows[side[rows] >= 0]
        if len(taken):
            raise UserError(f"the split leaks: annotation {annotations.id[taken[0]]} is in "
                            f"{list(sets)[side[taken[0]]]} and in {name}")
        side[rows] = number
        if (side == number).sum() < len(rows):
            raise UserError(f"the split is not valid: an annotation stands twice in {name}")
        sides[case[rows], number] = True
    # Two test sets may share a case; training or validation and anything else may not.
    leaking = np.flatnonzero((sides.sum(1) > 1) & sides[:, :2].any(1))
    if len(leaking) and split.settings.get("by") != "annotation":
        first, second = np.array(list(sets))[sides[leaking[0]]][:2].tolist()
        raise UserError(f"the split leaks: case {names[leaking[0]]} is in {first} and in {second}")


def load_split(path, annotations):
    """A split file for these annotations; UserError: another dataset, damaged, or a case on two sides."""
    content = runs.read_json(path)
    try:
        if content["format"] != "mitosis-split" or content["version"] != 1:
            raise UserError(f"{path}: not a split file of this version")

        def ids(values):
            if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
                raise TypeError
            return np.array(values, dtype=str)
        parts = {name: ids(content["ids"][name]) for name in ("train", "val", "test")}
        others = {str(name): ids(values) for name, values in content["others"].items()}
        settings, dataset = dict(content["settings"]), dict(content["dataset"])
        split = Split(**parts, others=others, pool=int(content["pool"]), settings=settings, dataset=dataset,
                      cases={str(name): ids(values).tolist() for name, values in content["cases"].items()})
        if settings["by"] not in ("case", "annotation", "official"):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise UserError(f"{path}: not a whole split file; make the split anew") from None
    if dataset.get("fingerprint") != annotations.fingerprint():
        raise UserError(f"{path}: was made for {dataset.get('name')!r} with other annotations than {annotations.name} "
                        "has now; the ids would not mean the same")
    check_split(annotations, split)
    for name, part in parts.items():
        if sorted(set(annotations.case[annotations.rows(part)].tolist())) != split.cases.get(name):
            raise UserError(f"{path}: the cases listed for {name} are not those of its annotations; it was changed")
    return split


def overlap(annotations, split, distance=NEAR):
    """How much of the test set the training set gives away: dict of cases shared, and of shares of test annotations
    on trained cases, and within `distance` px of a training annotation (Euclidean, and by the larger of |dx|, |dy|).
    """
    train, test = annotations.rows(split.train), annotations.rows(split.test)
    trained = np.unique(annotations.case[train])
    shared = np.intersect1d(trained, annotations.case[test])
    found = {"cases": len(shared), "on_trained_cases": float(np.isin(annotations.case[test], trained).mean())}
    for key, chebyshev in (("near", False), ("near_chebyshev", True)):
        near = 0
        if annotations.kind == "points":
            trained_on = by_image(annotations, train)
            for image, rows in by_image(annotations, test).items():
                other = trained_on.get(image, np.zeros(0, np.int64))
                i, _ = near_pairs(annotations.x[rows], annotations.y[rows], annotations.x[other],
                                  annotations.y[other], distance, chebyshev)
                near += len(np.unique(i))
        found[key] = near / max(1, len(test))
    return found


# ---------------------------------------------------------------- the sampler

class Sampler:
    """The patches of each pseudo-epoch: half mitotic figures, and of the rest hard negatives and random patches.

    ids: the training set. random_share: share of random patches (label 0); they come from the images that hold one
    of the ids, uniformly, and one whose final window could hold a mitotic figure of the whole table is drawn again.
    balance: "annotation" draws a class's annotations uniformly; "slide" draws the image first, then among its own.
    window: px at level 0 that the final patch covers (224 × mpp / the image's mpp, when resampled; Patches.window).
    jitter: centres of annotated patches are moved by up to this share of the window (0.1 in the published code).
    accept: function (random part of a sample) → bool array that may refuse positions (crops.Patches.tissue).

    Random positions come from a fixed pool per image (random_pool), whether a store of crops is there or not: so
    training sees the same patches with and without it. Epoch k takes the k-th part of a random order of the pool's
    allowed positions, so none comes twice before all have come; one that `accept` refuses is replaced by any other.
    """

    def __init__(self, annotations, ids, epoch_size=1280, seed=0, fold=0, balance="annotation", random_share=0.25,
                 window=PATCH, jitter=0.0, accept=None):
        if balance not in ("annotation", "slide"):
            raise UserError(f"--balance {balance}: annotation or slide")
        if epoch_size < 2 or not 0 <= random_share <= 0.5:
            raise UserError("an epoch needs 2 patches at least, and a share of random patches between 0 and 0.5")
        self.annotations, self.epoch_size, self.seed, self.fold = annotations, int(epoch_size), seed, fold
        self.balance, self.window, self.jitter, self.accept = balance, float(window), float(jitter), accept
        # Sorted, so that the order of the ids does not matter.
        rows = np.sort(annotations.rows(ids))
        self.positive, self.negative = rows[annotations.label[rows] == 1], rows[annotations.label[rows] == 0]
        if not len(self.positive) or not len(self.negative):
            raise UserError(f"{annotations.name}: the training set needs mitotic figures and hard negatives; it has "
                            f"{len(self.positive)} and {len(self.negative)}")
        self.names, self.image_of = annotations.codes("image")
        self.images = np.unique(annotations.image[rows])
        self.random = 0 if annotations.kind == "patches" else round(random_share * self.epoch_size)
        if annotations.kind == "patches" and random_share:
            print(f"{annotations.name}: ready-made patches have no random ones to draw: half mitotic figures, half "
                  "hard negatives", flush=True)
        # The centre of a mitotic figure within the half diagonal may lie in the window, whatever the rotation.
        self.reach = self.window / 2 * math.sqrt(2)
        mitotic = np.flatnonzero(annotations.label == 1)
        self.mitotic = by_image(annotations, mitotic)
        self._allowed, self._order = None, (None, None)

    def _pool(self):
        """(image, number within its pool, x, y) of the positions that may be drawn: on the training images, without
        a mitotic figure in the window."""
        if self._allowed is None:
            number, parts = pool_size(self.annotations), []
            for name in self.images.tolist():
                x, y = random_pool(self.annotations, name, number, self.window)
                free = np.flatnonzero(~self._holds_mitosis(name, x, y))
                parts.append((np.full(len(free), np.searchsorted(self.names, name)), free, x[free], y[free]))
            self._allowed = [np.concatenate(column) for column in zip(*parts)]
        if not len(self._allowed[0]):
            raise UserError(f"{self.annotations.name}: the training images have no place for random patches without a "
                            "mitotic figure; use --random-share 0")
        return self._allowed

    def _holds_mitosis(self, image, x, y):
        rows = self.mitotic.get(image)
        if rows is None:
            return np.zeros(len(x), bool)
        i, _ = near_pairs(x, y, self.annotations.x[rows], self.annotations.y[rows], self.reach)
        return np.isin(np.arange(len(x)), i)

    def epoch(self, epoch):
        """Structured array [epoch_size]: row (of the table; -1: random), image (index into np.unique of the table's),
        x, y, label, pool (number within the image's pool; -1: annotated). A pure function of the table, the ids, seed,
        fold and epoch.
        """
        table, rng = self.annotations, _rng("epoch", self.seed, self.fold, int(epoch))
        sample = np.zeros(self.epoch_size, [("row", "i8"), ("image", "i8"), ("x", "f8"), ("y", "f8"),
                                            ("label", "i1"), ("pool", "i8")])
        sample["pool"] = -1
        positives = self.epoch_size // 2
        negatives = self.epoch_size - positives - self.random
        rows = np.concatenate([self._draw(rng, self.positive, positives), self._draw(rng, self.negative, negatives)])
        annotated = sample[:len(rows)]
        annotated["row"], annotated["image"], annotated["label"] = rows, self.image_of[rows], table.label[rows]
        annotated["x"], annotated["y"] = table.x[rows], table.y[rows]
        if self.jitter:
            shift = (rng.random((len(rows), 2)) * 2 - 1) * self.jitter * self.window
            annotated["x"] += shift[:, 0]
            annotated["y"] += shift[:, 1]
        if self.random:
            self._draw_random(rng, sample[len(rows):], int(epoch))
        return _shuffle(rng, sample)

    def _draw(self, rng, rows, n):
        """n of `rows`, with replacement: uniform, or the image first."""
        u = rng.random((2, n))
        if self.balance == "annotation":
            return rows[(u[0] * len(rows)).astype(np.int64)]
        groups = list(by_image(self.annotations, rows).values())
        image = (u[0] * len(groups)).astype(np.int64)
        lengths = np.array([len(group) for group in groups])
        starts = np.cumsum(lengths) - lengths
        return np.concatenate(groups)[starts[image] + (u[1] * lengths[image]).astype(np.int64)]

    def _draw_random(self, rng, sample, epoch):
        pool = self._pool()
        sample["row"], sample["label"] = -1, 0

        def place(at, index):
            for name, column in zip(("image", "pool", "x", "y"), pool):
                sample[name][at] = column[index]
        todo = np.arange(len(sample))
        place(todo, self._turn(epoch * len(sample) + todo, len(pool[0])))
        for _ in range(1000):
            if self.accept is None or not len(todo):
                return
            todo = todo[~self.accept(sample[todo])]
            place(todo, (rng.random(len(todo)) * len(pool[0])).astype(np.int64))
        raise UserError(f"{self.annotations.name}: the training images have no tissue for random patches; leave "
                        "--tissue out, or use --random-share 0")

    def _turn(self, draws, n):
        """Which of n positions each draw of the run is: every n draws go through all of them, in another order."""
        index = np.empty(len(draws), np.int64)
        for turn in np.unique(draws // n).tolist():
            if self._order[0] != turn:
                self._order = turn, _shuffle(_rng("random", self.seed, self.fold, turn), np.arange(n))
            here = draws // n == turn
            index[here] = self._order[1][draws[here] % n]
        return index


# Random positions of all images together: a full run draws 100 × 320, from about two thirds of the images.
POOL = 64_000


def image_size(annotations, image):
    """(width, height) of an image: of the annotation file, or of the image itself."""
    known = annotations.sizes.get(image)
    if known is None:
        import slides
        known = annotations.sizes[image] = slides.dimensions(annotations.image_path(image))
    return known


def pool_size(annotations):
    """Random positions per image: POOL in all, but not so many that they cover an image of mean area over 4 times."""
    names = annotations.codes("image")[0].tolist()
    area = sum(width * height for width, height in (image_size(annotations, name) for name in names)) / len(names)
    return max(1, min(math.ceil(POOL / len(names)), math.ceil(4 * area / PATCH ** 2)))


def random_pool(annotations, image, number, window=PATCH):
    """x, y of the first `number` random positions of an image: uniform where the whole window lies inside, in the
    middle where the image is smaller than it. A pure function of the file's name, the image's size and the window.
    """
    u = _rng("pool", _stem(str(image))).random((number, 2))
    x, y = (low + u[:, i] * (high - low) for i, (low, high) in
            enumerate((min(window, extent) / 2, extent - min(window, extent) / 2)
                      for extent in image_size(annotations, image)))
    return x, y


# ---------------------------------------------------------------- flags

def add_arguments(parser, positional=False):
    """The flags that say which dataset: --data, --images, … (`positional`: the dataset without its flag)."""
    group = parser.add_argument_group("data")
    what = ("ccmct, midog2022, midogpp, midog2021, cmc or demo (looked up under $MITOSIS_ROOT, default data/), a "
            "folder, or an annotation file (default: $MITOSIS_DATA, else the synthetic demo)")
    if positional:
        group.add_argument("data", nargs="?", metavar="D", help=what)
    else:
        group.add_argument("--data", metavar="D", help=what)
    group.add_argument("--images", metavar="DIR", help="folder of the images, searched with its subfolders (default: "
                       "the annotation file's)")
    group.add_argument("--classes", metavar="mitotic=2,other=7", help="class ids or names of the two labels, where "
                       "the file's class names do not say it")
    group.add_argument("--profile", choices=readers.PROFILES, help="class ids of a known data set (default: none)")
    group.add_argument("--positive", metavar="VALUE", help="the label (or labels, with commas) that counts as 1")
    group.add_argument("--negative", metavar="VALUE", help="the label (or labels) that counts as 0 (default: the only "
                       "other one)")
    group.add_argument("--columns", metavar="path=A,case=B,label=C", help="columns of a CSV that are called "
                       f"differently ({', '.join(readers.COLUMNS)})")
    group.add_argument("--fit", choices=("resize", "pad"), default="resize", help="patches smaller than 224 px are "
                       "resized, or padded with white (default: resize)")
    group.add_argument("--mpp", type=float, metavar="0.25", help="resample to this many µm/px (default: as scanned)")
    group.add_argument("--source-mpp", type=float, metavar="MPP", help="µm/px of the images, where their files do not "
                       "say it")


def add_split_arguments(parser, several=True):
    """The flags that say which split: --fold, --frac, --domain, --seed, --split, --val-frac.

    several: --fold, --frac and --domain take several values and are lists (--domain may be None).
    """
    group = parser.add_argument_group("split")
    n = {"nargs": "+"} if several else {}
    group.add_argument("--frac", type=float, default=[1.0] if several else 1.0, metavar="F", help="fraction of the "
                       "training pool, 0.1 is 10%% (default: 1)", **n)
    group.add_argument("--fold", type=int, default=[0] if several else 0, metavar="K", help="repeat: another "
                       "validation set and seed, the same test set (default: 0)", **n)
    group.add_argument("--domain", metavar="X", help="train on this domain alone, test on each (default: all "
                       "domains)", **n)
    group.add_argument("--seed", type=int, default=0, help="of the split and the run (default: 0)")
    group.add_argument("--split", choices=("case", "annotation", "official"), default="case", help="draw the test set "
                       "by case; by annotation, as the published code does (leaks); or take the published test slides "
                       "of ccmct (default: case)")
    group.add_argument("--val-frac", type=float, default=1.0, metavar="F", help="fraction of the validation set that "
                       "is used (default: 1)")


def from_arguments(args, data=None, quiet=False):
    """The Annotations that the flags of add_arguments ask for; says loudly when it is the demo, and prints notes.

    data: another dataset with the same flags (for --test). UserError where the images are not there.
    """
    where = data or args.data or os.environ.get("MITOSIS_DATA") or "demo"
    if where == "demo" and not quiet:
        print("DATA: the synthetic demo (no tissue of anybody); --data or $MITOSIS_DATA names real data" if not data and
              not args.data else "DATA: the synthetic demo", flush=True)
    for flag, value in (("--mpp", args.mpp), ("--source-mpp", args.source_mpp)):
        if value is not None and not (math.isfinite(value) and 0.01 <= value <= 100):
            raise UserError(f"{flag} {value}: µm/px between 0.01 and 100 are needed")
    annotations = load_dataset(where, args.images, _classes(args), args.profile,
                               readers.parse_columns(args.columns) if args.columns else None, mpp=args.source_mpp)
    if not quiet:
        for note in annotations.notes:
            print(f"{annotations.name}: {note}", flush=True)
    return annotations


SOURCE = ("data", "images", "classes", "profile", "positive", "negative", "columns", "fit", "mpp", "source_mpp")


def source(args):
    """The flags of add_arguments as a run keeps them; absolute paths, so that its data is found from anywhere."""
    kept = {name: getattr(args, name) for name in SOURCE}
    kept["data"] = args.data or os.environ.get("MITOSIS_DATA") or "demo"
    for name in ("data", "images"):
        if kept[name] and Path(kept[name]).exists():
            kept[name] = str(Path(kept[name]).resolve())
    return kept


def facts(annotations):
    """What a model trained on this data must be told: {"mpp": µm/px of its images, "patch": px of ready-made patches}.

    None where it is not known, or differs by more than 2% between the first image and the others that tell.
    """
    import slides
    first = annotations.image_path(annotations.image[0])
    patch = max(slides.dimensions(first)) if annotations.kind == "patches" else None
    values = list((annotations.mpp or {}).values()) or [slides.microns_per_pixel(first)]
    known = [value for value in values if value]
    same = known and max(known) <= 1.02 * min(known)
    return {"mpp": round(sum(known) / len(known), 6) if same else None, "patch": patch}


def from_source(kept, quiet=True):
    """(Annotations, the flags as a namespace) of a run's config["source"]; UserError where the data is not here."""
    args = argparse.Namespace(**{name: kept.get(name) for name in SOURCE})
    return from_arguments(args, quiet=quiet), args


def _classes(args):
    if args.classes and (args.positive or args.negative):
        raise UserError("--classes and --positive/--negative say the same thing: give one of them")
    if args.negative and not args.positive:
        raise UserError("--negative needs --positive")
    if args.classes:
        return readers.parse_classes(args.classes)
    if args.positive:
        def values(text):
            found = [value.strip() for value in text.split(",") if value.strip()]
            if not found:
                raise UserError("--positive and --negative take a label")
            return found
        return {"mitotic": values(args.positive), "other": values(args.negative) if args.negative else None}
    return None


def need_images(annotations):
    """UserError unless images are there: for whoever reads pixels."""
    if set(annotations.image.tolist()) <= set(annotations.missing):
        raise UserError(f"{annotations.name}: none of its {len(annotations.all_images):,} images is under "
                        f"{annotations.root}; give their folder with --images")


# ---------------------------------------------------------------- the report

def opposite_pairs(annotations, distance=NEAR):
    """Number of pairs of opposite class on one image that lie within `distance` px (Euclidean)."""
    found = 0
    for rows in by_image(annotations).values():
        positive, negative = (rows[annotations.label[rows] == label] for label in (1, 0))
        found += len(near_pairs(annotations.x[positive], annotations.y[positive], annotations.x[negative],
                                annotations.y[negative], distance)[0])
    return found


def duplicates(annotations):
    """Row indices of annotations whose image and position an earlier row has too."""
    seen, found = set(), []
    for i, place in enumerate(zip(annotations.image.tolist(), annotations.x.tolist(), annotations.y.tolist())):
        if place in seen:
            found.append(i)
        seen.add(place)
    return np.array(found, np.int64)


def outside(annotations, sizes):
    """Row indices of annotations whose centre is not on their image, as far as `sizes` tells its extent."""
    size = np.array([sizes.get(image) or (np.inf, np.inf) for image in annotations.image.tolist()]).reshape(-1, 2)
    low = (annotations.x < 0) | (annotations.y < 0)
    return np.flatnonzero(low | (annotations.x >= size[:, 0]) | (annotations.y >= size[:, 1]))


def _image_facts(annotations, notes):
    """Sizes and µm/px of the images that are there: ({image: (w, h)}, {µm/px or None: number of images})."""
    sizes, mpp = dict(annotations.sizes), {}
    there = [image for image in np.unique(annotations.image).tolist() if image not in set(annotations.missing)]
    if not there or annotations.kind == "patches":
        return sizes, mpp
    import slides
    for image in cli.progress(there, desc="images", unit="images"):
        try:
            size, own = slides.dimensions(annotations.image_path(image)), slides.microns_per_pixel(
                annotations.image_path(image))
        except UserError as error:
            notes.append(f"unreadable image: {error}")
            continue
        if sizes.get(image, size) != size:
            notes.append(f"{image} is {size[0]} x {size[1]} px, the annotation file says "
                         f"{sizes[image][0]} x {sizes[image][1]}: is it the right file?")
        sizes[image] = size
        value = (annotations.mpp or {}).get(image) or own
        key = None if value is None else round(float(value), 3)
        mpp[key] = mpp.get(key, 0) + 1
    return sizes, mpp


def report(annotations, args):
    """Print what a dataset holds, what is wrong with it, and the splits that would be made of it."""
    known = KNOWN.get(annotations.known)
    label = annotations.label
    print(f"{annotations.name}: {known.title if known else annotations.kind}")
    print(f"annotations  {annotations.source}")
    there = len(annotations.all_images) - len(set(annotations.all_images) & set(annotations.missing))
    print(f"images       {annotations.root}: {there:,} of {there + len(annotations.missing):,} there"
          + (f", e.g. {annotations.missing[0]} is not" if annotations.missing else ""))
    print(f"licence      {annotations.licence or 'not stated'}")
    notes = []
    sizes, mpp = _image_facts(annotations, notes)
    if annotations.kind == "points":
        told = {}
        for value in (annotations.mpp or {}).values():
            told[round(value, 3)] = told.get(round(value, 3), 0) + 1
        found = mpp or told
        print("µm/px        " + (", ".join(f"{'unknown' if k is None else k} ({n:,} images)" for k, n in found.items())
                                 or "unknown: the images are not here"))
    print(f"fingerprint  {annotations.fingerprint()}\n")

    rows = []
    for domain in [*np.unique(annotations.domain).tolist(), None]:
        here = annotations.domain == domain if domain is not None else np.ones(len(label), bool)
        text = known.domains[domain][2] if known and domain in known.domains else ""
        rows.append([(f"{domain} {text}".strip() if domain is not None else "total"),
                     len(np.unique(annotations.image[here])), len(np.unique(annotations.case[here])),
                     f"{(label[here] == 1).sum():,}", f"{(label[here] == 0).sum():,}"])
    if len(rows) == 2:
        rows = rows[1:]
    print(cli.table(rows, ["domain", "labelled images", "cases", "mitotic figures", "hard negatives"],
                    right=(1, 2, 3, 4)))
    counts = np.bincount(np.unique(annotations.case, return_inverse=True)[1])
    labelled = len(np.unique(annotations.image))
    print(f"\ncases hold {counts.min():,} to {counts.max():,} annotations, the largest {counts.max() / len(label):.1%};"
          f" {labelled - len(np.unique(annotations.image[label == 1])):,} labelled images hold no mitotic figure; "
          f"{len(annotations.all_images) - labelled:,} images no label")

    problems = [*annotations.notes, *notes]
    if annotations.missing:
        problems.append(f"{len(annotations.missing):,} images are missing")
    if annotations.kind == "points":
        beyond, twice, near = outside(annotations, sizes), duplicates(annotations), opposite_pairs(annotations)
        if len(beyond):
            problems.append(f"{len(beyond):,} centres lie outside their image: " + ", ".join(
                f"{annotations.image[i]} ({annotations.x[i]:g}, {annotations.y[i]:g})" for i in beyond[:4])
                + (", …" if len(beyond) > 4 else ""))
        unknown = len(set(annotations.image.tolist()) - set(sizes))
        if unknown:
            problems.append(f"{unknown:,} images of unknown size: only negative positions could be found there")
        if len(twice):
            problems.append(f"{len(twice):,} annotations repeat the position of another: " + ", ".join(
                f"{annotations.image[i]} ({annotations.x[i]:g}, {annotations.y[i]:g})" for i in twice[:4]))
        if near:
            problems.append(f"{near:,} pairs of opposite class lie within {NEAR:g} px of each other: each is in the "
                            "other's patch")
    print("\nproblems")
    for problem in problems or ["none found"]:
        print(f"  {problem}")
    if known:
        print("\nagainst the published counts")
        for line in compare_with_published(annotations):
            print(f"  {line}")
    print("\nplanned splits")
    print(planned_splits(annotations, args))


def compare_with_published(annotations):
    """Lines: does the table hold what was published of this known dataset?"""
    known, lines = KNOWN[annotations.known], []

    def line(what, counts, images, wanted, wanted_images=None):
        same = counts == wanted and wanted_images in (None, images)
        of = "" if wanted_images is None else f" on {wanted_images:,} images"
        lines.append(f"{what}: {wanted[0]:,} / {wanted[1]:,}{of}: " + (
            "the same" if same else f"DIFFERS, here {counts[0]:,} / {counts[1]:,} on {images:,} images"))

    def counts(here):
        return (int((annotations.label[here] == 1).sum()), int((annotations.label[here] == 0).sum())), len(
            np.unique(annotations.image[here]))
    if known.counts is None:
        return ["none at hand"]
    line("all", *counts(slice(None)), known.counts, known.images)
    for domain, (*_, text, wanted) in known.domains.items():
        if wanted:
            line(f"{domain} {text}".strip(), *counts(annotations.domain == domain), wanted)
    return lines


def planned_splits(annotations, args):
    """Table of the splits that training with these flags would use, with their real shares and what they leak."""
    rows, errors = [], []
    for domain in args.domain or [None]:
        for fold in args.fold:
            for frac in args.frac:
                try:
                    split = make_split(annotations, fold, frac, domain, args.seed, args.split, args.val_frac)
                except UserError as error:
                    errors.append(f"  fold {fold}: {error}")
                    continue
                found = overlap(annotations, split)
                total = len(split.test) + len(split.val) + split.pool
                cells = [f"{domain} → {', '.join(split.others)}" if domain else "all", fold, f"{frac:g}"]
                for name in ("train", "val", "test"):
                    ids = getattr(split, name)
                    positive = int((annotations.label[annotations.rows(ids)] == 1).sum())
                    cells.append(f"{positive:,} + {len(ids) - positive:,} ({len(ids) / total:.1%}, "
                                 f"{len(split.cases[name])})")
                near = "–" if annotations.kind == "patches" else f"{found['near']:.1%}"
                rows.append([*cells, found["cases"], f"{found['on_trained_cases']:.0%}", near])
    text = cli.table(rows, ["domain", "fold", "frac", "train (share, cases)", "val", "test", "shared cases",
                            "test on trained cases", f"test within {NEAR:g} px"], right=(1, 2, 6, 7, 8))
    note = "  counts are mitotic figures + hard negatives; shares are of all annotations of the split"
    return "\n".join([*([text, note] if rows else []), *errors])


# ---------------------------------------------------------------- the command

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, positional=True)
    add_split_arguments(parser)
    parser.set_defaults(fold=None)  # the report plans all five, a file takes the first
    group = parser.add_argument_group("what to do beside the report")
    group.add_argument("--save-split", metavar="FILE", help="write the split (one --fold, --frac and --domain) to FILE")
    group.add_argument("--check-split", metavar="FILE", help="read a split file and assert that it fits and leaks "
                       "nothing")
    group.add_argument("--cache", nargs="?", const="", metavar="DIR", help="build the store of crops (in DIR; default: "
                       "$MITOSIS_CACHE, else .crops beside the images)")
    group.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes of --cache, "
                       "connections of --download (default: %(default)s)")
    group.add_argument("--download", metavar="NAME", help=f"fetch {', '.join(DOWNLOADABLE)} to $MITOSIS_ROOT/NAME; "
                       "continues where it was stopped")
    group.add_argument("--only", metavar="PATTERN", help="--download only files whose name matches, e.g. '00*.png'")
    args = parser.parse_args()
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: at least 1")
    if args.download:
        import download
        folder = root_folder() / args.download
        download.fetch(args.download, folder, workers=args.workers, only=args.only)
        print(f"{args.download} is in {folder}; python data.py {args.download} tells what it holds")
        return
    annotations = from_arguments(args, quiet=True)
    if args.cache is not None:
        need_images(annotations)
        import crops
        patches = crops.Patches(annotations, mpp=args.mpp, source_mpp=args.source_mpp, cache=args.cache or None)
        path = crops.build_store(patches, args.workers)
        elsewhere = args.cache and Path(args.cache).resolve() != (annotations.root / ".crops").resolve()
        print(f"training reads {path}.npy" + (f" where MITOSIS_CACHE={args.cache} is set" if elsewhere else ""))
        return
    if args.check_split:
        split = load_split(args.check_split, annotations)
        found = overlap(annotations, split)
        print(f"{args.check_split}: fits {annotations.name}; train {len(split.train):,}, val {len(split.val):,}, test "
              f"{len(split.test):,}; {found['cases']} cases on both sides, {found['near']:.1%} of the test within "
              f"{NEAR:g} px of training")
        return
    if args.save_split:
        folds, domains = args.fold or [0], args.domain or [None]
        if max(len(folds), len(args.frac), len(domains)) > 1:
            raise UserError("--save-split: a file holds one split; give one --fold, --frac and --domain")
        make_split(annotations, folds[0], args.frac[0], domains[0], args.seed, args.split,
                   args.val_frac).save(args.save_split)
        print(f"{args.save_split}: fold {folds[0]}, fraction {args.frac[0]:g}")
        return
    args.fold = args.fold or [0, 1, 2, 3, 4]
    report(annotations, args)


if __name__ == "__main__":
    cli.command(main)
