"""Flags that several commands share: which dataset, how it is read, which split, further test sets.
No torch.
"""

import argparse
import itertools
import math
import os
from pathlib import Path

import numpy as np

from common import UserError
from dataset import annotations as annotation_tables
from dataset import readers, slides
from dataset.annotations import PATCH, root_folder
from demo import synthetic


def demo_folder():
    """Folder of the demo dataset, which is made where it is missing; said loudly."""
    folder = root_folder() / "demo"
    if not folder.is_dir() or not any(folder.glob("*.json")):
        print(f"the synthetic demo dataset is made in {folder} (some seconds)", flush=True)
        synthetic.build(folder)
    return folder


def load_dataset(path, *args, **choices):
    """dataset.annotations.load_dataset, which see; the demo is made if it is asked for and not
    there.
    """
    if str(path) == "demo":
        path = demo_folder()
    return annotation_tables.load_dataset(path, *args, **choices)


def add_arguments(parser, positional=False):
    """The flags that say which dataset: --data, --images, … (`positional`: the dataset without its
    flag).
    """
    group = parser.add_argument_group("data")
    what = (
        "ccmct, midog2022, midogpp, midog2021, cmc or demo (looked up under $MITOSIS_ROOT, "
        "default data/), a "
        "folder, or an annotation file (default: $MITOSIS_DATA, else the synthetic demo)"
    )
    if positional:
        group.add_argument("data", nargs="?", metavar="D", help=what)
    else:
        group.add_argument("--data", metavar="D", help=what)
    group.add_argument(
        "--images",
        metavar="DIR",
        help="folder of the images, searched with its subfolders (default: the annotation file's)",
    )
    add_reading_arguments(group)
    group.add_argument(
        "--fit",
        choices=("resize", "pad"),
        default="resize",
        help="patches smaller than 224 px are resized, or padded with white (default: resize)",
    )
    group.add_argument(
        "--mpp",
        type=float,
        metavar="0.25",
        help="resample to this many µm/px (default: as scanned)",
    )
    group.add_argument(
        "--source-mpp",
        type=float,
        metavar="MPP",
        help="µm/px of the images, where their files do not say it",
    )


def add_reading_arguments(group):
    """The flags that say how labels and columns of an annotation file are read."""
    group.add_argument(
        "--classes",
        metavar="mitotic=2,other=7",
        help="class ids or names of the two labels, where the file's class names do not say it",
    )
    group.add_argument(
        "--profile", choices=readers.PROFILES, help="class ids of a known data set (default: none)"
    )
    group.add_argument(
        "--positive", metavar="VALUE", help="the label (or labels, with commas) that counts as 1"
    )
    group.add_argument(
        "--negative",
        metavar="VALUE",
        help="the label (or labels) that counts as 0 (default: the only other one)",
    )
    group.add_argument(
        "--columns",
        metavar="path=A,case=B,label=C",
        help=f"columns of a CSV that are called differently ({', '.join(readers.COLUMNS)})",
    )


def add_split_arguments(parser, several=True):
    """The flags that say which split: --fold, --frac, --domain, --seed, --split, --val-frac.

    several: --fold, --frac and --domain take several values and are lists (--domain may be None).
    """
    group = parser.add_argument_group("split")
    n = {"nargs": "+"} if several else {}
    group.add_argument(
        "--frac",
        type=float,
        default=[1.0] if several else 1.0,
        metavar="F",
        help="fraction of the training pool, 0.1 is 10%% (default: 1)",
        **n,
    )
    group.add_argument(
        "--fold",
        type=int,
        default=[0] if several else 0,
        metavar="K",
        help="repeat: another validation set and seed, the same test set (default: 0)",
        **n,
    )
    group.add_argument(
        "--domain",
        metavar="X",
        help="train on this domain alone, test on each (default: all domains)",
        **n,
    )
    group.add_argument("--seed", type=int, default=0, help="of the split and the run (default: 0)")
    group.add_argument(
        "--split",
        choices=("case", "annotation", "official"),
        default="case",
        help="draw the test set "
        "by case; by annotation, as the published code does (leaks); or take the published test "
        "slides "
        "of ccmct (default: case)",
    )
    group.add_argument(
        "--val-frac",
        type=float,
        default=1.0,
        metavar="F",
        help="fraction of the validation set that is used (default: 1)",
    )


