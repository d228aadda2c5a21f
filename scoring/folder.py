"""A folder of slides and one of candidates: every slide scored, in as many runs as it takes.

A slide that is finished is not scored again as long as its file, its candidates, the model and the
settings stay the same. The report gets a slide's line when its output is in place: a run that is
stopped anywhere loses no more than the slides it was at."""

import csv
import hashlib
import io
import json
import os
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np

import common
from common import UserError
from dataset import annotations, dicom, draws, formats, look, slides
from onnx_model import reading
from scoring import area, blobs, count, match, plan

REPORT, LOCK = "report.csv", ".lock"
COLUMNS = (
    "slide",
    "file",
    "mpp",
    "candidates",
    "scored",
    "figures",
    "area_mm2",
    "area_of",
    "area_figures",
    "per_mm2",
    "densest_figures",
    "densest_mm2",
    "densest_x",
    "densest_y",
    "seconds",
    "notes",
    "error",
    "fingerprint",
)
SUFFIXES = tuple(
    suffix + packed
    for suffix in (".csv", ".tsv", ".json", ".geojson", ".xml", ".sqlite", ".sqlite3", ".db")
    for packed in ("", ".gz")
)
ENDINGS = {"csv": ".csv", "midog": ".json", "challenge": ".json", "geojson": ".geojson"}
ENDINGS |= {"imagescope": ".xml", "sqlite": ".sqlite"}
LOOKED_AT = 100  # patches of a slide
PREPARED = 2  # slides that are opened ahead, for each device


class Settings(NamedTuple):
    """What the user chose; what stands before `workers` changes the results."""

    threshold: float
    mpp: float | None
    relabel: bool
    skip: bool
    kind: str | None
    tissue: bool  # figures are counted per mm² of tissue
    labels: list
    model: str  # fingerprint of the file
    workers: int
    candidates: Path
    out: Path
    blobs: bool = False  # candidates are found on the slides: there is no folder of them


class Task(NamedTuple):
    """A slide and the file of its candidates, by their names below the two folders."""

    slide: str
    path: Path | None  # of the slide's file
    file: str
    problem: str = ""  # why it cannot be scored
    outline: Path | None = None  # of the tumour


# ---------------------------------------------------------------- which file belongs to which slide


def tasks_of(slide_folder, candidate_folder, outline_folder=None):
    """All slides and all files of candidates below two folders → list of Task, by name; with the
    outlines of tumours (GeoJSON) below a third.

    A file belongs to the slide of its name, whatever the suffixes; of several, to the one that lies
    in folders of the same names. A file that bears no slide's name belongs to the one image that it
    names itself."""
    index = annotations.ImageFiles(slide_folder)
    names = {opened: name for name, opened in index.slides.items()}
    files_of, tasks = {}, []
    outlines = outlines_of(outline_folder, index)
    for file in candidate_files(candidate_folder):
        try:
            files_of.setdefault(slide_of(file, index, candidate_folder), []).append(file)
        except (UserError, OSError) as error:
            tasks.append(Task("", None, file, str(error)))
    for opened, name in names.items():
        path = Path(slide_folder) / opened
        files = files_of.get(opened, [])
        problem = ""
        if not files:
            tasks.append(Task(name, path, "", "there is no file of candidates for it"))
        if len(files) > 1:
            problem = f"{' and '.join(files[:3])} are all candidates of it; keep one of them"
        tasks += [Task(name, path, file, problem, outlines.get(opened)) for file in files]
    return sorted(tasks, key=lambda task: (task.slide or task.file, task.file))


def tasks_of_slides(slide_folder, kind, outline_folder=None):
    """A Task for every slide below a folder, whose candidates are found on it; kind: the format of
    the outputs, which are called after the slides."""
    index = annotations.ImageFiles(slide_folder)
    outlines = outlines_of(outline_folder, index)
    tasks = []
    for name, opened in index.slides.items():
        path = Path(slide_folder) / opened
        tasks.append(Task(name, path, name + ENDINGS[kind], outline=outlines.get(opened)))
    return sorted(tasks, key=lambda task: task.slide)


def candidate_files(folder):
    """Paths of the files of candidates below a folder, relative to it; hidden ones are left out."""
    found = []
    for inner, subfolders, files in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                found.append(Path(inner, name).relative_to(folder).as_posix())
    return sorted(found)


