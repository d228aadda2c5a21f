"""A finished run as an ONNX model: adapters merged, written, checked against torch, and only then
put in its place.

    python export.py RUN [--out model.onnx] [--precision fp32|fp16|int8] [--weights PATH]
    python export.py RUN RUN … --out model.onnx           the mean of their probabilities, one model
    python export.py RUN --peft DIR                       the run's LoRA adapter in peft's format
    python export.py RUN --card                           the model with a model card beside it
    python export.py --adapter DIR --model NAME --out model.onnx      an adapter trained by peft
    python export.py --doctor                             does ONNX Runtime use the GPU? one screen

The model takes patches uint8 [N, size, size, 3] (224 px for most encoders; normalisation inside)
and gives probability float32 [N]; classify.py and any other program with ONNX Runtime runs it,
without torch. Beside it lies MODEL.parity.json, and over 2 GiB (or with --external) MODEL.onnx.data
with the weights. --card adds MODEL.md, ready to be the README.md of a repository on the Hugging
Face Hub.

Several runs, such as the folds of one model, become one model with the same input and output. What
they have in common is stored and computed once: probes on one encoder cost what one of them costs;
of adapted or fully trained encoders each costs its own.

The folder of an adapter holds adapter_config.json and adapter_model.safetensors, as peft writes
them, and for a classifier its head: head.safetensors with head.weight [1, D] and head.bias [1] (or
two rows: label 0, label 1), as --peft writes it, or a classifier among peft's modules_to_save.
Without a head the model gives the embedding float32 [N, D] alone."""

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import hashlib
import io
import json
import math
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import torch

import checkpoint
import common
import flags
import lora
import models
import runs
from common import UserError
from dataset import splits
from dataset.formats.cells import MITOSIS
from dataset.patches import Patches
from encoders import rounding
from encoders.table import SIZE
from onnx_model import card, doctor, graph, parity, session
from onnx_model.parity import sigmoid
from reporting import ensemble, metrics, results

LIMIT = 2**31 - 2**24  # bytes of one protobuf, less room for the graph
FEWEST = 64  # patches to compare on, if the dataset has as many
BYTES = {"fp32": 4, "fp16": 2, "int8": 1}  # of a parameter
HERE = Path(__file__).resolve().parent


# ---------------------------------------------------------------- threshold and temperature


def validation(predictions):
    """(labels, logits, probabilities) of a run's validation predictions; empty without any."""
    if predictions is None:
        return np.zeros(0, np.int8), np.zeros(0), np.zeros(0)
    rows = predictions["set"] == "val"
    labels, logits, probability = (predictions[n][rows] for n in ("label", "logit", "probability"))
    if not (np.isfinite(logits).all() and ((0 <= probability) & (probability <= 1)).all()):
        raise UserError("predictions.csv: not probabilities (NaN?); restore it or repeat the run")
    return labels, logits, probability


def decide(predictions, rule, calibrate=False):
    """What the exported model decides by → (threshold, how it was chosen, temperature).

    predictions  of the run, or None
    rule         the text of --threshold
    """
    labels, logits, probability = validation(predictions)
    temperature = 1.0
    if calibrate:
        temperature = best_temperature(labels, logits)
        probability = sigmoid(logits / temperature)
    target = metrics.parse_threshold(rule, rules=True)
    if isinstance(target, float):
        return target, "given", temperature
    threshold = metrics.choose_threshold(labels, probability, target)
    if len(np.unique(labels)) < 2:
        text = "0.5, without validation predictions of both classes"
    elif target == "balanced":
        value = metrics.balanced_accuracy(labels, probability >= threshold)
        text = f"highest balanced accuracy on validation ({value:.4f})"
    elif target == "f1":
        text = f"highest F1 on validation ({metrics.f1(labels, probability >= threshold):.4f})"
    else:
        share = metrics.sensitivity(labels, probability >= threshold)
        text = f"sensitivity {share:.4f} on validation (required: {target[1]:g})"
    return threshold, text, temperature


def best_temperature(labels, logits):
    """Temperature T > 0 with the least cross-entropy of sigmoid(logit / T) (Guo et al. 2017, for
    two classes).

    Convex in 1 / T, so the root of its derivative, Σ (sigmoid(s z) - y) z, is found by bisection in
    s = 1 / T."""
    z, y = np.asarray(logits, np.float64), np.asarray(labels, np.float64)

    def slope(s):
        return float(((sigmoid(s * z) - y) * z).sum())

    low, high = 1e-3, 1e3
    if len(z) == 0 or slope(low) >= 0 or slope(high) <= 0:
        raise UserError(
            "--calibrate: no temperature fits the validation predictions (the logits separate the "
            "classes without an error, or do not order them at all); export without it"
        )
    for _ in range(100):
        middle = math.sqrt(low * high)
        if slope(middle) < 0:
            low = middle
        else:
            high = middle
    return 1 / math.sqrt(low * high)


# ---------------------------------------------------------------- patches to compare on


