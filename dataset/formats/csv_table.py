"""CSV of points (filename, x, y, label) or of ready-made patches (path, label), with case and
domain if present; candidates need x and y alone.

Commas, semicolons (then also decimal commas) and tabs; Excel's "sep=;" line; UTF-8, UTF-16 and
Windows-1252. x, y with width and height, or two corners, are boxes. Scores go into the columns
probability and class."""

import codecs
import csv
import io
import re
from typing import NamedTuple

from common import UserError
from dataset.formats import files
from dataset.formats.cells import (
    AMBIGUOUS,
    IMAGE_SUFFIXES,
    MITOSIS,
    MITOTIC,
    OTHER,
    Table,
    canonical,
    categories_of,
    class_labels,
    image_name,
    number,
    plain,
    several,
    short,
    shown,
    text,
)

# What a column means → its headers, as `_header` writes them; the first that is present counts.
COLUMNS = {
    "path": ("path", "patch", "patch_path"),
    "filename": (
        "filename",
        "file_name",
        "image",
        "image_name",
        "file",
        "img",
        "img_name",
        "file_path",
        "filepath",
        "image_path",
        "image_file",
        "slide_name",
        "slide_path",
        "slide_file",
        "wsi",
    ),
    "x": ("x", "x_px", "centroid_x_px"),
    "y": ("y", "y_px", "centroid_y_px"),
    "label": ("label", "class"),
    "case": ("case", "case_id", "patient", "patient_id", "slide"),
    "domain": ("domain", "tumortype", "tumor_type", "tumourtype", "tumour_type"),
    "scanner": ("scanner",),
    "species": ("species",),
    "split": ("split",),
    "votes": (),  # of several experts, joined by "+"
    "id": ("id",),
}
OPTIONAL = ("scanner", "species", "split")  # may be blank
# Headers that name the image of a point if no column of "filename" does.
IMAGE_INSTEAD = ("slide", "slide_id", "image_id", "wsi_id")
SIZES = (("width", "height"), ("w", "h"))  # beside x, y: the box's upper left corner
CORNERS = (("xmin", "ymin", "xmax", "ymax"), ("x1", "y1", "x2", "y2"))
# Headers of a detector's own score.
SCORES = ("score", "detector_score", "detector_probability", "confidence")
CELL_NAMES = {"label": "category", "path": "image", "filename": "image"}  # key → Table's column
IMAGE_WORDS = {"image", "img", "file", "filename", "slide", "wsi", "scan", "picture", "bild"}
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
MICRONS = re.compile(r"µm|μm|microns?\b|micromet|\bum\b|_um\b|\bmm\b|_mm\b|millimet", re.IGNORECASE)
# The header of the benchmark's files; those of MIDOG++ say 1 (mitotic figure) and 2 (hard
# negative).
BENCHMARK_HEADER = {"x", "y", "label", "filename", "slide", "split", "tumortype"}


def recognises(source):
    if source.suffix in (".csv", ".tsv", ".txt"):
        return True
    try:
        header = re.split(r"[,;\t]", source.text[:10_000].lstrip().split("\n", 1)[0])
    except UserError:
        return False
    return {"x", "y"} <= {_header(name) for name in header}


def parse_columns(text):
    """ "path=dataset_uid,case=slide,label=final_label" → {"path": "dataset_uid", ...}.

    A name with braces joins columns, "path={dataset}_{uid}.png"; "votes=expert1+expert2" are the
    columns of several experts."""
    columns = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key not in COLUMNS or not value or key in columns:
            raise UserError(
                f"--columns {text}: write path=FILE_COLUMN,case=CASE_COLUMN,label=LABEL_COLUMN; "
                f"the names on the left are {', '.join(COLUMNS)}, each at most once"
            )
        columns[key] = value
    return columns


class Rows(NamedTuple):
    """What a CSV file holds, for writing it back."""

    rows: list
    lines: list  # the line of the file in which each row ends
    delimiter: str
    first: int  # index of the header's row
    column: dict  # what a column means → its index


# ---------------------------------------------------------------- reading