def outlines_of(folder, index):
    """{slide, by its path below its folder: file of the tumour's outlines}; UserError if a file
    belongs to no slide, or two to one.
    """
    found = {}
    if folder is None:
        return found
    for file in candidate_files(folder):
        if not file.lower().endswith((".geojson", ".geojson.gz")):
            continue
        opened, _ = index.find(stem_of(file), file)
        if opened is None:
            raise UserError(f"--area {folder}: there is no slide of the name of {file}")
        if opened in found:
            raise UserError(f"--area {folder}: two files are of the name of {opened}")
        found[opened] = Path(folder, file)
    if not found:
        raise UserError(f"--area {folder}: holds no .geojson file")
    return found


def slide_of(file, index, folder):
    """The slide, by its path below its folder, to which a file of candidates belongs; UserError if
    there is none, or several.
    """
    opened, _ = index.find(stem_of(file), file)
    if opened is not None:
        return opened
    images = {name for name in formats.read_candidates(Path(folder, file)).images if name}
    if len(images) > 1:
        raise UserError(
            f"no slide has its name, and it holds candidates on {len(images)} images; a file for "
            "several slides is scored alone: --slide FOLDER --candidates FILE"
        )
    for name in images:
        opened, _ = index.find(match.relative(name, index.root), file)
    if opened is None:
        raise UserError(f"there is no slide of its name below {index.root}")
    return opened


def stem_of(file):
    """A file's path without its suffix and .gz."""
    if file.lower().endswith(".gz"):
        file = file[: -len(".gz")]
    return file[: file.rindex(".")]


def output_name(file, kind):
    """Path of the output below the folder of outputs."""
    if kind is None:
        return file
    return stem_of(file) + ENDINGS[kind]


# ---------------------------------------------------------------- what is finished


def fingerprint_of(task, settings):
    """A digest of all on which a slide's output depends: slide, candidates, model, settings. Of the
    slide, whose content may be gigabytes, sizes and times of its files count.
    """
    digest = hashlib.sha256()
    states = []
    for path in files_of_slide(task.path):
        status = path.stat()
        states.append([path.name, status.st_size, status.st_mtime_ns])
    told = [settings[: Settings._fields.index("workers")], states]
    digest.update(json.dumps(told).encode())
    if settings.blobs:
        digest.update(blobs.SETTINGS.encode())
    else:
        digest.update(Path(settings.candidates, task.file).read_bytes())
    if task.outline is not None:
        digest.update(b"outline" + task.outline.read_bytes())
    return digest.hexdigest()[:32]


def files_of_slide(path):
    """The files of which a slide consists."""
    if path.suffix.lower() == ".mrxs":
        folder = path.with_suffix("")
        if folder.is_dir():
            return [path, *sorted(part for part in folder.iterdir() if part.is_file())]
    if dicom.name_of(path) != path.name:
        return sorted(part for part in path.parent.iterdir() if part.suffix == path.suffix)
    return [path]


