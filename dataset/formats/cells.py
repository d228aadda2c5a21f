"""The table of cells that every format is read into, the rule what a cell is, class names, and
checks of single values.

Labels are 1 and 0; in the mitosis data sets mitotic figure and hard negative (the look-alike). They
are never guessed: they follow from class names that everybody reads the same way, from a named
profile, or from what the user says. What the two are called comes with the data (`class_names`)."""

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from common import UserError

MAX_COORDINATE = 1e7  # px; the largest scans have some 4e5
MAX_TEXT = 512  # characters of a name, case, domain or id
MAX_JOINED = 4  # classes of one label whose names are written out
# px, side of a shape's bounding box. Boxes of mitotic figures have 50 px; 256 px are 64 µm at 40x.
MAX_CELL = 256

# What the mitosis data sets call the labels 0 and 1, and so does all that does not say it: runs and
# models of before class names came with the data.
MITOSIS = ("hard negative", "mitotic figure")

# SlideRunner's class ids differ between data sets: profile → (mitotic figure, hard negative).
PROFILES = {
    "ccmct": ("2", "7"),
    "cmc": ("2", "1"),
    "midog": ("1", "2"),
    "mitos2014": ("1", "2"),
    "tupac": ("1", "2"),
}

# Class names whose meaning is beyond doubt, as `plain()` writes them.
MITOTIC = {
    "mitotic figure",
    "mitotic figures",
    "mitosis",
    "mitoses",
    "mitose",
    "mitosen",
    "mitotic",
    "mitotic cell",
    "mf",
}
OTHER = {
    "not mitotic figure",
    "not mitotic figures",
    "non mitotic figure",
    "non mitotic figures",
    "nonmitosis",
    "non mitosis",
    "nonmitotic",
    "non mitotic",
    "not mitotic",
    "non mitotic cell",
    "hard negative",
    "hard negatives",
    "hard negative look alike",
    "hard negative lookalike",
    "look alike",
    "look alikes",
    "lookalike",
    "lookalikes",
    "mitotic figure look alike",
    "mitotic figure lookalike",
    "imposter",
    "impostor",
    "imposters",
    "impostors",
    "no mitosis",
    "no mitotic figure",
}
# Names that mean one thing here and the opposite there: NMF is the non-mitotic figure of some and
# the normal mitotic figure of MIDOG 2025.
AMBIGUOUS = {"nmf", "nmfs"}
# A class whose name has one of these words marks regions, whatever their size.
REGION_WORDS = {"region", "regions", "roi", "rois", "area", "areas", "hpf", "hpfs", "tissue"}

IMAGE_SUFFIXES = (
    ".svs",
    ".tiff",
    ".tif",
    ".png",
    ".jpg",
    ".jpeg",
    ".ndpi",
    ".mrxs",
    ".scn",
    ".vms",
    ".bif",
    ".dcm",
    ".svslide",
    ".bmp",
)

# Control characters, halves of surrogate pairs, and invisible ones that change a line's direction.
UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)

COLUMNS_OF_A_CELL = (
    "ids",
    "images",
    "cases",
    "domains",
    "scanners",
    "species",
    "splits",
    "votes",
    "shares",
    "x",
    "y",
    "categories",
    "labels",
    "places",
    "titles",
    "probabilities",
    "scores",
)


