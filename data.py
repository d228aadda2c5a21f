"""What a dataset holds, and the flags that say which. No torch.

    python data.py midog2022                          counts, cases, problems, planned splits of a
    known dataset
    python data.py my.sqlite --images slides/         the same for one's own annotations
    python data.py midog2022 --cache                  build the store of crops that training reads
    from
    python data.py --download midog2022               fetch a public dataset (resumable)

The door to annotations.py (known datasets, the table), splits.py and sampler.py:
`data.load_dataset`, `data.make_split`, `data.Sampler`."""

import argparse
import os
import textwrap
from pathlib import Path

import numpy as np

import common
import flags
from common import UserError
from dataset.annotations import (  # noqa: F401
    DOWNLOADABLE,
    KNOWN,
    NEAR,
    Annotations,
    by_image,
    near_pairs,
    root_folder,
    shared_cases,
)
from dataset.sampler import PATCH, Sampler, pool_size, random_pool  # noqa: F401
from dataset.splits import check_settings, load_split, make_split, overlap, resolve_domain
from flags import load_dataset  # noqa: F401

# ---------------------------------------------------------------- the report


def opposite_pairs(annotations, distance=NEAR):
    """Number of pairs of opposite class on one image that lie within `distance` px (Euclidean)."""
    found = 0
    for rows in by_image(annotations).values():
        positive, negative = (rows[annotations.label[rows] == label] for label in (1, 0))
        found += len(
            near_pairs(
                annotations.x[positive],
                annotations.y[positive],
                annotations.x[negative],
                annotations.y[negative],
                distance,
            )[0]
        )
    return found


def duplicates(annotations):
    """Row indices of annotations whose image and position an earlier row has too."""
    seen, found = set(), []
    for i, place in enumerate(
        zip(annotations.image.tolist(), annotations.x.tolist(), annotations.y.tolist())
    ):
        if place in seen:
            found.append(i)
        seen.add(place)
    return np.array(found, np.int64)


def outside(annotations, sizes):
    """Row indices of annotations whose centre is not on their image, as far as `sizes` tells its
    extent.
    """
    size = np.array(
        [sizes.get(image) or (np.inf, np.inf) for image in annotations.image.tolist()]
    ).reshape(-1, 2)
    low = (annotations.x < 0) | (annotations.y < 0)
    return np.flatnonzero(low | (annotations.x >= size[:, 0]) | (annotations.y >= size[:, 1]))


def _image_facts(annotations, notes):
    """Sizes and µm/px of the images that are there: ({image: (w, h)}, {µm/px or None: number of
    images}).
    """
    sizes, mpp = dict(annotations.sizes), {}
    there = [
        image
        for image in np.unique(annotations.image).tolist()
        if image not in set(annotations.missing)
    ]
    if not there or annotations.kind == "patches":
        return sizes, mpp
    from dataset import slides

    for image in common.progress(there, desc="images", unit="images"):
        try:
            size, own = (
                slides.dimensions(annotations.image_path(image)),
                slides.microns_per_pixel(annotations.image_path(image)),
            )
        except UserError as error:
            notes.append(f"unreadable image: {error}")
            continue
        if sizes.get(image, size) != size:
            notes.append(
                f"{image} is {size[0]} x {size[1]} px, the annotation file says "
                f"{sizes[image][0]} x {sizes[image][1]}: is it the right file?"
            )
        sizes[image] = size
        value = (annotations.mpp or {}).get(image) or own
        key = None if value is None else round(float(value), 3)
        mpp[key] = mpp.get(key, 0) + 1
    return sizes, mpp