def read(source, columns=None):
    """columns: {"path": "dataset_uid", ...}, see `parse_columns`."""
    path = source.path
    content, note = _decoded(source)
    columns = dict(columns or {})
    votes = columns.pop("votes", None)
    rows, lines, delimiter, first = _rows(path, content, columns)
    header = [name.strip() for name in rows[first]]
    column = _find_columns(path, header, columns)
    table = Table("csv", path, content=Rows(rows, lines, delimiter, first, column))
    if note:
        table.notes.append(note)
    if "path" in column and "x" in column:
        # Candidates are points; training asks the user.
        name = header[column["path"]]
        table.no_training = (
            f"{path}: has path, x and y: say --columns filename={name} if the rows are points in "
            f"images, --columns path={name} if each file is a patch"
        )
        column["filename"] = column.pop("path")
    if "path" in column:
        table.kind = "patches"
    else:
        _check_columns(table, header, column, rows[first + 1 :])
    experts = []
    if votes:
        experts = [_chosen_column(path, header, "votes", name) for name in votes.split("+")]
    _read_rows(table, header, column, experts)
    _drop_repeated_patches(table)
    table.names = {category: category for category in table.categories if category is not None}
    return table


def _decoded(source):
    """(text, note): UTF-8, UTF-16 with its mark, else Windows-1252."""
    try:
        return source.text, None
    except UserError:
        # Characters that are right in UTF-8 beside bytes that are not: a damaged file.
        partly = source.bytes.decode("utf-8", "ignore")
        if source.bytes.startswith(UTF16_MARKS) or not partly.isascii():
            raise
    try:
        return source.bytes.decode("cp1252"), "not in UTF-8: read as Windows-1252"
    except UnicodeDecodeError:
        raise UserError(f"{source.path}: not a text file in UTF-8 or Windows-1252") from None


def _rows(path, content, chosen):
    """(all rows, the line in which each ends, delimiter, index of the header's row)."""
    first = content.lstrip("\r\n").split("\n", 1)[0]
    stated = re.fullmatch(r'"?sep=(.)"?\s*', first, re.IGNORECASE)
    if stated:
        delimiters = [stated[1]]
    else:
        delimiters = sorted(",;\t", key=first.count, reverse=True)
    # The header may hold other delimiters too: the first one that gives the needed columns counts.
    problem = None
    for delimiter in delimiters:
        rows, lines = _parsed(path, content, delimiter)
        filled = [i for i, row in enumerate(rows) if row]
        if stated:
            filled = filled[1:]
        if not filled:
            raise UserError(f"{path}: the file is empty")
        first = filled[0]
        try:
            _join_columns(path, rows, first, chosen)
            _find_columns(path, [name.strip() for name in rows[first]], chosen)
        except UserError as error:
            problem = problem or error
            continue
        return rows, lines, delimiter, first
    raise problem


def _parsed(path, content, delimiter):
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    rows, lines = [], []
    try:
        for row in reader:
            rows.append(row)
            lines.append(reader.line_num)
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.line_num}: not a readable CSV file ({files.one_line(error)})"
        ) from None
    return rows, lines


def _header(name):
    return re.sub(r"[\s_-]+", "_", name.strip().lower())


def _find_columns(path, header, chosen):
    """{"x": index of its column, …}: as chosen by the user, else by the usual names. Boxes have
    "width" and "height", or "right" and "bottom", beside "x" and "y"."""
    lower = [_header(name) for name in header]
    column = {key: _chosen_column(path, header, key, name) for key, name in chosen.items()}
    if "path" in column and "filename" in column:
        raise UserError(
            "--columns: path (ready-made patches) and filename (points in an image) exclude each "
            "other"
        )
    for key, names in COLUMNS.items():
        if key in column or (key == "filename" and "path" in column):
            continue
        if key == "path" and "filename" in column:
            continue
        for name in names:
            index = _index(path, lower, name)
            if index is not None and index not in column.values():
                column[key] = index
                break
    if "path" in chosen:
        column.pop("x", None)
        column.pop("y", None)
    _find_boxes(lower, column)
    if "path" in column and ("x" not in column or "y" not in column):
        column.pop("x", None)
        column.pop("y", None)
        if "label" not in column:
            raise _missing(path, header, ["label"])
        return column
    missing = [key for key in ("x", "y") if key not in column]
    if missing:
        if "path" not in column and "filename" not in column:
            missing.insert(0, "filename")
        raise _missing(path, header, missing)
    if "path" not in column and "filename" not in column:
        for name in IMAGE_INSTEAD:
            index = _index(path, lower, name)
            if index is not None:
                column["filename"] = index
                if column.get("case") == index:
                    del column["case"]
                break
    return column


