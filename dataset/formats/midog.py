"""MIDOG's JSON: like COCO, but bbox = [x1, y1, x2, y2]; the centre is the mean of the corners.

COCO's [x, y, width, height] is recognised by the annotations' `area`. Scores are written into the
annotations as "probability" and "class"."""

from common import UserError
from dataset.formats import files, fresh
from dataset.formats.cells import (
    MAX_TEXT,
    Table,
    canonical,
    image_name,
    key,
    number,
    positive_number,
    short,
    size_of,
    text,
)


def recognises(source):
    return (
        source.suffix == ".json"
        and isinstance(source.json, dict)
        and bool({"images", "annotations", "categories"} & set(source.json))
    )


def read(source):
    """The annotations of all categories."""
    path, content = source.path, source.json
    table = Table("midog", path, content=content)
    images = _read_images(table, _records(path, content, "images"))
    _read_categories(table, content)
    annotations = _records(path, content, "annotations")
    coco = _boxes_are_coco(path, annotations)
    if coco:
        table.notes.append("boxes are [x, y, width, height], as their area says")
    for i, record in enumerate(annotations):
        where = f"{path}, annotation {i + 1}"
        category = _category(table, where, record)
        row = {"category": category, "place": i, "title": i + 1}
        if record.get("id") is not None:
            row["id"] = text(where, key(record["id"]), "the id")
            row["title"] = row["id"]
        try:
            _read_annotation(table, where, record, images, coco, row)
        except UserError as error:
            table.damaged.append((category, str(error)))
    _read_facts(table, content)
    return table


def _records(path, content, name):
    """content[name] as a list of objects."""
    records = content.get(name)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{path}: a MIDOG file has a list of objects called {name!r}")
    return records


def _read_images(table, records):
    """{image id: (name, case)}; sizes, tumour types and µm/px go into the table."""
    images = {}
    for i, record in enumerate(records):
        where = f"{table.path}, image {i + 1}"
        image_id, name = key(record.get("id")), image_name(where, record.get("file_name"))
        if image_id is None:
            raise UserError(f"{where}: the id {short(record.get('id'))} is no id")
        if image_id in images:
            raise UserError(f"{where}: the id {short(image_id)} occurs twice")
        if name in table.sizes:
            raise UserError(f"{where}: {name} occurs twice")
        case = record.get("case")
        if case is not None:
            case = text(where, case, "the case")
        images[image_id] = name, case
        table.sizes[name] = size_of(record.get("width"), record.get("height"))
        tumour = record.get("tumor_type", record.get("domain"))
        if tumour is not None:
            table.image_domain[name] = text(where, tumour, "the tumour type")
        mpp = positive_number(record.get("mpp"))
        if mpp is not None:
            table.mpp[name] = mpp
    return images


def _read_categories(table, content):
    """The classes' names; candidates need none."""
    try:
        for record in _records(table.path, content, "categories"):
            category = key(record.get("id"))
            if category is None or category in table.names:
                raise UserError(f"{table.path}: a category's id is missing or occurs twice")
            name = record.get("name")
            table.names[category] = name if isinstance(name, str) else None
    except UserError as error:
        if "categories" in content:
            raise
        table.no_training = str(error)


def _category(table, where, record):
    value = record.get("category_id")
    if value is None:
        return None
    category = key(value)
    if category not in table.names and not table.no_training:
        table.no_training = f"{where}: category_id {short(value)} is not among the categories"
    return category


def _boxes_are_coco(path, annotations):
    """Whether the boxes are [x, y, width, height]: if `area` is width × height of that reading and
    not of the other. UserError if annotations of the file contradict each other."""
    as_corners = as_coco = 0
    for record in annotations:
        area, box = positive_number(record.get("area")), record.get("bbox")
        if area is None or not isinstance(box, list) or len(box) != 4:
            continue
        try:
            a, b, c, d = (number(path, value, "bbox") for value in box)
        except UserError:
            continue
        corners = _close(area, (c - a) * (d - b))
        coco = _close(area, c * d)
        as_corners += corners and not coco
        as_coco += coco and not corners
    if as_corners and as_coco:
        raise UserError(
            f"{path}: by their area, {as_coco:,} boxes are [x, y, width, height] and "
            f"{as_corners:,} are [x1, y1, x2, y2]; write all of them in one way"
        )
    return as_coco > 0


def _close(a, b):
    return abs(a - b) <= 0.01 * abs(a)


def _read_annotation(table, where, record, images, coco, row):
    """Add the cell of a record; row: its columns that are known already."""
    image_id = key(record.get("image_id"))
    if image_id not in images:
        raise UserError(
            f"{where}: image_id {short(record.get('image_id'))} is not among the images"
        )
    box = record.get("bbox")
    if not isinstance(box, list) or len(box) != 4:
        raise UserError(f"{where}: bbox must be [x1, y1, x2, y2]")
    x1, y1, x2, y2 = (number(where, value, "a corner of bbox") for value in box)
    if coco:
        x2, y2 = x1 + x2, y1 + y2
    if x2 < x1 or y2 < y1:
        raise UserError(
            f"{where}: bbox {box} does not run from the upper left to the lower right corner; "
            "MIDOG's boxes are [x1, y1, x2, y2], not COCO's [x, y, width, height]"
        )
    name, case = images[image_id]
    table.add(
        where,
        (x1 + x2) / 2,
        (y1 + y2) / 2,
        image=name,
        case=case,
        domain=table.image_domain.get(name),
        extent=max(x2 - x1, y2 - y1),
        probability=record.get("probability"),
        score=record.get("score"),
        **row,
    )


def _read_facts(table, content):
    licences = content.get("licenses")
    if isinstance(licences, list) and licences and isinstance(licences[0], dict):
        name = licences[0].get("name")
        if isinstance(name, str):
            table.licence = name[:MAX_TEXT]


def write(table, path, scores, names, categories):
    """The file with "probability" and "class" in each scored annotation; categories: what
    category_id becomes, [label 0's, label 1's], or None to leave it."""
    content = dict(table.content)
    annotations = content["annotations"] = [dict(record) for record in content["annotations"]]
    ids = {canonical(record["id"]): record["id"] for record in content.get("categories", ())}
    for place, score in zip(table.places, scores):
        if score is None:
            continue
        probability, label = score
        annotations[place].update({"probability": probability, "class": names[label]})
        if categories is not None:
            annotations[place]["category_id"] = ids[categories[label]]
    files.write_json(path, content)


def create(path, pictures, cells, names):
    """A new file of cells in boxes of 50 px; see `fresh`. The categories are the candidates' own
    classes, or the new ones if they have none."""
    images = []
    for i, picture in enumerate(pictures, 1):
        facts = {"width": picture.width, "height": picture.height, "mpp": picture.mpp}
        known = {key: value for key, value in facts.items() if value is not None}
        images.append({"id": i, "file_name": picture.name, **known})
    categories = [names[1], names[0]]
    if any(cell.own is not None for cell in cells):
        categories = list(dict.fromkeys(cell.own for cell in cells if cell.own is not None))
    annotations = []
    for name, cell in zip(fresh.ids_of(cells), cells):
        record = {"id": name, "image_id": cell.picture + 1, "bbox": fresh.box(cell)}
        category = fresh.class_of(cell, names)
        if category in categories:
            record["category_id"] = categories.index(category) + 1
        if cell.detector is not None:
            record["score"] = cell.detector
        if cell.score is not None:
            probability, label = cell.score
            record.update({"probability": probability, "class": names[label]})
        annotations.append(record)
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(categories, 1)],
    }
    files.write_json(path, content)
