"""The model card of an exported run: Markdown with the YAML that the Hugging Face Hub reads.

Every number comes from the run's folder and from the report of the export; cases, paths and command
lines are left out, because a card is passed on."""

import json
import math
import re

import common
from common import UserError
from onnx_model.session import parity_cells
from reporting import bootstrap, metrics, results, tables
from reporting.tables import Table, plain_markdown

# The Hub's identifiers; any other licence is "other" with its name.
LICENCES = {
    "MIT": "mit",
    "Apache-2.0": "apache-2.0",
    "BSD-3-Clause": "bsd-3-clause",
    "CC-BY-NC-ND-4.0": "cc-by-nc-nd-4.0",
    "CC-BY-NC-SA-4.0": "cc-by-nc-sa-4.0",
}
METHODS = {
    "lora": "LoRA adapters, merged into the encoder",
    "full": "End-to-end training",
    "probe": "A linear probe on the frozen encoder",
}
PRIVATE = ("data", "weights", "adapter")  # flags that may hold paths of the machine
SETS = {"train": "training", "val": "validation", "test": "test"}


def read_run(path):
    """The finished run whose card is wanted; UserError if it is unfinished or damaged."""
    run = results.read_run(path)
    if run is None:
        raise UserError(f"{path}: not a finished run")
    if not run.tests():
        raise UserError(f"{path}: has no predictions of a test set, so there is nothing to report")
    return run


def card(run, about, file, base=None, replicates=bootstrap.REPLICATES):
    """The card of a model as text.

    run    results.Finished, see `read_run`
    about  content of the export's MODEL.parity.json
    file   name of the model's file
    base   repository of the encoder on the Hub; None: it has none
    """
    labels = [plain_markdown(label) for label in about["labels"]]
    measured = measure(run, about, replicates)
    parts = [
        f"# {plain_markdown(title(run, about))}",
        f"{METHODS.get(run.method, run.method)}: `{about['encoder']}` on "
        f"{plain_markdown(run.data)}. Given the patch of an H&E slide around a cell, it gives the "
        f"probability that the cell is of the class **{labels[1]}** and not **{labels[0]}**.",
        *warning(about),
        "## How to use it",
        usage(run, about, file),
        "## Data",
        tables.markdown(data_table(run, about)),
        "## Metrics",
        tables.markdown(metric_table(run, measured)),
        tables.markdown(decision_table(measured, about)),
        "## The file against the training code",
        tables.markdown(parity_table(about["parity"])),
        "## Intended use",
        "Research: the second stage of a detector, which scores the candidates of a first one. "
        "What the numbers above do not cover has not been tested; they do not show that the model "
        f"is fit for diagnosis. Licence of the base weights: {plain_markdown(about['licence'])}; "
        f"redistribution: {about['redistribution']}.",
        "## Limits",
        "\n".join(f"- {line}" for line in limits(run, about, measured)),
        "## How it was made",
        making(run, about),
    ]
    return front_matter(run, about, measured, base) + "\n" + "\n\n".join(parts) + "\n"


def title(run, about):
    name = f"{about['encoder']} {run.method} on {run.data}"
    if about["precision"] != "fp32":
        name += f", {about['precision']}"
    return name


def warning(about):
    """A paragraph on what the licence forbids; [] if nothing."""
    if about["redistribution"] == "yes":
        return []
    text = "may be used and passed on for non-commercial purposes only"
    if about["redistribution"] == "no":
        text = "must not be passed on: their licence forbids derivatives, and this model is one"
    return [f"> **{plain_markdown(about['licence'])}**: the base weights {text}."]


# ---------------------------------------------------------------- numbers


def measure(run, about, replicates):
    """{set: {"summary", "intervals": {metric: (low, high) or None}, "decisions"}} of the test sets.

    summary and intervals are at 0.5, as evaluate.py reports them; decisions at the threshold of the
    exported model, with its temperature."""
    threshold = before_temperature(about["threshold"]["value"], about["temperature"])
    measured = {}
    for name in run.tests():
        _, labels, probability, cases, _ = run.rows(name)
        parts, count = bootstrap.replicate([(labels, probability, cases)], replicates)
        measured[name] = {
            "summary": run.sets[name],
            "cases": count,
            "intervals": {key: bootstrap.interval(*parts[key][1:], count) for key in parts},
            "decisions": metrics.decided(labels, probability, threshold),
        }
    return measured


