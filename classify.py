"""Second stage of a detector: an exported model, a slide and candidates in, the candidates with
scores out.

    python classify.py MODEL.onnx --slide S --candidates C --out O      score candidates
    python classify.py MODEL.onnx                                       what the model is

In a program of one's own:

    from classify import Classifier
    classifier = Classifier("model.onnx", device="auto")
    probability = classifier(patches)                 # uint8 [N, 224, 224, 3], RGB, at
    classifier.mpp µm/px
    mitotic = probability >= classifier.threshold

A model whose classifier.patch is not 224 was trained on patches of that many px: read those
(read_patch does it all).

Needs numpy, onnxruntime, openslide and Pillow (requirements-classify.txt); no torch.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import common
from common import UserError
from dataset import candidates as formats
from dataset import slides
from onnx_model import session
from onnx_model.session import Classifier

# ---------------------------------------------------------------- the model


# ---------------------------------------------------------------- pixels


# ---------------------------------------------------------------- the command


def find_images(found, slide):
    """Which file each candidate lies on → (list of paths or None, files of the wanted images that
    do not exist).
    """
    slide = Path(slide)
    if not slide.exists():
        raise UserError(f"--slide {slide}: no such file or folder")
    names = sorted({name for name in found.images if name})
    if slide.is_file():
        if not names:
            return [slide] * len(found), []
        # Formats know a slide by its name; of conversions (.svs → .tiff) only the stem is the same.
        same = [n for n in names if Path(n).name == slide.name] or [
            n for n in names if Path(n).stem == slide.stem
        ]
        if not same and len(names) == 1:
            print(
                f"note: the candidates are said to lie on {names[0]}; taken for {slide.name}",
                file=sys.stderr,
            )
            same = names
        if not same:
            raise UserError(
                f"--slide {slide}: {found.path.name} has no candidates on it, only on {names[0]} "
                "and "
                f"{len(names) - 1} others"
                if names
                else ""
            )
        return [slide if name in same else None for name in found.images], []
    if not names:
        raise UserError(
            f"--slide {slide}: {found.path.name} does not say on which image its candidates lie; "
            "give the "
            "slide's file"
        )
    stems = {}
    for file in sorted(slide.iterdir()):
        stems.setdefault(file.stem, file)
    paths, missing = {}, []
    for name in names:
        path = slide / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            path = slide / Path(name).name
        if not path.is_file():
            path = slide / Path(name).name
        if not path.is_file():
            path = stems.get(Path(name).stem, path)
        paths[name] = path
        if not path.is_file():
            missing.append(path)
    return [paths.get(name) for name in found.images], missing


def plan(found, images, missing, metadata, given, skip, say):
    """Jobs for `score` → (jobs, their rows); what cannot be scored is an error, or with `skip`
    named and left out.
    """
    problems = [f"{path}: no such file" for path in missing]
    sizes, scales = {}, {}
    for path in dict.fromkeys(path for path in images if path is not None and path not in missing):
        try:
            sizes[path] = slides.dimensions(path)
            found_mpp = slides.microns_per_pixel(path)
        except (UserError, OSError, ValueError) as error:
            problems.append(
                str(error) if str(path) in str(error) else f"{path}: cannot be read ({error})"
            )
            sizes.pop(path, None)
            continue
        mpp, source, text = session.resolution(metadata, found_mpp, path.name, given)
        scales[path] = mpp, source, given or found_mpp
        say(text)
    jobs, rows = [], []
    for i, path in enumerate(images):
        if path not in sizes:
            continue
        x, y = found.x[i], found.y[i]
        mpp, source, known = scales[path]
        if found.kind == "challenge":  # millimetres
            if known is None:
                raise UserError(
                    f"{path}: its µm/px is unknown and the candidates are in millimetres; give "
                    "--mpp"
                )
            x, y = x * 1000 / known, y * 1000 / known
        width, height = sizes[path]
        half = metadata["patch"] / 2 * (mpp / source if mpp else 1)
        if not (-half < x < width + half and -half < y < height + half):
            problems.append(
                f"candidate {found.ids[i]} at ({x:g}, {y:g}) lies outside {path.name} "
                f"({width} × {height} px)"
            )
            continue
        jobs.append((path, float(x), float(y), mpp, source))
        rows.append(i)
    if problems and not skip:
        more = f" (and {len(problems) - 1} more like this)" if len(problems) > 1 else ""
        raise UserError(
            f"{problems[0]}{more}; right slide, level-0 coordinates? --skip leaves out what "
            "cannot be scored"
        )
    for text in problems[:5]:
        say(f"left out: {text}")
    if len(problems) > 5:
        say(f"left out: {len(problems) - 5} more")
    return jobs, rows


def overlay(path, jobs, probability, threshold, labels, longest=2000):
    """Draw the scored candidates of the first slide that has any on a view of it that holds them
    all.
    """
    scored = [(file, x, y, p) for (file, x, y, *_), p in zip(jobs, probability) if not np.isnan(p)]
    if not scored:
        return
    image = scored[0][0]
    points = [(x, y, p) for file, x, y, p in scored if file == image]
    width, height = slides.dimensions(image)
    x, y = np.array([[a, b] for a, b, _ in points]).T
    margin = 200
    left, top = max(0, int(x.min()) - margin), max(0, int(y.min()) - margin)
    right, bottom = min(width, int(x.max()) + margin), min(height, int(y.max()) + margin)
    view, scale = region(image, left, top, max(1, right - left), max(1, bottom - top), longest)
    draw, radius = ImageDraw.Draw(view), max(4, round(25 * scale))
    width, font = max(2, radius // 6), ImageFont.load_default(max(12, max(view.size) // 80))
    halo = dict(stroke_width=2, stroke_fill="white")  # legible on dark nuclei too
    for a, b, p in sorted(points, key=lambda point: point[2]):
        cx, cy, colour = (a - left) * scale, (b - top) * scale, formats.COLOURS[int(p >= threshold)]
        for r, line, stroke in ((radius + 1, width + 2, "white"), (radius, width, colour)):
            draw.ellipse((cx - r, cy - r, cx + r, cy + r), outline=stroke, width=line)
        if len(points) <= 200:
            draw.text(
                (cx + radius + 3, cy), f"{p:.2f}", fill=colour, font=font, anchor="lm", **halo
            )
    legend = f"red: {labels[1]} (p from {threshold:.3g} on), blue: {labels[0]}"
    box = draw.textbbox((8, 6), legend, font=font)
    draw.rectangle((0, 0, box[2] + 8, box[3] + 6), fill="white")
    draw.text((8, 6), legend, fill="black", font=font)
    with common.atomic(path) as temporary:
        view.save(temporary, format="PNG")


def region(image, left, top, width, height, longest):
    """A part of level 0 as a PIL image of at most `longest` px, and its scale."""
    scale = min(1.0, longest / max(width, height))
    slide = slides.open_slide(image)
    if slide.random_access:
        level = slide.handle.get_best_level_for_downsample(1 / scale)
        factor = slide.handle.level_downsamples[level]
        size = max(1, round(width / factor)), max(1, round(height / factor))
        pixels = slide.handle.read_region((left, top), level, size)
        view = Image.new("RGB", pixels.size, "white")
        view.paste(pixels, mask=pixels.getchannel("A"))  # transparent where the scanner saw nothing
    else:
        view = Image.fromarray(slide.pixels()[top : top + height, left : left + width])
    return view.resize((max(1, round(width * scale)), max(1, round(height * scale)))), scale


def check_output(flag, path):
    """UserError for a file that could not be written: found before the scoring, not after."""
    if path.is_dir():
        raise UserError(f"{flag} {path}: is a folder; name a file in it")
    if not path.resolve().parent.is_dir():
        raise UserError(f"{flag} {path}: its folder does not exist")


def main():
    parser = argparse.ArgumentParser(
        description="Score a detector's candidates with an exported model; with the "
        "model alone: say what it is."
    )
    parser.add_argument("model", metavar="MODEL.onnx", help="made by export.py")
    parser.add_argument(
        "--slide",
        metavar="S",
        help="the slide or image; a folder where candidates name their images",
    )
    parser.add_argument(
        "--candidates",
        metavar="C",
        help="MIDOG JSON, MIDOG challenge JSON, CSV (x, y, filename), SlideRunner SQLite, QuPath "
        "GeoJSON",
    )
    parser.add_argument(
        "--out", metavar="O", help="the same format, with probability and class added"
    )
    parser.add_argument(
        "--relabel",
        action="store_true",
        help="also replace the class that the format keeps itself: category_id, agreedClass, label "
        "(default: no; GeoJSON always has the new one)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="P",
        help="from which probability on it is a mitotic figure (default: the model's)",
    )
    parser.add_argument(
        "--mpp", type=float, metavar="M", help="µm/px of the slide (default: what its file says)"
    )
    parser.add_argument(
        "--device",
        default="auto",
        metavar="D",
        help="auto, cuda, cuda:1 or cpu; cuda that is not obtained is an error (default: auto)",
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
        help="threads of the CPU that the model may use (default: all)",
    )
    parser.add_argument(
        "--skip",
        action="store_true",
        help="leave out what cannot be scored (unreadable slides, candidates outside) and name "
        "it; the "
        "exit status is 1 then (default: an error before anything is written)",
    )
    parser.add_argument(
        "--overlay", metavar="PNG", help="draw the scored candidates of the (first) slide"
    )
    args = parser.parse_args()
    given = [args.slide, args.candidates, args.out]
    if any(given) and not all(given):
        raise UserError(
            "--slide, --candidates and --out belong together; without them the model is described"
        )
    for name in ("batch_size", "workers"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    if args.mpp is not None and not 0.01 < args.mpp < 100:
        raise UserError(f"--mpp {args.mpp:g}: not a plausible number of µm per px")
    if args.threshold is not None and not 0 < args.threshold < 1:
        raise UserError(f"--threshold {args.threshold:g}: must be a probability between 0 and 1")

    if not args.candidates:
        print(Classifier(args.model, args.device, warm_up=False).describe())
        return 0

    def say(text):
        print(text, file=sys.stderr, flush=True)

    found = formats.read(args.candidates)
    out = Path(args.out)
    if out.exists() and out.samefile(args.candidates):
        raise UserError(
            f"--out {out}: is the file of the candidates itself; it is never written to, choose "
            "another"
        )
    check_output("--out", out)
    if args.overlay:
        check_output("--overlay", Path(args.overlay))
    images, missing = find_images(found, args.slide)
    elsewhere = sum(path is None for path in images)
    classifier = Classifier(args.model, args.device, args.batch_size, args.threads)
    if classifier.input != "uint8":
        raise UserError(
            f"{args.model}: was exported with --input float, for hosts that normalise; this "
            "command needs "
            "one with --input uint8"
        )
    if args.relabel and found.kind == "sqlite":
        formats.class_numbers(
            found, classifier.labels, relabel=True
        )  # its error must not come after the scoring
    say(f"{args.model}: {classifier.note}")
    threshold = classifier.threshold if args.threshold is None else args.threshold
    jobs, rows = plan(found, images, missing, classifier.metadata, args.mpp, args.skip, say)

    failures = []

    def failed(image, x, y, error):
        failures.append(f"{image}: cannot be read at ({x:g}, {y:g}): {error}")

    probability = np.full(len(found), np.nan, np.float32)
    start_time = time.perf_counter()
    with common.progress(total=len(jobs), desc="candidates", unit="candidates") as bar:
        probability[rows] = session.score(
            classifier,
            jobs,
            args.workers,
            args.batch_size or 64,
            bar,
            failed if args.skip else None,
        )
    seconds = time.perf_counter() - start_time
    for text in failures[:5]:
        say(f"left out: {text}")
    formats.write(found, out, probability, threshold, classifier.labels, args.relabel)
    if args.overlay and len(jobs):
        overlay(args.overlay, jobs, probability[rows], threshold, classifier.labels)
    scored = int((~np.isnan(probability)).sum())
    positive = int((probability >= threshold).sum())
    print(
        f"{out}: {scored} candidates scored, {positive} {classifier.labels[1]}, "
        f"{scored - positive} "
        f"{classifier.labels[0]} (threshold {threshold:.4g}); {scored / max(seconds, 1e-9):.1f} "
        "candidates/s"
    )
    if elsewhere:
        print(f"{elsewhere} candidates lie on other images and are left as they were")
    left = len(found) - elsewhere - scored
    if left:
        print(f"{left} candidates could not be scored and have no probability")
    return 1 if left else 0


if __name__ == "__main__":
    common.command(main)
