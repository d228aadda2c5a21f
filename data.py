"""Annotations: formats, known datasets, splits by case, the sampler of training patches. No torch.

    python data.py D    what a dataset holds: counts by domain and class, cases, problems, planned splits

One table for every format: arrays id, image, case, domain, x, y, label (1 mitotic figure, 0 look-alike).
"""

import argparse
import csv
import gzip
import hashlib
import json
import math
import os
import sqlite3
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import cli
import runs
import slides
from cli import UserError

# ---------------------------------------------------------------- the table

FIELDS = ("id", "image", "case", "domain", "x", "y", "label")


@dataclass
class Annotations:
    """Annotated cells of a dataset. `x`, `y`: centre in level-0 px (NaN for ready-made patches)."""
    id: np.ndarray       # [N] str, unique
    image: np.ndarray    # [N] str, path below `root`
    case: np.ndarray     # [N] str: what must not be on two sides of a split
    domain: np.ndarray   # [N] str, "" where there is one only
    x: np.ndarray        # [N] float64
    y: np.ndarray
    label: np.ndarray    # [N] int8
    name: str = ""
    root: Path = Path()
    kind: str = "points"  # points | patches
    all_images: tuple = ()  # also those without an annotation
    notes: list = field(default_factory=list)  # what the reader left out, one line each

    def __len__(self):
        return len(self.id)

    def take(self, rows):
        return Annotations(*(getattr(self, name)[rows] for name in FIELDS), self.name, self.root, self.kind,
                           self.all_images, self.notes)

    def path(self, row):
        return self.image_path(self.image[row])

    def image_path(self, image):
        return inside(self.root, image)

    def rows(self, ids):
        """Row numbers of some ids; KeyError where one is unknown."""
        where = {id: row for row, id in enumerate(self.id)}
        return np.array([where[id] for id in ids], dtype=np.int64)

    def fingerprint(self):
        """Hash of the table (not of the pixels)."""
        digest = hashlib.sha256(self.kind.encode())
        for name in FIELDS:
            values = getattr(self, name)
            digest.update("\0".join(map(str, values.tolist())).encode())
        return digest.hexdigest()[:16]


def inside(root, name):
    """root / name, refused where it leaves the folder."""
    path = Path(root) / name
    parts = Path(name).parts
    if Path(name).is_absolute() or ".." in parts or "\0" in str(name):
        raise UserError(f"image {name!r}: leaves the images' folder {root}")
    return path


# ---------------------------------------------------------------- readers

MITOTIC = {"mitotic figure", "mitosis", "mitose", "mitotic", "mf"}
LOOK_ALIKE = {"not mitotic figure", "non-mitotic", "nonmitosis", "nonmitotic", "hard negative", "hard negative look-alike",
              "look-alike", "imposter", "non-mitotic figure", "nmf"}
PROFILES = {  # class ids of databases whose names do not tell, or that are known by name: (mitotic figure, look-alike)
    "ccmct": (2, 7), "cmc": (2, 1), "midog": (1, 2), "mitos2014": (1, 2), "tupac": (1, 2)}

MIDOG2022_DOMAINS = (  # file numbers, domain: the JSON of MIDOG 2022 carries no tumour type
    (1, 150, "C"), (151, 194, "E"), (195, 249, "B"), (250, 299, "A"), (300, 354, "D"))
MIDOG2022_NAMES = {"A": "canine cutaneous mast cell tumor", "B": "canine lymphoma", "C": "human breast cancer",
                   "D": "human neuroendocrine tumor", "E": "canine lung cancer"}


class Rows:
    """Collects the rows of a reader and makes the table of them."""

    def __init__(self, path):
        self.path, self.rows, self.notes = path, [], []

    def add(self, id, image, case, domain, x, y, label, where):
        if not (math.isfinite(x) and math.isfinite(y)) or max(abs(x), abs(y)) > 1e7:
            raise UserError(f"{self.path}, {where}: ({x}, {y}) is no place in an image")
        self.rows.append((str(id), str(image), str(case), str(domain), x, y, label))

    def table(self, kind="points", all_images=()):
        if not self.rows:
            raise UserError(f"{self.path}: holds no annotation of a mitotic figure or a look-alike")
        columns = list(zip(*self.rows))
        ids = np.array(columns[0])
        if len(np.unique(ids)) != len(ids):
            raise UserError(f"{self.path}: annotation ids occur twice (for example "
                            f"{[v for v, n in zip(*np.unique(ids, return_counts=True)) if n > 1][0]})")
        return Annotations(ids, np.array(columns[1]), np.array(columns[2]), np.array(columns[3]),
                           np.array(columns[4], np.float64), np.array(columns[5], np.float64),
                           np.array(columns[6], np.int8), kind=kind, all_images=tuple(all_images), notes=self.notes)


