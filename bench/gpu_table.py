"""The table of bench/gpu.sh, from the figures (JSON) that its jobs left in a folder.

    python bench/gpu_table.py FOLDER
        print it; also into table.txt and table.md there
    python bench/gpu_table.py FOLDER --begin
        write down the machine; a folder of another one's figures is an error
    python bench/gpu_table.py FOLDER --rates
        the flags of bench/gpu_hours.py for these figures

"Eager" is what one has without this project: timm + peft under autocast, torch in bf16, the bare
step or the model alone. "Compiled" is the same with each block compiled. "/s": patches, images or
candidates per second.
"""

import argparse
import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Instead of this folder, whose onnx.py would hide the real one.
sys.path[:1] = [str(ROOT)]

import common
import runs
from common import UserError

MODELS = "h-optimus-0", "uni", "lunit-s16"
# Of the first batch size: smallest ratio to eager, to compiled blocks
STEP_GOALS = {"h-optimus-0": (2.3, 1.6), "uni": (3, None), "lunit-s16": (5, None)}
STEP_SPREAD = 0.03  # h-optimus-0, first batch size
STEP_MEMORY = 0.65  # of eager's
TRAIN_GOAL = 0.9  # of the bare step's rate
EMBEDDING_GOALS = {"h-optimus-0": (1.3, 1.03), "uni": (None, None)}
ONNX_GOALS = {1: 1.5, 64: 1.0}  # by batch size, to eager
HOURS_GOAL = 3
HEADER = "what", "ours", "eager", "compiled", "×", "× comp.", "goal", ""
PEFT, PEFT_COMPILED = "peft bf16 autocast", "peft bf16 autocast, blocks compiled"
STEP = "ours bf16, engine"
TIMM, TIMM_COMPILED = "timm bf16 autocast", "timm bf16 autocast, blocks compiled"
EMBED = "ours, models.predict"
TRAINED, TRAINED_OURS = "timm bf16 autocast, all trained", "ours bf16 autocast, all trained, engine"
TORCH, TORCH_COMPILED = "torch bf16", "torch bf16, blocks compiled"
EXPORTED = "ONNX Runtime fp16"


# ---------------------------------------------------------------- the machine


def version(*names):
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


def machine(device):
    """{name: text} of what the figures depend on."""
    import torch  # takes seconds, and the table needs none of it

    place = f"CPU, {torch.get_num_threads()} threads (a dry run: the figures mean nothing)"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise UserError("no GPU that torch can use is here; bench/gpu.sh --dry-run needs none")
        facts = torch.cuda.get_device_properties(0)
        place = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB"
    return {
        "device": place,
        "host": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "torch": torch.__version__,
        "timm": version("timm"),
        "peft": version("peft"),
        "onnxruntime": version("onnxruntime-gpu", "onnxruntime"),
        "commit": runs.environment()["commit"],
    }


def begin(folder, device):
    file, here = folder / "machine.json", machine(device)
    if file.exists() and common.read_json(file) != here:
        raise UserError(
            f"{folder} holds figures of another machine, version or commit: name another folder"
        )
    common.write_json(file, here)


# ---------------------------------------------------------------- the figures


class Figures:
    """What the jobs of a folder left."""

    def __init__(self, folder):
        self.folder = folder

    def read(self, job):
        """The JSON of a job, or None."""
        file = self.folder / f"{job}.json"
        return common.read_json(file) if file.exists() else None

    def cell(self, job, variant, batch=None):
        """The figures of a variant, {} if there are none. batch: 0 for the first one measured, …"""
        figures = self.read(job) or {"cells": []}
        cells = [cell for cell in figures["cells"] if cell["variant"] == variant]
        if batch is None:
            return cells[0] if cells else {}
        sizes = sorted({cell["batch"] for cell in figures["cells"] if "batch" in cell})
        for cell in cells:
            if batch < len(sizes) and cell.get("batch") == sizes[batch]:
                return cell
        return {}

    def number(self, job, variant, key, batch=None):
        """UserError where it was not measured."""
        value = self.cell(job, variant, batch).get(key)
        if value is None:
            raise UserError(f"needs the figure of {variant} in {job}, which is missing")
        return value


def rates(figures):
    """Flags of gpu_hours.py: patches per second, ours and of timm and peft under autocast.

    Where there was no time for our end-to-end step, timm's counts for both.
    """
    job, ours_trained = "step-h-optimus-0", TRAINED_OURS
    if "ms" not in figures.cell(job, TRAINED_OURS, 0):
        ours_trained = TRAINED
    flags = []
    for flag, ours, theirs in (("--lora", STEP, PEFT), ("--full", ours_trained, TRAINED)):
        flags.append(flag)
        for variant in (ours, theirs):
            milliseconds = figures.number(job, variant, "ms", 0)
            batch = figures.cell(job, variant, 0)["batch"]
            flags.append(f"{1000 * batch / milliseconds:.2f}")
    flags.append("--infer")
    for variant in (EMBED, TIMM):
        flags.append(f"{figures.number('embeddings-h-optimus-0', variant, 'per_s'):.2f}")
    return " ".join(flags)


