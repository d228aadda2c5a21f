"""QuPath's GeoJSON: points and outlines are cells, at the centre of their bounding box.

QuPath does not write the image's name: it is the file's, 001.geojson for 001.tiff. Cells may be
children of other objects at any depth (properties.childObjects). Coordinates are relative to
openslide.bounds-x, -y on slides that have such bounds. A score becomes a measurement, and the class
a coloured classification."""

import numpy as np

from common import UserError
from dataset import slides
from dataset.formats import files
from dataset.formats.cells import (
    MAX_CELL,
    Table,
    canonical,
    image_name,
    number,
    short,
    shown,
    text,
)

ONE_IMAGE = True
COLOURS = {1: (220, 30, 40), 0: (40, 110, 220)}  # RGB of a cell by its label
MANY = 5000  # annotations, with more of which QuPath becomes slow; its detections may be many more
HOTSPOT_COLOUR = (240, 180, 0)  # of the regions that `write` adds
# Objects of QuPath that are no cells, whatever their size.
REGION_OBJECTS = ("root", "tile", "tma_core", "tma core")
SHAPES = (
    "Point",
    "MultiPoint",
    "LineString",
    "MultiLineString",
    "Polygon",
    "MultiPolygon",
    "GeometryCollection",
)
AREAS = ("Polygon", "MultiPolygon")
END = object()


def recognises(source):
    if source.suffix not in (".json", ".geojson"):
        return False
    content = source.json
    if isinstance(content, dict):
        return content.get("type") in ("FeatureCollection", "Feature")
    return isinstance(content, list)


def read(source):
    """The features and their children, classified or not."""
    path = source.path
    image = image_name(path, source.stem)
    table = Table("geojson", path, content=source.json)
    table.image_by_file = table.relative_to_bounds = True
    table.sizes[image] = None
    features = list(_walk(path, _features(path, source.json)))
    for i, feature in enumerate(features):
        where = f"{path}, feature {i + 1}"
        properties = _properties(feature)
        table.no_candidates = table.no_candidates or _wrong_type(where, feature)
        name, category = class_name(properties.get("classification")), None
        if name is not None:
            category = canonical(text(where, name, "the classification"))
            table.names[category] = name.strip()
        row = {"image": image, "category": category, "place": (i, None), "title": i + 1}
        if feature.get("id") is not None:
            row["id"] = row["title"] = text(where, feature["id"], "the id")
        try:
            _read_feature(table, where, feature, row)
        except UserError as error:
            table.damaged.append((category, str(error)))
    if not table.names:
        table.no_training = (
            f"{path}: no feature has a classification; give the cells a class in QuPath"
        )
    return table


def _features(path, content):
    """The features of a collection, a list, or a single feature."""
    if isinstance(content, list):
        return content
    if content.get("type") == "Feature":
        return [content]
    features = content.get("features")
    if not isinstance(features, list):
        raise _no_features(path)
    return features


def _no_features(path):
    return UserError(
        f"{path}: neither MIDOG's JSON (images, annotations) nor GeoJSON (features, as QuPath "
        "exports them)"
    )


def _walk(path, features):
    """The features and their children, parents first."""
    stack = [iter(features)]
    while stack:
        feature = next(stack[-1], END)
        if feature is END:
            stack.pop()
            continue
        if not isinstance(feature, dict) or feature.get("type") != "Feature":
            raise _no_features(path)
        yield feature
        stack.append(iter(_children(path, feature)))


def _children(path, feature):
    children = _properties(feature).get("childObjects")
    if children is None:
        return []
    if not isinstance(children, list):
        raise UserError(f"{path}: the childObjects of a feature are no list of features")
    return children


def class_name(value):
    """The class name in any of the ways QuPath has written it: {"name": …}, {"names": [… ]} or a
    plain string; derived classes are joined, "Tumor: Mitosis"."""
    if isinstance(value, dict):
        value = value.get("name") if value.get("name") is not None else value.get("names")
    if isinstance(value, list):
        if not value or not all(isinstance(part, str) for part in value):
            return None
        value = ": ".join(value)
    if isinstance(value, str) and value.strip():
        return value
    return None


def _properties(feature):
    properties = feature.get("properties")
    return properties if isinstance(properties, dict) else {}


