"""Second stage of a detector: an exported model, slides and candidates in, the candidates with
scores out.

    python classify.py MODEL.onnx --slide S --candidates C --out O      score candidates
    python classify.py MODEL.onnx --slide DIR --candidates DIR --out DIR    a folder of slides
    python classify.py MODEL.onnx --slide S --candidates blobs --out O.geojson    without a detector
    python classify.py MODEL.onnx                                       what the model is
    python classify.py --doctor                                         does it run on the GPU?

In a program of your own:

    from classify import Classifier
    classifier = Classifier("model.onnx", device="auto")
    probability = classifier.score("slide.svs", x, y)     # centres in level-0 px
    positive = probability >= classifier.threshold

For patches that you read yourself: classifier(patches), uint8 [N, size, size, 3], RGB, at
classifier.mpp µm/px.

Needs numpy, onnxruntime, openslide and Pillow (requirements-classify.txt)."""

import argparse
import contextlib
import sys
import time
from pathlib import Path

import numpy as np

import common
from common import UserError
from dataset import draws, formats, look, slides
from onnx_model import doctor, reading
from onnx_model.session import Classifier
from reporting import metrics
from reporting.overlay import Marks, view_around
from scoring import area, blobs, count, folder, match, plan

LISTED = 5  # problems that are named one by one
NAMED = 20  # slides of a folder that could not be scored
LOOK_PATCHES, LOOK_SLIDES = 100, 8  # of the sample that is looked at before the scoring
BLOBS = "blobs"  # the word for --candidates that stands for no file
LABELLED = 200  # candidates in an overlay that are still labelled with their probability

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
        help="the slide or image, or a folder of its DICOM files; a folder of slides if the "
        "candidates name their images or are a folder, too",
    )
    parser.add_argument(
        "--candidates",
        metavar="C",
        help="MIDOG JSON, MIDOG challenge JSON, CSV (x, y, filename), SlideRunner SQLite, QuPath "
        "GeoJSON, ImageScope XML; or a folder of such files, one per slide, of the slides' names; "
        "or the word blobs: dark blobs of haematoxylin are found on the slides themselves (a file "
        "of that name is ./blobs)",
    )
    parser.add_argument(
        "--out",
        metavar="O",
        help="the candidates with probability and class; another suffix (.csv, .json, .geojson, "
        ".xml) means another format. For folders: a folder, which also gets report.csv; finished "
        "slides are skipped",
    )
    parser.add_argument(
        "--format",
        choices=list(formats.FORMATS),
        help="format of the output (default: what the suffix of --out says; for folders, that of "
        "each file of candidates)",
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
        help="probability from which a candidate is of the model's class 1 (default: the model's)",
    )
    parser.add_argument(
        "--mpp", type=float, metavar="M", help="µm/px of the slide (default: what its file says)"
    )
    parser.add_argument(
        "--device",
        default="auto",
        metavar="D",
        help="auto, cuda, cuda:1, tensorrt (an engine is built at the first start, in minutes) or "
        "cpu; cuda and tensorrt are an error if they do not work; for folders also a list: "
        "cuda:0,cuda:1 (default: auto)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="patches per run (default: on a GPU 256 for models of up to 700 MB, else 64; on the "
        "CPU 8 per thread, up to 64)",
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
        "--area",
        metavar="A",
        help="count the mitotic figures per mm² of it: tissue, or a GeoJSON file with the tumour's "
        "outlines; for folders a folder of such files, of the slides' names (default: the densest "
        "2.37 mm² alone, if the µm/px is known)",
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
    if args.area not in (None, area.TISSUE):
        inputs.append(args.area)
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


def find_blobs(args, slide):
    """The first stage on a slide → (candidates, its tissue)."""
    with common.progress(desc="searched", unit="tiles") as bar:
        found = blobs.find(slide, args.mpp, workers=args.workers, progress=bar)
    say(f"{slide.name}: {len(found.x)} blobs of haematoxylin")
    return formats.from_points(slide, found.x, found.y, found.score), found.tissue


def area_of(args, job, labels, searched):
    """The area.Area of the one slide of a plan; UserError if none can be. searched: the slide's
    tissue if its candidates were found there.
    """
    of_tissue, outline = args.area == area.TISSUE, None
    if args.area is None:
        of_tissue = searched is not None and area.are_mitotic(labels)
    if not of_tissue:
        outline = args.area
    if not job.readers:
        return area.Area()
    if args.area is not None and len(job.readers) > 1:
        raise UserError(
            f"--area is of one slide, and the candidates lie on {len(job.readers)}; score a folder "
            "of files, one per slide"
        )
    return area.of_slide(job.readers[0], outline, of_tissue, searched)


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
            probability = reading.score(
                classifier, job.readers, job.which, job.x, job.y, args.workers, bar, failed
            )
        except UserError as error:
            raise UserError(f"{error}; --skip leaves out what cannot be scored") from None
    say_left_out(failures)
    return probability, time.perf_counter() - start


def open_model(args, device):
    """The Classifier on a device; UserError if it gives no probabilities of patches, or none of
    what --area counts.
    """
    classifier = Classifier(args.model, device, args.batch_size, args.threads)
    if classifier.input != "uint8":
        raise UserError(
            f"{args.model}: was exported with --input float, for hosts that normalise; this "
            "command needs --input uint8"
        )
    if classifier.threshold is None:
        raise UserError(f"{args.model}: is an encoder without a head and gives no probabilities")
    if args.area is not None and not area.are_mitotic(classifier.labels):
        raise UserError(
            f"--area counts mitotic figures, and the class 1 of this model is "
            f"{classifier.labels[1]}"
        )
    say(f"{args.model}: {classifier.note}")
    return classifier


def threshold_of(args):
    """The threshold that the user gives, else None: the model's."""
    if args.threshold is None:
        return None
    return metrics.parse_threshold(args.threshold)


def read_input(args):
    """What is to be scored, and the model → (classifier, candidates, the file of each one's slide
    or None, files that do not exist, the slide's tissue if the candidates were found there).
    """
    # Mistakes are found before the work: what does not need the model, then what does.
    if args.candidates == BLOBS:
        slide = match.only_slide(args.slide)
        check_outputs(args, [slide])
        formats.kind_of_new(args.out, args.format)
        classifier = open_model(args, args.device)
        candidates, searched = find_blobs(args, slide)
        return classifier, candidates, [slide] * len(candidates), [], searched
    candidates = formats.read_candidates(args.candidates)
    for note in candidates.notes:
        say(f"{candidates.path.name}: {note}")
    images, missing = match.find_images(candidates, args.slide)
    check_outputs(args, sorted({path for path in images if path is not None}))
    formats.move_to_level0(candidates, images, say)
    return open_model(args, args.device), candidates, images, missing, None


def classify(args):
    """Score the candidates of a file, or those found on the slide, and write them → exit status."""
    threshold = threshold_of(args)
    if "," in args.device:
        raise UserError(f"--device {args.device}: several devices are for a folder of slides")
    classifier, candidates, images, missing, searched = read_input(args)
    labels = classifier.labels
    if args.relabel:
        formats.check_relabel(candidates, labels, args.out, args.format)
    if threshold is None:
        threshold = classifier.threshold

    job = plan.plan(candidates, images, missing, classifier.metadata, args.mpp)
    if searched is not None and not job.readers:  # a slide without a blob is counted, too
        job.add_reader(classifier.metadata, match.only_slide(args.slide), args.mpp)
    scales = job.scales()
    say_readers(job.readers)
    if job.problems and not args.skip:
        raise UserError(
            f"{plan.in_one_line(job.problems)}; right slide, level-0 coordinates? --skip leaves "
            "out what cannot be scored"
        )
    say_left_out(job.problems)
    for note in formats.check_write(candidates, args.out, images, scales, args.format):
        say(note)
    counted_on = area_of(args, job, labels, searched)
    look_at(job)

    probability = np.full(len(candidates), np.nan, np.float32)
    probability[job.rows], seconds = score_all(classifier, job, args)
    counted, regions = area.count_figures(job, probability[job.rows], threshold, labels, counted_on)
    not_in_file = formats.write(
        candidates,
        args.out,
        probability,
        threshold,
        labels,
        args.relabel,
        args.format,
        images,
        scales,
        regions,
    )
    if args.overlay:
        overlay(args.overlay, job, probability[job.rows], threshold, labels)

    scored = int((~np.isnan(probability)).sum())
    positive = int((probability >= threshold).sum())
    print(
        f"{args.out}: {scored} candidates scored, {positive} {labels[1]}, {scored - positive} "
        f"{labels[0]} (threshold {threshold:.4g}); {scored / max(seconds, 1e-9):.1f} candidates/s"
    )
    if counted is not None:
        print(count.text(counted))
    return say_unscored(images, scored, not_in_file)


def say_unscored(images, scored, not_in_file):
    """Say how many candidates have no probability → exit status: 1 if any should have one."""
    elsewhere = images.count(None)
    if elsewhere and not not_in_file:
        print(f"{elsewhere} candidates lie on other images and are left as they were")
    left = len(images) - elsewhere - scored
    if left:
        print(f"{left} candidates could not be scored and have no probability")
    if not_in_file:
        print(f"{not_in_file} candidates are not in the file, whose format has no place for them")
    return int(left > 0)


# ---------------------------------------------------------------- a folder of slides


def check_folders(args):
    """UserError for folders that cannot be meant, before the work."""
    if not Path(args.slide).is_dir():
        raise UserError(
            f"--candidates {args.candidates} is a folder: give the folder of the slides as --slide"
        )
    if args.overlay:
        raise UserError("--overlay draws one slide: score it alone, with its file of candidates")
    if args.area not in (None, area.TISSUE) and not Path(args.area).is_dir():
        raise UserError(
            f"--area {args.area}: for folders, tissue or a folder of GeoJSON files, of the slides' "
            "names"
        )
    out, candidates = Path(args.out).resolve(), Path(args.candidates).resolve()
    if out == Path(args.slide).resolve() or out == candidates or candidates in out.parents:
        raise UserError(
            f"--out {args.out}: is or lies in a folder of inputs; choose another folder, outside "
            "of --candidates"
        )
    common.check_output("--out", Path(args.out, folder.REPORT), [args.model])


def classify_folder(args):
    """Score a folder of slides → exit status: 1 if anything could not be scored."""
    threshold = threshold_of(args)
    check_folders(args)
    of_tissue, outlines = args.area == area.TISSUE, args.area
    if of_tissue:
        outlines = None
    if args.candidates == BLOBS:
        tasks = folder.tasks_of_slides(args.slide, args.format or "geojson", outlines)
        of_tissue = of_tissue or not outlines
        if not tasks:
            raise UserError(f"--slide {args.slide}: holds no slide")
    else:
        tasks = folder.tasks_of(args.slide, args.candidates, outlines)
        if not any(task.file for task in tasks):
            raise UserError(f"--candidates {args.candidates}: holds no file of candidates")
    devices = args.device.split(",")
    classifiers = [open_model(args, device) for device in devices]
    if threshold is None:
        threshold = classifiers[0].threshold
    labels = classifiers[0].labels
    settings = folder.Settings(
        threshold,
        args.mpp,
        args.relabel,
        args.skip,
        args.format,
        of_tissue,
        labels,
        folder.fingerprint_of_model(args.model),
        args.workers,
        Path(args.candidates),
        Path(args.out),
        args.candidates == BLOBS,
    )
    slides.keep_open(4 * len(devices))
    start = time.perf_counter()
    rows, before = folder.run(classifiers, tasks, settings)
    seconds = max(time.perf_counter() - start, 1e-9)

    done = [row for row in rows if not row["error"]]
    scored, figures = (sum(int(row[name]) for row in done) for name in ("scored", "figures"))
    new = scored - sum(int(row["scored"]) for row in before)
    print(
        f"{args.out}: {len(done)} of {common.counted(len(rows), 'slide')} scored "
        f"({len(before)} of them before), {scored} candidates, {figures} {labels[1]}, "
        f"{scored - figures} {labels[0]} (threshold {threshold:.4g}); {new / seconds:.1f} "
        f"candidates/s; report: {settings.out / folder.REPORT}"
    )
    unknown = [row["slide"] for row in done if not row["mpp"]]
    if unknown:
        say(
            f"warning: the µm/px of {common.counted(len(unknown), 'slide')} is unknown "
            f"({unknown[0]}); at another scale than the model's every probability is wrong "
            "(--mpp gives the µm/px)"
        )
    failed = [row for row in rows if row["error"]]
    for row in failed[:NAMED]:
        say(f"not scored: {row['slide'] or row['file']}: {row['error']}")
    if len(failed) > NAMED:
        say(f"not scored: {len(failed) - NAMED} more, see the report")
    left = sum(int(row["candidates"]) - int(row["scored"]) for row in done)
    if left:
        say(f"{left} candidates could not be scored and have no probability; see the report")
    return int(bool(failed or left))


def main():
    args = parse_arguments()
    if args.doctor:
        return doctor.report()
    check(args)
    if args.candidates == BLOBS and match.only_slide(args.slide) is None:
        return classify_folder(args)
    if args.candidates and args.candidates != BLOBS and Path(args.candidates).is_dir():
        return classify_folder(args)
    if args.candidates:
        return classify(args)
    print(Classifier(args.model, args.device, warm_up=False).describe())
    return 0


if __name__ == "__main__":
    common.command(main)