def before_temperature(threshold, temperature):
    """The threshold on sigmoid(z) that decides as `threshold` does on sigmoid(z / temperature)."""
    if temperature == 1 or not 0 < threshold < 1:
        return threshold
    logit = math.log(threshold / (1 - threshold))
    return 1 / (1 + math.exp(-temperature * logit))


def data_table(run, about):
    """Annotations, cases and classes of each set."""
    listed = common.read_json(run.path / "split.json").get("cases") or {}
    rows = []
    for name, shown in SETS.items():
        if name == "test" and name not in run.sets:
            continue
        cases = str(len(listed[name])) if name in listed else "–"
        positives = "–"
        if name in run.sets:
            positives = str(run.sets[name]["positives"])
            cases = str(run.sets[name]["cases"])
        rows.append([shown, str(len(run.split["ids"][name])), positives, cases])
    for name in run.tests():
        if name != "test":
            summary = run.sets[name]
            numbers = [str(summary[key]) for key in ("n", "positives", "cases")]
            rows.append([f"test on {name}", *numbers])
    header = ["set", "annotations", about["labels"][1], "cases"]
    notes = [f"Dataset {run.data}; {SPLITS.get(run.by, f'split by {run.by}')}."]
    if run.frac < 1:
        notes.append(f"Trained on {run.frac:.3g} of the training set.")
    if run.domain:
        notes.append(f"Trained on the domain {run.domain} alone.")
    return Table("data", "Annotations of each set", header, rows, notes)


SPLITS = {
    "case": "no case is in two sets",
    "annotation": "split by annotation, so that cells of one case are in several sets",
}


def metric_table(run, measured):
    """What evaluate.py reports of this run, with intervals that resample cases."""
    rows = []
    for name, values in measured.items():
        row = [name]
        for key in tables.METRICS:
            row.append(tables.number(values["summary"][key]))
            bounds = values["intervals"][key]
            if bounds is not None:
                row[-1] += " [{:.3f}, {:.3f}]".format(*bounds)
        rows.append(row)
    notes = [
        "Decisions at 0.5. In brackets the 95% interval of drawing the test cases anew; it does "
        "not hold the chance of the training."
    ]
    counts = sorted({values["cases"] for values in measured.values()})
    notes += filter(None, map(bootstrap.coverage_note, counts))
    header = ["test set", *tables.METRICS.values()]
    return Table("metrics", "Test sets", header, rows, notes)


DECISIONS = {key: key for key in ("sensitivity", "specificity", "precision")}
DECISIONS |= {"f1": "F1", "balanced_accuracy": "balanced accuracy"}


def decision_table(measured, about):
    threshold = about["threshold"]
    rows = []
    for name, values in measured.items():
        rows.append([name, *(tables.number(values["decisions"][key]) for key in DECISIONS)])
    header = ["test set", *DECISIONS.values()]
    notes = [f"Threshold {threshold['value']:.4g}: {threshold['rule']}."]
    if about["temperature"] != 1:
        notes.append(f"Logits are divided by the temperature {about['temperature']:.4g}.")
    heading = f"Decisions of the model: {about['labels'][1]} from {threshold['value']:.4g} on"
    return Table("decisions", heading, header, rows, notes)


def parity_table(parity):
    rows = [parity_cells(row) for row in parity["measured"]]
    header = ["provider", "batch", "patches", "largest Δp", "mean Δp"]
    header += ["share of limit", "changed", "Δ AUROC"]
    notes = [f"On {parity['source']}, against torch in float32; required: {parity['wanted']}."]
    return Table("parity", "Probabilities in ONNX Runtime and in torch", header, rows, notes)


# ---------------------------------------------------------------- text


def usage(run, about, file):
    """How to run the model, and what it takes and gives."""
    threshold = about["threshold"]["value"]
    lines = [
        "```bash",
        f"python classify.py {file} --slide slide.svs --candidates cells.geojson --out o.geojson",
        "```",
        "",
        f"Input `patches`: {shape(about)}, {scale(about)}, the cell in the middle; trained on "
        f"patches of {about['patch']} px, {FITS[about['fit']]}. Output `probability`: float32 "
        f"`[N]`; {plain_markdown(about['labels'][1])} from {threshold:.4g} on. Any program with "
        f"ONNX Runtime runs it; `classify.py` is part of {common.NAME}. Class names, threshold, "
        "scale, metrics and parity are in the file's metadata too.",
    ]
    return "\n".join(lines)