@dataclass
class Table:
    """The cells of an annotation file: columns of equal length, and what the file says of images.

    x, y: the centre, in px of level 0 unless `unit` or `relative_to_bounds` say otherwise; NaN for
    ready-made patches. categories: the class of each cell as the file writes it, None if it has
    none. labels: 1 or 0, filled by `labelled`. places: where in `content` each cell was read, for
    writing scores back; only the format's own file knows what it means.
    """

    format: str  # key of formats.FORMATS
    path: Path
    kind: str = "points"  # or "patches": the image is the patch, x and y are NaN
    unit: str = "px"  # or "mm"
    image_by_file: bool = False  # the file names no image: it is called after it
    relative_to_bounds: bool = False  # QuPath: relative to openslide.bounds-x, -y
    ids: list = field(default_factory=list)  # the file's; None if it has none
    images: list = field(default_factory=list)  # file name, relative or absolute path, or None
    cases: list = field(default_factory=list)  # or None
    domains: list = field(default_factory=list)  # or None
    scanners: list = field(default_factory=list)  # or None
    species: list = field(default_factory=list)  # or None
    splits: list = field(default_factory=list)  # the data's own: "train", "test", …, or None
    votes: list = field(default_factory=list)  # (where, labels that the experts gave), or None
    shares: list = field(default_factory=list)  # of votes for label 1, filled by `labelled`
    x: list = field(default_factory=list)
    y: list = field(default_factory=list)
    categories: list = field(default_factory=list)
    labels: list = field(default_factory=list)
    places: list = field(default_factory=list)
    titles: list = field(default_factory=list)  # how messages call each cell
    probabilities: list = field(default_factory=list)  # as classify.py wrote them; not checked
    scores: list = field(default_factory=list)  # the detector's own, of any scale; not checked
    extents: list = field(default_factory=list)  # longer side of the cell's shape, px

    names: dict = field(default_factory=dict)  # class as in `categories` → its name, or None
    sizes: dict = field(
        default_factory=dict
    )  # image → (width, height) or None; unlabelled ones too
    image_domain: dict = field(default_factory=dict)  # image → tumour type
    mpp: dict = field(default_factory=dict)  # image → µm/px
    notes: list = field(default_factory=list)  # what a user should know
    licence: str = None
    classes: tuple = MITOSIS  # names of the labels 0 and 1
    content: object = None  # what the file held, for writing it back
    given_ids: list = None  # of candidates, whose `ids` are their titles: the file's, or None

    regions: Counter = field(default_factory=Counter)  # class → number of shapes that are no cells
    damaged: list = field(default_factory=list)  # (class, message) of records that cannot be read
    no_training: str = None  # why the file is no annotation file: labels or images are missing
    no_candidates: str = None  # why scores could not be written into the file

    def __len__(self):
        return len(self.x)

    def add(self, where, x, y, *, title=None, extent=0.0, **columns):
        """Append a cell. x, y: checked here. columns: the rest of a row, by its singular name."""
        x, y = number(where, x, "x"), number(where, y, "y")  # both, before any column grows
        self.x.append(x)
        self.y.append(y)
        self._append(title, extent, columns)

    def add_patch(self, *, title=None, **columns):
        self.x.append(math.nan)
        self.y.append(math.nan)
        self._append(title, 0.0, columns)

    def _append(self, title, extent, columns):
        self.ids.append(columns.get("id"))
        self.images.append(columns.get("image"))
        self.cases.append(columns.get("case"))
        self.domains.append(columns.get("domain"))
        self.scanners.append(columns.get("scanner"))
        self.species.append(columns.get("species"))
        self.splits.append(columns.get("split"))
        self.votes.append(columns.get("votes"))
        self.categories.append(columns.get("category"))
        self.places.append(columns.get("place"))
        self.probabilities.append(columns.get("probability"))
        self.scores.append(columns.get("score"))
        self.titles.append(shown(title))
        self.extents.append(extent)

    def keep(self, rows):
        """Reduce the columns to these rows."""
        for name in COLUMNS_OF_A_CELL:
            column = getattr(self, name)
            if column:
                setattr(self, name, [column[i] for i in rows])

    def extend(self, other):
        """Append the cells of another file of the same format."""
        for name in (*COLUMNS_OF_A_CELL, "extents", "damaged"):
            getattr(self, name).extend(getattr(other, name))
        for name in ("names", "sizes", "image_domain", "mpp"):
            getattr(self, name).update(getattr(other, name))
        self.regions.update(other.regions)

    def category_name(self, category):
        """A class as messages call it."""
        if category is None:
            return "unclassified"
        name = self.names.get(category)
        return shown(name if name is not None else category)

    def counted(self, categories):
        """ "Tumor: Mitosis 57, ROI 3" of a list of classes, the most frequent first."""
        counts = Counter(self.category_name(category) for category in categories).most_common(8)
        return ", ".join(f"{name} {count:,}" for name, count in counts)