def fingerprint_of_model(path):
    """A digest of an exported model; of weights beside it, the .onnx holds the identity."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


class Report:
    """The table of a folder's slides: a line is added, and on the disk, as soon as its slide is
    done. A last line that was cut off when the machine stopped is not counted.
    """

    def __init__(self, path):
        self.path, self.rows, self.file = path, [], None
        self.old = {}
        if not path.exists():
            return
        text = path.read_text(encoding="utf-8-sig", errors="replace")  # spreadsheets add a mark
        whole = text[: text.rfind("\n") + 1]
        reader = csv.DictReader(io.StringIO(whole, newline=""))
        if not {"slide", "file", "fingerprint"} <= set(reader.fieldnames or ()):
            raise UserError(
                f"{path}: not a report of this command, and it would be replaced; choose another "
                "folder for --out"
            )
        for row in reader:
            if None not in row.values():
                self.old[row["slide"], row["file"]] = row

    def finished(self, task, settings):
        """The line of a task if it is done and nothing has changed since, else None."""
        row = self.old.get((common.printable(task.slide), common.printable(task.file)))
        if row is None or row["error"] or task.problem:
            return None
        try:
            same = row["fingerprint"] == fingerprint_of(task, settings)
        except OSError:  # what cannot be read is said when it is scored
            return None
        if not same or not (settings.out / output_name(task.file, settings.kind)).is_file():
            return None
        return {name: row.get(name, "") for name in COLUMNS}

    def begin(self, rows):
        """Write the file anew with the lines that stay, and open it for more."""
        self.rows = list(rows)
        self.write()
        self.file = open(self.path, "a", encoding="utf-8", newline="")

    def add(self, row):
        self.rows.append(row)
        csv.DictWriter(self.file, COLUMNS, lineterminator="\n").writerow(row)
        self.file.flush()
        os.fsync(self.file.fileno())

    def write(self):
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        common.write_text(self.path, text.getvalue())

    def close(self):
        if self.file is not None:
            self.file.close()

    def write_in_order(self):
        self.rows.sort(key=lambda row: (row["slide"] or row["file"], row["file"]))
        self.write()


# ---------------------------------------------------------------- one slide


class Work:
    """A slide on its way from its files to its line in the report."""

    def __init__(self, task):
        self.task, self.error, self.notes, self.left_out = task, None, [], []
        self.candidates, self.images, self.job = None, [], plan.Plan()
        self.fingerprint, self.area = "", area.Area()
        self.searched = None  # the slide's tissue, if its candidates were found there
        self.cells = reading.Cells([], [], [], [])

    def prepare(self, settings, metadata):
        """Read the candidates and open the slide; what is wrong becomes the error."""
        try:
            if self.task.problem:
                raise UserError(self.task.problem)
            self.fingerprint = fingerprint_of(self.task, settings)
            self._read(settings, metadata)
        except (UserError, OSError) as error:
            self.error = str(error)
        return self

    def _read(self, settings, metadata):
        path = Path(settings.candidates, self.task.file)
        if settings.blobs:
            slide = self.task.path
            found = blobs.find(slide, settings.mpp, workers=settings.workers)
            self.searched = found.tissue
            self.candidates = formats.from_points(slide, found.x, found.y, found.score)
        else:
            self.candidates = formats.read_candidates(path)
            self.notes += self.candidates.notes
        self.images = match.on_slide(self.candidates, self.task.path, called(self.task.path))
        formats.move_to_level0(self.candidates, self.images, self.notes.append)
        if settings.relabel:
            formats.check_relabel(self.candidates, settings.labels, path, settings.kind)
        self.job = plan.plan(self.candidates, self.images, [], metadata, settings.mpp)
        if not self.images:  # the slide of no candidates is looked at, too
            self.job.add_reader(metadata, self.task.path, settings.mpp)
        if self.job.problems and not settings.skip:
            raise UserError(plan.in_one_line(self.job.problems))
        self.left_out += self.job.problems
        self.notes += formats.check_write(
            self.candidates, self.output(settings), self.images, self.job.scales(), settings.kind
        )
        for reader in self.job.readers:
            self.notes += [f"it {note}" for note in slides.facts(reader.slide).notes]
            if reader.target is not None:
                self.notes.append(reader.note)
            if reader.warning:
                self.notes.append(reader.warning)
            if reader.mpp is not None:
                self.area = area.of_slide(reader, self.task.outline, settings.tissue, self.searched)
        failed = None
        if settings.skip:
            failed = self._failed
        rng = draws.generator("look")
        sample = draws.shuffled(rng, np.arange(len(self.job.rows)))[:LOOKED_AT]
        self.cells = reading.Cells(
            self.job.readers, self.job.which, self.job.x, self.job.y, failed, sample.tolist()
        )

    def _failed(self, i, error):
        self.left_out.append(f"({self.job.x[i]:g}, {self.job.y[i]:g}) cannot be read: {error}")

    def output(self, settings):
        return settings.out / output_name(self.task.file, settings.kind)

    def finish(self, settings, seconds):
        """Write the output → the line of the report."""
        if self.error is None and self.cells.error is not None:
            self.error = str(self.cells.error)
        row = dict.fromkeys(COLUMNS, "")
        row.update(slide=self.task.slide, file=self.task.file)
        if self.error is None:
            try:
                row.update(self._write(settings))
            except UserError as error:
                self.error = str(error)
        row.update(
            notes="; ".join(self.notes),
            error=self.error or "",
            seconds=f"{seconds:.2f}",
            fingerprint=self.fingerprint,
        )
        for path in {reader.slide for reader in self.job.readers}:
            slides.close(path)
        return {name: common.printable(" ".join(str(value).split())) for name, value in row.items()}

    def _write(self, settings):
        """Write the output → its numbers."""
        probability = np.full(len(self.candidates), np.nan, np.float32)
        probability[self.job.rows] = self.cells.probability
        counted, regions = area.count_figures(
            self.job, self.cells.probability, settings.threshold, settings.labels, self.area
        )
        numbers = {}
        if counted is not None:
            numbers = count.record(counted)
            numbers["area_figures"] = numbers.pop("figures")
        formats.write(
            self.candidates,
            self.output(settings),
            probability,
            settings.threshold,
            settings.labels,
            settings.relabel,
            settings.kind,
            self.images,
            self.job.scales(),
            regions,
        )
        if self.left_out:
            self.notes.append(f"left out: {plan.in_one_line(self.left_out)}")
        if self.cells.looked:
            suspicion = look.suspicion(np.stack(self.cells.looked))
            self.notes += filter(None, [suspicion])
        scales = [f"{reader.mpp:.6g}" for reader in self.job.readers if reader.mpp is not None]
        return {
            **{name: shown(value) for name, value in numbers.items()},
            "mpp": "".join(scales[:1]),
            "candidates": len(self.candidates) - self.images.count(None),
            "scored": int((~np.isnan(probability)).sum()),
            "figures": int((probability >= settings.threshold).sum()),
        }


def shown(value):
    """A number of the report as text; unknown ones are empty."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def called(path):
    """The paths by any of which a file of candidates may mean the slide."""
    if dicom.name_of(path) == path.name:
        return [path]
    return [path.parent, *files_of_slide(path)]


