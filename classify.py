"""Second stage of a detector: an exported model, a slide and candidates in, the candidates with
scores out.

    python classify.py MODEL.onnx --slide S --candidates C --out O      score candidates
    python classify.py MODEL.onnx                                       what the model is
    python classify.py --doctor                                         does it run on the GPU?

In a program of your own:

    from classify import Classifier
    classifier = Classifier("model.onnx", device="auto")
    probability = classifier.score("slide.svs", x, y)     # centres in level-0 px
    mitotic = probability >= classifier.threshold

For patches that you read yourself: classifier(patches), uint8 [N, size, size, 3], RGB, at
classifier.mpp µm/px.

Needs numpy, onnxruntime, openslide and Pillow (requirements-classify.txt)."""

import argparse
import contextlib
import itertools
import os
import sys
import time
import unicodedata
from pathlib import Path, PurePosixPath

import numpy as np

import common
from common import UserError
from dataset import annotations, draws, formats, look, slides
from onnx_model import doctor, session
from onnx_model.session import Classifier, SlideReader
from reporting import metrics
from reporting.overlay import Marks, view_around

LISTED = 5  # problems that are named one by one
LOOK_PATCHES, LOOK_SLIDES = 100, 8  # of the sample that is looked at before the scoring
LABELLED = 200  # candidates in an overlay that are still labelled with their probability

# ---------------------------------------------------------------- which image a candidate lies on


def find_images(candidates, slide):
    """Which file each candidate lies on → (list of paths or None, files that do not exist).

    A name in the candidates' file means an image by its path; its last part or its stem are enough
    if only one image can be meant, else UserError.

    slide  a slide, or a folder of images
    """
    slide = Path(slide)
    names = sorted({name for name in candidates.images if name})
    if not slide.exists():
        raise UserError(f"--slide {slide}: no such file or folder")
    if slide.is_file():
        if not names:
            return [slide] * len(candidates), []
        name = name_of_slide(names, slide, candidates.path)
        return [slide if parts(image) == parts(name) else None for image in candidates.images], []
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
    if below and (below[0] == "/" or below[0].endswith(":")):  # of another machine
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


# ---------------------------------------------------------------- what is to be scored


class Plan:
    """The cells that can be scored, in the arrays that `session.score` takes.

    rows [n]: their candidates · which [n]: index into `readers` · x, y [n]: level-0 px · problems:
    what cannot be scored, a line each"""

    def __init__(self):
        self.rows, self.which, self.x, self.y = [], [], [], []
        self.readers, self.problems = [], []

    def add_reader(self, metadata, path, mpp):
        """The index of a new reader; None if the image cannot be read."""
        try:
            self.readers.append(SlideReader(metadata, path, mpp))
        except (UserError, OSError, ValueError) as error:
            text = str(error)
            if str(path) not in text:
                text = f"{path}: cannot be read ({text})"
            self.problems.append(text)
            return None
        return len(self.readers) - 1

    def add_cell(self, row, reader, x, y):
        self.rows.append(row)
        self.which.append(reader)
        self.x.append(x)
        self.y.append(y)


def plan(candidates, images, missing, metadata, mpp):
    """What of the candidates can be scored → Plan.

    images, missing  from `find_images`
    mpp              µm/px of the slides; None: as their files say
    """
    job = Plan()
    job.problems += [f"{path}: no such file" for path in missing]
    readers = {None: None, **dict.fromkeys(missing)}
    for row, path in enumerate(images):
        if path not in readers:
            readers[path] = job.add_reader(metadata, path, mpp)
        if readers[path] is None:
            continue
        reader = job.readers[readers[path]]
        x, y = float(candidates.x[row]), float(candidates.y[row])
        if candidates.unit == "mm":  # millimetres
            if reader.mpp is None:
                raise UserError(
                    f"{path}: its µm/px is unknown, and the candidates are in millimetres; give "
                    "--mpp"
                )
            x, y = x * 1000 / reader.mpp, y * 1000 / reader.mpp
        if reader.outside(x, y):
            job.problems.append(
                f"candidate {candidates.ids[row]} at ({x:g}, {y:g}) lies outside {path.name} "
                f"({reader.extent})"
            )
            continue
        job.add_cell(row, readers[path], x, y)
    return job


# ---------------------------------------------------------------- the picture