def from_arguments(args, data=None, images=None, quiet=False):
    """The Annotations that the flags of add_arguments ask for; says loudly when it is the demo, and
    prints notes.

    data, images: another dataset (of --test), of which the flags say how its labels and columns are
    read, but neither where its images lie nor their µm/px. UserError where the images are not
    there."""
    where = data or args.data or os.environ.get("MITOSIS_DATA") or "demo"
    if where == "demo" and not quiet:
        print(
            "DATA: the synthetic demo (no tissue of anybody); --data or $MITOSIS_DATA names real "
            "data"
            if not data and not args.data
            else "DATA: the synthetic demo",
            flush=True,
        )
    if not 0 <= getattr(args, "seed", 0) < 2**47:
        raise UserError(f"--seed {args.seed}: a number from 0 to 2^47 is needed")
    for flag, value in (("--mpp", args.mpp), ("--source-mpp", args.source_mpp)):
        if value is not None and not (math.isfinite(value) and 0.01 <= value <= 100):
            raise UserError(f"{flag} {value}: µm/px between 0.01 and 100 are needed")
    annotations = load_dataset(
        where,
        images if data else args.images,
        _classes(args),
        args.profile,
        readers.parse_columns(args.columns) if args.columns else None,
        mpp=None if data else args.source_mpp,
    )
    if not quiet:
        for note in annotations.notes:
            print(f"{annotations.name}: {note}", flush=True)
    return annotations


def add_test_arguments(group):
    group.add_argument(
        "--test",
        nargs="+",
        default=[],
        metavar="D2",
        help="whole datasets as further test sets, also "
        "of a finished run; their labels and columns are read as the first one's",
    )
    group.add_argument(
        "--test-images",
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders of their images, in the same order (default: beside their annotations)",
    )


def further(args):
    """The datasets of --test."""
    if args.test_images and len(args.test_images) != len(args.test):
        raise UserError(
            f"--test-images: {len(args.test_images)} folders for {len(args.test)} datasets of "
            "--test"
        )
    found = [
        from_arguments(args, name, images)
        for name, images in itertools.zip_longest(args.test, args.test_images)
    ]
    for other in found:
        need_images(other)
    names = [other.name for other in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--test: two datasets are called {name}; rename one of the files")
    return found


def check_further(tests, annotations, split):
    """UserError where a dataset of --test is called like one of the run's own sets, or its dataset:
    its results would be taken for theirs."""
    for other in tests:
        if other.name in {"train", "val", "test", annotations.name, *split.others}:
            raise UserError(
                f"--test: {other.name} is the name of one of the run's own sets or datasets; "
                "rename the "
                "file"
            )


SOURCE = (
    "data",
    "images",
    "classes",
    "profile",
    "positive",
    "negative",
    "columns",
    "fit",
    "mpp",
    "source_mpp",
)


def source(args):
    """The flags of add_arguments as a run keeps them; absolute paths, so that its data is found
    from anywhere.
    """
    kept = {name: getattr(args, name) for name in SOURCE}
    kept["data"] = args.data or os.environ.get("MITOSIS_DATA") or "demo"
    for name in ("data", "images"):
        # Names of datasets stay names, whatever lies in the current folder ("demo" does here).
        is_name = name == "data" and kept[name] in ("demo", *annotation_tables.KNOWN)
        if kept[name] and not is_name and Path(kept[name]).exists():
            kept[name] = str(Path(kept[name]).resolve())
    return kept


def from_source(kept, quiet=True):
    """(Annotations, the flags as a namespace) of a run's config["source"]; UserError where the data
    is not here.
    """
    args = argparse.Namespace(**{name: kept.get(name) for name in SOURCE})
    return from_arguments(args, quiet=quiet), args


def _classes(args):
    if args.classes and (args.positive or args.negative):
        raise UserError("--classes and --positive/--negative say the same thing: give one of them")
    if args.negative and not args.positive:
        raise UserError("--negative needs --positive")
    if args.classes:
        return readers.parse_classes(args.classes)
    if args.positive:

        def values(text):
            found = [value.strip() for value in text.split(",") if value.strip()]
            if not found:
                raise UserError("--positive and --negative take a label")
            return found

        return {
            "mitotic": values(args.positive),
            "other": values(args.negative) if args.negative else None,
        }
    return None


def need_images(annotations):
    """UserError unless images are there: for whoever reads pixels."""
    if set(annotations.image.tolist()) <= set(annotations.missing):
        raise UserError(
            f"{annotations.name}: none of its {len(annotations.all_images):,} images is under "
            f"{annotations.root}; give their folder with --images"
        )


def facts(annotations, fit="resize"):
    """What a model trained on this data must be told: {"mpp": µm/px of its images, "patch": px that
    are read around a cell where patches are ready-made, in which `fit` decides what of them is
    seen}.

    None where it is not known, or differs by more than 2% between the images that tell.
    """
    first = annotations.image_path(annotations.image[0])
    patch = None
    if annotations.kind == "patches":  # as Patches cuts them
        patch = min(PATCH, (min if fit == "resize" else max)(slides.dimensions(first)))
    values = list((annotations.mpp or {}).values())
    if not values:
        present = (
            [first]
            if patch
            else [
                annotations.image_path(name)
                for name in np.unique(annotations.image).tolist()
                if name not in annotations.missing
            ]
        )
        values = [slides.microns_per_pixel(path) for path in present]
    known = [value for value in values if value]
    same = known and max(known) <= 1.02 * min(known)
    return {"mpp": round(sum(known) / len(known), 6) if same else None, "patch": patch}