def validation_patches(run, config, args, count, size=SIZE, others=()):
    """Validation patches of the run, about half of each class → (patches, labels, ids, where they
    are from); the demo's if the run's data is not available.

    others  further runs of the same data, whose validation patches count too
    """
    source = dict(config["source"])
    source |= {name: getattr(args, name) for name in ("data", "images") if getattr(args, name)}
    try:
        annotations, choices = flags.from_source(source, quiet=False)
        ids = [splits.load_split(path / "split.json", annotations).val for path in (run, *others)]
        rows = annotations.rows(list(dict.fromkeys(np.concatenate(ids).tolist())))
        if len(rows):
            # Read inside the try: the annotations may be available without their images.
            name = f"validation patches of {annotations.name}"
            patches, labels, rows, name = read_patches(
                annotations, choices, rows, count, name, size
            )
            return patches, labels, annotations.id[rows], name
    except (UserError, OSError) as error:
        if args.data:
            raise
        print(
            f"note: the run's data is not available ({error}); comparing on demo patches (--data D "
            "names other data)",
            file=sys.stderr,
        )
    return demo_patches(count, size)


def demo_patches(count, size):
    annotations, choices = flags.from_source({"data": "demo", "fit": "resize"}, quiet=False)
    rows = np.arange(len(annotations))
    patches, labels, _, name = read_patches(annotations, choices, rows, count, "demo patches", size)
    return patches, labels, [], name


def read_patches(annotations, choices, rows, count, name, size):
    """`count` of the rows, of both classes, and others of the dataset if they are too few →
    (patches, labels, rows, name). size: px of the patches.
    """
    rows = pick(rows, annotations.label, count)
    if len(rows) < min(count, FEWEST, len(annotations)):  # a batch of 64 needs as many
        others = np.setdiff1d(np.arange(len(annotations)), rows)
        others = pick(others, annotations.label, min(count, FEWEST) - len(rows))
        name += f" ({len(rows)}, and {len(others)} others)"
        rows = np.concatenate([rows, others])
    flags.need_images(annotations, choices.mpp, quiet=True, crop=choices.crop)
    reader = Patches(
        annotations,
        size=size,
        fit=choices.fit or "resize",
        mpp=choices.mpp,
        source_mpp=choices.source_mpp,
        crop=choices.crop,
    )
    return reader.read(rows), annotations.label[rows].astype(np.int8), rows, name


