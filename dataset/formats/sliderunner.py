"""SlideRunner's SQLite databases, old and new schema. Cells are spots (types 1 and 4); areas,
polygons and circles are not. The class is agreedClass.

Scores go into a table of their own, Predictions, in a copy of the database."""

import sqlite3

import common
from common import UserError
from dataset.formats import files
from dataset.formats.cells import (
    Table,
    canonical,
    categories_of,
    image_name,
    key,
    short,
    size_of,
    text,
)

NEEDED = {
    "slides": {"uid", "filename"},
    "annotations": {"uid", "slide", "type", "agreedclass"},
    "annotations_coordinates": {"coordinatex", "coordinatey", "annoid"},
    "classes": {"uid", "name"},
}
SHAPES = {2: "area", 3: "polygon", 5: "circle"}


def recognises(source):
    return source.is_sqlite or source.suffix in (".sqlite", ".sqlite3", ".db")


def read(source):
    if source.packed:
        raise UserError(f"{source.path}: a packed database cannot be read; unpack it (gunzip)")
    if not source.is_sqlite:
        raise UserError(f"{source.path}: not an SQLite database")
    with files.sqlite(source.path) as connection:
        return _read(source.path, connection)


def _columns(path, connection):
    """{table: its columns}, in lower case; UserError if SlideRunner's are not among them.

    Views, virtual tables and generated columns do not count: they compute what they hold, at any
    length."""
    columns = {}
    for name, definition in connection.execute(
        "SELECT name, sql FROM sqlite_master WHERE type = 'table'"
    ).fetchall():
        virtual = str(definition).lstrip().upper().startswith("CREATE VIRTUAL")
        if isinstance(name, str) and name.lower() in NEEDED and not virtual:
            # table_info leaves generated columns out; old databases lack guid, deleted and others.
            rows = connection.execute(f"PRAGMA table_info('{name}')")
            columns[name.lower()] = {row[1].lower() for row in rows if isinstance(row[1], str)}
    for name, needed in NEEDED.items():
        if name not in columns:
            raise UserError(
                f"{path}: not a SlideRunner database with cells: it lacks the table {name}"
            )
        missing = ", ".join(sorted(needed - columns[name]))
        if missing:
            raise UserError(
                f"{path}: not a SlideRunner database with cells: it lacks {missing} in the table "
                f"{name}"
            )
    return columns


def _read(path, connection):
    columns = _columns(path, connection)
    table = Table("sqlite", path)
    for uid, name in connection.execute("SELECT uid, name FROM Classes"):
        table.names[canonical(uid)] = name if isinstance(name, str) else None
    slides = _read_slides(table, connection, {"width", "height"} <= columns["slides"])
    alive = ""
    if "deleted" in columns["annotations"]:
        alive = "AND coalesce(a.deleted, 0) = 0"
    _count_regions(table, connection, alive)
    _read_spots(table, connection, slides, alive)
    used = {*table.categories, *(category for category, _ in table.damaged)}
    if not used - {None, "0"}:
        listed = ", ".join(short(name) for name in list(table.names.values())[:8]) or "none"
        table.no_training = (
            f"{path}: holds no cell labels (points with an agreed class), only areas; its classes "
            f"are {listed}"
        )
    return table


def _count_regions(table, connection, alive):
    for shape, agreed, count in connection.execute(
        "SELECT a.type, a.agreedClass, count(*) FROM Annotations a "
        f"WHERE a.type NOT IN (1, 4) {alive} GROUP BY a.type, a.agreedClass"
    ):
        category = key(agreed)
        if category is None or category == "0" and table.names.get("0") is None:
            category = SHAPES.get(shape, "other shape")
        table.regions[category] += count


def _read_spots(table, connection, slides, alive):
    """Add the spots that are not deleted, with or without an agreed class."""
    for uid, slide, agreed, x, y, positions in connection.execute(
        "SELECT a.uid, a.slide, a.agreedClass, min(c.coordinateX), min(c.coordinateY), count(*) "
        "FROM Annotations a LEFT JOIN Annotations_coordinates c ON c.annoId = a.uid "
        f"WHERE a.type IN (1, 4) {alive} GROUP BY a.uid ORDER BY a.uid"
    ):
        where = f"{table.path}, annotation {short(uid)}"
        category = key(agreed)
        if category is not None:
            # Ids that only the annotations use have no name: a profile or the user may mean them.
            table.names.setdefault(category, None)
        row = {"id": text(where, uid, "the id"), "title": uid, "place": uid, "category": category}
        try:
            if positions > 1:
                raise UserError(
                    f"{where}: a spot has one position, this one has more: the database is damaged"
                )
            if slide not in slides:
                raise UserError(
                    f"{where}: is on slide {short(slide)}, which the database does not list"
                )
            table.add(where, x, y, image=slides[slide], **row)
        except UserError as error:
            table.damaged.append((category, str(error)))


def _read_slides(table, connection, sized):
    """{uid: file name}; sizes go into the table."""
    slides = {}
    size = "width, height" if sized else "NULL, NULL"
    for uid, filename, width, height in connection.execute(
        f"SELECT uid, filename, {size} FROM Slides"
    ):
        name = image_name(f"{table.path}, slide {short(uid)}", filename)
        if name in table.sizes:
            raise UserError(f"{table.path}: the slide {name} occurs twice")
        slides[uid] = name
        table.sizes[name] = size_of(width, height)
    return slides


# ---------------------------------------------------------------- writing


def write(table, path, scores, names, categories):
    """A copy of the database with the table Predictions, which SlideRunner ignores. categories:
    what agreedClass becomes, [label 0's, label 1's], or None to leave it."""
    numbers = categories
    if numbers is None:
        numbers = [_number_of(table, name) for name in names]
    rows = []
    for uid, score in zip(table.places, scores):
        if score is not None:
            probability, label = score
            rows.append((uid, probability, names[label], numbers[label]))
    with common.atomic(path) as temporary, files.sqlite(table.path) as source:
        copy = sqlite3.connect(temporary)
        try:
            source.backup(copy)
            files.guard(copy)
            _add_predictions(copy, rows)
            if categories is not None:
                _relabel(copy, [(category, uid) for uid, _, _, category in rows])
            copy.commit()
        except sqlite3.Error as error:
            if "full" in str(error):
                raise OSError(28, "disk full", str(path)) from None
            raise UserError(
                f"{table.path}: cannot be copied with its predictions ({files.one_line(error)})"
            ) from None
        finally:
            copy.close()


def _number_of(table, name):
    """The database's class of that name, None if it has none or several."""
    try:
        return categories_of(table, [name])[0]
    except UserError:
        return None


def _add_predictions(connection, rows):
    connection.execute("DROP TABLE IF EXISTS Predictions")
    connection.execute(
        "CREATE TABLE Predictions "
        "(annoId INTEGER PRIMARY KEY, probability REAL, class TEXT, classId INTEGER)"
    )
    connection.executemany("INSERT INTO Predictions VALUES (?, ?, ?, ?)", rows)


def _relabel(connection, rows):
    """Set agreedClass for rows of (class, uid). The database's own triggers must not run: they are
    taken out for the update and put back after it."""
    triggers = connection.execute(
        "SELECT name, sql FROM sqlite_master WHERE type = 'trigger'"
    ).fetchall()
    for name, _ in triggers:
        quoted = '"' + name.replace('"', '""') + '"'
        connection.execute(f"DROP TRIGGER {quoted}")
    connection.executemany("UPDATE Annotations SET agreedClass = ? WHERE uid = ?", rows)
    for _, definition in triggers:
        connection.execute(definition)