# ---------------------------------------------------------------- what a cell is


def drop_regions(table):
    """Leave out what is no cell: shapes much larger than one, and all shapes of a class that marks
    regions. They are counted with their class."""
    shapes, large = Counter(), Counter()
    for category, extent in zip(table.categories, table.extents):
        shapes[category] += extent > 0
        large[category] += extent > MAX_CELL
    region_classes = set()
    for category in shapes:
        name = plain(table.category_name(category))
        if category is None or name in MITOTIC | OTHER:
            continue
        if 2 * large[category] > shapes[category] or REGION_WORDS & set(name.split()):
            region_classes.add(category)
    cells = []
    for i, (category, extent) in enumerate(zip(table.categories, table.extents)):
        if extent > MAX_CELL or extent > 0 and category in region_classes:
            table.regions[category] += 1
        else:
            cells.append(i)
    table.keep(cells)
    table.extents = []
    if table.regions:
        regions = table.counted(table.regions.elements())
        table.notes.append(
            f"{several(table.regions.total(), 'shape')} left out: regions or lines, not cells "
            f"({regions})"
        )


def check_scale(table):
    """UserError if all positions lie between 0 and 1: a fraction of the image's size, not px."""
    if table.kind != "points" or table.unit != "px":
        return
    values = [*table.x, *table.y]
    fractions = any(value != int(value) for value in values)
    if fractions and all(0 <= value <= 1 for value in values):
        raise UserError(
            f"{table.path}: all coordinates lie between 0 and 1, as fractions of the image's size; "
            "px at full resolution are needed"
        )


def labelled(table, labels):
    """The table reduced to the cells of the classes in `labels` ({class: 1 or 0}), with their
    labels; what is left out is counted. UserError: an unreadable record of these classes."""
    for category, message in table.damaged:
        if category in labels:
            raise UserError(message)
    left_out = [category for category, _ in table.damaged]
    rows = []
    for i, category in enumerate(table.categories):
        if category in labels:
            rows.append(i)
        else:
            left_out.append(category)
    # SlideRunner's class 0 is "no agreed class" unless the database gives it a name.
    unclassified = [c for c in left_out if c is None or c == "0" and table.names.get(c) is None]
    others = len(left_out) - len(unclassified)
    if unclassified:
        without = several(len(unclassified), "annotation")
        table.notes.append(f"{without} without a class left out")
    if others:
        named = table.counted([c for c in left_out if c is not None])
        table.notes.append(f"{several(others, 'annotation')} of other classes left out ({named})")
    table.keep(rows)
    table.labels = [labels[category] for category in table.categories]
    if any(votes is not None for votes in table.votes):
        table.shares = [
            share_of(*votes, labels, label) for votes, label in zip(table.votes, table.labels)
        ]
    if not rows:
        named = ", ".join(shown(table.category_name(category)) for category in list(labels)[:8])
        message = f"{table.path}: holds no annotation of its classes with a label ({named})"
        if table.regions:
            message += f"; shapes of more than {MAX_CELL} px count as regions, not as cells"
        raise UserError(message)
    return table


def share_of(where, votes, labels, label):
    """Share of the experts' votes that are for label 1; without any vote, the label itself.

    votes: labels as the file writes them, True and False, or 1 and 0; blank: no vote."""
    given = []
    for vote in votes:
        if not vote.strip():
            continue
        vote = canonical(vote)
        if vote in labels:
            given.append(labels[vote])
        elif vote.lower() in ("true", "false", "1", "0"):
            given.append(int(vote.lower() in ("true", "1")))
        else:
            raise UserError(
                f"{where}: the vote {short(vote)} is none of the labels "
                f"{', '.join(map(shown, labels))} (or True and False)"
            )
    return sum(given) / len(given) if given else float(label)