def pick(rows, labels, count):
    """At most `count` of `rows`, half of each label if possible, in random order: small batches
    have both.
    """
    generator = np.random.default_rng(0)
    negative, positive = (generator.permutation(rows[labels[rows] == kind]) for kind in (0, 1))
    half = max(min(count // 2, len(positive)), count - len(negative))
    return generator.permutation(np.concatenate([positive[:half], negative[: count - half]]))


def default_count(parameters):
    """Patches to compare on: 256; for large encoders (minutes on a CPU) one batch of 64."""
    if parameters < 1e8:
        return 256
    return 64


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def workshop(out):
    """A temporary folder beside `out` for unfinished files, removed at the end, however it ends.

    Those that killed processes left are removed too."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for old in out.parent.glob(f".{out.name}.*.tmp"):
        remove_abandoned(old)
    prefix = f".{out.name}.{os.getpid()}."
    folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=out.parent))
    # A SIGTERM ends as an exit does, so that the folder goes.
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with common.exclusive(folder / "lock"):
            yield folder
    finally:
        signal.signal(signal.SIGTERM, previous)
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(folder):
    """Remove the workshop of a process that was killed, whose lock is free."""
    with contextlib.suppress(OSError):
        lock = common.try_lock(folder / "lock")
        if lock is not None:
            lock.release()
            shutil.rmtree(folder, ignore_errors=True)


def files_of(out):
    """What an export writes: weights, report and model, in the order in which they appear."""
    return Path(f"{out}.data"), out.with_suffix(".parity.json"), out


def put_in_place(folder, out):
    """Move the finished files to their names. The .onnx comes last: while it exists, what belongs
    to it does.
    """
    for target in files_of(out):
        path = folder / target.name
        if path.exists():
            mode = common.default_mode()
            if target.exists():  # permissions of a replaced file stay
                mode = stat.S_IMODE(target.stat().st_mode)
            path.chmod(mode)
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
    # An old .onnx must not stand beside new weights, not even for a moment.
    out.unlink(missing_ok=True)
    for target in files_of(out):
        if (folder / target.name).exists():
            common.replace(folder / target.name, target)
        else:
            target.unlink(missing_ok=True)  # of an earlier, larger export


def room(folder, needed):
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free; make "
            "room, or name another place with --out"
        )


def save_array(path, array):
    """np.save, but a full disk is an OSError with its number, which NumPy's own is not."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    Path(path).write_bytes(buffer.getbuffer())


def set_metadata(proto, metadata):
    del proto.metadata_props[:]
    proto.metadata_props.add(key="format", value=session.FORMAT)
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=json.dumps(value, default=common.plain))


def free_memory():
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


# ---------------------------------------------------------------- what the model says of itself


def describe(run, config, model, args, decision):
    """The metadata of a run's model, except for what is known only when it is written.

    decision  (threshold, rule, temperature), see `decide`
    """
    choices, data = config["flags"], config["data"]
    threshold, rule, temperature = decision
    stored = common.read_json(run / "metrics.json")
    if not isinstance(stored, dict) or not session.are_metrics(stored.get("sets", stored)):
        raise UserError(f"{run / 'metrics.json'}: damaged; restore it or repeat the run")
    with open(run / "model.safetensors", "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return describe_model(model, args) | {
        "method": choices["method"],
        "dataset": data.get("name", choices.get("data")),
        "frac": choices.get("frac"),
        "fold": choices.get("fold"),
        "domain": choices.get("domain"),
        **{key: choices[key] for key in ("folds", "leave_out") if choices.get(key)},
        **reading(config),
        "labels": class_names(run, config),
        "threshold": {"value": threshold, "rule": rule},
        "temperature": temperature,
        "metrics": stored.get("sets", stored),
        "weights_hash": digest,
    }


def class_names(run, config):
    """[name of label 0, name of label 1] of a run; runs of earlier versions do not say them."""
    names = config["data"].get("classes")
    if names is None and config["source"].get("positive"):
        print(
            f"warning: {run}: is of a version that did not record what its classes are called "
            f"(--positive {config['source']['positive']}); the model calls them {MITOSIS[0]} and "
            f"{MITOSIS[1]}. A run made anew says the names of the data",
            file=sys.stderr,
        )
    return names or list(MITOSIS)


def reading(config):
    """The metadata that say which pixels a run's model is given."""
    choices = config["flags"]
    size = choices.get("size") or models.find_encoder(choices["model"]).size
    return {
        "size": size,
        "mpp": training_mpp(config),
        "mixed_mpp": mixed_mpp(config),
        "resampled": bool(choices.get("mpp")),
        "patch": config["data"].get("patch") or size,
        "crop": choices.get("crop"),  # as "patch": larger patches are cut to their middle
        "fit": choices.get("fit") or "resize",
    }


def describe_adapter(model, args):
    """The same for an adapter: of its training, only what the flags say is known."""
    threshold = labels = None
    if model.head is not None:
        value, rule, _ = decide(None, args.threshold)
        threshold = {"value": value, "rule": rule}
        labels = lora.head_classes(args.adapter) or list(MITOSIS)
    return describe_model(model, args) | {
        "method": "lora",
        "dataset": None,
        "mpp": args.mpp,
        "resampled": False,
        "patch": model.encoder.size,
        "fit": "resize",
        "labels": labels,
        "threshold": threshold,
        "temperature": 1.0,
        "metrics": {},
        "weights_hash": lora.adapter_hash(args.adapter),
    }


def describe_model(model, args):
    """The metadata that follows from the network and from how it is written."""
    spec = model.encoder.spec
    licence = getattr(model.encoder, "licence", spec.licence)
    return {
        "version": 1,
        "encoder": spec.name,
        "pool": model.encoder.pool,
        "layer": model.encoder.layer,
        "tta": bool(model.tta),
        "licence": licence,
        "redistribution": redistribution(spec, licence),
        "base_weights_hash": model.encoder.weights_hash,
        "size": model.encoder.size,
        "normalisation": spec.norm,
        "precision": args.precision,
        "opset": args.opset,
        "input": args.input,
        "commit": runs.environment()["commit"],
        "versions": {
            common.NAME: common.VERSION,
            "torch": torch.__version__,
            "onnx": onnx.__version__,
        },
    }


def redistribution(spec, licence):
    """Whether a model with these weights merged in, a derivative of them, may be passed on."""
    if not spec.derivatives:
        return "no"
    if "non-commercial" in licence or "NC" in licence:
        return "not for commercial use"
    return "yes"


def training_mpp(config):
    """µm/px of the patches that the run was trained on; None if it is not known, or mixed."""
    value = config["flags"].get("mpp") or config["data"].get("mpp")
    if isinstance(value, dict):  # of early versions, per image or domain
        known = [number for number in value.values() if number]
        value = None
        if known and max(known) <= 1.02 * min(known):
            value = np.median(known)
    if value is None:
        return None
    return float(value)


def mixed_mpp(config):
    """{µm/px: number of images} if the run was trained on images as scanned at different µm/px."""
    if training_mpp(config) is not None:
        return None
    return config["data"].get("mixed_mpp")


def announce(source, metadata, calibrated):
    """Say what is exported, under which licence, and what to mind."""
    threshold = metadata["threshold"]
    line = f"{source}: {metadata['method']} on {metadata['encoder']}"
    if metadata["dataset"]:
        line += f", {metadata['dataset']}"
    if threshold is None:
        line += "; no head in the folder, so the model gives the embedding alone"
    else:
        line += f"; threshold {threshold['value']:.4g} ({threshold['rule']})"
    if calibrated:
        line += f", temperature {metadata['temperature']:.4g}"
    print(line)
    line = (
        f"licence of the base weights: {metadata['licence']}; redistribution: "
        f"{metadata['redistribution']}"
    )
    if metadata["redistribution"] != "yes":
        line += " (a model with these weights merged in is a derivative of them)"
    print(line)
    if metadata.get("mixed_mpp"):
        print(
            f"warning: trained on images of different µm/px ({scales(metadata['mixed_mpp'])}), so "
            "slides will be read as scanned; --mpp of train.py resamples all to one scale"
        )


def scales(mixed):
    return ", ".join(f"{scale} µm/px: {count} images" for scale, count in mixed.items())


# ---------------------------------------------------------------- the check against torch


@dataclasses.dataclass
class Reference:
    """What torch says of the patches to compare on."""

    values: np.ndarray  # logits [n], without a head embeddings [n, D]: float32, adapters unmerged
    half: np.ndarray | None  # the same in float16 on a GPU, for fp16
    bound: float | None  # what rounding explains of them, see parity.bound
    peaks: dict | None  # of the activations, see graph.activation_peaks


def torch_output(model, patches, args):
    """Run torch in float32, with adapters unmerged, so that merging is checked too → Reference."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    device = models.resolve_device(args.device)
    output, watching, half = "logits", contextlib.nullcontext(), None
    if model.head is None:
        output = "embedding"
    if args.precision != "fp32":
        watching = graph.activation_peaks(model.encoder)
    with watching as peaks:
        values = models.predict(
            model, patches, batch_size=8, device=device, output=output, progress="torch"
        )
    if args.precision == "fp16" and device.type == "cuda":
        half = half_output(model, patches, output)
    bound = None
    if args.precision != "int8":
        terms = rounding.longest_sum(model.encoder)
        bound = parity.bound(args.precision, rounding.gain(model, patches, values), terms)
        if not np.isfinite(bound):
            raise UserError("torch's own output on these patches is not a finite number, or zero")
    model.to("cpu")
    return Reference(values, half, bound, peaks)


def half_output(model, patches, output):
    """The same in float16 on the model's GPU; None if it overflows there, where the exported model
    keeps parts of blocks in float32.
    """
    try:
        return models.predict(
            model, patches, batch_size=8, dtype="fp16", output=output, progress="torch fp16"
        )
    except UserError as error:
        print(f"note: no comparison with torch in float16: {error}", file=sys.stderr)
        return None


def probabilities(reference, temperature):
    """The arrays that a model with a head is compared with, see parity.measure."""
    logits = reference.values / temperature
    arrays = {"expected": sigmoid(logits)}
    if reference.bound is not None:
        bound = reference.bound / temperature
        arrays["allowed"] = parity.allowed_of_logits(logits, bound)
    if reference.half is not None:
        arrays["half"] = sigmoid(reference.half / temperature)
    return arrays


def embeddings(reference):
    """The same without a head."""
    arrays = {"expected": reference.values}
    if reference.bound is not None:
        arrays["allowed"] = parity.allowed_of_embeddings(reference.values, reference.bound)
    if reference.half is not None:
        arrays["half"] = reference.half
    return arrays


def against_predictions(predictions, ids, logits):
    """How far the merged float32 model is from the run's own predictions (which may be of bf16)."""
    if predictions is None:
        return None
    validation_rows = np.flatnonzero(predictions["set"] == "val")  # other sets may share the ids
    row_of = dict(zip(predictions["id"][validation_rows].tolist(), validation_rows.tolist()))
    pairs = [(row_of[name], i) for i, name in enumerate(np.asarray(ids).tolist()) if name in row_of]
    if not pairs:
        return None
    old, new = np.array(pairs).T
    difference = np.abs(predictions["probability"][old] - sigmoid(logits[new]))
    return {
        "patches": len(pairs),
        "largest": float(difference.max()),
        "mean": float(difference.mean()),
    }


def check_process(model, folder, *options):
    """Run onnx_model/parity.py on a file in a process of its own → its report; UserError if it
    fails.
    """
    command = [sys.executable, "-m", "onnx_model.parity"]
    command += [str(Path(model).resolve()), str(Path(folder).resolve()), *options]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message; killed for memory?"])[-1]
        raise UserError(
            f"the exported model does not run ({last.removeprefix('error: ')}); nothing was written"
        )
    return json.loads(done.stdout)


def print_parity(report):
    print(session.describe_parity(report))
    difference = report["predictions.csv"]
    if difference:
        print(
            f"torch fp32 against predictions.csv ({difference['patches']} patches): largest |Δp| "
            f"{difference['largest']:.2e}, mean {difference['mean']:.2e}"
        )


# ---------------------------------------------------------------- the export


def write_graph(model, folder, name, args, metadata, peaks):
    """Emit the model into `folder` → (ModelProto, file of the weights, whether it stays a file of
    its own); completes the metadata.
    """
    size = size_of(model, args)
    external = args.external or size > LIMIT
    copies = 2  # the weights, and the model with them inside
    if external:
        copies = 1
    room(folder, int(size * copies * 1.05) + (1 << 20))
    weights = folder / f"{name}.data"
    with open(weights, "wb") as file:
        proto = graph.emit(
            model,
            file,
            args.precision,
            args.opset,
            args.input,
            args.embedding,
            metadata["temperature"],
            peaks,
        )
        close_weights(file, metadata, external)
    if args.precision == "fp16":
        say_float32(peaks)
    return proto, weights, external


def size_of(model, args):
    """Bytes of the parameters as they are written."""
    return sum(p.numel() for p in model.parameters()) * BYTES[args.precision]


def close_weights(file, metadata, external):
    """Complete the file of weights, and the metadata by what they say of it."""
    file.flush()
    metadata["export_id"] = identity(file.name, metadata)
    file.write(bytes.fromhex(metadata["export_id"]))
    metadata["data_bytes"] = 0
    if external:
        metadata["data_bytes"] = file.tell()
    metadata["data_name"] = Path(file.name).name


def identity(weights, metadata):
    """What tells the files of one export from those of another; the same for the same export."""
    text = json.dumps(metadata, default=common.plain, sort_keys=True)
    with open(weights, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(text.encode())
    return digest.hexdigest()


def say_float32(peaks):
    blocks = graph.float32_blocks(peaks)
    if blocks:
        print(f"activations near the end of float16: parts of the blocks {blocks} stay in float32")


def load_run(args):
    """A finished run → (PatchClassifier, its metadata, its predictions or None, its config)."""
    run = Path(args.run)
    if not (run / "metrics.json").exists():
        raise UserError(f"{run}: not a finished run (no metrics.json)")
    predictions = None
    if (run / "predictions.csv").exists():
        predictions = runs.read_predictions(run / "predictions.csv")
    decision = decide(predictions, args.threshold, args.calibrate)
    model, config = checkpoint.load_run(run, weights=args.weights)
    return model, describe(run, config, model, args, decision), predictions, config


def load_adapter(args):
    """A published encoder with an adapter in peft's format → (PatchClassifier, whose head is None
    if the folder has none, and its metadata).
    """
    head = lora.load_head(args.adapter)
    encoder = models.load_encoder(
        args.model, args.weights, pool=args.pool, layer=args.layer, size=args.size
    )
    lora.load_peft(encoder, args.adapter)
    model = models.PatchClassifier(encoder).eval()
    if head is None:
        model.head = None
    elif head[0].shape != model.head.weight.shape:
        raise UserError(
            f"{args.adapter}: its head is for embeddings of {head[0].shape[1]} numbers, "
            f"{args.model} gives {encoder.embed_dim} (--pool, --layer)"
        )
    else:
        with torch.no_grad():
            model.head.weight.copy_(head[0])
            model.head.bias.copy_(head[1])
    return model, describe_adapter(model, args)


def comparison(args, model, config):
    """Patches to compare on → (patches, labels, ids, where they are from)."""
    parameters = sum(p.numel() for p in model.encoder.parameters())
    count = args.patches or default_count(parameters)
    size = model.encoder.size
    if args.run:
        return validation_patches(Path(args.run), config, args, count, size)
    if not args.data:
        return demo_patches(count, size)
    source = {"data": args.data, "images": args.images, "fit": "resize"}
    annotations, choices = flags.from_source(source, quiet=False)
    rows = np.arange(len(annotations))
    name = f"patches of {annotations.name}"
    patches, labels, rows, name = read_patches(annotations, choices, rows, count, name, size)
    return patches, labels, annotations.id[rows], name


def export(out, args):
    """Write a finished run, the mean of several (args.runs) or an adapter (args.adapter) as the
    ONNX model `out`, verified; UserError if it is not within its tolerance.
    """
    with workshop(out) as folder:
        write = write_one
        if len(args.runs) > 1:
            write = write_mean
        proto, weights, external, metadata, report = write(folder, out.name, args)
        free_memory()

        # Written twice: to be measured, and with the report of that inside.
        output = report["output"]
        report["measured"] = []
        model_file = folder / out.name
        write_model(proto, weights, model_file, external, metadata, report)
        report["measured"] = check_process(model_file, folder)
        report["problems"] = parity.problems(report["measured"], args.precision, output)
        report["note"] = parity.unseen(report["measured"], args.precision)
        print_parity(report)
        if report["problems"]:
            raise UserError(
                f"not exported, {args.precision} is not within its tolerance: "
                f"{report['problems'][0]}"
            )
        write_model(proto, weights, model_file, external, metadata, report)
        if not external:
            check_process(model_file, folder, "--quick")
            weights.unlink()
        parity_file = folder / out.with_suffix(".parity.json").name
        common.write_json(parity_file, {**metadata, "parity": report})
        put_in_place(folder, out)
    say_written(out, external)


def write_one(folder, name, args):
    """Write the graph of one run or adapter, its weights, and the arrays to compare with, into
    `folder` → (ModelProto, file of the weights, whether it stays a file of its own, metadata, what
    the parity report says already).
    """
    predictions = config = None
    if args.run:
        model, metadata, predictions, config = load_run(args)
    else:
        model, metadata = load_adapter(args)
    announce(args.run or args.adapter, metadata, args.calibrate)

    patches, labels, ids, source = comparison(args, model, config)
    reference = torch_output(model, patches, args)
    output, arrays = "embedding", embeddings(reference)
    if model.head is not None:
        output, arrays = "probability", probabilities(reference, metadata["temperature"])
    save_comparison(folder, patches, labels, output, arrays)
    lora.merge_lora(model.encoder)
    proto, weights, external = write_graph(model, folder, name, args, metadata, reference.peaks)
    report = {
        "source": source,
        "output": output,
        "wanted": parity.wanted(args.precision, output, arrays.get("allowed"), reference.half),
        "predictions.csv": against_predictions(predictions, ids, reference.values),
    }
    return proto, weights, external, metadata, report


def save_comparison(folder, patches, labels, output, arrays):
    """What onnx_model/parity.py compares the model with."""
    arrays = {"patches": patches, "labels": labels, **arrays}
    arrays[output] = arrays.pop("expected")
    for name, array in arrays.items():
        save_array(folder / f"{name}.npy", array)


def write_model(proto, weights, path, external, metadata, report):
    set_metadata(proto, {**metadata, "parity": report})
    graph.save(proto, weights, path, inline=not external)
    onnx.checker.check_model(str(path))


# ---------------------------------------------------------------- several runs as one model


def read_members(args):
    """The runs of args.runs → [results.Finished], [config]; UserError if they have no mean: other
    classes, or other pixels to read.
    """
    members, configs = [], []
    for path in args.runs:
        run = results.read_run(path)
        if run is None:
            raise UserError(f"{path}: not a finished run (no metrics.json)")
        members.append(run)
        configs.append(checkpoint.read_config(path))
    first = reading(configs[0])
    for run, config in zip(members, configs):
        if run.classes != members[0].classes:
            names = " and ".join("/".join(names) for names in (run.classes, members[0].classes))
            raise UserError(
                f"{run.path}: its classes are not those of {members[0].path} ({names}); runs have "
                "a mean only of the same classes in the same order"
            )
        for key, value in reading(config).items():
            if value != first[key]:
                raise UserError(
                    f"{run.path}: reads other patches than {members[0].path} ({key} {value} and "
                    f"{first[key]}); one model reads all its patches in one way"
                )
    return members, configs


def calibrated(run, rule):
    """(run with the probabilities of its calibrated logits, its temperature)"""
    _, _, temperature = decide(run.columns, rule, calibrate=True)
    probability = sigmoid(run.columns["logit"] / temperature)
    columns = {**run.columns, "probability": probability}
    return dataclasses.replace(run, columns=columns), temperature


def trained_on_tests(members):
    """Lines on members that were trained on test patches of others, or chosen by them."""
    lines = []
    for run in members:
        for other in members:
            if run.fingerprint != other.fingerprint:
                continue
            seen = np.union1d(other.split["ids"]["train"], other.split["ids"]["val"])
            count = np.isin(run.split["ids"]["test"], seen).sum()
            if count:
                lines.append(
                    f"{other.path} was trained or chosen on {count} of the test patches of "
                    f"{run.path}: no test of the mean on these"
                )
    return lines


def comparison_of(members, configs, args):
    """Patches to compare the mean on, as `comparison`: validation patches of all members on the
    first one's dataset.
    """
    specs = [models.find_encoder(run.model) for run in members]
    count = args.patches or default_count(max(spec.params for spec in specs))
    first, *others = (run.path for run in members if run.fingerprint == members[0].fingerprint)
    size = reading(configs[0])["size"]
    return validation_patches(first, configs[0], args, count, size, others)


def write_mean(folder, name, args):
    """As `write_one`, the mean of the probabilities of args.runs; one network is in memory at a
    time.
    """
    members, configs = read_members(args)
    temperatures = [1.0] * len(members)
    if args.calibrate:
        members, temperatures = zip(*(calibrated(run, args.threshold) for run in members))
    columns, reasons = ensemble.average(members)
    threshold, rule, _ = decide(columns, args.threshold)
    patches, labels, ids, source = comparison_of(members, configs, args)

    parts, compared, differences = [], [], []

    def networks():
        for run, config, temperature in zip(members, configs, temperatures):
            model, _ = checkpoint.load_run(run.path, weights=args.weights)
            decision = (threshold, rule, temperature)
            parts.append(describe(run.path, config, model, args, decision))
            reference = torch_output(model, patches, args)
            compared.append(probabilities(reference, temperature))
            logits = reference.values / temperature
            differences.append(against_predictions(run.columns, ids, logits))
            lora.merge_lora(model.encoder)
            if args.precision == "fp16":
                say_float32(reference.peaks)
            room(folder, size_of(model, args) + (1 << 20))
            yield model, temperature, reference.peaks
            del model
            free_memory()

    weights = folder / f"{name}.data"
    with open(weights, "wb") as file:
        proto = graph.emit_mean(networks(), file, args.precision, args.opset, args.input)
        target = metrics.parse_threshold(args.threshold, rules=True)
        summaries = metrics.of_predictions(columns, target)["sets"]
        metadata = describe_mean(members, parts, summaries, (threshold, rule))
        announce(f"{len(members)} runs", metadata, args.calibrate)
        external = args.external or file.tell() > LIMIT
        if not external:
            room(folder, int(file.tell() * 1.05) + (1 << 20))  # the model with the weights inside
        close_weights(file, metadata, external)
    for set_name, reason in reasons.items():
        print(f"note: no metrics of the mean on {set_name}: {reason}")
    for line in trained_on_tests(members):
        print(f"note: {line}")

    arrays = mean_of(compared)
    save_comparison(folder, patches, labels, "probability", arrays)
    report = {
        "source": source,
        "output": "probability",
        "wanted": parity.wanted(
            args.precision, "probability", arrays.get("allowed"), arrays.get("half")
        ),
        "predictions.csv": together(differences),
    }
    return proto, weights, external, metadata, report


def mean_of(compared):
    """The arrays of the mean (see `probabilities`) of those of its members; an array that one of
    them does not have is left out.
    """
    names = [name for name in compared[0] if all(name in arrays for arrays in compared)]
    return {name: np.mean([arrays[name] for arrays in compared], axis=0) for name in names}


def together(differences):
    """One entry of the parity report for those of all members; None without any."""
    known = [difference for difference in differences if difference]
    if not known:
        return None
    counts = [difference["patches"] for difference in known]
    means = [difference["mean"] for difference in known]
    return {
        "patches": sum(counts),
        "largest": max(difference["largest"] for difference in known),
        "mean": float(np.average(means, weights=counts)),
    }


def describe_mean(members, parts, summaries, decision):
    """The metadata of the mean of several runs.

    parts: `describe` of each member; summaries: {set: metrics of the mean}; decision: (threshold,
    rule).
    """
    threshold, rule = decision
    digests = [part["weights_hash"] for part in parts]
    for i, digest in enumerate(digests):
        if digest in digests[:i]:
            twin = members[digests.index(digest)].path
            print(f"note: {members[i].path} is the same model as {twin} and counts twice")

    own = ("method", "encoder", "pool", "layer", "tta", "licence", "dataset", "frac", "fold")
    own += ("domain", "normalisation", "temperature", "weights_hash", "base_weights_hash")
    listing = []
    for run, part in zip(members, parts):
        place = "/".join(run.path.resolve().parts[-3:])
        listing.append({"run": place} | {key: part[key] for key in own})
    # Of what the members do not share, texts stand side by side and the rest is in the list alone.
    shared = {}
    for key in parts[0]:
        values = [part[key] for part in parts]
        values = [value for i, value in enumerate(values) if value not in values[:i]]
        shared[key] = values[0]
        if len(values) > 1:
            shared[key] = None
        if len(values) > 1 and all(isinstance(value, str) for value in values):
            shared[key] = " + ".join(values)
    return shared | {
        "method": f"mean of {len(parts)}: {shared['method']}",
        "redistribution": strictest(part["redistribution"] for part in parts),
        # Of the first: pixels are normalised inside the model, for each member by its own.
        "normalisation": parts[0]["normalisation"],
        "threshold": {"value": threshold, "rule": rule},
        "temperature": 1.0,
        "metrics": summaries,
        "weights_hash": hashlib.sha256("".join(digests).encode()).hexdigest(),
        "members": listing,
    }


def strictest(terms):
    """What may be done with a model that holds several."""
    return min(terms, key=["no", "not for commercial use", "yes"].index)


def write_adapter(args):
    """The adapter of a LoRA run in peft's format, with its head beside it."""
    folder = Path(args.peft)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--peft {folder}: is a file; name a folder")
    model, config = checkpoint.load_run(args.run, weights=args.weights)
    if config["flags"]["method"] != "lora":
        raise UserError(f"{args.run}: was trained without --lora and has no adapter to write")
    spec = model.encoder.spec
    classes = config["data"].get("classes")
    lora.save_peft(model.encoder, folder, spec.repo or spec.name, model.head, classes)
    print(
        f"{folder}: adapter of {len(lora.adapted(model.encoder))} layers in peft's format, and the "
        f"head in {lora.HEAD}, for {spec.name}, embedding {model.encoder.pool}"
    )


def say_written(out, external):
    size, together = out.stat().st_size, ""
    if external:
        size += Path(f"{out}.data").stat().st_size
        together = f" with {out.name}.data (keep them together)"
    print(f"{out}: {size / 1e6:.1f} MB{together}")


# ---------------------------------------------------------------- the command


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="Write a finished run as an ONNX model, verified against torch."
    )
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="folder of a finished run; several: the mean of their probabilities",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="the model's file (default: RUN/model.onnx, model-fp16.onnx, model-int8.onnx)",
    )
    parser.add_argument(
        "--peft",
        metavar="DIR",
        help="write the adapter of a LoRA run in peft's format, with its head, instead of a model",
    )
    parser.add_argument(
        "--card",
        nargs="?",
        const="",
        metavar="FILE",
        help="also write a model card for the Hugging Face Hub: data, metrics with intervals, "
        "licence, parity, limits (default: no; without FILE beside the model, as MODEL.md)",
    )
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        help="instead of RUN: merge this adapter in peft's format into the published encoder",
    )
    parser.add_argument("--model", metavar="NAME", help="with --adapter: the encoder (models.py)")
    parser.add_argument(
        "--pool", metavar="P", help="with --adapter: as for train.py (default: as published)"
    )
    parser.add_argument(
        "--layer", type=int, metavar="N", help="with --adapter: as for train.py (default: last)"
    )
    parser.add_argument(
        "--size", type=int, metavar="PX", help="with --adapter: as for train.py (default: the same)"
    )
    parser.add_argument(
        "--mpp",
        type=float,
        metavar="M",
        help="with --adapter: µm/px of the patches that it was trained on (default: unknown)",
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp16", "int8"),
        default="fp32",
        help="fp16: half the size, for GPUs; int8: a quarter, for CPUs (default: fp32)",
    )
    parser.add_argument(
        "--weights",
        metavar="PATH",
        help="the encoder's published weights (default: those of the run, else from the Hub)",
    )
    parser.add_argument(
        "--opset",
        type=int,
        default=graph.FUSED,
        metavar="N",
        help=f"ONNX opset, {graph.OLDEST} to {graph.NEWEST}; below {graph.FUSED} attention is "
        f"written as products and softmax, for older runtimes (default: {graph.FUSED})",
    )
    parser.add_argument(
        "--input",
        choices=("uint8", "float"),
        default="uint8",
        help="uint8: RGB [N, size, size, 3], normalisation inside; float: normalised "
        "[N, 3, size, size], for hosts that normalise (default: uint8)",
    )
    parser.add_argument(
        "--embedding", action="store_true", help="add the output embedding [N, D] (default: no)"
    )
    parser.add_argument(
        "--external",
        action="store_true",
        help="weights in a .data file, even if one file would do (default: over 2 GiB)",
    )
    parser.add_argument(
        "--threshold",
        default="f1",
        metavar="RULE",
        help="f1, balanced (best balanced accuracy), sensitivity=0.9, or a probability; chosen on "
        "validation predictions (default: f1)",
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="divide the logit by a temperature fitted on validation predictions (default: no)",
    )
    parser.add_argument(
        "--patches",
        type=int,
        metavar="N",
        help="patches to compare on (default: 256, for encoders over 100M parameters 64)",
    )
    parser.add_argument(
        "--data", metavar="D", help="dataset to compare on (default: the run's, else the demo)"
    )
    parser.add_argument(
        "--images", metavar="DIR", help="folder of its images, if not beside the annotations"
    )
    parser.add_argument(
        "--device",
        default="auto",
        metavar="D",
        help="where torch computes: auto, cuda or cpu (default: auto)",
    )
    parser.add_argument(
        "--doctor",
        action="store_true",
        help="check the installation instead, as python classify.py --doctor does; exit status 1 "
        "if a GPU is not used",
    )
    args = parser.parse_args()
    args.run = next(iter(args.runs), None)
    return args