def overlay(path, job, probability, threshold, labels, longest=2000):
    """Draw the scored candidates of the first slide that has any on a view that holds them all.

    probability  of the cells of `job`, a Plan; NaN: not scored
    """
    scored = np.flatnonzero(~np.isnan(probability))
    if not len(scored):
        return
    which, x, y = np.asarray(job.which), np.asarray(job.x), np.asarray(job.y)
    cells = scored[which[scored] == which[scored[0]]]
    image = job.readers[which[cells[0]]].slide
    view, left, top, scale = view_around(image, x[cells], y[cells], longest)

    marks = Marks(view, scale)
    for i in cells[np.argsort(probability[cells])]:  # the likely ones on top
        text = f"{probability[i]:.2f}"
        if len(cells) > LABELLED:
            text = ""
        label = int(probability[i] >= threshold)
        marks.mark((x[i] - left) * scale, (y[i] - top) * scale, label, text)
    legend = f"red: {labels[1]} (p from {threshold:.3g} on), blue: {labels[0]}"
    box = marks.draw.textbbox((8, 6), legend, font=marks.font)
    marks.draw.rectangle((0, 0, box[2] + 8, box[3] + 6), fill="white")
    marks.draw.text((8, 6), legend, fill="black", font=marks.font)
    with common.atomic(path) as temporary:
        view.save(temporary, format="PNG")


# ---------------------------------------------------------------- the command


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="Score a detector's candidates with an exported model; with the model alone: "
        "say what it is."
    )
    parser.add_argument("model", nargs="?", metavar="MODEL.onnx", help="made by export.py")
    parser.add_argument(
        "--slide",
        metavar="S",
        help="the slide or image; a folder of them if the candidates name their images",
    )
    parser.add_argument(
        "--candidates",
        metavar="C",
        help="MIDOG JSON, MIDOG challenge JSON, CSV (x, y, filename), SlideRunner SQLite, QuPath "
        "GeoJSON, ImageScope XML",
    )
    parser.add_argument(
        "--out", metavar="O", help="the same format, with probability and class added"
    )
    parser.add_argument(
        "--relabel",
        action="store_true",
        help="also replace the format's own class: category_id, agreedClass, label (default: no; "
        "GeoJSON always gets the new one)",
    )
    parser.add_argument(
        "--threshold",
        metavar="P",
        help="probability from which a candidate is a mitotic figure (default: the model's)",
    )
    parser.add_argument(
        "--mpp", type=float, metavar="M", help="µm/px of the slide (default: what its file says)"
    )
    parser.add_argument(
        "--device",
        default="auto",
        metavar="D",
        help="auto, cuda, cuda:1 or cpu; cuda is an error if it does not work (default: auto)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="patches per run (default: 64 on a GPU, on the CPU 8 per thread, up to 64)",
    )
    parser.add_argument(
        "--workers", type=int, default=4, metavar="N", help="threads that read (default: 4)"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        metavar="N",
        help="CPU threads that the model may use (default: all)",
    )
    parser.add_argument(
        "--skip",
        action="store_true",
        help="name and leave out what cannot be scored (unreadable slides, candidates outside); "
        "exit status 1 then (default: an error before anything is written)",
    )
    parser.add_argument(
        "--overlay", metavar="PNG", help="draw the scored candidates of the (first) slide"
    )
    parser.add_argument(
        "--doctor",
        action="store_true",
        help="check the installation instead; exit status 1 if a GPU is not used",
    )
    return parser.parse_args()


def check(args):
    """UserError for flags that do not make sense, before any file is opened."""
    if not args.model:
        raise UserError("which model? python classify.py MODEL.onnx … (or --doctor)")
    together = [args.slide, args.candidates, args.out]
    if any(together) and not all(together):
        raise UserError(
            "--slide, --candidates and --out belong together; without them the model is described"
        )
    for flag, value, least, most in (
        ("--batch-size", args.batch_size, 1, 65536),
        ("--workers", args.workers, 1, 256),
        ("--threads", args.threads, 0, 1024),
    ):
        if value is not None and not least <= value <= most:
            raise UserError(f"{flag} {value}: give {least} to {most}")
    if args.mpp is not None and not 0.01 < args.mpp < 100:
        raise UserError(f"--mpp {args.mpp:g}: not a plausible number of µm per px")


def check_outputs(args, images):
    """UserError for outputs that could not be written or would replace an input: before the work.

    images  that the candidates lie on
    """
    inputs = [args.model, f"{args.model}.data", args.slide, args.candidates, *images]
    outputs = [("--out", args.out)]
    if args.overlay:
        outputs.append(("--overlay", args.overlay))
    for flag, path in outputs:
        common.check_output(flag, path, inputs)
        if not Path(path).resolve().parent.is_dir():
            raise UserError(f"{flag} {path}: its folder does not exist")
        inputs.append(path)


def say(text):
    print(text, file=sys.stderr, flush=True)


def say_left_out(problems):
    for text in problems[:LISTED]:
        say(f"left out: {text}")
    if len(problems) > LISTED:
        say(f"left out: {len(problems) - LISTED} more")


