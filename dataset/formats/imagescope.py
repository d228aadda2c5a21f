"""Aperio ImageScope's XML: rectangles, ellipses, outlines and points are cells, at the centre of
their bounding box; rulers, arrows and negative regions are not.

The class is a region's text, else the name or description of its layer. The image's name is the
file's, 001.xml for 001.svs. A score and the class become attributes of the region."""

import copy
import io
from xml.etree import ElementTree

from common import UserError
from dataset.formats import files, fresh
from dataset.formats.cells import Table, canonical, image_name, number, text

ONE_IMAGE = True
LINES = ("3", "4")  # Region Type: ruler and arrow; 0 outline, 1 rectangle, 2 ellipse, 5 point


def recognises(source):
    return source.suffix == ".xml"


def read(source):
    """The regions of all layers, in the order of the file."""
    path, root = source.path, source.xml
    if root.tag != "Annotations":
        raise UserError(f"{path}: not an ImageScope file: its root is {root.tag[:40]!r}")
    image = image_name(path, source.stem)
    table = Table("imagescope", path, image_by_file=True, content=root)
    table.sizes[image] = None
    for i, (layer, region) in enumerate(_regions(root)):
        where = f"{path}, region {i + 1}"
        name, category = region.get("Text", "").strip() or _layer_name(layer), None
        if name:
            category = canonical(text(where, name, "the region's text"))
            table.names[category] = name
        if region.get("Type") in LINES or region.get("NegativeROA") == "1":
            table.regions[category] += 1
            continue
        try:
            x, y, extent = _centre(where, region)
            row = {"image": image, "category": category, "place": i}
            table.add(where, x, y, title=i + 1, extent=extent, **row)
        except UserError as error:
            table.damaged.append((category, str(error)))
    if not table.names:
        table.no_training = f"{path}: no region has a text or a named layer that gives its class"
    return table


def _regions(root):
    """(layer, region) in the order of the file."""
    for layer in root.iter("Annotation"):
        for region in layer.iterfind("Regions/Region"):
            yield layer, region


def _layer_name(layer):
    name = layer.get("Name", "").strip()
    for attribute in layer.iterfind("Attributes/Attribute"):
        if not name and attribute.get("Name") == "Description":
            name = attribute.get("Value", "").strip()
    return name


def _centre(where, region):
    """(x, y, longer side) of the bounding box of a region's vertices."""
    xs, ys = [], []
    for vertex in region.iterfind("Vertices/Vertex"):
        xs.append(number(where, vertex.get("X"), "X"))
        ys.append(number(where, vertex.get("Y"), "Y"))
    if not xs:
        raise UserError(f"{where}: has no vertices")
    extent = max(max(xs) - min(xs), max(ys) - min(ys))
    return (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2, extent


def write(table, path, scores, names, categories):
    """The file with the attributes "probability" and "class" in each scored region; categories:
    what its text becomes, [label 0's, label 1's], or None to leave it."""
    root = copy.deepcopy(table.content)
    regions = [region for _, region in _regions(root)]
    for place, score in zip(table.places, scores):
        if score is None:
            continue
        probability, label = score
        region = regions[place]
        attributes = region.find("Attributes")
        if attributes is None:
            attributes = ElementTree.Element("Attributes")
            region.insert(0, attributes)
        _set(attributes, "probability", repr(probability))
        _set(attributes, "class", names[label])
        if categories is not None:
            region.set("Text", table.names[categories[label]])
    text = io.StringIO()
    ElementTree.ElementTree(root).write(text, encoding="unicode", xml_declaration=False)
    files.write_text(path, text.getvalue() + "\n")


def _set(attributes, name, value):
    for attribute in attributes.iterfind("Attribute"):
        if attribute.get("Name") == name:
            attribute.set("Value", value)
            return
    ElementTree.SubElement(attributes, "Attribute", Name=name, Id="0", Value=value)


def create(path, pictures, cells, names):
    """A new file with a layer of boxes of 50 px; see `fresh`."""
    root = ElementTree.Element("Annotations")
    if pictures and pictures[0].mpp is not None:
        root.set("MicronsPerPixel", repr(pictures[0].mpp))
    layer = ElementTree.SubElement(root, "Annotation", Id="1", Name="", Type="4", Visible="1")
    regions = ElementTree.SubElement(layer, "Regions")
    for name, cell in zip(fresh.ids_of(cells), cells):
        region = ElementTree.SubElement(regions, "Region", Id=str(name), Type="1")
        region.set("Text", fresh.class_of(cell, names) or "")
        attributes = ElementTree.SubElement(region, "Attributes")
        if cell.detector is not None:
            _set(attributes, "score", repr(cell.detector))
        if cell.score is not None:
            _set(attributes, "probability", repr(cell.score[0]))
            _set(attributes, "class", names[cell.score[1]])
        x1, y1, x2, y2 = fresh.box(cell)
        vertices = ElementTree.SubElement(region, "Vertices")
        for x, y in ((x1, y1), (x2, y1), (x2, y2), (x1, y2)):
            ElementTree.SubElement(vertices, "Vertex", X=repr(x), Y=repr(y), Z="0")
    text = io.StringIO()
    ElementTree.ElementTree(root).write(text, encoding="unicode", xml_declaration=False)
    files.write_text(path, text.getvalue() + "\n")