def _join_columns(path, rows, first, chosen):
    """Append the columns whose names join others, "{dataset}_{uid}.png", to the rows."""
    header = [name.strip() for name in rows[first]]
    for key, name in chosen.items():
        parts = re.split(r"\{([^{}]+)\}", name)  # text, column, text, …, text
        if len(parts) == 1 or name in header:
            continue
        joined = [_chosen_column(path, header, key, part) for part in parts[1::2]]
        rows[first].append(name)
        for row in rows[first + 1 :]:
            if len(row) >= len(header):  # shorter ones are refused where rows are read
                values = [row[i].strip() for i in joined]
                row.append("".join(text + value for text, value in zip(parts[::2], [*values, ""])))
        header.append(name)


def _missing(path, header, keys):
    return UserError(
        f"{path}: no column for {', '.join(keys)} in its header ({shown(', '.join(header))}); "
        "points need filename,x,y,label, patches path,label, candidates at least the columns x and "
        "y; name other columns with --columns"
    )


def _chosen_column(path, header, key, name):
    matches = [i for i, title in enumerate(header) if title == name]
    if not matches:
        matches = [i for i, title in enumerate(header) if title.lower() == name.lower()]
    if len(matches) != 1:
        count = "more than one" if matches else "no"
        raise UserError(
            f"{path}: the header has {count} column {name!r} (--columns {key}={name}); it has "
            f"{shown(', '.join(header))}"
        )
    return matches[0]


def _index(path, lower, name):
    """Index of the column of that name, None if there is none."""
    if lower.count(name) > 1:
        raise UserError(
            f"{path}: the column {name!r} occurs twice in the header; choose with --columns"
        )
    return lower.index(name) if name in lower else None


def _find_boxes(lower, column):
    """Add the other two columns if x and y belong to a box."""
    if "x" in column and "y" in column:
        for width, height in SIZES:
            if width in lower and height in lower:
                column["width"], column["height"] = lower.index(width), lower.index(height)
                return
        return
    for names in CORNERS:
        if set(names) <= set(lower):
            for key, name in zip(("x", "y", "right", "bottom"), names):
                column[key] = lower.index(name)
            return


def _check_columns(table, header, column, rows):
    """UserError for columns of points that cannot be meant as they stand."""
    for key in ("x", "y"):
        name = header[column[key]]
        if MICRONS.search(name):
            raise UserError(
                f"{table.path}: the column {shown(name)} is in µm or mm; px at full resolution are "
                "needed (divide by the image's µm/px)"
            )
    if "filename" not in column:
        _check_no_image_column(table, header, column, rows)
        table.no_training = str(_missing(table.path, header, ["filename"]))
    elif "label" not in column and table.no_training is None:
        table.no_training = str(_missing(table.path, header, ["label"]))


def _check_no_image_column(table, header, column, rows):
    """UserError if a column that is not understood seems to name the images: without it, cells of
    other images would be read from the wrong one."""
    for i, name in enumerate(header):
        if i in column.values():
            continue
        values = {row[i].strip() for row in rows if len(row) > i} - {""}
        if not values or all(re.fullmatch(r"[-+.,\deE]+", value) for value in values):
            continue
        files_alone = all(value.lower().endswith(IMAGE_SUFFIXES) for value in values)
        if files_alone or IMAGE_WORDS & set(_header(name).split("_")):
            raise UserError(
                f"{table.path}: the column {shown(name)} seems to name the images, but not by a "
                "known header; call it filename"
            )


