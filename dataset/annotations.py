"""Known datasets, and the table of annotations that every format becomes. No torch.

`load_dataset` takes a dataset's name, a folder or an annotation file, lets dataset/readers.py read
it, finds the images, and returns `Annotations`: id, image, case, domain, x, y, label, sorted by
image."""

import hashlib
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from common import UserError
from dataset import readers

PATCH = 224  # px
NEAR = PATCH / 2  # two centres nearer than this lie in each other's patch
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
    domains: dict = field(
        default_factory=dict
    )  # domain → (first file number, last, description, counts or None)
    official_test: tuple = ()  # cases


KNOWN = {
    "ccmct": Known(
        "canine cutaneous mast cell tumour, 32 slides (MITOS_WSI_CCMCT, variant ODAEL)",
        ("MITOS_WSI_CCMCT_ODAEL.sqlite", "MITOS_WSI_CCMCT_ODAEL_binary_labels.csv"),
        (44880, 27965),
        32,
        "ccmct",
        "CC BY-NC-ND",
        0.25,
        "https://ndownloader.figshare.com/files/16261571",
        official_test=(
            "f26e9fcef24609b988be",
            "dd4246ab756f6479c841",
            "f3741e764d39ccc4d114",
            "c91a842257ed2add5134",
            "8c9f9618fcaca747b7c3",
            "add0a9bbc53d1d9bac4c",
            "c86cd41f96331adf3856",
            "be10fa37ad6e88e1f406",
            "96274538c93980aad8d6",
            "552c51bfb88fd3e65ffe",
            "1018715d369dd0df2fc0",
        ),
    ),
    "cmc": Known(
        "canine mammary carcinoma (MITOS_WSI_CMC)",
        ("MITOS_WSI_CMC_CODAEL_TR_ROI.sqlite", "MITOS_WSI_CMC_CODAEL.sqlite"),
        profile="cmc",
        address="https://github.com/DeepMicroscopy/MITOS_WSI_CMC",
    ),
    "midog2021": Known(
        "human breast cancer by four scanners (MIDOG 2021 training set)",
        ("MIDOG.json", "MIDOG.sqlite"),
        (1721, 2714),
        150,
        "midog",
        "CC BY-NC-ND",
        address="https://github.com/DeepMicroscopy/MIDOG",
        domains={
            "Hamamatsu XR": (1, 50, "scanner", None),
            "Hamamatsu S360": (51, 100, "scanner", None),
            "Aperio CS2": (101, 150, "scanner", None),
            "unlabelled": (151, 200, "scanner", None),
        },
    ),
    "midog2022": Known(
        "five tumour types (MIDOG 2022 training set)",
        (
            "MIDOG2022_training_png.json",
            "MIDOG2022_training.json",
            "MIDOG2022_training_png.sqlite",
            "MIDOG2022_training.sqlite",
            "MIDOG2022_training_png.csv",
            "MIDOG2022_training_tiff.csv",
        ),
        (9501, 11051),
        354,
        "midog",
        None,
        address="https://zenodo.org/records/6547151",
        domains={
            "A": (250, 299, "canine cutaneous mast cell tumour", (2327, 1366)),
            "B": (195, 249, "canine lymphoma", (3959, 4257)),
            "C": (1, 150, "human breast cancer", (1721, 2714)),
            "D": (300, 354, "human neuroendocrine tumour", (639, 1762)),
            "E": (151, 194, "canine lung cancer", (855, 952)),
            "unlabelled": (355, 405, "unlabelled", None),
        },
    ),
    "midogpp": Known(
        "seven tumour types (MIDOG++)",
        (
            "MIDOGpp.json",
            "MIDOG++.json",
            "MIDOGpp.sqlite",
            "MIDOG++.sqlite",
            "MIDOGpp.csv",
            "MultiDomainMitoticFigureDataset.json.gz",
            "MultiDomainMitoticFigureDataset.json",
        ),
        (11937, 14349),
        503,
        "midog",
        "CC0 (its JSON)",
        address="https://figshare.com/ndownloader/files/40283737",
        domains={
            "human breast cancer": (1, 200, "", (1721, 2714)),
            "canine lung cancer": (201, 244, "", (855, 951)),
            "canine lymphosarcoma": (245, 299, "", (3959, 4257)),
            "canine cutaneous mast cell tumor": (300, 349, "", (2327, 1366)),
            "human neuroendocrine tumor": (350, 404, "", (639, 1761)),
            "canine soft tissue sarcoma": (405, 504, "", (1286, 2375)),
            "human melanoma": (505, 553, "", (1150, 925)),
        },
    ),
}


def root_folder():
    return Path(os.environ.get("MITOSIS_ROOT") or "data")


