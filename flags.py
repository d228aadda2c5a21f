"""Flags that several commands share: which data, how it is read, which split, which runs."""

import argparse
import collections
import dataclasses
import itertools
import math
import os
import re
from pathlib import Path

import numpy as np

import common
import runs
from common import UserError
from dataset import annotations as annotation_tables
from dataset import formats, images
from dataset.annotations import leak, root_folder
from dataset.patches import Patches
from dataset.splits import WAYS, make_split
from demo import synthetic

SEEDS, FOLDS = 2**47, 2**16  # so many there are: together they make one seed of 63 bits


# ---------------------------------------------------------------- the flags


def add_arguments(parser, positional=False):
    """The flags that say which dataset: --data, --images, … (`positional`: D instead of --data)."""
    group = parser.add_argument_group("data")
    dataset = (
        f"{', '.join(annotation_tables.KNOWN)} or demo (looked up under $MITOSIS_ROOT, default "
        "data/), a folder, or an annotation file (default: $MITOSIS_DATA, else the synthetic demo)"
    )
    if positional:
        group.add_argument("data", nargs="?", metavar="D", help=dataset)
    else:
        group.add_argument("--data", metavar="D", help=dataset)
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
        help="patches smaller than the encoder reads are resized, or padded (default: resize)",
    )
    group.add_argument(
        "--crop",
        type=int,
        metavar="PX",
        help="read the middle PX px of each patch alone, enlarged to what the encoder reads: the "
        "cell fills the patch (default: all of it)",
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
        help="µm/px of the images of --data, if their files do not state it (--test datasets "
        "need it in their files)",
    )


def add_reading_arguments(group):
    """The flags that say how labels and columns of an annotation file are read."""
    group.add_argument(
        "--classes",
        metavar="mitotic=2,other=7",
        help="class ids or names of the two labels, if the file's class names do not tell",
    )
    group.add_argument(
        "--profile", choices=formats.PROFILES, help="class ids of a known dataset (default: none)"
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
        help=f"columns of a CSV that have other names ({', '.join(formats.COLUMNS)}); "
        "path={A}_{B}.png joins columns, votes=A+B+C are the labels that several experts gave",
    )