def _read_rows(table, header, column, experts):
    """Add the rows below the header to the table. experts: indices of the columns of votes."""
    rows, lines, delimiter = table.content.rows, table.content.lines, table.content.delimiter
    start = table.content.first + 1
    numeric = [key for key in ("x", "y", "width", "height", "right", "bottom") if key in column]
    lower = [name.lower() for name in header]
    probability = lower.index("probability") if "probability" in lower else None
    named = [_header(name) for name in header]
    scores = [named.index(name) for name in SCORES if name in named][:1]
    if delimiter != ",":
        _check_thousands(table, column, rows[start:])
    checked = {}  # (what, text) → its value: many rows share their case, label and image
    blank = []
    for i in range(start, len(rows)):
        row, where = rows[i], f"{table.path}, line {lines[i]}"
        if not "".join(row).strip():
            continue
        if len(row) != len(header):
            raise UserError(f"{where}: {len(row)} fields, but the header has {len(header)}")
        cell = {"title": f"line {lines[i]}", "place": i}
        if experts:
            cell["votes"] = where, [row[expert] for expert in experts]
        for key in ("case", "domain", *OPTIONAL, "id", "label", "path", "filename"):
            if key in column:
                written = key, row[column[key]]
                if written not in checked:
                    checked[written] = _checked(table, where, *written)
                cell[CELL_NAMES.get(key, key)] = checked[written]
        if cell.get("image") is None:
            blank.append(where)
        else:
            table.sizes.setdefault(cell["image"], None)
        if table.kind == "patches":
            table.add_patch(**cell)
            continue
        numbers = {key: _decimal_point(row[column[key]], delimiter) for key in numeric}
        if len(numbers) > 2:
            cell["extent"] = _centre(where, numbers)
        if probability is not None:
            cell["probability"] = row[probability]
        for index in scores:
            cell["score"] = row[index]
        table.add(where, numbers["x"], numbers["y"], **cell)
    if blank and ("path" in column or len(blank) < len(table)):
        raise UserError(f"{blank[0]}: the image's name is empty")
    if blank:  # a column that is all blank says nothing
        table.no_training = f"{blank[0]}: the image's name is empty"


def _checked(table, where, key, value):
    """A text of a row as the table holds it. What candidates do not need stops training only."""
    if key in ("path", "filename"):
        return image_name(where, value) if value.strip() else None
    if key in OPTIONAL and not value.strip():
        return None
    try:
        value = text(where, value, f"the {key}")
    except UserError as error:
        table.no_training = table.no_training or str(error)
        return None
    return canonical(value) if key == "label" else value


def _decimal_point(value, delimiter):
    """With another delimiter than the comma, "369,5" is 369.5."""
    value = value.strip()
    if delimiter != "," and re.fullmatch(r"[+-]?\d+,\d+", value):
        return value.replace(",", ".")
    return value


def _centre(where, numbers):
    """Turn the corner of a box in `numbers` into its centre → its longer side."""
    for key, value in numbers.items():
        numbers[key] = number(where, value, key)
    if "width" in numbers:
        width, height = numbers["width"], numbers["height"]
    else:
        width, height = numbers["right"] - numbers["x"], numbers["bottom"] - numbers["y"]
    if width < 0 or height < 0:
        raise UserError(f"{where}: the box has a negative size")
    numbers["x"] += width / 2
    numbers["y"] += height / 2
    return max(width, height)


def _check_thousands(table, column, rows):
    """UserError if all coordinates look like 1.369 for 1,369, as spreadsheets with decimal commas
    write them."""
    grouped = 0
    for row in rows:
        for key in ("x", "y"):
            value = row[column[key]].strip() if len(row) > column.get(key, len(row)) else ""
            if re.fullmatch(r"[1-9]\d{0,2}([.,])\d{3}(\1\d{3})*", value):
                grouped += 1
            elif value and not re.fullmatch(r"\d{1,3}", value):
                return
    if grouped:
        raise UserError(
            f"{table.path}: coordinates such as 1.369 may be 1369 or 1.369 px; write them without "
            "a thousands separator"
        )


def _drop_repeated_patches(table):
    """List each patch once. UserError if two rows of one patch differ."""
    if table.kind != "patches":
        return
    rows, repeated, seen = [], 0, {}
    for i, image in enumerate(table.images):
        facts = table.categories[i], table.cases[i], table.domains[i]
        if image not in seen:
            rows.append(i)
        elif seen[image] != facts:
            raise UserError(
                f"{table.path}: {image} occurs twice, with another label, case or domain"
            )
        else:
            repeated += 1
        seen[image] = facts
    table.keep(rows)
    table.extents = [table.extents[i] for i in rows]
    if repeated:
        table.notes.append(f"{several(repeated, 'row')} of patches that are listed twice left out")


# ---------------------------------------------------------------- labels


