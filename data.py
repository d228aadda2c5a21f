"""What a dataset holds: counts by domain, cases, problems, and the splits that training would make.

python data.py midog2022                     report on a known dataset
python data.py my.sqlite --images slides/    report on your own annotations
python data.py midog2022 --cache             build the store of crops that training reads from
python data.py --download midog2022          fetch a public dataset (resumable)
"""

import argparse
import os
import textwrap
from pathlib import Path

import numpy as np

import common
import flags
import runs
from common import UserError
from dataset import download, images, look
from dataset.annotations import (  # noqa: F401
    DOWNLOADABLE,
    KNOWN,
    NEAR,
    PATCH,
    Annotations,
    by_image,
    count_near_pairs,
    root_folder,
    shared_cases,
)
from dataset.images import pool_size, random_pool  # noqa: F401
from dataset.patches import Patches, build_store
from dataset.sampler import Sampler  # noqa: F401
from dataset.splits import check_settings, load_split, make_split, overlap, resolve_domain
from flags import load_dataset  # noqa: F401

# ---------------------------------------------------------------- the report


def say(text=""):
    """Print, without the control characters that a name in somebody's file may hold."""
    print("\n".join(common.printable(line) for line in str(text).split("\n")))


def opposite_pairs(annotations, distance=NEAR):
    """Number of pairs of opposite class on one image that lie within `distance` px (Euclidean)."""
    number = 0
    x, y = annotations.x, annotations.y
    for rows in by_image(annotations).values():
        positive = rows[annotations.label[rows] == 1]
        negative = rows[annotations.label[rows] == 0]
        number += count_near_pairs(x[positive], y[positive], x[negative], y[negative], distance)
    return number


def duplicates(annotations):
    """Row indices of annotations whose image and position an earlier row has too."""
    seen, repeated = set(), []
    places = zip(annotations.image.tolist(), annotations.x.tolist(), annotations.y.tolist())
    for row, place in enumerate(places):
        if place in seen:
            repeated.append(row)
        seen.add(place)
    return np.array(repeated, np.int64)


def report(annotations, args):
    """Print what a dataset holds, what is wrong with it, and the splits that it would give."""
    for domain in args.domain or ():
        resolve_domain(annotations, domain)
    for domain in args.leave_out or ():
        resolve_domain(annotations, domain, "--leave-out")
    known = KNOWN.get(annotations.known)
    missing = len(annotations.missing)
    number = len(set(annotations.all_images) | set(annotations.missing))
    problems = images.find_problems(annotations, args.mpp)
    say(f"{annotations.name}: {known.title if known else annotations.kind}")
    say(f"annotations  {annotations.source}")
    say(f"images       {annotations.root}: {number - missing:,} of {number:,} exist")
    say(f"licence      {annotations.licence or 'not stated'}")
    if annotations.kind == "points":
        say(f"µm/px        {_scales(annotations, problems)}")
    for line in _columns(annotations):
        say(line)
    say(f"fingerprint  {annotations.fingerprint()}\n")
    say(_counts(annotations, known, number))

    lines = [*annotations.notes, *problems.lines, *_problems(annotations, problems)]
    lines += _pixels(annotations, args)
    say("\nproblems")
    for problem in lines or ["none found"]:
        say(
            textwrap.fill(
                problem,
                108,
                initial_indent="  ",
                subsequent_indent="    ",
                break_long_words=False,
                break_on_hyphens=False,
            )
        )
    if known:
        say("\nagainst the published counts")
        for line in compare_with_published(annotations):
            say(f"  {line}")
    say()
    say(planned_splits(annotations, args))


def _scales(annotations, problems):
    """The µm/px of the images, with the number of images that have each."""
    scales = problems.scales
    if not scales:  # no image is here, but the annotation file may know
        scales = {}
        for value in (annotations.mpp or {}).values():
            scales[round(value, 3)] = scales.get(round(value, 3), 0) + 1
    texts = []
    for value, number in scales.items():
        texts.append(f"{'unknown' if value is None else value} ({number:,} images)")
    return ", ".join(texts) or "unknown, the images are missing"


