"""The MIDOG challenge's JSON, which its detectors write: "Multiple points" in millimetres.

Each point has a name and a probability, which scoring replaces; the detector's own is kept as
detector_probability. The file names no image. The names are the challenge's own two, or those of a
model of other classes."""

from common import UserError
from dataset.formats import files
from dataset.formats.cells import MITOSIS, Table, canonical

ONE_IMAGE = SCALED = SCORED = True
NAMES = ("non-mitotic figure", "mitotic figure")  # the challenge's own, by label


def recognises(source):
    return (
        source.suffix == ".json"
        and isinstance(source.json, dict)
        and source.json.get("type") == "Multiple points"
    )


def read(source):
    """The points, in millimetres."""
    path, content = source.path, source.json
    table = Table("challenge", path, unit="mm", content=content)
    table.no_training = (
        f"{path}: a detector's points in millimetres, without the image's name; training needs "
        "px, as MIDOG JSON or CSV"
    )
    points = content.get("points")
    if not isinstance(points, list):
        raise UserError(f"{path}: not a list of points as in the MIDOG challenge")
    for i, record in enumerate(points):
        position = record.get("point") if isinstance(record, dict) else None
        if not isinstance(position, list) or len(position) < 2:
            raise UserError(f"{path}, point {i + 1}: not a point as in the MIDOG challenge")
        name = record.get("name")
        category = canonical(name) if isinstance(name, str) else None
        if category is not None:
            table.names[category] = name
        table.add(
            f"{path}, point {i + 1}",
            position[0],
            position[1],
            title=i + 1,
            category=category,
            place=i,
            probability=record.get("probability"),
            score=record.get("detector_probability"),
        )
    return table


def own_categories(table, names):
    """None: a point always gets the name of its class."""
    return None


def write(table, path, scores, names, categories):
    """The file with the new probabilities, and by class the challenge's own two names, or those of
    a model that tells other classes apart."""
    if tuple(names) == MITOSIS:
        names = NAMES
    content = dict(table.content)
    points = content["points"] = [dict(point) for point in content["points"]]
    for place, score in zip(table.places, scores):
        if score is not None:
            probability, label = score
            if "probability" in points[place]:  # the detector's, unless it was scored before
                points[place].setdefault("detector_probability", points[place]["probability"])
            points[place].update(probability=probability, name=names[label])
    files.write_json(path, content)


def content_of(x, y, probability, threshold, mpp):
    """Points in level-0 px → the content of a challenge file: all of them, named by threshold."""
    points = []
    for a, b, p in zip(x, y, probability):
        points.append(
            {
                "name": NAMES[int(p >= threshold)],
                "point": [float(a) * mpp / 1000, float(b) * mpp / 1000, 0],
                "probability": float(p),
            }
        )
    return {
        "name": "Points of interest",
        "type": "Multiple points",
        "points": points,
        "version": {"major": 1, "minor": 0},
    }


def create(path, pictures, cells, names):
    """A new file of points; see `fresh`. The names of the classes are those that `write` gives."""
    if tuple(names) == MITOSIS:
        names = NAMES
    points = []
    for cell in cells:
        probability, label = cell.score
        points += content_of([cell.x], [cell.y], [probability], 0, pictures[0].mpp)["points"]
        points[-1]["name"] = names[label]
        if cell.detector is not None:
            points[-1]["detector_probability"] = cell.detector
    files.write_json(path, {**content_of([], [], [], 0, None), "points": points})