# ---------------------------------------------------------------- the rows


def text(cell, key, spread=True):
    """A figure for the table; "–" if it was not asked for, the reason where it could not be had."""
    if "failed" in cell:
        return "failed"
    if "missing" in cell:
        return cell["missing"]
    if cell.get(key) is None:
        return "–"
    value = cell[key]
    digits = 0 if value >= 1000 else 1 if value >= 10 else 2
    plus_minus = ""
    if spread and "spread" in cell:
        plus_minus = f" ±{100 * cell['spread']:.1f}%"
    return f"{value:,.{digits}f}{plus_minus}"


def row(what, key, ours, eager, compiled, goals=(None, None), less_is_better=False, spread=True):
    """A row of the table; goals: smallest ratios to eager and to compiled."""
    ratios = []
    for other in (eager, compiled):
        ratio = None
        if ours.get(key) and other.get(key):
            ratio = ours[key] / other[key]
            if less_is_better:
                ratio = 1 / ratio
        ratios.append(ratio)
    wanted = [(ratio, goal) for ratio, goal in zip(ratios, goals) if goal]
    return [
        what,
        text(ours, key, spread),
        text(eager, key, False),
        text(compiled, key, False),
        *("–" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        ", ".join(f"≥ {goal:g}" for _, goal in wanted),
        verdict([(ratio, ratio is not None and ratio >= goal) for ratio, goal in wanted]),
    ]


def verdict(results):
    """results: [(figure or None, whether it reaches its goal)] → "met", "MISSED", "?" or ""."""
    if any(figure is not None and not reached for figure, reached in results):
        return "MISSED"
    if any(figure is None for figure, _ in results):
        return "?"
    return "met" if results else ""


def limit_row(what, figure, shown, goal, limit):
    """A row of one figure that must not be larger than `limit`."""
    result = verdict([(figure, figure is not None and figure <= limit)])
    return [what, shown, "", "", "", "", goal, result]


def step_rows(figures, model):
    job, rows = f"step-{model}", []
    for i in range(2):
        ours, eager, compiled = (
            figures.cell(job, variant, i) for variant in (STEP, PEFT, PEFT_COMPILED)
        )
        if not (ours or eager or compiled):
            continue
        batch = (ours or eager or compiled)["batch"]
        goals = STEP_GOALS[model] if i == 0 else (None, None)
        name = f"LoRA step, {model}, batch {batch}"
        if ours.get("graph") is False:
            name += ", no CUDA graph"
        rows.append(row(f"{name}, ms", "ms", ours, eager, compiled, goals, less_is_better=True))
        if model == "h-optimus-0" and i == 0:
            spread = ours.get("spread")
            shown = "–" if spread is None else f"±{100 * spread:.1f}%"
            rows.append(limit_row("  spread", spread, shown, "≤ ±3%", STEP_SPREAD))
        memory = row("  peak GiB", "gib", ours, eager, compiled, less_is_better=True, spread=False)
        # As shares of theirs, as the goal is written.
        memory[4:6] = [share(ours, other, "gib") for other in (eager, compiled)]
        if model == "h-optimus-0" and i == 0:
            memory[6] = f"≤ {STEP_MEMORY} × eager"
            known = ours.get("gib") and eager.get("gib")
            ratio = ours["gib"] / eager["gib"] if known else None
            memory[7] = verdict([(ratio, ratio is not None and ratio <= STEP_MEMORY)])
        rows.append(memory)
        rows.append(row("  of the product's rate", "share", ours, eager, compiled, spread=False))
    ours, eager = figures.cell(job, TRAINED_OURS, 0), figures.cell(job, TRAINED, 0)
    if ours or eager:
        name = f"end to end, {model}, batch {(ours or eager)['batch']}, ms"
        rows.append(row(name, "ms", ours, eager, {}, less_is_better=True))
    return rows


def share(ours, other, key):
    if ours.get(key) and other.get(key):
        return f"{ours[key] / other[key]:.2f}"
    return "–"


def train_rows(figures):
    if figures.read("train") is None:
        return []
    bare, step = {}, figures.cell("step-h-optimus-0", STEP, 0)
    if "ms" in step:
        bare = {"per_s": 1000 * step["batch"] / step["ms"]}
    rows = []
    for source in ("slides", "store"):
        cell = figures.cell("train", source)
        name = f"train.py, {source} (eager: bare step), /s"
        rows.append(row(name, "per_s", cell, bare, {}, (TRAIN_GOAL, None)))
    return rows


def embedding_rows(figures, model):
    job = f"embeddings-{model}"
    found = figures.read(job)
    if found is None:
        return []
    cells = [figures.cell(job, variant) for variant in (EMBED, TIMM, TIMM_COMPILED)]
    name = f"embeddings, {model}, batch {found['batch']}"
    return [
        row(f"{name}, /s", "per_s", *cells, EMBEDDING_GOALS[model]),
        row("  of the product's rate", "share", *cells, spread=False),
    ]


def onnx_rows(figures, model):
    job = f"onnx-{model}"
    found = figures.read(job)
    if found is None:
        return []
    rows = []
    sizes = sorted({cell["batch"] for cell in found["cells"] if "batch" in cell})
    for i, batch in enumerate(sizes):
        # Without CUDA in ONNX Runtime there is one cell, which says so.
        ours = figures.cell(job, EXPORTED, i) or figures.cell(job, EXPORTED)
        eager, compiled = (figures.cell(job, variant, i) for variant in (TORCH, TORCH_COMPILED))
        name = f"export fp16, {model}, batch {batch}, /s"
        goals = (ONNX_GOALS.get(batch), None)
        rows.append(row(name, "per_s", ours, eager, compiled, goals))
    return rows


def classify_rows(figures):
    found = figures.read("classify")
    if found is None:
        return []
    if "missing" in found:
        return [["classify.py", found["missing"], *[""] * 6]]
    rows, alone = [], {"per_s": found["alone"]}
    for key in ("slide", "folder"):
        what = f"classify.py, {key} (eager: model alone), /s"
        rows.append(row(what, "per_s", {"per_s": found[key]}, alone, {}))
    return rows


def hours_rows(figures):
    found = figures.read("hours")
    if found is None:
        return []
    rows = []
    for key, how in (
        ("", f"--val-patches {found['val_patches']}"),
        ("_on_all", "validated on all"),
    ):
        ours, theirs = ({"hours": found[who + key]} for who in ("ours", "ordinary"))
        name = f"grid, {how}, GPU-hours"
        rows.append(row(name, "hours", ours, theirs, {}, (HOURS_GOAL, None), less_is_better=True))
    return rows


def test_rows(folder):
    """pytest's closing line in short; of a run that was cut off, what its marks say."""
    log = folder / "tests.log"
    if not log.exists():
        return []
    lines = [line.strip("= ") for line in log.read_text(errors="replace").splitlines()]
    for line in reversed(lines):
        counts = re.findall(r"\d+ (?:passed|failed|error)", line)
        if counts and re.search(r" in \d", line):
            return [["GPU tests", ", ".join(counts), *[""] * 6]]
    marks = "".join(re.sub(r"\[.*", "", line) for line in lines if re.match(r"[.sFE]+( |$)", line))
    shown = f"{marks.count('.')} passed, {marks.count('F') + marks.count('E')} failed until then"
    return [["GPU tests", shown, *[""] * 6]]


def table(folder):
    """(rows, lines about what failed)."""
    figures, rows = Figures(folder), test_rows(folder)
    for model in MODELS:
        rows += step_rows(figures, model)
    rows += train_rows(figures)
    for model in MODELS[:2]:
        rows += embedding_rows(figures, model)
    for model in MODELS[:2]:
        rows += onnx_rows(figures, model)
    rows += classify_rows(figures) + hours_rows(figures)
    failed = []
    for file in sorted(folder.glob("*.failed")):
        failed.append(f"failed: {file.stem}: {file.read_text(errors='replace').strip()}")
    return rows, failed


def closing_line(rows):
    counts = {word: sum(row[-1] == word for row in rows) for word in ("met", "MISSED", "?")}
    return (
        f"goals met: {counts['met']}, missed: {counts['MISSED']}, not measured: {counts['?']}. "
        "× is ours over theirs in speed (GiB: in memory)."
    )


def markdown(rows):
    lines = ["| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    for cells in rows:
        cells = [cell.replace("MISSED", "**missed**").replace("|", "/") for cell in cells]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the figures are")
    parser.add_argument("--begin", action="store_true", help="write down the machine")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="with --begin (default: cuda)"
    )
    parser.add_argument("--rates", action="store_true", help="print the flags of gpu_hours.py")
    args = parser.parse_args()
    if not args.folder.is_dir():
        raise UserError(f"{args.folder}: no such folder")
    if args.begin:
        return begin(args.folder, args.device)
    if args.rates:
        print(rates(Figures(args.folder)))
        return None
    file = args.folder / "machine.json"
    head = [f"{name:12}{value}" for name, value in common.read_json(file).items()]
    rows, failed = table(args.folder)
    plain = common.table(rows, HEADER, right=range(1, 6))
    parts = ["\n".join(head), plain, "\n".join([closing_line(rows), *failed])]
    common.write_text(args.folder / "table.txt", "\n\n".join(parts) + "\n")
    parts[0] = ", ".join(f"{name} {value}" for name, value in common.read_json(file).items())
    parts[1] = markdown(rows)
    common.write_text(args.folder / "table.md", "\n\n".join(parts) + "\n")
    print((args.folder / "table.txt").read_text(encoding="utf-8"))
    return None


if __name__ == "__main__":
    common.command(main)
