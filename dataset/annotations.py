"""Known datasets, and the table of annotations that every format becomes.

`load_dataset` takes a dataset's name, a folder or an annotation file, lets dataset/formats read it,
finds the images, and returns `Annotations`: id, image, case, domain, x, y, label, sorted by
image."""

import hashlib
import itertools
import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

import common
from common import UserError
from dataset import dicom, formats
from dataset.formats import cells, class_folders

PATCH = 224  # px
NEAR = PATCH / 2  # two centres nearer than this lie in each other's patch
MAX_FILES = 2_000_000  # looked through for images, before --images was probably a mistake
CHUNK = 1_000_000  # pairs of points that are compared at a time


# ---------------------------------------------------------------- known datasets


class Domain(NamedTuple):
    """A domain of a known dataset: the numbers of its image files, first to last."""

    first: int
    last: int
    description: str = ""
    counts: tuple = None  # mitotic figures, hard negatives


@dataclass(frozen=True)
class Known:
    """A public dataset: what its files must hold."""

    title: str
    files: tuple  # annotation files, the preferred first
    counts: tuple = None  # mitotic figures, hard negatives
    images: int = None  # labelled ones
    profile: str = None
    licence: str = None
    mpp: float = None  # µm/px, if all slides share it
    address: str = None
    domains: dict = field(default_factory=dict)  # name → Domain
    official_test: tuple = ()  # cases
    classes: tuple = None  # names of the labels 0 and 1, if they are not the usual ones
    columns: dict = None  # of its CSV, as formats.parse_columns gives them
    labels: dict = None  # which label means what, as load_dataset takes `classes`
    folder: str = None  # where its files lie below the root if not in a folder of its name
    patches: str = None  # folder of its images, beside the annotation file
    case_pattern: str = None  # the case is group 1 of this in the image's name
    names_cases: bool = True
    drawn_from: range = range(0)  # numbers of the MIDOG++ cases of which it names none


def _cases(form, numbers):
    return tuple(form.format(int(number)) for number in numbers.split())


ATYPICAL = ("normal", "atypical")