def unlabelled(table):
    """The table with all its cells, whatever their class. UserError: a record that cannot be read.
    One of a class that by its name is neither mitotic figure nor hard negative is left out, and so
    is one without a class among classified ones."""
    if table.no_candidates:
        raise UserError(table.no_candidates)
    classified = any(category is not None for category in table.categories)
    left_out = []
    for category, message in table.damaged:
        if category is None:
            needed = not classified
        else:
            name = table.names.get(category)
            needed = name is None or plain(name) in MITOTIC | OTHER
        if needed:
            raise UserError(message)
        left_out.append(category)
    if left_out:
        table.notes.append(
            f"{several(len(left_out), 'record')} without a valid place left out "
            f"({table.counted(left_out)})"
        )
    return table


def unique_ids(table, file):
    """The file's ids if they are unique, else "<file>#<row>"."""
    if len(set(table.ids)) == len(table.ids) and None not in table.ids:
        return
    if None not in table.ids:
        table.notes.append(
            "ids occur more than once in the file: annotations are numbered by their row instead"
        )
    table.ids = [f"{file}#{row}" for row in range(1, len(table.ids) + 1)]


# ---------------------------------------------------------------- class names


def parse_classes(text):
    """ "mitotic=2,other=7" → {"mitotic": ["2"], "other": ["7"]}; a key may be repeated for several
    classes.
    """
    classes = {"mitotic": [], "other": []}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key not in classes or not value:
            raise UserError(f"--classes {text}: write mitotic=2,other=7 (class ids or names)")
        classes[key].append(value)
    if not classes["mitotic"] or not classes["other"]:
        raise UserError(f"--classes {text}: both are needed, as in mitotic=2,other=7")
    if {plain(v) for v in classes["mitotic"]} & {plain(v) for v in classes["other"]}:
        raise UserError(f"--classes {text}: a class is named on both sides")
    return classes


def plain(name):
    """A class name without case, punctuation and repeated blanks: "Non-mitotic  figure" → "non
    mitotic figure".
    """
    return " ".join(re.findall(r"\w+", str(name).replace("_", " ").lower()))


def class_labels(where, names, classes=None, profile=None):
    """{class: 1 or 0} for {class id: name or None}: by the user's word, by profile, or by the
    names. Classes that are neither are left out. UserError if it does not follow which is which."""
    if profile:
        classes = {"mitotic": [PROFILES[profile][0]], "other": [PROFILES[profile][1]]}
    if classes:
        flag = f"--profile {profile}" if profile else "--classes"
        return _chosen_labels(where, names, classes, flag)
    ambiguous = [name for name in names.values() if name is not None and plain(name) in AMBIGUOUS]
    if ambiguous:
        raise UserError(
            f"{where}: {shown(ambiguous[0])} is the non-mitotic figure of some data sets and the "
            "normal mitotic figure of others; say which class is which with --classes "
            f"mitotic=NAME,other=NAME (classes: {listed(names)})"
        )
    labels = {}
    for category, name in names.items():
        if name is None:
            continue
        if plain(name) in MITOTIC:
            labels[category] = 1
        elif plain(name) in OTHER:
            labels[category] = 0
    if len(set(labels.values())) < 2:
        raise UserError(
            f"{where}: its classes ({listed(names)}) do not say which are mitotic figures and "
            "which hard negatives; say so with --classes mitotic=ID,other=ID or --profile "
            f"{'|'.join(PROFILES)}"
        )
    return labels


def _chosen_labels(where, names, classes, flag):
    """class_labels for what the user says: {"mitotic": [...], "other": [...] or None}."""
    labels, by_number = {}, set()
    for label, values in ((1, classes["mitotic"]), (0, classes["other"] or ())):
        for value in values:
            # An id counts before a name: "2" means class 2 even if some class is called "2".
            matches = [category for category in names if category == canonical(value)]
            if not matches:
                matches = [
                    category
                    for category, name in names.items()
                    if name is not None and plain(name) == plain(value)
                ]
            if not matches:
                raise UserError(
                    f"{where}: there is no class {value!r}; its classes are {listed(names)}"
                )
            for category in matches:
                if plain(value) != plain(names[category]):
                    by_number.add(category)
                if labels.setdefault(category, label) != label:
                    raise UserError(f"{where}: class {category} would have both labels, 1 and 0")
    if classes["other"] is None:
        rest = [category for category in names if category not in labels]
        if len(rest) != 1:
            raise UserError(
                f"{where}: besides {', '.join(classes['mitotic'])} there are {len(rest)} other "
                f"classes (classes: {listed(names)}); name those of label 0 with --negative"
            )
        labels[rest[0]] = 0
    # A number may be a slip; who names a class in words means it ("mitosis" against "atypical
    # mitosis").
    for category in sorted(by_number):
        opposite = OTHER if labels[category] else MITOTIC
        if names[category] is not None and plain(names[category]) in opposite:
            raise UserError(
                f"{where}: its class {category[:20]} is called {short(names[category])}, the "
                f"opposite of what {flag} says; its classes are {listed(names)}"
            )
    return labels