def check(args):
    """UserError for flags that do not make sense, before any work."""
    if bool(args.run) == bool(args.adapter):
        raise UserError(
            "which run? python export.py runs/…/frac1-fold0, or --adapter DIR --model NAME, or "
            "--doctor"
        )
    if args.run:
        check_run(args)
    else:
        check_adapter(args)
    if not graph.OLDEST <= args.opset <= graph.NEWEST:
        raise UserError(f"--opset {args.opset}: {graph.OLDEST} to {graph.NEWEST} can be written")
    if args.patches is not None and args.patches < 2:
        raise UserError("--patches must be at least 2")
    metrics.parse_threshold(args.threshold, rules=True)


def check_run(args):
    for run in args.runs:
        if not Path(run).is_dir():
            raise UserError(f"{run}: no such run folder")
    for name in ("model", "pool", "layer", "size", "mpp"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name} goes with --adapter; a run knows its own")
    if args.peft and args.out:
        raise UserError("--peft writes an adapter and --out a model: give one of them")
    if args.peft and args.card is not None:
        raise UserError("--card belongs to an exported model, and --peft writes an adapter")
    if len(args.runs) > 1:
        check_several(args)


def check_several(args):
    """The flags with several runs."""
    if args.peft:
        raise UserError("--peft writes the adapter of one RUN")
    if args.card is not None:
        raise UserError("--card tells of one RUN; export and describe the members one by one")
    if args.embedding:
        raise UserError(
            "--embedding goes with one RUN: the mean of several is one of probabilities"
        )
    if not args.out:
        raise UserError(
            "the mean of several runs belongs to none of their folders: give --out FILE"
        )
    if len({os.path.realpath(run) for run in args.runs}) < len(args.runs):
        raise UserError("one of the runs is named twice; name each member once")