KNOWN = {
    "ccmct": Known(
        "canine cutaneous mast cell tumour, 32 slides (MITOS_WSI_CCMCT, variant ODAEL)",
        ("MITOS_WSI_CCMCT_ODAEL.sqlite", "MITOS_WSI_CCMCT_ODAEL_binary_labels.csv"),
        counts=(44880, 27965),
        images=32,
        profile="ccmct",
        licence="CC BY-NC-ND",
        mpp=0.25,
        address="https://ndownloader.figshare.com/files/16261571",
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
        counts=(1721, 2714),
        images=150,
        profile="midog",
        licence="CC BY-NC-ND",
        address="https://github.com/DeepMicroscopy/MIDOG",
        domains={
            "Hamamatsu XR": Domain(1, 50, "scanner"),
            "Hamamatsu S360": Domain(51, 100, "scanner"),
            "Aperio CS2": Domain(101, 150, "scanner"),
            "unlabelled": Domain(151, 200, "scanner"),
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
        counts=(9501, 11051),
        images=354,
        profile="midog",
        address="https://zenodo.org/records/6547151",
        domains={
            "A": Domain(250, 299, "canine cutaneous mast cell tumour", (2327, 1366)),
            "B": Domain(195, 249, "canine lymphoma", (3959, 4257)),
            "C": Domain(1, 150, "human breast cancer", (1721, 2714)),
            "D": Domain(300, 354, "human neuroendocrine tumour", (639, 1762)),
            "E": Domain(151, 194, "canine lung cancer", (855, 952)),
            "unlabelled": Domain(355, 405, "unlabelled"),
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
        counts=(11937, 14349),
        images=503,
        profile="midog",
        licence="CC0 (its JSON)",
        address="https://figshare.com/ndownloader/files/40283737",
        domains={
            "human breast cancer": Domain(1, 200, "", (1721, 2714)),
            "canine lung cancer": Domain(201, 244, "", (855, 951)),
            "canine lymphosarcoma": Domain(245, 299, "", (3959, 4257)),
            "canine cutaneous mast cell tumor": Domain(300, 349, "", (2327, 1366)),
            "human neuroendocrine tumor": Domain(350, 404, "", (639, 1761)),
            "canine soft tissue sarcoma": Domain(405, 504, "", (1286, 2375)),
            "human melanoma": Domain(505, 553, "", (1150, 925)),
        },
        official_test=_cases(
            "{:03d}",
            "6 7 14 15 18 26 29 31 32 35 50 52 57 58 59 64 66 74 88 93 95 100 102 104 107 109 115 "
            "116 123 124 128 147 150 203 212 218 220 230 232 234 236 239 241 249 251 252 253 256 "
            "257 268 269 276 291 292 295 305 310 311 315 329 336 338 339 344 345 346 353 354 366 "
            "368 370 373 375 383 386 389 390 398 413 414 419 422 425 426 427 439 442 456 458 463 "
            "472 476 477 481 484 485 487 491 497 504 510 512 528 531 533 534 537 538 539 541 552",
        ),
    ),
    "amibr": Known(
        "atypical and normal mitotic figures of human breast cancer (AMi-Br, 128 px)",
        ("AMI-BR.csv", "amibr_train_split.csv"),
        counts=(832, 2888),
        images=3720,
        licence="MIT",
        mpp=0.25,
        address="https://github.com/DeepMicroscopy/AMi-Br_Benchmark",
        official_test=(
            *_cases(
                "MIDOG21-{:03d}.tiff",
                "7 11 17 18 20 21 27 31 32 49 60 62 66 71 72 73 74 75 81 82 84 85 88 91 98 108 118 "
                "119 120 125 128 130 139 140 142 146",
            ),
            *_cases("TUPAC16-{:02d}_stitched1.tif", "3 7 8 9 12 17 22"),
            *_cases("TUPAC16-{:02d}.tif", "28 30 33 34 35 42 45 55 57 66 68 71 72"),
        ),
        classes=ATYPICAL,
        columns={
            "path": "{dataset}_{uid}.png",
            "case": "{dataset}-{slide}",
            "domain": "dataset",
            "label": "majority_atypical",
            "votes": "expert1_atypical+expert2_atypical+expert3_atypical",
        },
        labels={"mitotic": ["True"], "other": ["False"]},
        patches="AMi-Br",
    ),
    "atnorm-br": Known(
        "atypical and normal mitotic figures of breast cancer in TCGA (AtNorM-Br, 128 px)",
        (),
        counts=(128, 618),
        images=746,
        licence="MIT",
        mpp=0.25,
        address="https://github.com/DeepMicroscopy/AMi-Br_Benchmark",
        classes=ATYPICAL,
        labels={"mitotic": ["Atypical"], "other": ["Normal"]},
        folder="amibr/AtNorM-Br",
        names_cases=False,
    ),
    "atnorm-md": Known(
        "atypical and normal mitotic figures of six tumour types of MIDOG++ (AtNorM-MD, 128 px)",
        ("AtNorM-MD_expert_votes.csv",),
        counts=(219, 1888),
        images=2107,
        licence="MIT",
        mpp=0.25,
        address="https://github.com/DeepMicroscopy/AMi-Br_Benchmark",
        classes=ATYPICAL,
        columns={
            "path": "Filename",
            "label": "Majority",
            "votes": "Expert_1+Expert_2+Expert_3+Expert_4+Expert_5",
        },
        labels={"mitotic": ["Atypical"], "other": ["Normal"]},
        folder="amibr",
        patches="AtNorM-MD",
        names_cases=False,
        drawn_from=range(201, 554),
    ),
    "midog25": Known(
        "atypical and normal mitotic figures of seven tumour types (MIDOG 2025, track 2)",
        ("MIDOG25.csv", "MIDOG25_Atypical_Classification_Train_Set.csv"),
        counts=(1748, 10189),
        images=11937,
        mpp=0.25,
        address="https://zenodo.org/records/16044804",
        classes=ATYPICAL,
        columns={
            "path": "image_id",
            "case": "filename",
            "domain": "Tumor",
            "scanner": "Scanner",
            "species": "Species",
            "label": "majority",
            "votes": "expert1+expert2+expert3",
        },
        labels={"mitotic": ["AMF"], "other": ["NMF"]},
    ),
    "omg-octo": Known(
        "atypical and normal mitotic figures of several tumour types (OMG-Octo Atypical)",
        ("OMG-Octo.csv",),
        counts=(1375, 378),
        images=1753,
        address="https://zenodo.org/records/16107743",
        classes=ATYPICAL,
        columns={"path": "image_file", "label": "label"},
        labels={"mitotic": ["AMF"], "other": ["MF"]},
        case_pattern=r"([^_]+)_.+",
    ),
}


DOWNLOADABLE = ("ccmct", "midog2022", "midogpp", "amibr")
# Scanner and species of the MIDOG cases, by their MIDOG++ number: up to this one.
MIDOG_FACTS = (
    (50, "Hamamatsu XR", "human"),
    (100, "Hamamatsu S360", "human"),
    (150, "Aperio CS2", "human"),
    (200, "", "human"),
    (299, "3DHistech", "canine"),
    (349, "Aperio CS2", "canine"),
    (404, "Hamamatsu XR", "human"),
    (504, "3DHistech", "canine"),
    (553, "Hamamatsu XR", "human"),
)
# How the MIDOG tables write one scanner in two ways.
SCANNERS = {"Hamammatsu XR": "Hamamatsu XR", "3D Histech": "3DHistech"}
# MIDOG 2022 numbers its files differently from MIDOG++: up to this number, add so many.
MIDOG2022_OFFSETS = ((150, 0), (346, 50), (353, 51), (354, 43))


def root_folder() -> Path:
    return Path(os.environ.get("MITOSIS_ROOT") or "data")


def recognise(path, table):
    """Name of the known dataset that an annotation file is, or None: by its published name and its
    images' names.
    """
    stems = {Path(image).stem for image in table.sizes}
    numbers = [int(stem) for stem in stems if re.fullmatch(r"\d{3}", stem, re.ASCII)]
    for name, known in KNOWN.items():
        if path.name not in known.files or known.columns:  # those: _known_by_header
            continue
        # MIDOG.json is a name that other files have too; the numbers must be the published ones,
        # and nearly all of them.
        if path.stem == "MIDOG" and len(set(table.images)) < 0.9 * known.images:
            continue
        if known.domains:
            last = max(domain.last for domain in known.domains.values())
            if len(numbers) < len(stems) or max(numbers) > last:
                continue
        return name
    return None


def domain_of(known, image):
    """A known dataset's domain of an image, by its file's number; None if that says nothing."""
    stem = Path(image).stem
    if re.fullmatch(r"\d{1,4}", stem, re.ASCII):
        for name, domain in KNOWN[known].domains.items():
            if domain.first <= int(stem) <= domain.last:
                return name
    return None


MIDOG21_CASE = re.compile(r"midog(?:20)?21[-_ ]*0*(\d{1,3})")
TUPAC_CASE = re.compile(r"tupac(?:16)?[-_ ]*0*(\d{1,3})(?:_stitched\d)?|0*(\d{1,3})_stitched\d")


def case_identity(case, known=None):
    """One name for a case, however the datasets write it: "MIDOG21-007.tiff" of AMi-Br, "007" of
    MIDOG 2021, 2022 and ++ and "007.tiff" of MIDOG 2025 are "midog7". known: key of KNOWN.
    """
    stem = file_stem(str(case))
    match = MIDOG21_CASE.fullmatch(stem.casefold())
    if match:
        return f"midog{int(match[1])}"
    match = TUPAC_CASE.fullmatch(stem.casefold())
    if match:
        return f"tupac{int(match[1] or match[2])}"
    if known in ("midog2021", "midog2022", "midogpp", "midog25"):
        return _midog_number(stem, known) or case_key(stem)
    if known and not KNOWN[known].names_cases:
        return f"{known}:{case_key(stem)}"
    return case_key(stem)


def _midog_number(case, known):
    """A MIDOG case by its MIDOG++ number, so that cases of 2021, 2022, 25 and ++ can be compared;
    None if it is no number.
    """
    if not re.fullmatch(r"\d{1,3}", case, re.ASCII):
        return None
    number = int(case)
    if known != "midog2022":
        return f"midog{number}"
    for last, offset in MIDOG2022_OFFSETS:
        if number <= last:
            return f"midog{number + offset}"
    return f"midog2022-{number}"  # unlabelled images that MIDOG++ does not have


def _number_of(identity):
    """The MIDOG++ number of a case_identity(); None for other cases."""
    match = re.fullmatch(r"midog(\d+)", identity)
    return int(match[1]) if match else None


def _identities(annotations, rows=slice(None)):
    """{case_identity: the case as the annotations write it} of rows."""
    cases = np.unique(annotations.case[rows]).tolist()
    return {case_identity(case, annotations.known): case for case in cases}


def shared_cases(a, b):
    """Cases that two datasets have in common, as named in `b` (sorted): a test on them would be no
    test. The spellings of the known datasets are accounted for.
    """
    first, second = _identities(a), _identities(b)
    return sorted(second[key] for key in first.keys() & second.keys())


def leak(annotations, rows, other):
    """What a test on `other` would not be if the rows of `annotations` were trained on: (text on
    the cases that both have, whether that is beyond doubt), or None if they have none.

    Two datasets of strangers may both number their cases from 1, which is no proof.
    """
    trained, tested = _identities(annotations, rows), _identities(other)
    shared = trained.keys() & tested.keys()
    if shared:
        example = min(tested[key] for key in shared)
        text = f"{other.name} shares {cells.several(len(shared), 'case')} with the training on "
        text += f"{annotations.name}, for example {cells.shown(example)}"
        return text, not all(re.fullmatch(r"\d{1,5}", key) for key in shared)
    for first, second, keys in ((annotations, other, tested), (other, annotations, trained)):
        drawn = KNOWN[first.known].drawn_from if first.known else ()
        count = sum(_number_of(key) in drawn for key in keys)
        if count:
            return (
                f"{first.name} is drawn from MIDOG++ cases that it does not name, which may be "
                f"among {cells.several(count, 'case')} of {second.name}"
            ), True
    return None


def case_key(case):
    """A case without what spreadsheets and typists change: 12 and 12.0, P-01 and p-01, blanks."""
    name = unicodedata.normalize("NFKC", str(case)).casefold()
    return cells.canonical(" ".join(name.split()))


# ---------------------------------------------------------------- annotations


OPTIONAL = ("share", "scanner", "species", "split")  # columns that few datasets have


@dataclass
class Annotations:
    """Annotations of a dataset: arrays of equal length N, and what is known of their images.

    id, image, case, domain: str. image is the path below `root`. x, y: float64, px at level 0, the
    centre (NaN for ready-made patches). label: int8, 0 or 1, called as `classes` says. The table is
    sorted by image."""

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
    mpp: dict = None  # image → µm/px, if known beside the image file itself
    sizes: dict = field(default_factory=dict)  # image → (width, height) by the annotation file
    share: np.ndarray = None  # float32, of the experts who voted for label 1, if there are votes
    scanner: np.ndarray = None  # str, "" if unknown; None if it is known of no image
    species: np.ndarray = None  # likewise
    split: np.ndarray = None  # str: "train", "test", … as the data say; None without such a column
    all_images: list = field(default_factory=list)  # labelled and unlabelled
    missing: list = field(default_factory=list)  # images that are not below root
    notes: list = field(default_factory=list)
    classes: tuple = cells.MITOSIS  # names of the labels 0 and 1
    _cache: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self):
        return len(self.id)

    def take(self, index):
        """The annotations of a mask or of row indices; the images' facts stay."""
        names = ["id", "image", "case", "domain", "x", "y", "label"]
        names += [name for name in OPTIONAL if getattr(self, name) is not None]
        return replace(self, **{name: getattr(self, name)[index] for name in names})

    def _cached(self, key, column, make):
        """make(column), computed once for a column as long as it is the same array."""
        values = getattr(self, column)
        if key not in self._cache or self._cache[key][0] is not values:
            self._cache[key] = values, make(values)
        return self._cache[key][1]

    def order(self):
        """The rows in the order of their ids."""
        return self._cached("order", "id", lambda ids: np.argsort(ids, kind="stable"))

    def codes(self, column):
        """(names, code): the sorted different values of a column, and for each row which it has."""
        return self._cached(column, column, lambda values: np.unique(values, return_inverse=True))

    def rows(self, ids):
        """Row indices of annotation ids, in their order; UserError for an unknown id."""
        row = self._cached(
            "rows", "id", lambda ids: {name: i for i, name in enumerate(ids.tolist())}
        )
        try:
            return np.array([row[name] for name in np.asarray(ids, dtype=str).tolist()], np.int64)
        except KeyError as error:
            raise UserError(
                f"{self.name}: there is no annotation {error.args[0]!r}; the ids belong to another "
                "dataset"
            ) from None

    def path(self, i):
        """Path of the image of row i, below `root`."""
        return self.image_path(self.image[i])

    def image_path(self, image):
        return self.root / cells.relative_name(self.name, str(image))

    def fingerprint(self):
        """Hex digest of the table: ids, file names, cases, domains, positions and labels; not of
        the pixels.
        """
        digest = hashlib.sha256()
        # The file's name only: in which folder below root it lies, in which format, and in which
        # normal form its file system keeps the name, may differ between machines.
        stems = {}
        for image in np.unique(self.image).tolist():
            stems[image] = unicodedata.normalize("NFC", file_stem(image))
        columns = (self.id, [stems[image] for image in self.image.tolist()], self.case, self.domain)
        for column in columns:
            digest.update(("\x1f".join(np.asarray(column, dtype=str).tolist()) + "\x1e").encode())
        for column in (self.x, self.y, self.label):
            digest.update((np.asarray(column, "<f8") + 0.0).tobytes())
        return digest.hexdigest()[:32]


def load_dataset(
    path: str | Path,
    images: str | Path | None = None,
    classes: dict | None = None,
    profile: str | None = None,
    columns: dict | None = None,
    name: str | None = None,
    mpp: float | None = None,
) -> Annotations:
    """Annotations of a known dataset (its name), a folder, or an annotation file.

    images: folder of the image files (default: beside the annotations; subfolders are searched).
    classes: dict, see formats.parse_classes; profile: a name of formats.PROFILES; columns: dict,
    see formats.parse_columns; name: what to call it in run folders; mpp: µm/px of all images, if
    their files do not say it. Annotations of missing images are dropped, with a note, unless all
    images are missing: then the table is useful without pixels. UserError: not found, unreadable,
    ambiguous."""
    source, known = _find(path)
    if columns is None:
        known = known or _known_by_header(source)
        if known:
            columns = KNOWN[known].columns
            if not classes and not profile:
                classes = KNOWN[known].labels
    table = formats.read(source, classes, profile or _profile(source, known, classes), columns)
    known = known or recognise(source, table)
    root = _image_folder(source, images, known)
    notes = table.notes

    place = locate(list(table.sizes), root, notes, source)
    missing = [image for image, path in place.items() if path is None]
    absent = set(missing) if len(missing) < len(place) else set()
    for image in missing:
        place[image] = _name_below(image)
    _check_distinct(source, root, place)
    _drop_absent(table, absent, source, root, notes)
    if table.kind == "patches":
        _note_patches(table, len(missing) < len(place), source, root, known, notes)
    if len(missing) < len(place):
        paths = [root / place[image] for image in table.images]
        formats.move_to_level0(table, paths, notes.append)

    cases = _cases_of(table, known, notes)
    domains = _domains(table, known)
    scanners, species = _groups(table, cases, known)
    splits = [value or "" for value in table.splits]
    order = sorted(range(len(table)), key=lambda row: place[table.images[row]])

    def column(values, dtype):
        return np.array([values[row] for row in order], dtype=dtype)

    def optional(values, dtype):
        return column(values, dtype) if values and any(value != "" for value in values) else None

    return Annotations(
        id=column(table.ids, str),
        image=column([place[image] for image in table.images], str),
        case=column(cases, str),
        domain=column(domains, str),
        x=column(table.x, np.float64),
        y=column(table.y, np.float64),
        label=column(table.labels, np.int8),
        name=name or known or _dataset_name(path, source),
        root=root,
        kind=table.kind,
        source=source,
        known=known,
        licence=(KNOWN[known].licence if known else None) or table.licence,
        mpp=_resolutions(table, place, known, mpp),
        sizes={place[i]: size for i, size in table.sizes.items() if size and i not in absent},
        all_images=sorted(path for image, path in place.items() if image not in absent),
        missing=sorted(place[image] for image in missing),
        notes=notes,
        share=optional(table.shares, np.float32),
        scanner=optional(scanners, str),
        species=optional(species, str),
        split=optional(splits, str),
        classes=_class_names(table, known, classes),
    )


def _known_by_header(source):
    """Key of the known dataset that a CSV is by its published name and its columns, or None."""
    for name, known in KNOWN.items():
        if source.name not in known.files or not known.columns or not source.is_file():
            continue
        try:
            with open(source, encoding="utf-8-sig", errors="replace") as file:
                header = {column.strip() for column in file.readline(10_000).split(",")}
        except OSError:  # whoever reads the file says what is wrong with it
            return None
        wanted = set()
        for text in known.columns.values():
            wanted.update(re.findall(r"\{([^{}]+)\}", text) or text.split("+"))
        if wanted <= header:
            return name
    return None


def _class_names(table, known, classes):
    """Names of the labels 0 and 1: a known dataset's, unless the user says what its labels mean."""
    if known and KNOWN[known].classes and classes is KNOWN[known].labels:
        return KNOWN[known].classes
    return table.classes


def _profile(source, known, classes):
    """The profile of a known dataset's database, whose class names say nothing."""
    if classes or not source.name.lower().endswith((".sqlite", ".sqlite3", ".db")):
        return None
    if known is None and source.is_file() and source.name in KNOWN["ccmct"].files:
        known = "ccmct"
    return KNOWN[known].profile if known else None


def _image_folder(source, images, known=None):
    patches = known and KNOWN[known].patches
    if images is not None:
        root = Path(images)
    elif patches and (source.parent / patches).is_dir():
        root = source.parent / patches
    elif source.is_dir():
        root = source
    else:
        root = source.parent
    if not root.is_dir():
        raise UserError(f"{root}: no such folder of images (--images)")
    return root


def _check_distinct(source, root, place):
    """UserError if two images of the annotation file are one file on disk."""
    for path, count in Counter(place.values()).items():
        if count > 1:
            raise UserError(
                f"{source}: two of its images are the file {path}; name them by their paths below "
                f"{root}"
            )


def _drop_absent(table, absent, source, root, notes):
    """Drop the rows of images that are missing, with a note."""
    rows = [row for row, image in enumerate(table.images) if image not in absent]
    dropped = len(table) - len(rows)
    if not dropped:
        return
    what = "patches dropped"
    if table.kind == "points":
        what = f"annotations dropped on {len(set(table.images) & absent):,} images"
    notes.append(f"{dropped:,} of {len(table):,} {what}: their files are not under {root}")
    if not rows:
        raise UserError(
            f"{source}: none of the images with annotations is under {root}; give --images FOLDER"
        )
    table.keep(rows)


def _note_patches(table, some_exist, source, root, known, notes):
    if some_exist and source.is_file():
        files = sum(1 for _ in _walk(root))
        notes.append(
            f"{len(table):,} of the {files:,} image files under {root} are listed in {source.name}"
        )
    named = known and KNOWN[known].case_pattern
    if all(case is None for case in table.cases) and not named:
        notes.append(
            "no column of cases: every patch counts as a case of its own, so patches of one "
            "patient may lie on both sides of a split"
        )


def _cases_of(table, known, notes):
    """The case of each row: the file's, each written in one way, else the image's name, or what of
    it names the case.
    """
    pattern = known and KNOWN[known].case_pattern
    written = table.cases
    if _numbers_files(table):
        written = [None] * len(table)
    # The fields of MITOS 2014, as A03_00Aa, are pieces of one slide, A03.
    mitos2014 = all(
        re.fullmatch(r"[AH]\d\d_\d\d[A-D][a-d]", Path(image).stem) for image in table.sizes
    )
    spellings = {}  # key → how often each spelling occurs
    for case in written:
        if case is not None:
            spellings.setdefault(case_key(case), Counter())[case] += 1
    several = sorted(", ".join(sorted(names)) for names in spellings.values() if len(names) > 1)
    if several:
        notes.append(
            f"cases written in several ways count as one: {cells.shown('; '.join(several))}"
        )
    cases = []
    for image, case in zip(table.images, written):
        if case is not None:
            counts = spellings[case_key(case)]
            cases.append(min(counts, key=lambda name: (-counts[name], len(name), name)))
        elif mitos2014:
            cases.append(file_stem(image)[:3])
        else:
            named = pattern and re.fullmatch(pattern, file_stem(image))
            cases.append(named[1] if named else file_stem(image))
    return cases


def _midog_facts(cases, known):
    """(scanner, species) of each case, as known of the MIDOG datasets; "" for other cases."""
    facts = {}
    for case in set(cases):
        identity = case_identity(case, known)
        facts[case] = "", ""
        if identity.startswith("tupac"):
            facts[case] = "", "human"
        number = _number_of(identity)
        if number:
            ranges = (both for last, *both in MIDOG_FACTS if number <= last)
            facts[case] = tuple(next(ranges, facts[case]))
    return [facts[case] for case in cases]


def _groups(table, cases, known):
    """(scanner, species) of the rows: as the file says, else as known of the dataset; a list is
    None if it is blank.
    """
    facts = [("", "")] * len(table)
    if known:
        facts = _midog_facts(cases, known)
    columns = []
    for number, written in enumerate((table.scanners, table.species)):
        column = [value or facts[row][number] for row, value in enumerate(written)]
        if known:
            column = [SCANNERS.get(value, value) for value in column]
        columns.append(column if any(column) else None)
    return columns


def _domains(table, known):
    """The domain of each row: a known dataset's by the file's number, else the file's, else all."""
    numbered = {}
    if known:
        numbered = {image: domain_of(known, image) for image in table.sizes}
    domains = []
    for image, domain in zip(table.images, table.domains):
        domains.append(numbered.get(image) or domain or table.image_domain.get(image) or "all")
    return domains


def _resolutions(table, place, known, mpp):
    """{image: µm/px} as the user says (mpp), the annotation file, or the known dataset; or None."""
    if mpp is not None:
        return {path: float(mpp) for path in place.values()}
    resolutions = {}
    if known and KNOWN[known].mpp:
        resolutions = {path: KNOWN[known].mpp for path in place.values()}
    for image, value in table.mpp.items():
        resolutions[place[image]] = value
    return resolutions or None


def file_stem(image):
    """The file's name without folder and suffix (only an image's: "01.4" stays what it is)."""
    name = image.rsplit("/", 1)[-1]
    base, dot, suffix = name.rpartition(".")
    return base if dot and base and f".{suffix.lower()}" in formats.IMAGE_SUFFIXES else name


def short_stem(image):
    """file_stem without the ".ome" of slide.ome.tif, which QuPath leaves out too."""
    stem = file_stem(image)
    return stem[: -len(".ome")] if stem.lower().endswith(".ome") else stem


def _dataset_name(path, source):
    """What run folders call a dataset: its folder, or its file without suffixes."""
    # A folder's name says more than that of the file in it, which is often annotations.json.
    name = source.name
    if not Path(path).is_file() and not source.is_dir():
        name = source.resolve().parent.name
    suffixes = (".geojson", ".json", ".sqlite3", ".sqlite", ".csv", ".tsv", ".txt", ".db", ".xml")
    for suffix in (".gz", *suffixes):
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            name = name[: -len(suffix)]
    return common.file_name(name) or "data"


def _numbers_files(table):
    """Whether the case column only numbers the image files, one number each (the benchmark's
    `slide`).

    The file's name then says the same and stays the same in all formats of the dataset.
    """
    if table.kind != "points" or None in table.cases:
        return False
    pairs = set(zip(table.images, table.cases))
    images = {image for image, _ in pairs}
    cases = {case for _, case in pairs}
    one_to_one = len(pairs) == len(images) == len(cases)
    return one_to_one and all(re.fullmatch(r"\d+", case, re.ASCII) for case in cases)


# ---------------------------------------------------------------- finding the annotation file


def _find(path):
    """(annotation file or folder, key of KNOWN or None) of what --data says."""
    text = str(path)
    folder = root_folder() / text
    inside = KNOWN[text].folder if text in KNOWN else None
    if inside and not folder.is_dir() and (root_folder() / inside).is_dir():
        folder = root_folder() / inside
    if text == "demo":  # as for the other names; a folder of this name is given as ./demo
        if not folder.is_dir():
            raise UserError(
                f"{folder}: the demo dataset does not exist; make it with python -m demo.synthetic"
            )
        return _annotation_file(folder, None), None
    if text in KNOWN:
        if not folder.is_dir():
            how = ""
            download = (inside or text).split("/")[0]
            if download in DOWNLOADABLE:
                how = f"download it with python data.py --download {download}, or "
            elif KNOWN[text].address:
                how = f"it is at {KNOWN[text].address}; "
            raise UserError(
                f"{folder}: the dataset {text} does not exist; {how}set MITOSIS_ROOT to the folder "
                f"that holds {text}/"
            )
        return _annotation_file(folder, text), text
    path = Path(text)
    if path.is_dir():
        name = path.resolve().name
        known = name if name in KNOWN else None
        return _annotation_file(path, known), known
    if path.exists():
        return path, None
    if re.fullmatch(r"[\w.+-]+", text) and folder.is_dir():
        return _annotation_file(folder, None), None
    raise UserError(
        f"{text}: neither a known dataset ({', '.join(KNOWN)}, demo) nor an existing file or folder"
    )


def _annotation_file(folder, known):
    """The annotation file in a folder: a known dataset's, or the only one; the folder itself if it
    holds one file per image or a folder per class."""
    if known:
        for name in KNOWN[known].files:
            if (folder / name).is_file():
                return folder / name
    suffixes = (".json", ".json.gz", ".sqlite", ".sqlite3", ".csv", ".csv.gz")
    files = []
    for path in sorted(folder.iterdir()):
        hidden = path.name.startswith(".")
        if path.name.lower().endswith(suffixes) and path.is_file() and not hidden:
            files.append(path)
    if len(files) == 1:
        return files[0]
    if not files and (formats.per_image_files(folder) or class_folders.recognises(folder)):
        return folder
    if not files:
        raise UserError(
            f"{folder}: holds no annotation file; give it as --data and its images with --images"
        )
    names = ", ".join(path.name for path in files[:6])
    if len(files) > 6:
        names += ", …"
    raise UserError(
        f"{folder}: holds {len(files)} annotation files ({names}); give the right one as --data "
        "and its images with --images"
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
                    f"{root}: more than {MAX_FILES:,} files; give the folder of the images with "
                    "--images"
                )
            if name.lower().endswith(formats.IMAGE_SUFFIXES) and not name.startswith("."):
                yield os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")


def _folder_of(path):
    return path.rpartition("/")[0]


class ImageFiles:
    """The image files below a folder, to be found by their names.

    A folder whose images are the DICOM files of one slide is one image, of the folder's name and of
    each file's.

    slides: {name for messages: path below root of the file to open}"""

    def __init__(self, root):
        self.root, self.slides = Path(root), {}
        self._by_name, self._by_stem, self._by_short_stem = {}, {}, {}
        for folder, group in itertools.groupby(_walk(root), key=_folder_of):
            paths = list(group)
            whole = dicom.slide_of(self.root / path for path in paths)
            if whole is None:
                for path in paths:
                    self._add(path, path)
                self.slides.update(zip(paths, paths))
                continue
            opened = whole.relative_to(self.root).as_posix()
            called = folder or self.root.resolve().name
            for path in [*paths, called]:
                self._add(path, opened)
            if len(paths) == 1:
                called = opened
            self.slides[called] = opened

    def _add(self, path, opened):
        name = _normal(path.rsplit("/", 1)[-1])
        for index, key in (
            (self._by_name, name),
            (self._by_stem, file_stem(name)),
            (self._by_short_stem, short_stem(name)),
        ):
            index.setdefault(key, []).append((path, opened))

    def find(self, name, source=None):
        """(path below root or None, whether only by another suffix) of the image that a name means.

        Of several with the same name, the one that shares most folders with it. UserError if it
        could be several. source: the file that names it, for errors."""
        normal = _normal(name)
        bare = normal.rsplit("/", 1)[-1]
        found = self._by_name.get(bare)
        by_stem = found is None
        if by_stem:
            found = self._by_stem.get(file_stem(bare))
            found = found or self._by_short_stem.get(short_stem(bare), [])
        matches = sorted({opened for _, opened in _nearest(normal, found)})
        if len(matches) > 1:
            raise UserError(
                f"{source or self.root}: several files under {self.root} could be "
                f"{cells.shown(name)} ({', '.join(matches[:3])}); name it by its path below that "
                "folder"
            )
        if not matches:
            return None, by_stem
        return matches[0], by_stem


def dicom_slide(folder):
    """The file to open of the one slide that the DICOM files in a folder are; None if it holds
    anything else."""
    opened = list(ImageFiles(folder).slides.values())
    if len(opened) == 1 and opened[0].lower().endswith(dicom.SUFFIX) and "/" not in opened[0]:
        return Path(folder) / opened[0]
    return None


def locate(names, root, notes, source=None):
    """{name in an annotation file: path below root, or None}. source: that file, for errors.

    Absolute paths must lie below root; those of Windows belong to another machine and count from
    their end. Subfolders are searched, and file names also match in another Unicode normal form and
    with another image suffix."""
    place = {name: _directly(name, root, source) for name in names}
    lost = [name for name, path in place.items() if path is None]
    if not lost:
        return place
    files, renamed = ImageFiles(root), 0
    for name in lost:
        place[name], by_stem = files.find(name, source)
        bare = name.rsplit("/", 1)[-1]
        renamed += place[name] is not None and by_stem and bare != file_stem(bare)
    if renamed:
        images = cells.several(renamed, "image")
        notes.append(f"{images} found under the same name with another suffix")
    return place


def _normal(name):
    return unicodedata.normalize("NFC", name)


def _directly(name, root, source):
    """Path below root of an image that lies exactly where its name says, or None. UserError for an
    absolute path outside of root."""
    # "/a.svs" is not absolute on Windows, but leads out of the folder there too.
    if not (Path(name).is_absolute() or name.startswith("/")):
        return name if not cells.is_windows_path(name) and (root / name).is_file() else None
    for path, folder in ((Path(name), Path(os.path.abspath(root))), (Path(name), root.resolve())):
        if path.is_relative_to(folder):
            relative = path.relative_to(folder).as_posix()
            return relative if path.is_file() else None
    if cells.is_windows_path(name):
        return None
    raise UserError(
        f"{source or root}: the absolute path {cells.short(name)} leads out of the folder of "
        f"images {root}; give the right folder with --images"
    )


def _nearest(name, found):
    """Those of the (path, …) that agree with a name in most folders, counted from the end."""

    def agreement(path):
        count = 0
        for a, b in zip(reversed(name.split("/")[:-1]), reversed(_normal(path).split("/")[:-1])):
            if a != b:
                break
            count += 1
        return count

    most = max((agreement(path) for path, _ in found), default=0)
    return [(path, opened) for path, opened in found if agreement(path) == most]


def _name_below(image):
    """The name under which a missing image is listed: absolute paths lose their folders."""
    if image.startswith("/") or cells.is_windows_path(image):
        return image.rsplit("/", 1)[-1]
    return image


# ---------------------------------------------------------------- neighbours


def near_any(xa, ya, xb, yb, distance, chebyshev=False):
    """Whether each point of a has a point of b within `distance`, Euclidean or (chebyshev) by the
    larger of |dx| and |dy|: bool [len(a)]. Memory is linear in the number of points."""
    a, row, _ = _distinct(xa, ya)
    b, _, _ = _distinct(xb, yb)
    near = np.zeros(len(a), bool)
    for i, _ in _pair_chunks(a[:, 0], a[:, 1], b[:, 0], b[:, 1], distance, chebyshev):
        near[i] = True
    return near[row]


def count_near_pairs(xa, ya, xb, yb, distance, chebyshev=False):
    """Number of pairs of a point of a and a point of b within `distance`, as in `near_any`."""
    a, _, times_a = _distinct(xa, ya)
    b, _, times_b = _distinct(xb, yb)
    count = 0
    for i, j in _pair_chunks(a[:, 0], a[:, 1], b[:, 0], b[:, 1], distance, chebyshev):
        count += int((times_a[i] * times_b[j]).sum())
    return count


def _distinct(x, y):
    """(points [n, 2], index of each position among them, how often each occurs): coincident points
    are compared once."""
    points = np.stack([np.asarray(x, np.float64), np.asarray(y, np.float64)], axis=1)
    points, row, times = np.unique(points, axis=0, return_inverse=True, return_counts=True)
    return points, row.reshape(-1), times


def _pair_chunks(xa, ya, xb, yb, distance, chebyshev):
    """Yield index arrays (i, j) of pairs within `distance`, in chunks: candidates (|dx| ≤ distance)
    are expanded CHUNK at a time, so that memory stays bounded by that and the number of points."""
    xa, ya = np.asarray(xa), np.asarray(ya)
    # 1. Sort b by x; the candidates of each point of a are a range in it.
    order = np.argsort(xb, kind="stable")
    xs, ys = np.asarray(xb)[order], np.asarray(yb)[order]
    low = np.searchsorted(xs, xa - distance, "left")
    count = np.searchsorted(xs, xa + distance, "right") - low
    ends = np.cumsum(count)
    start = 0
    while start < len(count):
        # 2. Take as many points of a as have CHUNK candidates together, at least one.
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + CHUNK, "right")))
        part = count[start:stop]
        # 3. Write out their ranges: low, low + 1, … for each.
        i = np.repeat(np.arange(start, stop), part)
        within = np.arange(len(i)) - np.repeat(np.cumsum(part) - part, part)
        j = within + np.repeat(low[start:stop], part)
        # 4. Keep the near ones.
        dx, dy = np.abs(xa[i] - xs[j]), np.abs(ya[i] - ys[j])
        gap = np.maximum(dx, dy) if chebyshev else np.hypot(dx, dy)
        close = gap <= distance
        yield i[close], order[j[close]]
        start = stop


def by_image(annotations, rows=None):
    """{image: its row indices}, of all rows or of those given."""
    if rows is None:
        rows = np.arange(len(annotations))
    rows = np.asarray(rows)
    images = annotations.image[rows]
    order = np.argsort(images, kind="stable")
    names, starts = np.unique(images[order], return_index=True)
    return dict(zip(names.tolist(), np.split(rows[order], starts[1:])))