def report(annotations, args):
    """Print what a dataset holds, what is wrong with it, and the splits that would be made of it."""
    for domain in args.domain or ():
        resolve_domain(annotations, domain)
    known, label = KNOWN.get(annotations.known), annotations.label
    wanted = set(annotations.all_images) | set(annotations.missing)
    print(f"{annotations.name}: {known.title if known else annotations.kind}")
    print(f"annotations  {annotations.source}")
    print(
        f"images       {annotations.root}: {len(wanted) - len(annotations.missing):,} of "
        f"{len(wanted):,} are there"
    )
    print(f"licence      {annotations.licence or 'not stated'}")
    notes = []
    sizes, mpp = _image_facts(annotations, notes)
    if annotations.kind == "points":
        for value in (
            () if mpp else (annotations.mpp or {}).values()
        ):  # no image is here, but they are known
            mpp[round(value, 3)] = mpp.get(round(value, 3), 0) + 1
        print(
            "µm/px        "
            + (
                ", ".join(
                    f"{'unknown' if value is None else value} ({n:,} images)"
                    for value, n in mpp.items()
                )
                or "unknown, the images are not here"
            )
        )
    print(f"fingerprint  {annotations.fingerprint()}\n")

    rows = []
    for domain in [*np.unique(annotations.domain).tolist(), None]:
        here = annotations.domain == domain if domain is not None else np.ones(len(label), bool)
        text = known.domains[domain][2] if known and domain in known.domains else ""
        rows.append(
            [
                (f"{domain} {text}".strip() if domain is not None else "total"),
                f"{len(np.unique(annotations.image[here])):,}",
                f"{len(np.unique(annotations.case[here])):,}",
                f"{(label[here] == 1).sum():,}",
                f"{(label[here] == 0).sum():,}",
            ]
        )
    print(
        common.table(
            rows if len(rows) > 2 else rows[1:],
            ["domain", "labelled images", "cases", "mitotic figures", "hard negatives"],
            right=(1, 2, 3, 4),
        )
    )
    counts = np.bincount(annotations.codes("case")[1])
    labelled = len(np.unique(annotations.image))
    print(
        f"\ncases hold {counts.min():,} to {counts.max():,} annotations, the largest "
        f"{counts.max() / len(label):.1%} "
        "of all"
    )
    if annotations.kind == "points":
        print(
            f"{labelled - len(np.unique(annotations.image[label == 1])):,} labelled images hold "
            "no mitotic figure, "
            f"{len(wanted) - labelled:,} images are not labelled"
        )

    print("\nproblems")
    for problem in [*annotations.notes, *notes, *_problems(annotations, sizes)] or ["none found"]:
        print(
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
        print("\nagainst the published counts")
        for line in compare_with_published(annotations):
            print(f"  {line}")
    print()
    print(planned_splits(annotations, args))


def _problems(annotations, sizes):
    """Lines: images that are missing; positions outside, twice, or of both classes."""
    found = []

    def places(rows):
        return ", ".join(
            f"{annotations.image[i]} ({annotations.x[i]:g}, {annotations.y[i]:g})" for i in rows[:4]
        ) + (", …" if len(rows) > 4 else "")

    if annotations.missing:
        found.append(
            f"{len(annotations.missing):,} images are missing ({', '.join(annotations.missing[:3])}"
            f"{', …' if len(annotations.missing) > 3 else ''}); --images names their folder"
        )
    if annotations.kind == "patches":
        return found
    beyond, twice, near = (
        outside(annotations, sizes),
        duplicates(annotations),
        opposite_pairs(annotations),
    )
    unknown = len(set(annotations.image.tolist()) - set(sizes))
    if len(beyond):
        found.append(f"{len(beyond):,} centres lie outside their image: {places(beyond)}")
    if unknown:
        found.append(
            f"the sizes of {unknown:,} images are not known: centres beyond their right and lower "
            "border "
            "were not looked for"
        )
    if len(twice):
        found.append(f"{len(twice):,} annotations repeat the position of another: {places(twice)}")
    cases = np.unique(
        np.stack([annotations.codes("image")[1], annotations.codes("case")[1]]), axis=1
    )
    shared = int((np.bincount(cases[0]) > 1).sum())
    if shared:
        found.append(
            f"{shared:,} images hold several cases: random patches keep away from the annotations "
            "of cases "
            "that are not trained on, not from other tissue of theirs (--random-share 0 draws none)"
        )
    if near:
        found.append(
            f"{near:,} pairs of opposite class lie within {NEAR:g} px: each is in the other's patch"
        )
    return found


def compare_with_published(annotations):
    """Lines: does the table hold what was published of this known dataset?"""
    known, lines = KNOWN[annotations.known], []

    def line(what, counts, images, wanted, wanted_images=None):
        same = counts == wanted and wanted_images in (None, images)
        of = "" if wanted_images is None else f" on {wanted_images:,} images"
        lines.append(
            f"{what}: {wanted[0]:,} / {wanted[1]:,}{of}: "
            + (
                "the same"
                if same
                else f"DIFFERS, here {counts[0]:,} / {counts[1]:,} on {images:,} images"
            )
        )

    def counts(here):
        return (
            int((annotations.label[here] == 1).sum()),
            int((annotations.label[here] == 0).sum()),
        ), len(np.unique(annotations.image[here]))

    if known.counts is None:
        return ["none at hand"]
    line("all", *counts(slice(None)), known.counts, known.images)
    for domain, (*_, text, wanted) in known.domains.items():
        if wanted:
            line(f"{domain} {text}".strip(), *counts(annotations.domain == domain), wanted)
    return lines


def planned_splits(annotations, args):
    """The splits that training with these flags would use, with their real shares and what they
    leak, as text.
    """
    parts = []
    for domain in args.domain or [None]:
        rows, leaks, errors, others = [], [], [], {}
        for fold in args.fold:
            for frac in args.frac:
                try:
                    split = make_split(
                        annotations, fold, frac, domain, args.seed, args.split, args.val_frac
                    )
                except UserError as error:
                    errors.append(f"fold {fold}: {error}")
                    continue
                others = split.others
                if frac == max(args.frac):
                    leaks.append(overlap(annotations, split))
                sizes = {"train": len(split.train), "val": len(split.val), "test": len(split.test)}
                total = split.pool + sizes["val"] + sizes["test"]
                cells = []
                for name in sizes:
                    positive = int(annotations.label[annotations.rows(getattr(split, name))].sum())
                    cells.append(
                        f"{positive:,} + {sizes[name] - positive:,} ({len(split.cases[name]):,})"
                    )
                rows.append(
                    [
                        fold,
                        f"{frac:g}",
                        *cells,
                        " / ".join(f"{100 * n / total:.1f}" for n in sizes.values()),
                    ]
                )
        title = "planned splits: mitotic figures + hard negatives (cases)"
        if domain:
            title = (
                f"train on {domain}, test on it and on "
                f"{', '.join(others) or 'the other domains'}: mitotic "
                "figures + hard negatives (cases)"
            )
        lines = [title]
        if rows:
            lines.append(
                common.table(
                    rows, ["fold", "frac", "train", "val", "test", "% of all"], right=range(6)
                )
            )
            lines.append(_leaks(annotations, leaks))
        parts.append("\n".join(lines + [f"  {error}" for error in sorted(set(errors))]))
    return "\n\n".join(parts)


def _leaks(annotations, leaks):
    """One line: what the training sets give away of the test sets."""
    if not any(found["cases"] for found in leaks):
        return "no case is on two sides"

    def span(key):
        low, high = (
            f"{100 * extreme(found[key] for found in leaks):.1f}" for extreme in (min, max)
        )
        return f"{low}%" if low == high else f"{low} to {high}%"

    text = f"LEAKS: {span('on_trained_cases')} of the test annotations lie on cases that are trained on"
    return (
        text
        if annotations.kind == "patches"
        else (
            f"{text},\n  {span('near')} within {NEAR:g} px of a training annotation "
            f"({span('near_chebyshev')} by the larger "
            "of |dx| and |dy|)"
        )
    )


# ---------------------------------------------------------------- the command


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_arguments(parser, positional=True)
    flags.add_split_arguments(parser)
    parser.set_defaults(fold=None)  # the report plans all five, a file takes the first
    group = parser.add_argument_group("what to do beside the report")
    group.add_argument(
        "--save-split",
        metavar="FILE",
        help="write the split (one --fold, --frac and --domain) to FILE",
    )
    group.add_argument(
        "--check-split",
        metavar="FILE",
        help="read a split file and assert that it fits and leaks nothing",
    )
    group.add_argument(
        "--cache",
        nargs="?",
        const="",
        metavar="DIR",
        help="build the store of crops (in DIR; default: "
        "$MITOSIS_CACHE, else .crops beside the images)",
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
        help=f"fetch {', '.join(DOWNLOADABLE)} to $MITOSIS_ROOT/NAME; "
        "continues where it was stopped",
    )
    group.add_argument(
        "--only", metavar="PATTERN", help="--download only files whose name matches, e.g. '00*.png'"
    )
    args = parser.parse_args()
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: at least 1")
    if args.download:
        from dataset import download

        folder = root_folder() / args.download
        download.fetch(args.download, folder, workers=args.workers, only=args.only)
        print(f"{args.download} is in {folder}; python data.py {args.download} tells what it holds")
        return
    for fold in args.fold or (0,):
        for frac in args.frac:
            check_settings(fold, frac, args.split, args.val_frac)
    annotations = flags.from_arguments(args, quiet=True)
    if args.cache is not None:
        flags.need_images(annotations)
        from dataset.patches import Patches, build_store

        patches = Patches(
            annotations, mpp=args.mpp, source_mpp=args.source_mpp, cache=args.cache or None
        )
        path = build_store(patches, args.workers)
        elsewhere = (
            args.cache and Path(args.cache).resolve() != (annotations.root / ".crops").resolve()
        )
        print(
            f"training reads {path}.npy"
            + (f" where MITOSIS_CACHE={args.cache} is set" if elsewhere else "")
        )
        return
    if args.check_split:
        split = load_split(args.check_split, annotations)
        found = overlap(annotations, split)
        print(
            f"{args.check_split}: fits {annotations.name}; train {len(split.train):,}, val "
            f"{len(split.val):,}, test "
            f"{len(split.test):,}; {found['cases']} cases on both sides, {found['near']:.1%} of "
            "the test within "
            f"{NEAR:g} px of training"
        )
        return
    if args.save_split:
        folds, domains = args.fold or [0], args.domain or [None]
        if max(len(folds), len(args.frac), len(domains)) > 1:
            raise UserError(
                "--save-split: a file holds one split; give one --fold, --frac and --domain"
            )
        make_split(
            annotations, folds[0], args.frac[0], domains[0], args.seed, args.split, args.val_frac
        ).save(args.save_split)
        print(f"{args.save_split}: fold {folds[0]}, fraction {args.frac[0]:g}")
        return
    args.fold = args.fold or [0, 1, 2, 3, 4]
    report(annotations, args)


if __name__ == "__main__":
    common.command(main)