def say_readers(readers):
    """How each slide is read, and once, loudly, where the scale may be wrong."""
    doubtful = {}
    for reader in readers:
        say(f"{Path(reader.name).name}: {reader.note}")
        for note in slides.facts(reader.slide).notes:  # pages, orientation
            say(f"warning: {Path(reader.name).name} {note}")
        if reader.warning:
            doubtful.setdefault(reader.warning, []).append(Path(reader.name).name)
    for warning, names in doubtful.items():
        more = ""
        if len(names) > 1:
            more = f" and {len(names) - 1} more"
        say(
            f"warning: {names[0]}{more}: {warning}; at another scale every probability is wrong "
            "(--mpp gives the µm/px)"
        )


def look_at(job):
    """Say if a sample of the patches does not look like cells."""
    rng = draws.generator("look")
    cells = np.arange(len(job.rows))
    which = np.asarray(job.which, int)
    if len(job.readers) > LOOK_SLIDES:  # each may have to be decoded whole
        chosen = draws.shuffled(rng, np.arange(len(job.readers)))[:LOOK_SLIDES]
        cells = np.flatnonzero(np.isin(which, chosen))
    patches = []
    for i in np.sort(draws.shuffled(rng, cells)[:LOOK_PATCHES]):
        # What cannot be read is said when it is scored.
        with contextlib.suppress(UserError, OSError, ValueError):
            patches.append(job.readers[which[i]].read(job.x[i], job.y[i]))
    if patches:
        line = look.suspicion(np.stack(patches))
        if line:
            say(f"warning: {line}")


def score_all(classifier, job, args):
    """Probabilities of the plan's cells → (float32 [n], seconds). With --skip, NaN for those that
    cannot be read, which are named.
    """
    failures, failed = [], None
    if args.skip:

        def failed(i, error):
            name = job.readers[job.which[i]].name
            failures.append(f"{name}: cannot be read at ({job.x[i]:g}, {job.y[i]:g}): {error}")

    start = time.perf_counter()
    with common.progress(total=len(job.rows), desc="candidates", unit="candidates") as bar:
        try:
            probability = session.score(
                classifier, job.readers, job.which, job.x, job.y, args.workers, bar, failed
            )
        except UserError as error:
            raise UserError(f"{error}; --skip leaves out what cannot be scored") from None
    say_left_out(failures)
    return probability, time.perf_counter() - start


def classify(args):
    """Score the candidates and write them → exit status."""
    # Mistakes are found before the work: what does not need the model, then what does.
    threshold = None
    if args.threshold is not None:
        threshold = metrics.parse_threshold(args.threshold)
    candidates = formats.read_candidates(args.candidates)
    for note in candidates.notes:
        say(f"{candidates.path.name}: {note}")
    images, missing = find_images(candidates, args.slide)
    check_outputs(args, sorted({path for path in images if path is not None}))
    formats.move_to_level0(candidates, images, say)
    classifier = Classifier(args.model, args.device, args.batch_size, args.threads)
    if classifier.input != "uint8":
        raise UserError(
            f"{args.model}: was exported with --input float, for hosts that normalise; this "
            "command needs --input uint8"
        )
    if classifier.threshold is None:
        raise UserError(f"{args.model}: is an encoder without a head and gives no probabilities")
    if args.relabel:
        formats.own_classes(candidates, classifier.labels)
    say(f"{args.model}: {classifier.note}")
    if threshold is None:
        threshold = classifier.threshold

    job = plan(candidates, images, missing, classifier.metadata, args.mpp)
    say_readers(job.readers)
    if job.problems and not args.skip:
        more = ""
        if len(job.problems) > 1:
            more = f" (and {len(job.problems) - 1} more like this)"
        raise UserError(
            f"{job.problems[0]}{more}; right slide, level-0 coordinates? --skip leaves out what "
            "cannot be scored"
        )
    say_left_out(job.problems)
    look_at(job)

    probability = np.full(len(candidates), np.nan, np.float32)
    probability[job.rows], seconds = score_all(classifier, job, args)
    formats.write(candidates, args.out, probability, threshold, classifier.labels, args.relabel)
    if args.overlay:
        overlay(args.overlay, job, probability[job.rows], threshold, classifier.labels)

    scored = int((~np.isnan(probability)).sum())
    positive = int((probability >= threshold).sum())
    print(
        f"{args.out}: {scored} candidates scored, {positive} {classifier.labels[1]}, "
        f"{scored - positive} {classifier.labels[0]} (threshold {threshold:.4g}); "
        f"{scored / max(seconds, 1e-9):.1f} candidates/s"
    )
    elsewhere = images.count(None)
    if elsewhere:
        print(f"{elsewhere} candidates lie on other images and are left as they were")
    left = len(candidates) - elsewhere - scored
    if left:
        print(f"{left} candidates could not be scored and have no probability")
        return 1
    return 0


def main():
    args = parse_arguments()
    if args.doctor:
        return doctor.report()
    check(args)
    if args.candidates:
        return classify(args)
    print(Classifier(args.model, args.device, warm_up=False).describe())
    return 0


if __name__ == "__main__":
    common.command(main)