def recognise(path, table):
    """Name of the known dataset that an annotation file is, or None: by its published name and its
    images' names.
    """
    for name, known in KNOWN.items():
        if path.name not in known.files:
            continue
        stems = {Path(image).stem for image in table.images}
        numbered = [int(stem) for stem in stems if re.fullmatch(r"\d{3}", stem)]
        # MIDOG.json is a name that other files have too; the numbers must be the published ones,
        # and nearly all there.
        if path.stem == "MIDOG" and len(set(table.image)) < 0.9 * known.images:
            continue
        if known.domains and (
            len(numbered) < len(stems)
            or max(numbered) > max(last for _, last, *_ in known.domains.values())
        ):
            continue
        return name
    return None


def domain_of(known, image):
    """A known dataset's domain of an image, by the file's number; None where the number says
    nothing.
    """
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
        n = (
            n
            if n <= 150
            else n + 50
            if n <= 346
            else n + 51
            if n <= 353
            else 397
            if n == 354
            else -n
        )
    return f"midog{n}"


def shared_cases(a, b):
    """Cases that two datasets have in common, as named in `b` (sorted): a test on them would be no
    test.

    The MIDOG datasets number the same slides differently, which is taken into account.
    """

    def keys(annotations):
        family = annotations.known in ("midog2021", "midog2022", "midogpp")
        return {
            (_midog_number(str(case), annotations.known) if family else None) or str(case): str(
                case
            )
            for case in np.unique(annotations.case)
        }

    first, second = keys(a), keys(b)
    return sorted(second[key] for key in first.keys() & second.keys())


# ---------------------------------------------------------------- annotations


@dataclass
class Annotations:
    """Annotations of a dataset: arrays of equal length N, and what is known of their images.

    id, image, case, domain: str. image is the path below `root`. x, y: float64, px at level 0, the
    centre (NaN for ready-made patches). label: int8, 1 mitotic figure, 0 hard negative. The table
    is sorted by image."""

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
    sizes: dict = field(
        default_factory=dict
    )  # image → (width, height), where the annotation file tells
    all_images: list = field(default_factory=list)  # labelled and unlabelled
    missing: list = field(default_factory=list)  # images that are not below root
    notes: list = field(default_factory=list)
    _kept: dict = field(
        default_factory=dict, init=False, repr=False, compare=False
    )  # what was sorted once

    def __len__(self):
        return len(self.id)

    def take(self, index):
        """The annotations of a mask or of row indices; the images' facts stay."""
        return replace(
            self,
            **{
                name: getattr(self, name)[index]
                for name in ("id", "image", "case", "domain", "x", "y", "label")
            },
        )

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
        if self._kept.get("row", (None,))[0] is not self.id:
            self._kept["row"] = self.id, {id: row for row, id in enumerate(self.id.tolist())}
        row = self._kept["row"][1]
        try:
            return np.array([row[id] for id in np.asarray(ids, dtype=str).tolist()], np.int64)
        except KeyError as error:
            raise UserError(
                f"{self.name}: there is no annotation {error.args[0]!r}; the ids belong to another "
                "dataset"
            ) from None

    def path(self, i):
        """Path of the image of row i (or of an image's name), below `root`."""
        return self.image_path(self.image[i])

    def image_path(self, image):
        return self.root / readers.image_name(self.name, str(image))

    def fingerprint(self):
        """Hex digest of the table: ids, file names, cases, domains, positions and labels; not of
        the pixels.
        """
        digest = hashlib.sha256()
        # The file's name only: where below root it lies, and in which format, may differ between
        # machines.
        stem = {image: file_stem(image) for image in np.unique(self.image).tolist()}
        for column in (
            self.id,
            [stem[image] for image in self.image.tolist()],
            self.case,
            self.domain,
        ):
            digest.update(("\x1f".join(np.asarray(column, dtype=str).tolist()) + "\x1e").encode())
        for column in (self.x, self.y, self.label):
            digest.update((np.asarray(column, "<f8") + 0.0).tobytes())
        return digest.hexdigest()[:32]