def class_names(names, labels, classes=None):
    """(name of label 0, name of label 1) as the data say it.

    names: {class id: name or None}; labels: {class: 1 or 0}; classes: what the user says, see
    formats.read, or None. The mitosis data sets write theirs in many ways, which all become
    MITOSIS, and so do classes without a name that --classes calls mitotic and other."""
    sides = [[c for c, label in labels.items() if label == side] for side in (0, 1)]
    if classes is None or all(
        _is_mitosis(names, side, meaning, classes) for side, meaning in zip(sides, (OTHER, MITOTIC))
    ):
        return MITOSIS
    joined = []
    for side in sides:
        called = list(dict.fromkeys(_printable(names.get(c)) or _printable(c) for c in side))
        if len(called) > MAX_JOINED:
            called[MAX_JOINED - 1 :] = [f"{len(called) - MAX_JOINED + 1} others"]
        joined.append(" or ".join(called))
    if joined[0].casefold() == joined[1].casefold():  # told apart by their ids alone
        joined = [f"{name} ({_printable(side[0])})" for name, side in zip(joined, sides)]
    return tuple(joined)


def _is_mitosis(names, side, meaning, classes):
    """Whether all classes of one label are what `meaning` says, or have no name and were called so
    by --classes."""
    for category in side:
        name = names.get(category)
        word = name if name is not None and name.strip() else category
        number = re.fullmatch(r"[+-]?[\d.]*|true|false", canonical(word).lower(), re.ASCII)
        called_so = number and not classes.get("own_names")
        if not called_so and plain(word) not in meaning:
            return False
    return True


def _printable(name):
    """A class name as it can stand in every output: one line, printable, of at most 60 characters;
    "" if nothing is left."""
    words = " ".join(str(name if name is not None else "").split())
    return shown("".join(c if c.isprintable() else "?" for c in words))


def are_class_names(value):
    """Whether a value of a JSON file is a pair of class names, [of label 0, of label 1]."""
    if not isinstance(value, list) or len(value) != 2:
        return False
    texts = all(isinstance(name, str) and name.isprintable() and name.strip() for name in value)
    return texts and value[0] != value[1]


def categories_of(table, names):
    """[class of names[0], class of names[1]]: the file's own classes for the two class names of a
    model, for --relabel. UserError if the file does not have them beyond doubt."""
    result = []
    for model_name in names:
        synonyms = {plain(model_name)}
        for meaning in (MITOTIC, OTHER):
            if plain(model_name) in meaning:
                synonyms = meaning
        exact, similar = [], []
        for category, name in table.names.items():
            if name is None:
                continue
            if plain(name) == plain(model_name):
                exact.append(category)
            elif plain(name) in synonyms:
                similar.append(category)
        matches = exact or similar
        if len(matches) != 1:
            raise UserError(
                f"{table.path}: --relabel cannot tell which of its classes "
                f"({listed(table.names)}) is {shown(model_name)}; without it, the class is written "
                "beside the probability"
            )
        result.append(matches[0])
    return result


def listed(names):
    """ "1 mitotic figure, 2 hard negative": {class id: name} for a message."""
    parts = []
    for category, name in sorted(names.items())[:8]:
        if name is None or name == category:
            parts.append(shown(category)[:40])
        else:
            parts.append(f"{shown(category)[:20]} {short(name)}")
    if len(names) > 8:
        parts.append("…")
    return ", ".join(parts) or "none"