def _columns(annotations):
    """Lines on the columns that few datasets have: scanners, species, experts' votes, a split."""
    lines = []
    for name in ("scanner", "species", "split"):
        if getattr(annotations, name) is not None:
            words, word = annotations.codes(name)
            counts = zip(words.tolist(), np.bincount(word).tolist())
            texts = [f"{word or 'unknown'} ({count:,})" for word, count in counts]
            lines.append(f"{name:<12} {', '.join(texts[:12])}")
    if annotations.share is not None:
        agreed = np.isin(annotations.share, (0, 1)).mean()
        lines.append(f"votes        the experts agree on {agreed:.1%} of the annotations")
    return lines


def _counts(annotations, known, number):
    """Table of the counts by domain, and what they say of cases and images."""
    label, rows = annotations.label, []
    domains = np.unique(annotations.domain).tolist()
    for domain in [*domains, None]:
        name, inside = "total", np.ones(len(label), bool)
        if domain is not None:
            inside = annotations.domain == domain
            name = domain
            if known and domain in known.domains:
                name = f"{domain} {known.domains[domain][2]}".strip()
        rows.append(
            [
                name,
                f"{len(np.unique(annotations.image[inside])):,}",
                f"{len(np.unique(annotations.case[inside])):,}",
                f"{(label[inside] == 1).sum():,}",
                f"{(label[inside] == 0).sum():,}",
            ]
        )
    if len(domains) == 1:
        rows = rows[1:]
    header = ["domain", "labelled images", "cases", *reversed(annotations.classes)]
    lines = [common.table(rows, header, right=(1, 2, 3, 4)), ""]
    sizes = np.bincount(annotations.codes("case")[1])
    lines.append(
        f"cases hold {sizes.min():,} to {sizes.max():,} annotations, the largest "
        f"{sizes.max() / len(label):.1%} of all"
    )
    if annotations.kind == "points":
        labelled = len(np.unique(annotations.image))
        without = labelled - len(np.unique(annotations.image[label == 1]))
        lines.append(
            f"{without:,} labelled images hold no {annotations.classes[1]}, "
            f"{number - labelled:,} images are not labelled"
        )
    return "\n".join(lines)


def _problems(annotations, problems):
    """Lines on the table itself: missing images; positions twice, or of both classes."""
    lines = []
    if annotations.missing:
        lines.append(
            f"{len(annotations.missing):,} images are missing "
            f"({images.examples(annotations.missing)}); --images names their folder"
        )
    lines += _same_content(annotations)
    if annotations.kind == "patches":
        return lines
    unknown = len(set(annotations.image.tolist()) - set(problems.sizes))
    if unknown:
        lines.append(
            f"the sizes of {unknown:,} images are not known: centres beyond their right and lower "
            "border cannot be found"
        )
    repeated = duplicates(annotations)
    if len(repeated):
        lines.append(
            f"{len(repeated):,} annotations repeat the position of another: "
            f"{images.places(annotations, repeated)}"
        )
    codes = np.stack([annotations.codes("image")[1], annotations.codes("case")[1]])
    cases_of_images = np.bincount(np.unique(codes, axis=1)[0])
    shared = int((cases_of_images > 1).sum())
    if shared:
        lines.append(
            f"{shared:,} images hold several cases: random patches keep away from the annotations "
            "of cases that are not trained on, not from other tissue of theirs (--random-share 0 "
            "draws none)"
        )
    near = opposite_pairs(annotations)
    if near:
        lines.append(
            f"{near:,} pairs of opposite class lie within {NEAR:g} px: each is in the other's patch"
        )
    return lines


def _same_content(annotations):
    """A line if one image has several names, which may lie on two sides of a split, as a list."""
    if set(annotations.image.tolist()) & set(annotations.missing):
        return []
    names, image_of = annotations.codes("image")
    case_of = dict(zip(image_of.tolist(), annotations.case.tolist()))
    first, twins = {}, []
    for number, name in enumerate(names.tolist()):
        try:
            content = images.file_content(annotations.image_path(name), times=False)
        except UserError:  # it is among the unreadable images
            continue
        twin = first.setdefault(content, number)
        if case_of[twin] != case_of[number]:
            twins.append(f"{names[twin]} and {name}")
    if not twins:
        return []
    return [
        f"{len(twins):,} images have the same content as another of another case: "
        f"{images.examples(twins)}; one may be trained on and the other tested"
    ]