def number(value, path, where):
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"{path}, {where}: {value!r} is not a number") from None


def read_midog(path):
    """MIDOG JSON: bbox [x1, y1, x2, y2], categories by name; each image is a case."""
    opened = gzip.open if str(path).endswith(".gz") else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            content = json.load(file)
        images = {image["id"]: image for image in content["images"]}
        names = {c["id"]: str(c["name"]).strip().lower() for c in content["categories"]}
        annotations = content["annotations"]
    except (ValueError, KeyError, TypeError, RecursionError, OSError, EOFError) as error:
        if isinstance(error, (FileNotFoundError, PermissionError)):
            raise
        raise UserError(f"{path}: not a MIDOG-style JSON (images, categories and annotations expected)") from None
    labels = {id: 1 if name in MITOTIC else 0 for id, name in names.items() if name in MITOTIC | LOOK_ALIKE}
    if 1 not in labels.values():
        raise UserError(f"{path}: no category is called mitotic figure (there are {', '.join(names.values()) or 'none'})")
    rows, left = Rows(path), 0
    for position, annotation in enumerate(annotations):
        where = f"annotation {position + 1}"
        try:
            label = labels.get(annotation["category_id"])
            if label is None:
                left += 1
                continue
            image = images[annotation["image_id"]]
            x1, y1, x2, y2 = (number(v, path, where) for v in annotation["bbox"])
            id, name = annotation.get("id", position + 1), image["file_name"]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"{path}, {where}: needs bbox of four numbers, category_id and a known image_id") from None
        rows.add(id, name, name, image.get("tumor_type") or "", (x1 + x2) / 2, (y1 + y2) / 2, label, where)
    if left:
        rows.notes.append(f"{left} annotations of no class of this task left out")
    return rows.table(all_images=[image["file_name"] for image in images.values()])