def _wrong_type(where, feature):
    """What is wrong with a feature into which scores could not be written, else None."""
    if not isinstance(feature.get("properties"), (dict, type(None))):
        return f"{where}: its properties are no object"
    for name, types in (("measurements", (dict, list)), ("metadata", dict)):
        value = _properties(feature).get(name)
        if value is not None and not isinstance(value, types):
            return f"{where}: its {name} are no object"
    return None


def _read_feature(table, where, feature, row):
    """Add the cells of a feature, or count it among the regions. row: its columns but x and y."""
    geometry = feature.get("geometry")
    if not isinstance(geometry, dict):
        raise UserError(f"{where}: has no geometry")
    shape, coordinates = geometry.get("type"), geometry.get("coordinates")
    object_type = _properties(feature).get("objectType")
    if shape not in SHAPES:
        raise UserError(f"{where}: {short(shape)} is no geometry of GeoJSON")
    if shape not in ("Point", "MultiPoint", "Polygon") or object_type in REGION_OBJECTS:
        table.regions[row["category"]] += 1
        return
    if not isinstance(coordinates, list):
        raise UserError(f"{where}: the geometry has no coordinates")
    if shape == "MultiPoint":  # QuPath's points tool: each point is a cell
        points = [_position(where, position) for position in coordinates]
        for j, (x, y) in enumerate(points):
            point = {"place": (row["place"][0], j), "title": f"{row['title']}.{j + 1}"}
            if "id" in row and j:
                point["id"] = f"{row['id']}.{j + 1}"
            table.add(where, x, y, **{**row, **point})
        return
    extent = 0.0
    if shape == "Point":
        x, y = _position(where, coordinates)
    else:
        x, y, extent = _outline(where, coordinates)
    table.add(where, x, y, extent=extent, **row)