def add_split_arguments(parser, several=True):
    """The flags that say which split: --fold, --frac, --domain, --seed, --split, …

    several: --fold, --frac, --domain and --leave-out take several values and are lists (--domain
    and --leave-out may be None).
    """
    group = parser.add_argument_group("split")
    n, frac, fold = {}, 1.0, 0
    if several:
        n, frac, fold = {"nargs": "+"}, [1.0], [0]
    group.add_argument(
        "--frac",
        type=float,
        default=frac,
        metavar="F",
        help="fraction of the training pool, 0.1 is 10%% (default: 1)",
        **n,
    )
    group.add_argument(
        "--fold",
        type=int,
        default=fold,
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
    group.add_argument(
        "--leave-out",
        metavar="X",
        help="train on all domains but this one, test on it (default: no such test)",
        **n,
    )
    group.add_argument(
        "--folds",
        type=int,
        metavar="N",
        help="cross-validation: deal the cases out into N test sets, of which --fold 0 … N-1 "
        "takes one (default: one test set for all of --fold)",
    )
    group.add_argument(
        "--seed", type=int, default=0, help="seed of the split and of the run (default: 0)"
    )
    group.add_argument(
        "--split",
        choices=WAYS,
        default="case",
        help="draw the test set by case; by annotation, as the published code does (leaks); use "
        "the published test cases (ccmct, midogpp, amibr); or the split given in the data's "
        "column split, else those cases (default: case)",
    )
    group.add_argument(
        "--val-frac",
        type=float,
        default=1.0,
        metavar="F",
        help="fraction of the validation set to use (default: 1)",
    )


def add_run_arguments(parser):
    """The flags of train.py and probe.py about runs: --runs, --test, --resume, --force."""
    group = parser.add_argument_group("runs")
    group.add_argument(
        "--runs", default="runs", metavar="DIR", help="folder of all runs (default: runs)"
    )
    group.add_argument(
        "--name",
        metavar="TAG",
        help="a tag at the end of the runs' names, e.g. lr1e-3: settings that are no part of the "
        "name stand side by side (default: none)",
    )
    group.add_argument(
        "--test",
        nargs="+",
        default=[],
        metavar="D2",
        help="whole datasets as further test sets, also of a finished run; --classes, --columns, "
        "--fit, --crop and --mpp apply to them, --images and --source-mpp do not. "
        "D2:label=A,positive=B,images=DIR reads one in a way of its own: columns, positive, "
        "negative, classes, profile, images",
    )
    group.add_argument(
        "--shared-cases",
        choices=("refuse", "allow"),
        default="refuse",
        help="what to do if a dataset of --test holds cases that are trained on (default: refuse)",
    )
    group.add_argument(
        "--test-images",
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders of their images, in the same order (default: beside their annotations)",
    )
    group.add_argument(
        "--resume", action="store_true", help="continue interrupted runs (no effect on others)"
    )
    group.add_argument(
        "--force",
        action="store_true",
        help="repeat existing runs; deletes what they wrote, models exported there included",
    )


# ---------------------------------------------------------------- the data


@dataclasses.dataclass(frozen=True)
class Source:
    """Which data, and how it is read: the flags of add_arguments, as a run keeps them."""

    data: str | None = None
    images: str | None = None
    classes: str | None = None
    profile: str | None = None
    positive: str | None = None
    negative: str | None = None
    columns: str | None = None
    fit: str | None = None
    crop: int | None = None
    mpp: float | None = None
    source_mpp: float | None = None


SOURCE = tuple(field.name for field in dataclasses.fields(Source))


def source(args):
    """The flags of add_arguments as a dict; absolute paths, so that the data is found from
    anywhere.
    """
    values = {name: getattr(args, name) for name in SOURCE}
    values["data"] = args.data or os.environ.get("MITOSIS_DATA") or "demo"
    for name in ("data", "images"):
        # Names of datasets stay names, whatever lies in the current folder ("demo" does here).
        is_name = name == "data" and values[name] in ("demo", *annotation_tables.KNOWN)
        if values[name] and not is_name and Path(values[name]).exists():
            values[name] = str(Path(values[name]).resolve())
    return values


def from_source(kept, quiet=True):
    """(Annotations, Source) of a run's config["source"]; UserError if the data is not available."""
    choices = Source(**{name: kept.get(name) for name in SOURCE})
    return from_arguments(choices, quiet=quiet), choices


def demo_folder():
    """Folder of the demo dataset, which is made if it is missing; says so loudly."""
    folder = root_folder() / "demo"
    if not folder.is_dir() or not any(folder.glob("*.json")):
        print(f"making the synthetic demo dataset in {folder} (some seconds)", flush=True)
        synthetic.build(folder)
    return folder


def load_dataset(path, *args, **choices):
    """dataset.annotations.load_dataset, which see; "demo" is made if it is missing."""
    if str(path) == "demo":
        path = demo_folder()
    return annotation_tables.load_dataset(path, *args, **choices)


def from_arguments(args, data=None, images=None, quiet=False):
    """The Annotations that the flags of add_arguments ask for; prints notes unless `quiet`.

    data, images: a --test dataset instead: --classes, --columns … apply to it, --images and
    --source-mpp do not. UserError if a flag has no sense, or the data cannot be read.
    """
    name = data or args.data or os.environ.get("MITOSIS_DATA") or "demo"
    if name == "demo" and not quiet:
        text = "DATA: the synthetic demo"
        if not data and not args.data:
            text += " (nobody's tissue); --data or $MITOSIS_DATA names real data"
        print(text, flush=True)
    _check_ranges(args)
    annotations = load_dataset(
        name,
        images if data else args.images,
        _classes(args),
        args.profile,
        formats.parse_columns(args.columns) if args.columns else None,
        mpp=None if data else args.source_mpp,
    )
    for column in (annotations.id, annotations.case, annotations.domain):
        for value in np.unique(column).tolist():
            if not common.is_utf8(str(value)):
                raise UserError(
                    f"{annotations.name}: the name {value!r} holds bytes that are not UTF-8; "
                    "rename the file"
                )
    if not quiet:
        for note in annotations.notes:
            print(f"{annotations.name}: {note}", flush=True)
    return annotations


def _check_ranges(args):
    seed = getattr(args, "seed", 0)
    if not 0 <= seed < SEEDS:
        raise UserError(f"--seed {seed}: give a number from 0 to 2^47 - 1")
    folds = getattr(args, "fold", None) or 0  # data.py gives None: all of them
    for fold in np.atleast_1d(np.array(folds, object)).tolist():
        if not 0 <= fold < FOLDS:
            raise UserError(f"--fold {fold}: give a number from 0 to {FOLDS - 1}")
    for flag, value in (("--mpp", args.mpp), ("--source-mpp", args.source_mpp)):
        if value is not None and not (math.isfinite(value) and 0.01 <= value <= 100):
            raise UserError(f"{flag} {value}: give µm/px between 0.01 and 100")
    crop = getattr(args, "crop", None)
    if crop is not None and not 8 <= crop <= 4096:
        raise UserError(f"--crop {crop}: give a number of px from 8 to 4096")
    if crop and args.fit == "pad":
        raise UserError(
            f"--crop {crop} enlarges patches, --fit pad does not: leave one of them out"
        )


def _classes(args):
    """What load_dataset takes as `classes`, from --classes or --positive and --negative."""
    if args.classes and (args.positive or args.negative):
        raise UserError("--classes and --positive/--negative mean the same: give one of them")
    if args.negative and not args.positive:
        raise UserError("--negative needs --positive")
    if args.classes:
        return formats.parse_classes(args.classes)
    if args.positive:
        other = _labels(args.negative) if args.negative else None
        return {"mitotic": _labels(args.positive), "other": other, "own_names": True}
    return None


def _labels(text):
    labels = [value.strip() for value in text.split(",") if value.strip()]
    if not labels:
        raise UserError("--positive and --negative need a label")
    return labels


def need_images(annotations, mpp=None, quiet=False, crop=None):
    """For commands that read pixels: UserError if the images are missing, broken, not those that
    the annotations mean, or ready-made patches of fewer than `crop` px; prints what else is odd
    about them unless `quiet`.

    mpp: µm/px that patches are resampled to, if they are.
    """
    if set(annotations.image.tolist()) <= set(annotations.missing):
        raise UserError(
            f"{annotations.name}: none of its {len(annotations.all_images):,} images is under "
            f"{annotations.root}; give their folder with --images"
        )
    images.check(annotations, mpp, quiet)
    if crop and annotations.kind == "patches":
        images.check_crop(annotations, crop)


def facts(annotations, fit="resize", mpp=None, source_mpp=None, size=224, crop=None):
    """What a model needs to know about the data it was trained on.

    {"mpp": µm/px of the images, or None if unknown or different by more than 2%; "patch": side in
    px actually used of ready-made patches, `crop` if there is one, else None; "pixels": fingerprint
    of the patches}. If the images have different µm/px, also "mixed_mpp": {µm/px as text: number of
    images}.
    """
    patch = crop
    if annotations.kind == "patches" and not crop:
        patch = images.patch_side(annotations, fit, size)
    # Unlabelled images count too if the annotation file knows all: runs of version 1.0 and earlier
    # hold this mean.
    names = annotations.codes("image")[0].tolist()
    scales = list((annotations.mpp or {}).values())
    if not set(names) <= set(annotations.mpp or {}):
        scales = [images.source_mpp(annotations, name) for name in names]
    known = [scale for scale in scales if scale]
    scale = None
    if known and max(known) <= images.SAME_SCALE * min(known):
        scale = round(sum(known) / len(known), 6)
    patches = Patches(annotations, size, fit, mpp, source_mpp, crop=crop)
    content = {"mpp": scale, "patch": patch, "pixels": patches.fingerprint(times=False)}
    if known and scale is None:
        counts = collections.Counter(f"{value:.3g}" for value in sorted(known))
        content["mixed_mpp"] = dict(counts)
    return content


# ---------------------------------------------------------------- splits and further test sets


# What a dataset of --test may be given after its name, beside columns.
TEST_CHOICES = ("positive", "negative", "classes", "profile", "images")


def test_source(args, text):
    """(name, args to read it with) of a dataset of --test, D2 or D2:label=A,positive=B.

    With choices of its own, or as a known dataset whose columns and labels are known, it is read
    without those of --data.
    """
    keys = "|".join((*formats.COLUMNS, *TEST_CHOICES))
    match = re.fullmatch(rf"(.+?):((?:{keys})=.*)", text, re.DOTALL)
    name, parts = text, []
    if match:
        name = match[1]
        # A comma ends a value where another key follows; classes=mitotic=1,other=2 holds one.
        parts = re.split(rf",(?=(?:{keys})=)", match[2])
    known = annotation_tables.KNOWN.get(name)
    if not parts and not (known and known.labels):
        return name, args
    reading = dict.fromkeys(("classes", "profile", "positive", "negative", "columns", "images"))
    columns = []
    for part in parts:
        key, _, value = part.partition("=")
        if key not in TEST_CHOICES:
            columns.append(part)
        elif reading[key] or not value:
            raise UserError(f"--test {text}: {key} needs one value")
        else:
            reading[key] = value
    reading["columns"] = ",".join(columns) or None
    return name, argparse.Namespace(**vars(args) | reading)


def _lower(names):
    return [name.casefold() for name in names]


def further(args, annotations, quiet=False):
    """The datasets of --test.

    UserError if one has no images, or two have the same name: results are stored by name.
    """
    if args.test_images and len(args.test_images) != len(args.test):
        raise UserError(
            f"--test-images: {len(args.test_images)} folders for {len(args.test)} datasets of "
            "--test"
        )
    tests = []
    for text, folder in itertools.zip_longest(args.test, args.test_images):
        name, own = test_source(args, text)
        if own is not args:
            folder = folder or own.images
        other = from_arguments(own, name, folder, quiet)
        need_images(other, args.mpp, quiet, args.crop)
        if other.name in [test.name for test in tests]:
            raise UserError(
                f"--test: two datasets are called {other.name}; rename one of the files"
            )
        tests.append(other)
        if not quiet and _lower(other.classes) != _lower(annotations.classes):
            print(
                f"note: {other.name} tells {' from '.join(other.classes[::-1])}, "
                f"{annotations.name} {' from '.join(annotations.classes[::-1])}: its labels may "
                "mean something else",
                flush=True,
            )
        problem = runs.one_class_line(other.name, other.label)
        if problem and not quiet:
            print(f"problem: {problem}", flush=True)
    return tests


def split_grid(args, folds=None):
    """What make_split takes, as a dict, for every --domain or --leave-out, --frac and --fold, in
    this order. folds: instead of --fold.
    """
    places = [{"domain": name} for name in dict.fromkeys(args.domain or [None])]
    if args.leave_out:
        if args.domain:
            raise UserError("--leave-out and --domain both say what to train on: give one")
        places = [{"leave_out": name} for name in dict.fromkeys(args.leave_out)]
    folds = args.fold if folds is None else folds
    fixed = {
        "seed": args.seed,
        "by": args.split,
        "val_frac": args.val_frac,
        "folds": args.folds,
    }
    grid = itertools.product(places, dict.fromkeys(args.frac), dict.fromkeys(folds))
    return [{**fixed, **place, "frac": frac, "fold": fold} for place, frac, fold in grid]


def splits(args, annotations, tests=(), quiet=False):
    """The splits of every --domain or --leave-out, --frac and --fold, in this order.

    UserError if one is not possible, a --test dataset has the name of one of the run's own sets
    (results are stored by name), or it holds cases that are trained on and --shared-cases does not
    allow it: then it is a note.
    """
    planned, shared = [], {}
    for choices in split_grid(args):
        split = make_split(annotations, **choices)
        for other in tests:
            if other.name in {"train", "val", "test", annotations.name, *split.others}:
                raise UserError(
                    f"--test: {other.name} is the name of one of the run's own sets or datasets; "
                    "rename the file"
                )
            found = leak(annotations, annotations.rows([*split.train, *split.val]), other)
            if found and found[1] and args.shared_cases == "refuse":
                raise UserError(
                    f"--test: {found[0]}; use a dataset or a split (--split, --domain) that keeps "
                    "them apart, or --shared-cases allow"
                )
            if found:
                shared.setdefault(other.name, found[0])
        planned.append(split)
    for text in shared.values():
        if not quiet:
            print(f"note: {text}: its figures are not those of unseen cases", flush=True)
    return planned


def check_name(args):
    """UserError if --name is no tag: it becomes a part of a folder's name, as it is."""
    if args.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,39}", args.name):
        raise UserError(
            f"--name {args.name}: give at most 40 letters, digits, points, dashes, _ or +, such as "
            "lr1e-3"
        )


def at_least(args, least, *names):
    """UserError if one of the flags is below `least`, or larger than any sensible number."""
    for name in names:
        if not least <= getattr(args, name) < 2**31:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} {getattr(args, name)}: give a number from {least} to 2^31 - 1")