# ---------------------------------------------------------------- all of them


class Stopped(Exception):
    """Another device has failed, or the user has stopped the command."""


class Watch:
    """A progress that ends the work when another thread asks for it."""

    def __init__(self, stop):
        self.stop = stop

    def update(self, count):
        if self.stop.is_set():
            raise Stopped


def score_folder(classifiers, tasks, settings, report, progress):
    """Score tasks and add their lines to the report; each classifier takes the next slide when it
    can, and its threads read ahead over the ends of slides.

    What a slide gets does not depend on how many classifiers there are: batches end with slides.
    progress: its .update(1) is called after each slide."""
    waiting, stop, lock = deque(tasks), threading.Event(), threading.Lock()

    def taken():
        while waiting and not stop.is_set():
            try:
                yield waiting.popleft()
            except IndexError:  # another thread was faster
                return

    def serve(classifier):
        last, under_way = time.perf_counter(), deque()

        def cells():
            for work in ahead(taken(), lambda t: Work(t).prepare(settings, classifier.metadata)):
                under_way.append(work)
                yield work.cells

        for _ in reading.score_each(classifier, cells(), settings.workers, Watch(stop)):
            now = time.perf_counter()
            row = under_way.popleft().finish(settings, now - last)
            last = now
            with lock:
                report.add(row)
                progress.update(1)

    if len(classifiers) == 1:
        serve(classifiers[0])
        return
    with ThreadPoolExecutor(len(classifiers), thread_name_prefix="device") as pool:
        try:
            for future in as_completed([pool.submit(serve, one) for one in classifiers]):
                future.result()
        except BaseException:
            stop.set()
            raise


def ahead(items, prepare):
    """prepare(item) of each item, done by another thread while the earlier ones are in use."""
    waiting = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="prepare") as pool:
        for item in items:
            waiting.append(pool.submit(prepare, item))
            if len(waiting) > PREPARED:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def check_names(tasks, settings):
    """UserError if two outputs, or an output and a file of the command's own, would be one file;
    also on disks that know no upper and lower case.
    """
    outputs = {REPORT: "the command's report", LOCK: "the command's lock"}
    for task in tasks:
        if not task.file or task.problem:
            continue
        name = output_name(task.file, settings.kind).casefold()
        if name in outputs:
            raise UserError(
                f"--out {settings.out}: {task.file} and {outputs[name]} would be written to one "
                "file; rename it"
            )
        outputs[name] = task.file


def remove_leftovers(tasks, settings):
    """Remove the unfinished outputs of a run that was killed."""
    outputs = [settings.out / output_name(task.file, settings.kind) for task in tasks if task.file]
    names = {}
    for path in outputs:
        names.setdefault(path.parent, set()).add(path.name)
    for folder, known in names.items():
        for path in folder.glob(".*.tmp"):
            if path.name[1:].rsplit(".", 2)[0] in known:  # as common.atomic calls them
                path.unlink(missing_ok=True)


def run(classifiers, tasks, settings):
    """Score what is not finished → (the lines of the report in order, those of them that were
    finished before). UserError: the folder is in use, or its report is none of this command."""
    check_names(tasks, settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    lock = common.try_lock(settings.out / LOCK)
    if lock is None:
        raise UserError(f"--out {settings.out}: another process scores into this folder")
    try:
        report = Report(settings.out / REPORT)
        rows = {task: report.finished(task, settings) for task in tasks}
        todo = [task for task in tasks if rows[task] is None]
        remove_leftovers(tasks, settings)
        before = [row for row in rows.values() if row is not None]
        report.begin(before)
        try:
            with common.progress(total=len(todo), desc="slides", unit="slides") as bar:
                score_folder(classifiers, todo, settings, report, bar)
        finally:
            report.close()
        report.write_in_order()
    finally:
        lock.release()
    return report.rows, before