def canonical(value):
    """A class id or label as text, written in one way: 1, "1", "1.0", " 1 " → "1"."""
    text = str(value).strip()
    if re.fullmatch(r"[+-]?\d{1,15}(\.0*)?", text, re.ASCII):
        return str(int(text.split(".")[0]))
    return text


# ---------------------------------------------------------------- values


def text(where, value, what):
    """A short printable string, or UserError."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise UserError(f"{where}: {what} is {short(value)}, a text is needed")
    try:
        value = str(value).strip()
    except ValueError:  # an integer with thousands of digits
        raise UserError(f"{where}: {what} is too long") from None
    if not value:
        raise UserError(f"{where}: {what} is empty")
    if len(value) > MAX_TEXT:
        raise UserError(f"{where}: {what} is longer than {MAX_TEXT} characters")
    if UNPRINTABLE.search(value):
        raise UserError(f"{where}: {what} {short(value)} holds control characters")
    return value


def number(where, value, what):
    """A finite coordinate in pixels, or UserError."""
    try:
        if isinstance(value, str):
            if "_" in value or len(value) > 64:
                raise ValueError
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError
        value = float(value)
    except (ValueError, OverflowError):
        raise UserError(f"{where}: {what} is {short(value)}, a number is needed") from None
    if not math.isfinite(value) or abs(value) > MAX_COORDINATE:
        raise UserError(f"{where}: {what} is {value:g}, no position in an image")
    return value


def image_name(where, value):
    """The image's name in an annotation file: a file name, a path below the folder of images, or an
    absolute path (whether that lies in the folder is for `annotations` to check). UserError: it is
    no name, or climbs out of a folder by ".."."""
    value = text(where, value, "the image's name")
    name = value.replace("\\", "/")
    parts = name.split("/")
    if ".." in parts:
        raise UserError(
            f"{where}: the image's name {short(value)} leads out of the folder of images"
        )
    if any(len(part.encode()) > 255 for part in parts):
        raise UserError(f"{where}: the image's name {short(value)} is too long for a file")
    root = ""
    if value.startswith("\\\\"):  # a share of Windows: \\server\slides\a.svs
        root = "//"
    elif name.startswith("/"):
        root = "/"
    parts = [part for part in parts if part not in ("", ".")]
    if not parts:
        raise UserError(f"{where}: the image's name is empty")
    return root + "/".join(parts)


def is_windows_path(name):
    """Whether an image's name is an absolute path of Windows: "D:/a.svs", "//server/a.svs"."""
    return name.startswith("//") or re.match(r"[A-Za-z]:", name) is not None


def relative_name(where, value):
    """image_name for names that must lie below a folder."""
    name = image_name(where, value)
    if name.startswith("/") or is_windows_path(name):
        raise UserError(f"{where}: the image {short(value)} leads out of the folder of images")
    return name


def positive_number(value):
    """value as a positive finite float, else None: for hints such as µm/px and image sizes."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) and 0 < value <= MAX_COORDINATE else None


def size_of(width, height):
    """(width, height) in whole px, or None if they are no plausible size of an image."""
    width, height = positive_number(width), positive_number(height)
    if width is None or height is None or min(width, height) < 1:
        return None
    return int(width), int(height)


def several(number, noun):
    """ "1 image", "1,200 images"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def key(value):
    """An id of JSON or SQLite as a dictionary key; 1 and "1" and 1.0 are one id, true is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return canonical(value)
    except ValueError:
        return None


def short(value):
    """A value for a message: its repr, at most 60 characters; control characters are escaped."""
    if not isinstance(value, (str, int, float, type(None))):
        return type(value).__name__
    try:
        shortened = repr(value)
    except ValueError:
        return "a very long number"
    return shortened if len(shortened) <= 60 else shortened[:57] + "..."


def shown(value):
    """A name for a message, without quotes: control characters become question marks."""
    try:
        name = str(value)
    except ValueError:
        return "a very long number"
    name = UNPRINTABLE.sub("?", name)
    return name if len(name) <= 60 else name[:57] + "..."