def _pixels(annotations, args):
    """A line if a sample of the patches does not look like cells, as a list."""
    if set(annotations.image.tolist()) & set(annotations.missing):
        return []
    patches = Patches(annotations, fit=args.fit, mpp=args.mpp, source_mpp=args.source_mpp)
    try:
        sample = patches.read(look.sample_rows(annotations))
    except UserError as error:
        return [f"the pixels cannot be checked: {error}"]
    line = look.suspicion(sample, annotations.kind == "points")
    return [line] if line else []


def compare_with_published(annotations):
    """Lines: does the table hold what was published of this known dataset?"""
    known, lines = KNOWN[annotations.known], []
    if known.counts is None:
        return ["none available"]

    def compare(what, inside, published, published_images=None):
        label = annotations.label[inside]
        counts = int((label == 1).sum()), int((label == 0).sum())
        number = len(np.unique(annotations.image[inside]))
        text = f"{what}: {published[0]:,} / {published[1]:,}"
        if published_images is not None:
            text += f" on {published_images:,} images"
        if counts == published and published_images in (None, number):
            lines.append(f"{text}: the same")
        else:
            here = f"{counts[0]:,} / {counts[1]:,} on {number:,} images"
            lines.append(f"{text}: DIFFERS, here {here}")

    compare("all", slice(None), known.counts, known.images)
    for domain, (*_, text, published) in known.domains.items():
        if published:
            compare(f"{domain} {text}".strip(), annotations.domain == domain, published)
    return lines


# ---------------------------------------------------------------- the splits


def planned_splits(annotations, args):
    """The splits that training with these flags would use, with their real shares and what they
    leak, as text.
    """
    places = {}  # (domain, left out) → its splits
    for choices in flags.split_grid(args):
        place = choices.get("domain"), choices.get("leave_out")
        places.setdefault(place, []).append(choices)
    return "\n\n".join(
        "\n".join(_planned(annotations, grid, *place)) for place, grid in places.items()
    )


def _planned(annotations, grid, domain, left_out):
    """Lines on the splits of all folds and fractions, of one domain or of the whole. grid: what
    make_split takes for each.
    """
    rows, leaks, errors, others = [], [], set(), {}
    one_class = {}  # lines, each once
    for choices in grid:
        fold, frac = choices["fold"], choices["frac"]
        try:
            split = make_split(annotations, **choices)
        except UserError as error:
            errors.add(f"fold {fold}: {error}")
            continue
        others = split.others
        one_class |= dict.fromkeys(runs.one_class(annotations, split))
        if frac == max(choices["frac"] for choices in grid):
            leaks.append(overlap(annotations, split))
        rows.append([fold, f"{frac:g}", *_split_cells(annotations, split)])
    what = f"{annotations.classes[1]} + {annotations.classes[0]} (cases)"
    title = f"planned splits: {what}"
    if domain:
        title = f"train on {domain}, test on it and on "
        title += f"{', '.join(others) or 'the other domains'}: {what}"
    if left_out:
        title = f"train on all domains but {left_out}, test on it: {what}"
    lines = [title]
    if rows:
        header = ["fold", "frac", "train", "val", "test", "% of all"]
        lines.append(common.table(rows, header, right=range(6)))
        lines.append(_leaks(annotations, leaks))
    lines += [f"problem: {line}" for line in one_class]
    return lines + [f"  {error}" for error in sorted(errors)]


def _split_cells(annotations, split):
    """Cells of a table: the counts of train, val and test, and their shares."""
    sets = {"train": split.train, "val": split.val, "test": split.test}
    total = split.pool + len(split.val) + len(split.test)
    cells, shares = [], []
    for name, ids in sets.items():
        positive = int(annotations.label[annotations.rows(ids)].sum())
        cells.append(f"{positive:,} + {len(ids) - positive:,} ({len(split.cases[name]):,})")
        shares.append(f"{100 * len(ids) / total:.1f}")
    return [*cells, " / ".join(shares)]