def _outline(where, coordinates):
    """(x, y, longer side) of the bounding box of a polygon; only its outer ring matters."""
    if not coordinates or not isinstance(coordinates[0], list) or not coordinates[0]:
        raise UserError(f"{where}: the geometry has no coordinates")
    ring = [_position(where, position) for position in coordinates[0]]
    xs = [x for x, _ in ring]
    ys = [y for _, y in ring]
    extent = max(max(xs) - min(xs), max(ys) - min(ys))
    return (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2, extent


def _position(where, position):
    if not isinstance(position, list) or len(position) < 2:
        raise UserError(f"{where}: the coordinates are no [x, y]")
    return number(where, position[0], "x"), number(where, position[1], "y")


# ---------------------------------------------------------------- regions


def regions(source):
    """The outlines in a file that are no cells: list of (class name or None, rings), one per
    polygon; rings: [float [n, 2], …], the outline and its holes, in px as the file writes them.
    UserError: no GeoJSON, or a damaged outline."""
    if not recognises(source):
        raise UserError(f"{source.path}: no GeoJSON, as QuPath exports the outlines of regions")
    found = []
    for i, feature in enumerate(_walk(source.path, _features(source.path, source.json))):
        where = f"{source.path}, feature {i + 1}"
        geometry = feature.get("geometry")
        if not isinstance(geometry, dict) or geometry.get("type") not in AREAS:
            continue
        polygons = geometry.get("coordinates")
        if geometry["type"] == "Polygon":
            polygons = [polygons]
        if not isinstance(polygons, list) or not polygons:
            raise UserError(f"{where}: the geometry has no coordinates")
        polygons = [_rings(where, polygon) for polygon in polygons]
        if max(np.ptp(rings[0], axis=0).max() for rings in polygons) <= MAX_CELL:
            continue
        name = class_name(_properties(feature).get("classification"))
        found += [(name, rings) for rings in polygons]
    return found


def _rings(where, polygon):
    """The rings of a polygon as arrays."""
    if not isinstance(polygon, list) or not polygon:
        raise UserError(f"{where}: the geometry has no coordinates")
    rings = []
    for ring in polygon:
        if not isinstance(ring, list) or len(ring) < 3:
            raise UserError(f"{where}: an outline of fewer than three points")
        rings.append(np.array([_position(where, position) for position in ring], np.float64))
    return rings


# ---------------------------------------------------------------- writing


def own_categories(table, names):
    """None: a feature always gets the new class; the old one goes into its metadata."""
    return None


def write(table, path, scores, names, categories, regions=()):
    """The file with a measurement and the class in each scored feature; all else stays. A scored
    MultiPoint becomes one feature per point, because each gets a class of its own. regions: see
    `region`; those of an earlier run are replaced."""
    by_feature = {}
    for (i, j), score in zip(table.places, scores):
        if score is not None:
            by_feature.setdefault(i, {})[j] = score
    content = table.content
    number_of = {}
    for i, feature in enumerate(_walk(table.path, _features(table.path, content))):
        number_of[id(feature)] = i

    def rewritten(features):
        result = []
        for feature in features:
            children = _children(table.path, feature)
            given = by_feature.get(number_of[id(feature)], {})
            if children:
                properties = {**feature["properties"], "childObjects": rewritten(children)}
                feature = {**feature, "properties": properties}
            if not given:
                result.append(feature)
            elif None in given:
                result.append(_scored(feature, given[None], names))
            else:
                result += _scored_points(feature, given, names)
        return result

    features = rewritten(_features(table.path, content))
    added = {kind for kind, *_ in regions}
    features = [
        f for f in features if class_name(_properties(f).get("classification")) not in added
    ]
    features += [region(*one) for one in regions]
    if isinstance(content, dict) and content.get("type") == "FeatureCollection":
        content = {**content, "features": features}
    else:
        content = {"type": "FeatureCollection", "features": features}
    files.write_json(path, content)


def _scored_points(feature, scores, names):
    """The points of a MultiPoint as features of their own; those without a score keep its class."""
    result = []
    geometry = feature["geometry"]
    for j, point in enumerate(geometry["coordinates"]):
        one = {**feature, "geometry": {**geometry, "type": "Point", "coordinates": point}}
        if len(geometry["coordinates"]) > 1:
            one.pop("id", None)  # must be unique; QuPath makes new ones
        if j in scores:
            one = _scored(one, scores[j], names)
        result.append(one)
    return result


def _scored(feature, score, names):
    probability, label = score
    properties = dict(feature.get("properties") or {})
    measurements, name = properties.get("measurements"), f"probability of {names[1]}"
    if isinstance(measurements, list):  # QuPath before 0.4
        properties["measurements"] = [*measurements, {"name": name, "value": probability}]
    else:
        properties["measurements"] = {**(measurements or {}), name: probability}
    before = class_name(properties.get("classification"))
    if before is not None:
        metadata = properties.get("metadata") or {}
        properties["metadata"] = {**metadata, "class of the candidate": shown(before)}
    properties["classification"] = {"name": names[label], "color": list(COLOURS[label])}
    return {**feature, "properties": properties}


def region(kind, name, box, measurements):
    """A rectangle as a feature. box: left, top, right, bottom in px as the file has them."""
    left, top, right, bottom = box
    ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    properties = {
        "objectType": "annotation",
        "name": name,
        "classification": {"name": kind, "color": list(HOTSPOT_COLOUR)},
        "measurements": measurements,
    }
    geometry = {"type": "Polygon", "coordinates": [ring]}
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def create(path, pictures, cells, names, regions=()):
    """A new file of points and of regions; see `fresh`, and `region`."""
    left, top = 0, 0
    if pictures and pictures[0].width is not None:
        left, top = slides.bounds_offset(pictures[0].path)
    features, object_type = [], "annotation"
    if len(cells) > MANY:
        object_type = "detection"
    for cell in cells:
        point = {"type": "Point", "coordinates": [cell.x - left, cell.y - top]}
        properties = {"objectType": object_type}
        if cell.id is not None:
            properties["metadata"] = {"id": cell.id}
        if cell.detector is not None:
            properties["measurements"] = {"detector score": cell.detector}
        if cell.own is not None:
            properties["classification"] = {"name": cell.own}
        feature = {"type": "Feature", "geometry": point, "properties": properties}
        if cell.score is not None:
            feature = _scored(feature, cell.score, names)
        features.append(feature)
    features += [region(*one) for one in regions]
    files.write_json(path, {"type": "FeatureCollection", "features": features})