def read_csv(path, columns=None, positive=None):
    """CSV of points (filename,x,y,label) or of patches (path,label), with case or slide, domain or tumortype."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = [name for name in reader.fieldnames or ()]
            lines = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a readable CSV file ({error})") from None
    chosen = dict(columns or {})

    def column(*names, needed=True):
        if names[0] in chosen:
            if chosen[names[0]] not in header:
                raise UserError(f"{path}: no column {chosen[names[0]]!r} (there are {', '.join(header)})")
            return chosen[names[0]]
        found = next((h for name in names for h in header if h.strip().lower() == name), None)
        if found is None and needed:
            raise UserError(f"{path}: no column {' or '.join(names)} (there are {', '.join(header)}); name it with "
                            f"--columns {names[0]}=…")
        return found

    xc, yc = column("x", needed=False), column("y", needed=False)
    patches = "path" in chosen or (xc is None or yc is None) or column("filename", "file_name", "image",
                                                                     needed=False) is None
    image = column("path", "patch", "file") if patches else column("filename", "file_name", "image")
    label = column("label", "class")
    case, domain = column("case", "slide", needed=False), column("domain", "tumortype", "tumor_type", needed=False)
    ids = column("id", needed=False)
    values = {str(line[label]).strip() for line in lines}
    if positive is not None:
        if positive not in values:
            raise UserError(f"{path}: no row has the label {positive!r} (there are {', '.join(sorted(values)[:8])})")
        meaning = {value: int(value == positive) for value in values}
    elif values <= {"0", "1"}:
        meaning = {"0": 0, "1": 1}
    elif values == {"1", "2"}:  # MIDOG's category ids: 1 mitotic figure, 2 look-alike
        meaning = {"1": 1, "2": 0}
    elif values and {v.lower() for v in values} <= MITOTIC | LOOK_ALIKE:
        meaning = {v: int(v.lower() in MITOTIC) for v in values}
    else:
        raise UserError(f"{path}: labels {', '.join(sorted(values)[:8]) or '(none)'} are not 0/1, 1/2 or names of the "
                        "two classes; say which one is the mitotic figure with --positive")
    rows = Rows(path)
    for i, line in enumerate(lines, start=2):
        where = f"line {i}"
        name = (line[image] or "").strip()
        if not name or None in line.values() or None in line:
            raise UserError(f"{path}, {where}: a row with missing or extra fields")
        x, y = (0.0, 0.0) if patches else (number(line[xc], path, where), number(line[yc], path, where))
        rows.add(line[ids] if ids else f"{name}#{i - 1}", name, line[case] if case else name,
                 line[domain] if domain else "", x, y, meaning[str(line[label]).strip()], where)
    return rows.table("patches" if patches else "points", sorted({row[1] for row in rows.rows}))


def read_sqlite(path, profile=None, classes=None):
    """SlideRunner database, opened read-only. The final class of a cell is Annotations.agreedClass."""
    uri = f"file:{urllib.parse.quote(str(Path(path).resolve()))}?mode=ro"
    if not Path(f"{path}-wal").exists():
        uri += "&immutable=1"
    try:
        with sqlite3.connect(uri, uri=True) as db:
            db.execute("PRAGMA trusted_schema=OFF")
            have = {row[1] for row in db.execute("PRAGMA table_info(Annotations)")}
            names = {int(id): str(name) for id, name in db.execute("SELECT uid, name FROM Classes")}
            alive = " AND a.deleted = 0" if "deleted" in have else ""
            found = db.execute(
                "SELECT a.uid, s.filename, c.coordinateX, c.coordinateY, a.agreedClass FROM Annotations a JOIN "
                "Annotations_coordinates c ON c.annoId = a.uid JOIN Slides s ON s.uid = a.slide "
                f"WHERE a.type IN (1, 4){alive} ORDER BY a.uid, c.uid").fetchall()
            all_images = [str(row[0]) for row in db.execute("SELECT filename FROM Slides")]
    except (sqlite3.Error, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a SlideRunner database ({error})") from None
    if classes:
        labels = {classes["mitotic"]: 1, classes["other"]: 0}
    elif profile:
        labels = dict(zip(PROFILES[profile], (1, 0)))
    else:
        labels = {id: int(name.strip().lower() in MITOTIC) for id, name in names.items()
                  if name.strip().lower() in MITOTIC | LOOK_ALIKE}
        if set(labels.values()) != {0, 1}:
            raise UserError(f"{path}: its classes ({', '.join(names.values()) or 'none'}) do not tell mitotic figures "
                            f"from look-alikes; say which is which with --classes mitotic=ID,other=ID or --profile "
                            f"{'|'.join(PROFILES)}")
    rows, seen, left = Rows(path), set(), 0
    for uid, name, x, y, label in found:
        if label not in labels or uid in seen:
            left += label not in labels
            continue
        seen.add(uid)
        where = f"annotation {uid}"
        rows.add(uid, name, name, "", number(x, path, where), number(y, path, where), labels[label], where)
    if left:
        rows.notes.append(f"{left} annotations of other classes left out")
    return rows.table(all_images=all_images)


def load_dataset(path, images=None, columns=None, positive=None, profile=None, classes=None):
    """The annotations of a dataset: a name under $MITOSIS_ROOT, a folder, or an annotation file.

    `images`: folder of the images (default: the folder of the file). UserError names what is wrong with the input.
    """
    given = path
    path = Path(path)
    if not path.exists() and Path(os.environ.get("MITOSIS_ROOT", "data"), given).is_dir():
        path = Path(os.environ.get("MITOSIS_ROOT", "data"), given)
    if path.is_dir():
        inside_it = [p for p in sorted(path.iterdir()) if p.suffix.lower() in (".json", ".csv", ".sqlite", ".geojson")
                     or p.name.endswith(".json.gz")]
        if len(inside_it) != 1:
            raise UserError(f"{path}: {len(inside_it) or 'no'} annotation files in this folder; name one with --data")
        path = inside_it[0]
    if not path.exists():
        raise UserError(f"--data {given}: no such dataset, folder or file; python data.py --help lists the names")
    with open(path, "rb") as file:
        start = file.read(16)
    if start == b"SQLite format 3\0":
        table = read_sqlite(path, profile, classes)
    elif path.suffix.lower() == ".csv":
        table = read_csv(path, columns, positive)
    elif path.suffix.lower() in (".json", ".gz"):
        table = read_midog(path)
    else:
        raise UserError(f"{path}: annotations are .json, .csv, .sqlite or .geojson files")
    table.root = Path(images) if images else path.parent
    table.name = path.parent.name if path.stem.lower() in ("midog", "annotations") else path.stem
    return table


# ---------------------------------------------------------------- splits

TEST_SHARE = VAL_SHARE = 0.2
NEAR = 112  # px: closer centres show the same cell in their patches


@dataclass
class Split:
    """Ids of the annotations for training, validation and test; `others`: further whole test sets by name."""
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    others: dict = field(default_factory=dict)
    by: str = "case"
    about: dict = field(default_factory=dict)

    def save(self, path):
        runs.write_json(path, {"by": self.by, "about": self.about, "train": self.train, "val": self.val,
                               "test": self.test, "others": self.others})


def load_split(path, annotations):
    """A split from its file; UserError where it does not fit the annotations or a case is on two sides."""
    content = runs.read_json(path)
    try:
        split = Split(*(np.array(content[k], dtype=str) for k in ("train", "val", "test")),
                      {name: np.array(ids, dtype=str) for name, ids in content["others"].items()}, content["by"],
                      content["about"])
        check_split(split, annotations)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path}: not a split of {annotations.name} (or of other annotations)") from None
    return split


def check_split(split, annotations):
    """UserError where an id is in two parts or, for splits by case, a case is on two sides."""
    parts = {"train": split.train, "val": split.val, "test": split.test, **split.others}
    sides = {}
    for name, ids in parts.items():
        rows = annotations.rows(ids)
        for owner in np.unique(annotations.case[rows] if split.by == "case" else ids):
            if owner in sides:
                raise UserError(f"the split leaks: {'case' if split.by == 'case' else 'annotation'} {owner} is in "
                                f"{sides[owner]} and in {name}")
            sides[owner] = name


def make_split(annotations, fold=0, frac=1.0, domain=None, seed=0, by="case", val_frac=1.0):
    """The split of a run (section 3.6 and 3.7 of the paper).

    Test: 20% of the annotations, the same for every fold; validation: 20% of the rest, per fold; `frac` of what
    remains is for training: by annotation, nested within a fold, both classes always present. by="case": whole cases,
    chosen per domain so that the shares come near 20%. `domain`: train, validate and test within it, the other
    domains whole are `others`. `val_frac` shrinks the validation set alike.
    """
    if not 0 < frac <= 1:
        raise UserError(f"--frac {frac:g}: a fraction of the training data, above 0 and at most 1 (0.1 is 10%)")
    if not 0 < val_frac <= 1:
        raise UserError(f"--val-frac {val_frac:g}: above 0 and at most 1")
    if by not in ("case", "annotation"):
        raise UserError(f"--split {by}: by case or by annotation")
    everything, others = np.arange(len(annotations)), {}
    if domain is not None:
        known = sorted(set(annotations.domain))
        if domain not in known:
            raise UserError(f"--domain {domain}: {annotations.name} has the domains {', '.join(known)}")
        others = {f"domain {other}": annotations.id[annotations.domain == other] for other in known if other != domain}
        everything = everything[annotations.domain == domain]
    test = draw_part(annotations, everything, TEST_SHARE, by, generator(seed, 1))
    rest = np.setdiff1d(everything, test)
    val = draw_part(annotations, rest, VAL_SHARE, by, generator(seed, 2, fold))
    pool = np.setdiff1d(rest, val)
    train = fraction(annotations, pool, frac, generator(seed, 3, fold))
    val = fraction(annotations, val, val_frac, generator(seed, 4, fold))
    split = Split(annotations.id[train], annotations.id[val], annotations.id[test], others, by,
                  {"fold": fold, "frac": frac, "domain": domain, "seed": seed, "val_frac": val_frac,
                   "annotations": annotations.fingerprint()})
    check_split(split, annotations)
    return split


def generator(*numbers):
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(numbers)))


def draw_part(annotations, rows, share, by, rng):
    """About `share` of the rows: whole cases, per domain, or single annotations."""
    if by == "annotation":
        return np.sort(rng.permutation(rows)[:round(share * len(rows))])
    chosen = []
    for domain in np.unique(annotations.domain[rows]):
        own = rows[annotations.domain[rows] == domain]
        cases, counts = np.unique(annotations.case[own], return_counts=True)
        if len(cases) < 2:
            raise UserError(f"{annotations.name}{f', domain {domain}' if domain else ''}: one case only; a split by "
                            "case needs at least 3 (name the case column, or use --split annotation)")
        taken = cases[choose(counts, share, rng)]
        chosen.append(own[np.isin(annotations.case[own], taken)])
    return np.sort(np.concatenate(chosen))


def choose(counts, share, rng, tries=200):
    """Indices of cases that hold about `share` of all: random orders, filled up to the target; the first within 2% of
    it, else the nearest. At least 4 cases where there are 16: one giant case is no test set."""
    total, least = counts.sum(), min(4, max(1, len(counts) // 4))
    best, best_miss = None, np.inf
    for _ in range(tries):
        order, held, taken = rng.permutation(len(counts)), 0, []
        for case in order:
            if held + counts[case] <= share * total * 1.02 and len(taken) < len(counts) - 1:
                taken.append(case)
                held += counts[case]
        if not taken:
            taken, held = [int(np.argmin(counts))], counts.min()
        miss = abs(held / total - share) + (len(taken) < least)
        if miss < best_miss:
            best, best_miss = taken, miss
        if miss <= 0.02 * share:
            break
    return np.array(best)


def fraction(annotations, rows, frac, rng):
    """The first `frac` of a random order that begins with one of each class: nested, and never of one class."""
    order = rng.permutation(rows)
    labels = annotations.label[order]
    first = [int(np.flatnonzero(labels == label)[0]) for label in (0, 1) if (labels == label).any()]
    order = np.concatenate([order[first], np.delete(order, first)])
    return np.sort(order[:max(len(first), round(frac * len(rows)))])


# ---------------------------------------------------------------- training patches

SAMPLE = np.dtype([("image", np.int32), ("x", np.float64), ("y", np.float64), ("label", np.int8), ("row", np.int64)])


class Sampler:
    """Training patches of a pseudo-epoch: 50% mitotic figures, 25% look-alikes, 25% random (section 3.8).

    epoch(k) is a pure function of (seed, fold, k): no state to save, the same for any number of workers. Returns a
    structured array of image (index into `images`), x, y, label, row (of the annotations; -1: a random patch).
    balance "annotation": class, then uniform over its annotations; "slide": class, then image, then annotation.
    Random patches lie in images of training cases that hold a drawn annotation; one whose window holds an annotated
    mitotic figure, of the drawn fraction or not, is drawn again.
    """

    def __init__(self, annotations, ids, epoch_size=1280, seed=0, fold=0, balance="annotation", random_share=0.25,
                 size=224):
        self.annotations, self.epoch_size, self.seed, self.fold = annotations, epoch_size, seed, fold
        self.balance, self.size = balance, size
        rows = annotations.rows(ids)
        self.of_class = {label: rows[annotations.label[rows] == label] for label in (0, 1)}
        if not all(map(len, self.of_class.values())):
            raise UserError(f"training needs both classes; this fraction holds {len(self.of_class[1])} mitotic figures "
                            f"and {len(self.of_class[0])} look-alikes: choose a larger --frac")
        self.random_share = 0.0 if annotations.kind == "patches" else random_share
        self.images = np.unique(annotations.image)
        self.index = np.searchsorted(self.images, annotations.image)
        self.drawn = np.unique(self.index[rows])
        if self.random_share:
            self.extent = {i: slides.dimensions(annotations.image_path(self.images[i])) for i in self.drawn}
            figures = annotations.label == 1
            self.figures = {i: np.stack([annotations.x, annotations.y], 1)[figures & (self.index == i)]
                            for i in self.drawn}

    def epoch(self, k):
        rng = generator(self.seed, 5, self.fold, k)
        sample = np.zeros(self.epoch_size, SAMPLE)
        figures = round(0.5 * self.epoch_size)
        randoms = round(self.random_share * self.epoch_size)
        kinds = np.repeat([1, 0, -1], [figures, self.epoch_size - figures - randoms, randoms])
        for i, kind in enumerate(rng.permutation(kinds)):
            sample[i] = self.random_patch(rng) if kind < 0 else self.annotated(rng, int(kind))
        return sample

    def annotated(self, rng, label):
        rows = self.of_class[label]
        if self.balance == "slide":
            images = np.unique(self.index[rows])
            rows = rows[self.index[rows] == images[rng.integers(len(images))]]
        row = rows[rng.integers(len(rows))]
        return self.index[row], self.annotations.x[row], self.annotations.y[row], label, row

    def random_patch(self, rng, tries=100):
        half = self.size / 2
        for _ in range(tries):
            image = self.drawn[rng.integers(len(self.drawn))]
            width, height = self.extent[image]
            x, y = (int(rng.integers(math.ceil(min(half, n / 2)), math.floor(max(n - half, n / 2)) + 1))
                    for n in (width, height))
            if not (np.abs(self.figures[image] - (x, y)).max(1, initial=0) < half).any() or not len(self.figures[image]):
                return image, x, y, 0, -1
            if (np.abs(self.figures[image] - (x, y)).max(1) >= half).all():
                return image, x, y, 0, -1
        raise UserError(f"{self.annotations.name}: no place without a mitotic figure found for random patches; train "
                        "without them: --random-share 0")


# ---------------------------------------------------------------- flags

def add_arguments(parser):
    """The flags that every command with a dataset shares."""
    group = parser.add_argument_group("data")
    group.add_argument("--data", metavar="D", help="name, folder or annotation file (default: $MITOSIS_DATA, else the "
                       "synthetic demo)")
    group.add_argument("--images", metavar="DIR", help="folder of the images (default: beside the annotations)")
    group.add_argument("--columns", nargs="+", default=[], metavar="OUR=THEIRS",
                       help="names of a CSV's columns: path, filename, x, y, label, case, domain, id")
    group.add_argument("--positive", metavar="LABEL", help="the CSV's label that is the class 1")
    group.add_argument("--profile", choices=PROFILES, help="class ids of a known SlideRunner database")
    group.add_argument("--classes", metavar="mitotic=A,other=B", help="class ids of a SlideRunner database")
    group.add_argument("--fit", choices=("resize", "pad"), default="resize",
                       help="ready-made patches smaller than 224 px (default: resize)")
    group.add_argument("--mpp", type=float, help="resample to these microns per pixel (default: as scanned)")
    group.add_argument("--source-mpp", type=float, help="microns per pixel of images that do not tell")


def from_arguments(args):
    """The annotations that the flags name; without --data and $MITOSIS_DATA the demo, made where it is missing."""
    given = args.data or os.environ.get("MITOSIS_DATA")
    if not given:
        print("NOTE: no --data and no $MITOSIS_DATA: using the synthetic demo dataset. Its results say nothing about "
              "real tissue.", flush=True)
        given = "demo"
    if given == "demo":
        folder = Path(os.environ.get("MITOSIS_ROOT", "data"), "demo")
        if not (folder / "MIDOG.json").exists():
            import demo
            demo.build(folder)
        given = folder
    classes = None
    if args.classes:
        try:
            classes = {k: int(v) for k, v in (pair.split("=") for pair in args.classes.split(","))}
            classes["mitotic"], classes["other"]
        except (ValueError, KeyError):
            raise UserError(f"--classes {args.classes}: write it as mitotic=2,other=7") from None
    columns = {}
    for pair in args.columns:
        if "=" not in pair:
            raise UserError(f"--columns {pair}: write it as path=file_name")
        ours, theirs = pair.split("=", 1)
        columns[ours] = theirs
    return load_dataset(given, args.images, columns, args.positive, args.profile, classes)


if __name__ == "__main__":
    cli.command(lambda: print(len(from_arguments(_parse()))))
