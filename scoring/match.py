"""Which slide a candidate lies on: names in files of candidates against slides on disk."""

import itertools
import os
import unicodedata
from pathlib import Path, PurePosixPath

from common import UserError
from dataset import annotations


def find_images(candidates, slide):
    """Which file each candidate lies on → (list of paths or None, files that do not exist).

    A name in the candidates' file means an image by its path; its last part or its stem are enough
    if only one image can be meant, else UserError.

    slide  a slide (also a folder of its DICOM files), or a folder of images
    """
    slide = Path(slide)
    if not slide.exists():
        raise UserError(f"--slide {slide}: no such file or folder")
    if slide.is_file():
        return on_slide(candidates, slide, [slide]), []
    whole = annotations.dicom_slide(slide)
    if whole is not None:
        return on_slide(candidates, whole, [slide, *sorted(slide.glob("*.*"))]), []
    return in_folder(candidates, slide)


def only_slide(path):
    """The file of the one slide that a path means, None for a folder of slides."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"--slide {path}: no such file or folder")
    if path.is_file():
        return path
    return annotations.dicom_slide(path)


def on_slide(candidates, slide, called):
    """The slide for each candidate that lies on it, None for the others; UserError if none does.

    called  the paths by any of which a name may mean the slide
    """
    names = sorted({name for name in candidates.images if name})
    if not names:
        return [slide] * len(candidates)
    problem = None
    for path in called:
        try:
            name = name_of_slide(names, path, candidates.path)
        except UserError as error:
            problem = problem or error
            continue
        return [slide if parts(image) == parts(name) else None for image in candidates.images]
    raise problem


def in_folder(candidates, slide):
    """find_images for a folder of slides."""
    names = sorted({name for name in candidates.images if name})
    if not names:
        raise UserError(
            f"--slide {slide}: {candidates.path.name} does not name the image of its candidates, "
            "so a folder is not enough: give the slide's file"
        )
    inside = {name: relative(name, slide) for name in names}
    places = annotations.locate(list(inside.values()), slide, [], candidates.path)
    paths, users = {}, {}
    for name in names:
        paths[name] = slide / (places[inside[name]] or inside[name])
        other = users.setdefault(paths[name], name)
        if inside[other] != inside[name]:
            raise UserError(
                f"{candidates.path}: {other} and {name} would both be {paths[name]}; name the "
                "images by their paths below the folder of --slide"
            )
    missing = [path for path in paths.values() if not path.is_file()]
    return [paths.get(name) for name in candidates.images], missing


def parts(name):
    """The parts of an image's name, which may be a path of any system."""
    name = unicodedata.normalize("NFC", str(name or ""))
    return PurePosixPath(name.replace("\\", "/")).parts


def relative(name, folder):
    """An image's name as a path below `folder`: never one that leaves it."""
    below = parts(name)
    for root in (parts(folder.resolve()), parts(os.path.abspath(folder))):
        if below[: len(root)] == root:
            below = below[len(root) :]
    if below and (below[0] in ("/", "//") or below[0].endswith(":")):  # of another machine
        below = below[1:]
    if ".." in below:
        below = below[-1:]
    if not below or ".." in below:
        raise UserError(f"{name!r} is not the name of an image")
    return "/".join(below)


def shared_end(one, other):
    """How many parts two paths have in common at their ends."""
    pairs = zip(reversed(one), reversed(other))
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))


def name_of_slide(names, slide, source):
    """Which of the images that a candidates' file names is the slide; UserError if none is, or if
    several could be.
    """
    names = list({parts(name): name for name in names}.values())
    path = parts(slide.resolve())
    by_path = [name for name in names if path[-len(parts(name)) :] == parts(name)]
    if by_path:  # of "a.tiff" and "sub/a.tiff", the longer one says more
        return max(by_path, key=lambda name: len(parts(name)))
    # Files of another machine: those that share most folders, counted from the end.
    same_name = [name for name in names if parts(name)[-1] == path[-1]]
    most = max((shared_end(parts(name), path) for name in same_name), default=0)
    same_name = [name for name in same_name if shared_end(parts(name), path) == most]
    # Conversions (.svs to .ome.tiff) keep only the stem.
    stem = annotations.short_stem(path[-1])
    same_stem = [name for name in names if annotations.short_stem(parts(name)[-1]) == stem]
    matches = same_name or same_stem
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UserError(
            f"--slide {slide}: {source.name} has candidates on {matches[0]} and on {matches[1]}, "
            "and either could be this slide; give the slide by the path that the file names"
        )
    others = ""
    if len(names) > 1:
        others = f" and {len(names) - 1} more"
    raise UserError(
        f"--slide {slide}: {source.name} has no candidates on it, only on {names[0]}{others}"
    )