def load_dataset(path, images=None, classes=None, profile=None, columns=None, name=None, mpp=None):
    """Annotations of a known dataset (its name), a folder, or an annotation file.

    images: folder of the image files (default: beside the annotations; subfolders are searched).
    classes: dict, see readers.parse_classes; profile: a name of readers.PROFILES; columns: dict,
    see readers.parse_columns; name: what to call it in run folders; mpp: µm/px of all images, where
    their files do not say it. Annotations whose image is not there are dropped, with a note, unless
    no image is there at all: then the table is of use without pixels. UserError: not found,
    unreadable, ambiguous."""
    source, known = _find(path)
    guessed = known
    if known is None and source.is_file():
        guessed = next(
            (key for key, k in KNOWN.items() if source.name in k.files and k.profile == "ccmct"),
            None,
        )
    sqlite = source.name.lower().endswith((".sqlite", ".sqlite3", ".db"))
    if sqlite and not classes and not profile and guessed:
        profile = KNOWN[guessed].profile
    table = readers.read(source, classes, profile, columns)
    known = known or recognise(source, table)
    root = Path(images) if images is not None else source if source.is_dir() else source.parent
    if not root.is_dir():
        raise UserError(f"{root}: no such folder of images (--images)")
    notes = list(table.notes)
    place = locate(list(table.images), root, notes)
    missing = [image for image, found in place.items() if found is None]
    gone = set() if len(missing) == len(place) else set(missing)
    place = {image: found or image for image, found in place.items()}
    if len(set(place.values())) < len(place):
        twice = next(found for found in place.values() if list(place.values()).count(found) > 1)
        raise UserError(
            f"{source}: two of its images are the file {twice}; name them by their paths below "
            f"{root}"
        )

    keep = [i for i, image in enumerate(table.image) if image not in gone]
    dropped = len(table.image) - len(keep)
    if dropped:
        what = "patches" if table.kind == "patches" else "annotations"
        files = "" if table.kind == "patches" else f" on {len(set(table.image) & gone):,} images"
        notes.append(
            f"{dropped:,} of {len(table.image):,} {what} dropped{files}: their files are not "
            f"under {root}"
        )
    if not keep:
        raise UserError(
            f"{source}: none of the images with annotations is under {root}; give --images FOLDER"
        )
    if table.kind == "patches":
        present = _count_images(root)
        if gone or len(missing) < len(place):
            notes.append(
                f"{len(keep):,} of the {present:,} image files under {root} are listed in "
                f"{source.name}"
            )
    numbered = _numbers_files(table)
    if table.kind == "patches" and all(case is None for case in table.case):
        notes.append(
            "no column of cases: every patch counts as a case of its own, so patches of one "
            "patient may lie "
            "on both sides of a split"
        )
    mitos2014 = all(
        re.fullmatch(r"[AH]\d\d_\d\d[A-D][a-d]", Path(image).stem) for image in table.images
    )
    cases, domains = [], []
    numbered_domain = {image: domain_of(known, image) for image in table.images} if known else {}
    for i in keep:
        image, stem = table.image[i], file_stem(table.image[i])
        case = table.case[i]
        if case is None or numbered:
            # The fields of MITOS 2014, as A03_00Aa, are pieces of one slide, A03.
            case = stem[:3] if mitos2014 and case is None else stem
        cases.append(case)
        domains.append(
            numbered_domain.get(image) or table.domain[i] or table.image_domain.get(image) or "all"
        )
    order = sorted(range(len(keep)), key=lambda j: place[table.image[keep[j]]])
    rows = [keep[j] for j in order]
    size = {
        place[image]: size for image, size in table.images.items() if size and image not in gone
    }
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
        name=name or known or _plain_name(path, source),
        root=root,
        kind=table.kind,
        source=source,
        known=known,
        licence=(KNOWN[known].licence if known else None) or table.licence,
        mpp=known_mpp or None,
        sizes=size,
        all_images=sorted(found for image, found in place.items() if image not in gone),
        missing=sorted(missing),
        notes=notes,
    )


def file_stem(image):
    """The file's name without folder and suffix (only an image's: "01.4" stays what it is)."""
    name = image.rsplit("/", 1)[-1]
    base, dot, suffix = name.rpartition(".")
    return base if dot and base and f".{suffix.lower()}" in readers.IMAGE_SUFFIXES else name


def _plain_name(path, source):
    # A folder's name says more than that of the file in it, which is often annotations.json.
    name = source.name if Path(path).is_file() or source.is_dir() else source.resolve().parent.name
    for suffix in (
        ".gz",
        ".geojson",
        ".json",
        ".sqlite3",
        ".sqlite",
        ".csv",
        ".tsv",
        ".txt",
        ".db",
    ):
        name = (
            name[: -len(suffix)]
            if name.lower().endswith(suffix) and len(name) > len(suffix)
            else name
        )
    return "".join(c if c.isalnum() or c in "-_.+" else "_" for c in name).lstrip(".") or "data"


def _numbers_files(table):
    """Whether the case column only numbers the image files, one number each (the benchmark's
    `slide`).

    The file's name then says the same and stays the same in all formats of the dataset.
    """
    pairs = {(image, case) for image, case in zip(table.image, table.case)}
    images = {image for image, _ in pairs}
    cases = {case for _, case in pairs}
    return (
        table.kind == "points"
        and None not in cases
        and len(pairs) == len(images) == len(cases)
        and all(re.fullmatch(r"\d+", case, re.ASCII) for case in cases)
    )