def labels_of(table, classes=None, profile=None):
    """{label as written: 1 or 0}. {0, 1} is 1 = mitotic figure; {1, 2} only in the benchmark's own
    files. UserError if the labels do not say it."""
    header = [name.strip() for name in table.content.rows[table.content.first]]
    values = set(table.names)
    if classes or profile:
        where = f"{table.path}, column {shown(header[table.content.column['label']])}"
        return class_labels(where, table.names, classes, profile)
    if values <= {"0", "1"}:
        return {"0": 0, "1": 1}
    hint = ""
    if values <= {"1", "2"}:
        if set(header) == BENCHMARK_HEADER or table.path.name == "MIDOGpp.csv":
            return {"1": 1, "2": 0}
        hint = " (1 and 2 mean one thing in MIDOG and another in other data sets)"
    if {plain(value) for value in values} & AMBIGUOUS:
        hint = " (NMF is the non-mitotic figure of some data sets, the normal one of others)"
    labels = {value: _meaning(value) for value in values}
    if None not in labels.values():
        return labels
    listed = ", ".join(short(value) for value in sorted(values)[:8])
    raise UserError(
        f"{table.path}: the labels {listed[:200]} do not say which are mitotic figures{hint}; say "
        "so with --positive VALUE [--negative VALUE], or use 1 (mitotic figure) and 0"
    )


def _meaning(value):
    """1, 0, or None if a word says neither."""
    if value.lower() == "true" or plain(value) in MITOTIC:
        return 1
    if value.lower() == "false" or plain(value) in OTHER:
        return 0
    return None


def own_categories(table, names):
    """[label of names[0], label of names[1]] in the file's own vocabulary, for --relabel."""
    written = {}  # label → how the file writes it: 1.0 for 1
    if "label" in table.content.column:
        for place in table.places:
            label = table.content.rows[place][table.content.column["label"]].strip()
            written.setdefault(canonical(label), label)
    values = set(table.names)
    mitosis = tuple(names) == MITOSIS  # 1 and true are mitotic figures, as in `labels_of`
    if mitosis and values <= {"0", "1"}:
        labels = ["0", "1"]
        if "." in "".join(written.values()):
            labels = ["0.0", "1.0"]
    elif mitosis and {value.lower() for value in values} <= {"true", "false"}:
        labels = ["False", "True"]
        if "".join(values).islower():
            labels = ["false", "true"]
    else:
        labels = categories_of(table, names)
    return [written.get(label, label) for label in labels]


# ---------------------------------------------------------------- writing


def write(table, path, scores, names, categories):
    """The rows with the columns probability and class; categories: what the column of labels
    becomes, [label 0's, label 1's], or None to leave it."""
    column, first = table.content.column, table.content.first
    rows = [list(row) for row in table.content.rows]
    header = rows[first]
    lower = [name.strip().lower() for name in header]
    places = {}
    for name in ("probability", "class"):
        if name in lower:
            places[name] = lower.index(name)
            continue
        places[name] = len(header)
        header.append(name)
        for row in rows[first + 1 :]:
            if row:
                row.append("")
    for place, score in zip(table.places, scores):
        if score is None:
            continue
        probability, label = score
        rows[place][places["probability"]] = repr(probability)
        rows[place][places["class"]] = names[label]
        if categories is not None and "label" in column:
            rows[place][column["label"]] = categories[label]
    text = io.StringIO()
    csv.writer(text, delimiter=table.content.delimiter, lineterminator="\n").writerows(rows)
    files.write_text(path, text.getvalue())


def create(path, pictures, cells, names):
    """A new table of cells; see `fresh`."""
    header = ["filename", "x", "y", "id", "label", "score", "probability", "class"]
    rows = []
    for cell in cells:
        probability = label = ""
        if cell.score is not None:
            probability, label = repr(cell.score[0]), names[cell.score[1]]
        row = [pictures[cell.picture].name, cell.x, cell.y, cell.id, cell.own, cell.detector]
        rows.append([*row, probability, label])
    for name in ("id", "label", "score"):  # of which no cell has any
        place = header.index(name)
        if all(row[place] is None for row in rows):
            header.pop(place)
            for row in rows:
                row.pop(place)
    delimiter = ","
    if ".tsv" in path.suffixes:
        delimiter = "\t"
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator="\n").writerows([header, *rows])
    files.write_text(path, text.getvalue())