def _leaks(annotations, leaks):
    """What the training sets give away of the test sets, as text."""

    def span(key):
        shares = [leak[key] for leak in leaks]
        low, high = f"{100 * min(shares):.1f}", f"{100 * max(shares):.1f}"
        return f"{low}%" if low == high else f"{low} to {high}%"

    same_case = any(leak["cases"] for leak in leaks)
    same_place = any(leak["near"] for leak in leaks)
    near = (
        f"within {NEAR:g} px of a training annotation ({span('near_chebyshev')} by the larger of "
        "|dx| and |dy|)"
    )
    if not same_case and not same_place:
        return "no case is on two sides"
    if not same_case:
        return (
            f"LEAKS: {span('near')} of the test annotations lie {near},\n"
            "  under other case names; correct the cases of the annotation file"
        )
    text = f"LEAKS: {span('on_trained_cases')} of the test annotations lie on trained cases"
    if annotations.kind == "patches":
        return text
    return f"{text},\n  {span('near')} {near}"


# ---------------------------------------------------------------- the command


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_arguments(parser, positional=True)
    flags.add_split_arguments(parser)
    parser.set_defaults(fold=[])  # the report plans all five, a file takes the first
    group = parser.add_argument_group("actions instead of the report")
    group.add_argument(
        "--save-split",
        metavar="FILE",
        help="write the split (one --fold, --frac and --domain) to FILE",
    )
    group.add_argument(
        "--check-split",
        metavar="FILE",
        help="read a split file and check that it fits and leaks nothing",
    )
    group.add_argument(
        "--cache",
        nargs="?",
        const="",
        metavar="DIR",
        help="build the store of crops (in DIR; default: $MITOSIS_CACHE, else .crops beside the "
        "images)",
    )
    group.add_argument(
        "--workers",
        type=int,
        default=min(4, os.cpu_count() or 1),
        help="processes of --cache, connections of --download (default: %(default)s)",
    )
    group.add_argument(
        "--download",
        metavar="NAME",
        help=f"fetch {', '.join(DOWNLOADABLE)} to $MITOSIS_ROOT/NAME; continues an interrupted "
        "download",
    )
    group.add_argument(
        "--only", metavar="PATTERN", help="--download only files whose name matches, e.g. '00*.png'"
    )
    return parser.parse_args()


def fetch(args):
    folder = root_folder() / args.download
    download.fetch(args.download, folder, workers=args.workers, only=args.only)
    say(f"{args.download} is in {folder}; python data.py {args.download} reports on it")


def build_cache(annotations, args):
    flags.need_images(annotations, args.mpp, crop=args.crop)
    patches = Patches(
        annotations,
        mpp=args.mpp,
        source_mpp=args.source_mpp,
        cache=args.cache or None,
        crop=args.crop,
    )
    path = build_store(patches, args.workers)
    text = f"training reads {path}.npy"
    if args.cache and Path(args.cache).resolve() != (annotations.root / ".crops").resolve():
        text += f" if MITOSIS_CACHE={args.cache} is set"
    say(text)


def check_file(annotations, path):
    split = load_split(path, annotations)
    leak = overlap(annotations, split)
    say(
        f"{path}: fits {annotations.name}; train {len(split.train):,}, val {len(split.val):,}, "
        f"test {len(split.test):,}; {leak['cases']} cases on both sides, {leak['near']:.1%} of the "
        f"test within {NEAR:g} px of training"
    )


def save_file(annotations, args):
    grid = flags.split_grid(args, args.fold or [0])
    if len(grid) > 1:
        raise UserError(
            "--save-split: a file holds one split; give one --fold, --frac and --domain"
        )
    choices = grid[0]
    inputs = [annotations.source, args.check_split]
    inputs += [annotations.image_path(name) for name in annotations.codes("image")[0].tolist()]
    common.check_output("--save-split", args.save_split, inputs)
    make_split(annotations, **choices).save(args.save_split)
    say(f"{args.save_split}: fold {choices['fold']}, fraction {choices['frac']:g}")


def main():
    args = arguments()
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: at least 1")
    if args.download:
        fetch(args)
        return
    for choices in flags.split_grid(args, args.fold or [0]):
        check_settings(**{key: value for key, value in choices.items() if key != "seed"})
    annotations = flags.from_arguments(args, quiet=True)
    if args.cache is not None:
        build_cache(annotations, args)
    elif args.check_split:
        check_file(annotations, args.check_split)
    elif args.save_split:
        save_file(annotations, args)
    else:
        args.fold = args.fold or list(range(args.folds or 5))
        report(annotations, args)


if __name__ == "__main__":
    common.command(main)