def check_adapter(args):
    """The flags of --adapter; what a run would know must be given, or cannot be had."""
    if args.peft:
        raise UserError("--peft writes the adapter of a RUN; --adapter has one already")
    if args.card is not None:
        raise UserError("--card tells of a RUN, its data and metrics; an adapter has none")
    if not args.model or not args.out:
        raise UserError("--adapter needs --model NAME (its encoder) and --out FILE.onnx")
    if not Path(args.adapter).is_dir():
        raise UserError(f"--adapter {args.adapter}: no such folder")
    if args.calibrate:
        raise UserError("--calibrate needs the validation predictions of a run")
    if args.mpp is not None and not 0.01 < args.mpp < 100:
        raise UserError(f"--mpp {args.mpp:g}: not a plausible number of µm per px")
    if args.threshold == "balanced" or args.threshold.startswith("sensitivity"):
        raise UserError(
            f"--threshold {args.threshold} needs the validation predictions of a run; give a number"
        )
    if args.precision == "int8" and lora.load_head(args.adapter) is None:
        raise UserError(
            f"--precision int8 is judged by its AUROC, and {args.adapter} has no head; choose fp32 "
            "or fp16"
        )


def inputs_of(args, outputs):
    """Files that the export reads, without those of `outputs`, which an earlier one may have
    written into the run's folder.
    """
    inputs = [args.weights, args.data]
    for run in args.runs:
        config = checkpoint.read_config(run)
        inputs += [config["flags"].get("weights"), config["source"].get("data")]
    for folder in (*args.runs, args.adapter):
        if folder:
            inputs += [path for path in Path(folder).iterdir() if path not in outputs]
    return inputs