def _find(path):
    """(annotation file or folder, key of KNOWN or None) of what --data says."""
    text = str(path)
    if text == "demo":  # as for the other names; a folder of this name is given as ./demo
        if not (root_folder() / "demo").is_dir():
            raise UserError(
                f"{root_folder() / 'demo'}: the demo is not there; python -m demo.synthetic makes "
                "it"
            )
        return _annotation_file(root_folder() / "demo", None), None
    if text in KNOWN:
        folder = root_folder() / text
        if not folder.is_dir():
            how = (
                f"fetch it with python data.py --download {text}, or "
                if text in DOWNLOADABLE
                else ""
            )
            raise UserError(
                f"{folder}: the dataset {text} is not there; {how}set MITOSIS_ROOT to the folder "
                "that "
                f"holds {text}/"
            )
        return _annotation_file(folder, text), text
    path = Path(text)
    if path.is_dir():
        known = path.resolve().name if path.resolve().name in KNOWN else None
        return _annotation_file(path, known), known
    if path.is_file():
        return path, None
    if (root_folder() / text).is_dir() and re.fullmatch(r"[\w.+-]+", text):
        return _annotation_file(root_folder() / text, None), None
    raise UserError(
        f"{text}: neither a known dataset ({', '.join(KNOWN)}, demo) nor a file or folder that is "
        "there"
    )


DOWNLOADABLE = ("ccmct", "midog2022", "midogpp")


def _annotation_file(folder, known):
    """The annotation file in a folder: a known dataset's, or the only one there."""
    for name in KNOWN[known].files if known else ():
        if (folder / name).is_file():
            return folder / name
    found = sorted(
        p
        for p in folder.iterdir()
        if p.is_file()
        and not p.name.startswith(".")
        and p.name.lower().endswith((".json", ".json.gz", ".sqlite", ".sqlite3", ".csv"))
    )
    if len(found) == 1:
        return found[0]
    if not found and any(
        p.name.lower().endswith((".geojson", ".geojson.gz")) for p in folder.iterdir()
    ):
        return folder
    if not found:
        raise UserError(
            f"{folder}: holds no annotation file; give it as --data and its images with --images"
        )
    names = ", ".join(p.name for p in found[:6]) + (", …" if len(found) > 6 else "")
    raise UserError(
        f"{folder}: holds {len(found)} annotation files ({names}); give the right one as --data "
        "and its "
        "images with --images"
    )


# ---------------------------------------------------------------- finding the images


def _walk(root):
    """Paths of the image files below root, relative to it; hidden folders are left out."""
    seen = 0
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(files):
            seen += 1
            if seen > MAX_FILES:
                raise UserError(
                    f"{root}: more than {MAX_FILES:,} files; give the images' own folder with "
                    "--images"
                )
            if name.lower().endswith(readers.IMAGE_SUFFIXES) and not name.startswith("."):
                yield os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")


def _count_images(root):
    return sum(1 for _ in _walk(root))


def locate(names, root, notes):
    """{name in the annotation file: path below root, or None}; subfolders and other image suffixes
    are tried.
    """
    place = {name: name if (root / name).is_file() else None for name in names}
    lost = [name for name, found in place.items() if found is None]
    if not lost:
        return place
    by_name, by_stem = {}, {}
    for found in _walk(root):
        by_name.setdefault(found.rsplit("/", 1)[-1], []).append(found)
        by_stem.setdefault(file_stem(found), []).append(found)
    renamed = 0
    for name in lost:
        exact = by_name.get(name.rsplit("/", 1)[-1], [])
        found = [path for path in exact if path.endswith("/" + name)] or exact
        if not found:
            found = by_stem.get(file_stem(name), [])
            renamed += len(found) == 1
        if len(found) > 1:
            raise UserError(
                f"{name}: several files under {root} could be this image "
                f"({', '.join(found[:3])}); name it by its path below that folder"
            )
        place[name] = found[0] if found else None
    if renamed:
        notes.append(f"{renamed:,} images were found under the same name with another suffix")
    return place


# ---------------------------------------------------------------- neighbours


def near_pairs(xa, ya, xb, yb, distance, chebyshev=False):
    """Pairs (i, j) with point i of a within `distance` of point j of b: Euclidean, or the larger of
    |dx| and |dy|.

    Returns two index arrays. Memory stays bounded: candidates (|dx| ≤ distance) are expanded a
    million at a time."""
    order = np.argsort(xb, kind="stable")
    xs, ys = np.asarray(xb)[order], np.asarray(yb)[order]
    low, high = (
        np.searchsorted(xs, xa - distance, "left"),
        np.searchsorted(xs, xa + distance, "right"),
    )
    count, first, second = high - low, [], []
    start, ends = 0, np.cumsum(count)
    while start < len(count):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + 1_000_000, "right")))
        part = count[start:stop]
        i = np.repeat(np.arange(start, stop), part)
        j = (
            np.arange(len(i))
            - np.repeat(np.cumsum(part) - part, part)
            + np.repeat(low[start:stop], part)
        )
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
