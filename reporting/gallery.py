"""Gallery of errors: the patches on which the best model is most confidently wrong."""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import common
import flags
from common import UserError
from dataset.annotations import KNOWN, PATCH, root_folder
from dataset.patches import Patches
from reporting import figures, tables

TILE, MARGIN = 112, 60  # px of a patch, and of the domain's name left of its line
GAP, TOP = 24, 20  # px between the two sides, and of their headings
LINE, STEP = TILE + 30, TILE + 6  # px of a line of tiles with its text, from tile to tile


def dataset_of(run, given):
    """(Annotations, flags) of a run's dataset as the run read it. given: flags (dict) that replace
    the run's. UserError if it is not available or has changed.
    """
    source = {"data": run.data} | run.source
    recorded = str(source["data"])
    if run.data in KNOWN and os.path.isabs(recorded) and not Path(recorded).exists():
        source["data"] = run.data  # trained on another machine; find it by its name
    if given.get("data"):
        source["images"] = None  # those of the other place
    source |= {name: given[name] for name in flags.SOURCE if given.get(name)}
    if source["data"] == "demo" and not (root_folder() / "demo").is_dir():
        raise UserError(f"the demo dataset is not in {root_folder()}")  # loading would make it
    annotations, reading = flags.from_source(source)
    if annotations.fingerprint() != run.fingerprint:
        raise UserError(
            f"{annotations.source} holds other annotations than the runs were made with"
        )
    return annotations, reading


def gallery(finished, given):
    """(PNG bytes, caption) of the most confident errors of the best model, by domain; UserError or
    OSError if the images are not available. finished: runs of one section; given: see dataset_of().
    """
    named = tables.in_order(finished)
    scores = {}
    for label, repeats in named.items():
        scores[label] = tables.mean([run.sets["test"]["auroc"] for run in repeats]) or 0
    label = max(scores, key=scores.get)
    repeats = named[label]
    first = repeats[0]
    ids, y, _, _, domain = first.rows("test")
    p = np.mean([run.rows("test")[2] for run in repeats], axis=0)
    annotations, reading = dataset_of(first, given)
    flags.need_images(annotations, first.flags.get("mpp"), True, first.flags.get("crop"))
    patches = Patches(
        annotations,
        size=first.flags.get("size") or PATCH,
        fit=first.flags.get("fit") or "resize",
        mpp=first.flags.get("mpp"),
        source_mpp=reading.source_mpp,
        crop=first.flags.get("crop"),
    )
    sheet = draw_errors(patches, annotations.rows(ids), ids, y, p, domain)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    negative, positive = first.classes
    caption = (
        f"{first.data}: the most confident errors of {label} on the test set, mean over "
        f"{common.counted(len(repeats), 'repeat')}, by domain. Left: {negative} called {positive}; "
        f"right: {positive} missed. p: probability of {positive}."
        f"{tables.legend(first.data, np.unique(domain))}"
    )
    return buffer.getvalue(), caption


def draw_errors(patches, rows, ids, y, p, domain, columns=5):
    """PIL image: one line of tiles per domain, false positives left, false negatives right, with p
    and id below. rows: of the annotations [N]; ids, y, p, domain: [N].
    """
    font = ImageFont.load_default(12)
    domains = sorted(set(domain.tolist()))
    short = figures.short_names(domains)
    size = MARGIN + 2 * columns * STEP + GAP, TOP + LINE * len(domains)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)

    def write(x, y, text, fill="black"):
        draw.text((x, y), common.printable(text), fill=fill, font=font)

    lefts = MARGIN, MARGIN + columns * STEP + GAP
    for left, heading in zip(lefts, ("false positives", "false negatives")):
        write(left, 3, heading)
    for line, name in enumerate(domains):
        top = TOP + line * LINE
        middle = top + TILE // 2 - 7
        write(4, middle, short[name])
        members = np.flatnonzero(domain == name)
        positives = members[(y[members] == 0) & (p[members] >= 0.5)]
        positives = positives[np.argsort(-p[positives], kind="stable")]
        negatives = members[(y[members] == 1) & (p[members] < 0.5)]
        negatives = negatives[np.argsort(p[negatives], kind="stable")]
        for left, errors in zip(lefts, (positives, negatives)):
            errors = errors[:columns]
            if not len(errors):
                write(left + 4, middle, "none", "#666666")
                continue
            for k, (i, tile) in enumerate(zip(errors, patches.read(rows[errors]))):
                x = left + k * STEP
                tile = Image.fromarray(tile).resize((TILE, TILE), Image.Resampling.LANCZOS)
                sheet.paste(tile, (x, top))
                write(x, top + TILE + 1, f"p {p[i]:.3f}")
                write(x, top + TILE + 13, str(ids[i])[-16:], "#444444")
    return sheet