def output_path(args):
    """The model's file; UserError if it could not be written, or would replace an input."""
    name = "model.onnx"
    if args.precision != "fp32":
        name = f"model-{args.precision}.onnx"
    out = Path(args.out or Path(args.run) / name)
    if out.suffix != ".onnx":
        raise UserError(f"--out {out}: must end with .onnx")
    if not common.is_utf8(str(out.resolve())):
        raise UserError(f"--out {out}: ONNX Runtime reads paths in UTF-8 alone; choose another")
    for path in files_of(out):
        common.check_output("--out", path, inputs_of(args, files_of(out)))
        if path.is_symlink():
            raise UserError(f"--out {path}: a symbolic link; name the file that it points to")
    return out


def card_path(args, out):
    """The file of --card; UserError if it could not be written, or would replace an input or a file
    of the model.
    """
    path = out.with_suffix(".md")
    if args.card:
        path = Path(args.card)
    inputs = [file for file in inputs_of(args, ()) if Path(file or "").suffix != ".md"]
    common.check_output("--card", path, [*inputs, *files_of(out)])
    return path


def write_card(path, out, finished):
    about = common.read_json(out.with_suffix(".parity.json"))
    base = models.ENCODERS[about["encoder"]].repo
    if base.startswith("torchvision/"):
        base = None
    common.write_text(path, card.card(finished, about, out.name, base))
    print(f"{path}: model card")


def main():
    args = parse_arguments()
    if args.doctor:
        return doctor.report()
    check(args)
    if args.peft:
        write_adapter(args)
        return 0
    out = output_path(args)
    if args.card is None:
        export(out, args)
        return 0
    path, finished = card_path(args, out), card.read_run(args.run)  # their mistakes before the work
    export(out, args)
    write_card(path, out, finished)
    return 0


if __name__ == "__main__":
    common.command(main)