FITS = {"resize": "resized where that is another size", "pad": "with a white border if smaller"}


def shape(about):
    size = about["size"]
    if about["input"] == "uint8":
        return f"uint8 `[N, {size}, {size}, 3]`, RGB, normalisation is inside"
    return f"normalised float32 `[N, 3, {size}, {size}]`"


def scale(about):
    if about["mpp"] is not None:
        return f"{about['mpp']:g} µm/px"
    if about.get("mixed_mpp"):
        return f"at different µm/px as scanned ({', '.join(sorted(about['mixed_mpp']))})"
    return "µm/px unknown"


def limits(run, about, measured):
    """Sentences on what the model was not trained for or not tested on, from its own files."""
    labels = [plain_markdown(label) for label in about["labels"]]
    domains = {str(domain) for name in run.tests() for domain in run.rows(name)[4]}
    domains = sorted(domains - {""}) or [run.data]
    lines = [
        f"Tested on {plain_markdown(', '.join(domains))} alone; other tumours, scanners and stains "
        "are unknown.",
        f"It was taught to tell {labels[1]} from {labels[0]} as {plain_markdown(run.data)} has "
        f"them. On the candidates of another detector both the share of {labels[1]} and the best "
        f"threshold are others: choose the threshold on candidates of your own.",
        f"Patches of another scale than it was trained on ({scale(about)}) give wrong "
        "probabilities.",
    ]
    if run.by == "annotation":
        lines.append(
            "The split is by annotation: cells of the same slides were trained on, and the metrics "
            "are too good."
        )
    for name, values in measured.items():
        if values["summary"]["auroc"] is None:
            lines.append(f"The test set {plain_markdown(name)} holds one class only.")
    if about["precision"] == "int8":
        lines.append("A probability depends slightly on the other patches of its batch (int8).")
    return lines


def making(run, about):
    """Settings, versions and hashes that identify the training and the file."""
    settings = []
    for key, value in run.flags.items():
        if value is not None and key not in PRIVATE:
            text = json.dumps(value, ensure_ascii=False, default=common.plain)
            settings.append(f"{key} {text}")
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"- settings: {plain_markdown(', '.join(settings))}",
        f"- exported by {plain_markdown(versions)}, commit {about['commit']}; opset "
        f"{about['opset']}, {about['precision']}",
        f"- SHA-256 of the trained weights `{about['weights_hash']}`, of the base weights "
        f"`{about['base_weights_hash']}`",
        f"- fingerprint of the annotations `{plain_markdown(run.fingerprint)}`",
    ]
    if run.seconds is not None:
        lines.append(f"- the run took {run.seconds:,.0f} s")
    return "\n".join(lines)


# ---------------------------------------------------------------- YAML


def front_matter(run, about, measured, base):
    """What the Hub reads. Every text is written as JSON, which is YAML too."""
    licence = about["licence"]
    lines = ["---", f"license: {LICENCES.get(licence, 'other')}"]
    if licence not in LICENCES:
        lines.append(f"license_name: {quoted(slug(licence))}")
    lines += ["library_name: onnx", "pipeline_tag: image-classification"]
    if base:
        lines.append(f"base_model: {quoted(base)}")
    lines.append("tags:")
    tags = ["onnx", "pathology", "histology", "mitotic-figures", run.method]
    lines += [f"- {quoted(tag)}" for tag in tags]
    lines += ["model-index:", f"- name: {quoted(title(run, about))}", "  results:"]
    for name, values in measured.items():
        lines += [
            "  - task:",
            "      type: image-classification",
            "    dataset:",
            f"      name: {quoted(dataset_name(run, name))}",
            f"      type: {quoted(slug(run.data))}",
            f"      split: {quoted(name)}",
            "    metrics:",
        ]
        for key, kind in METRIC_TYPES.items():
            if values["summary"][key] is not None:
                lines += [
                    f"    - type: {kind}",
                    f"      name: {quoted(tables.METRICS[key])}",
                    f"      value: {values['summary'][key]:.4f}",
                ]
    return "\n".join([*lines, "---", ""])


METRIC_TYPES = {"auroc": "roc_auc", "balanced_accuracy": "balanced_accuracy", "weighted_f1": "f1"}


def dataset_name(run, name):
    if name == "test":
        return run.data
    return f"{run.data}, {name}"


def quoted(text):
    return json.dumps(common.printable(text), ensure_ascii=False)


def slug(text):
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-") or "unnamed"
