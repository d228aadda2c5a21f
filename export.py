"""A finished run as an ONNX model: adapters merged, written, checked against torch, and only then
put in its place.

    python export.py RUN [--out model.onnx] [--precision fp32|fp16|int8] [--weights PATH]
    python export.py --doctor        does ONNX Runtime get the GPU here? one screen

The model takes patches uint8 [N, 224, 224, 3] (normalisation inside) and gives probability float32
[N]; classify.py and any other program with ONNX Runtime runs it, without torch. Beside it lies
MODEL.parity.json, and over 2 GiB (or with --external) MODEL.onnx.data with the weights."""

import argparse
import contextlib
import ctypes
import gc
import hashlib
import io
import json
import math
import os
import shutil
import signal
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
from dataset.patches import Patches
from onnx_model import graph, parity, session

LIMIT = 2**31 - 2**24  # bytes of one protobuf, less room for the graph
FEWEST = 64  # patches to compare on, where the dataset has as many
LABELS = ["hard negative", "mitotic figure"]
HERE = Path(__file__).resolve().parent


# ---------------------------------------------------------------- threshold and temperature


def best_threshold(labels, probability, rule):
    """The threshold of a rule on validation predictions → (value, text).

    rule  "f1": the highest F1 | "sensitivity=S": the highest threshold that finds the share S of
    the mitotic figures
          | a number. It lies in the middle between two neighbouring probabilities, so that rounding
          moves no decision.
    """
    with contextlib.suppress(ValueError):
        value = float(rule)
        if not 0 < value < 1:
            raise UserError(
                f"--threshold {rule}: a probability between 0 and 1, f1, or sensitivity=0.9"
            )
        return value, "given"
    kind, _, share = rule.partition("=")
    if kind not in ("f1", "sensitivity") or (kind == "f1" and share):
        raise UserError(
            f"--threshold {rule}: a probability between 0 and 1, f1, or sensitivity=0.9"
        )
    if kind == "sensitivity":
        try:
            share = float(share)
        except ValueError:
            share = -1
        if not 0 < share <= 1:
            raise UserError(
                f"--threshold {rule}: the share of mitotic figures to be found, e.g. "
                "sensitivity=0.9"
            )
    if len(set(np.asarray(labels).tolist()) & {0, 1}) < 2:
        return 0.5, "0.5, without validation predictions of both classes"
    order = np.argsort(-probability, kind="stable")
    sorted_p, hits = probability[order], np.cumsum(labels[order] == 1)
    ends = np.flatnonzero(
        np.append(np.diff(sorted_p) != 0, True)
    )  # the last of equal ones: they go together
    hits, called = hits[ends], ends + 1
    positives = int((labels == 1).sum())
    if kind == "f1":
        f1 = 2 * hits / (called + positives)
        best = int(np.argmax(f1))
        text = f"highest F1 on validation ({f1[best]:.4f})"
    else:
        best = int(np.argmax(hits / positives >= share))
        text = f"sensitivity {hits[best] / positives:.4f} on validation (wanted {share:g})"
    low = sorted_p[ends[best + 1]] if best + 1 < len(ends) else 0.0
    return float((sorted_p[ends[best]] + low) / 2), text


def best_temperature(labels, logits):
    """Temperature T > 0 with the least cross-entropy of sigmoid(logit / T) (Guo et al. 2017, for
    two classes).

    Convex in 1 / T, so the root of its derivative, Σ (sigmoid(s z) - y) z, is found by bisection in
    s = 1 / T."""
    z, y = np.asarray(logits, np.float64), np.asarray(labels, np.float64)

    def slope(s):
        return float(((0.5 * (1 + np.tanh(s * z / 2)) - y) * z).sum())

    low, high = 1e-3, 1e3
    if len(z) == 0 or slope(low) >= 0 or slope(high) <= 0:
        raise UserError(
            "--calibrate: no temperature fits the validation predictions (they order the classes "
            "not at "
            "all, or without an error); export without it"
        )
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / math.sqrt(low * high)


# ---------------------------------------------------------------- patches to compare on


def validation_patches(run, config, args, count):
    """Validation patches of the run, as many of each class as there are → (patches, labels, ids,
    where they are from).

    The demo's, where the run's data is not here.
    """
    kept = dict(config.get("source", {}))
    kept |= {name: getattr(args, name) for name in ("data", "images") if getattr(args, name)}
    try:
        annotations, choices = flags.from_source(kept, quiet=False)
        wanted = splits.load_split(run / "split.json", annotations).val
        rows = annotations.rows(wanted)
        if len(rows):  # read here: the annotations may be here without their images
            return read_patches(
                annotations, choices, rows, count, f"validation patches of {annotations.name}"
            )
    except (UserError, OSError) as error:
        if args.data:
            raise
        print(
            f"note: the run's data cannot be used here ({error}); comparing on demo patches "
            "(--data D names it)",
            file=sys.stderr,
        )
    annotations, choices = flags.from_source({"data": "demo", "fit": "resize"}, quiet=False)
    return read_patches(annotations, choices, np.arange(len(annotations)), count, "demo patches")


def read_patches(annotations, choices, rows, count, source):
    """`count` of the rows, both classes among them, and others of the dataset where they are too
    few.
    """
    own = source != "demo patches"
    rows = pick(rows, annotations.label, count)
    if len(rows) < min(count, FEWEST, len(annotations)):  # a batch of 64 needs so many
        others = np.setdiff1d(np.arange(len(annotations)), rows)
        more = pick(others, annotations.label, min(count, FEWEST) - len(rows))
        source += f" ({len(rows)}, and {len(more)} others)"
        rows = np.concatenate([rows, more])
    reader = Patches(
        annotations,
        size=models.SIZE,
        fit=choices.fit or "resize",
        mpp=choices.mpp,
        source_mpp=choices.source_mpp,
    )
    return (
        reader.read(rows),
        annotations.label[rows].astype(np.int8),
        annotations.id[rows] if own else [],
        source,
    )


def pick(rows, labels, count):
    """At most `count` of `rows`, as many of each label as there are, in random order: both are in
    small batches.
    """
    generator = np.random.default_rng(0)
    negative, positive = (generator.permutation(rows[labels[rows] == kind]) for kind in (0, 1))
    half = max(min(count // 2, len(positive)), count - len(negative))
    return generator.permutation(np.concatenate([positive[:half], negative[: count - half]]))


def default_count(encoder):
    """How many patches: 256, for large encoders (minutes on a CPU) as few as fill one batch of 64."""
    return 256 if sum(p.numel() for p in encoder.parameters()) < 1e8 else 64


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def workshop(out):
    """A temporary folder beside `out`, for files that are not yet the result; gone at the end,
    however it ends.

    Those of processes that were killed are removed too.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    for old in out.parent.glob(f".{out.name}.*.tmp"):
        owner = old.name.split(".")[-3]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(old, ignore_errors=True)
    folder = Path(
        tempfile.mkdtemp(prefix=f".{out.name}.{os.getpid()}.", suffix=".tmp", dir=out.parent)
    )
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder goes
    try:
        yield folder
    finally:
        signal.signal(signal.SIGTERM, previous)
        shutil.rmtree(folder, ignore_errors=True)


def put_in_place(folder, out):
    """Move the finished files to their names. The .onnx comes last: while it is there, what belongs
    to it is.
    """
    names = [f"{out.name}.data", out.with_suffix(".parity.json").name, out.name]
    for name in names:
        path = folder / name
        if path.exists():
            path.chmod(0o666 & ~common._umask())
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    out.unlink(
        missing_ok=True
    )  # an old .onnx must not stand beside new weights, not even for a moment
    for name in names:
        if (folder / name).exists():
            os.replace(folder / name, out.parent / name)
        else:
            (out.parent / name).unlink(missing_ok=True)  # of an earlier, larger export


def room(folder, wanted):
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise UserError(
            f"{folder}: {wanted / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free; make "
            "room, or name "
            "another place with --out"
        )


def save_array(path, array):
    """np.save, but on a full disk it says so (NumPy's own error has no number)."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    Path(path).write_bytes(buffer.getbuffer())


def check_process(model, folder, *flags):
    """Run onnx_model/parity.py on a file in a process of its own → its report; UserError where it
    fails.
    """
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "onnx_model.parity",
            str(Path(model).resolve()),
            str(Path(folder).resolve()),
            *flags,
        ],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message; killed for memory?"])[-1]
        raise UserError(
            f"the exported model does not run ({last.removeprefix('error: ')}); nothing was written"
        )
    return json.loads(done.stdout)


def set_metadata(proto, metadata):
    del proto.metadata_props[:]
    proto.metadata_props.add(key="format", value=session.FORMAT)
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=json.dumps(value, default=common._plain))


def free_memory():
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


# ---------------------------------------------------------------- the export


def describe(run, config, model, args, threshold, rule, temperature):
    """The metadata of the model, without what is known only when it is written."""
    flags, spec = config["flags"], model.encoder.spec
    metrics = common.read_json(run / "metrics.json") if (run / "metrics.json").exists() else {}
    licence = getattr(model.encoder, "licence", spec.licence)
    redistribution = "yes"
    if not spec.derivatives:
        redistribution = "no"
    elif "non-commercial" in licence or "NC" in licence:
        redistribution = "not for commercial use"
    with open(run / "model.safetensors", "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "version": 1,
        "encoder": spec.name,
        "pool": model.encoder.pool,
        "layer": model.encoder.layer,
        "method": flags["method"],
        "tta": bool(model.tta),
        "licence": licence,
        "redistribution": redistribution,
        "dataset": config.get("data", {}).get("name", flags.get("data")),
        "frac": flags.get("frac"),
        "fold": flags.get("fold"),
        "domain": flags.get("domain"),
        "mpp": training_mpp(config),
        "resampled": bool(flags.get("mpp")),
        "size": models.SIZE,
        "patch": config.get("data", {}).get("patch") or models.SIZE,
        "fit": flags.get("fit") or "resize",
        "labels": LABELS,
        "threshold": {"value": threshold, "rule": rule},
        "temperature": temperature,
        "metrics": metrics.get("sets", metrics),
        "commit": runs.environment()["commit"],
        "weights_hash": digest,
        "base_weights_hash": model.encoder.weights_hash,
        "precision": args.precision,
        "opset": args.opset,
        "input": args.input,
        "normalisation": spec.norm,
        "versions": {
            common.NAME: common.VERSION,
            "torch": torch.__version__,
            "onnx": onnx.__version__,
        },
    }


def training_mpp(config):
    """µm/px of the patches that the run was trained on; None where it is not known."""
    value = config["flags"].get("mpp") or config.get("data", {}).get("mpp")
    if isinstance(value, dict):  # per image or domain: the middle one
        value = float(np.median([v for v in value.values() if v])) if any(value.values()) else None
    return None if value is None else float(value)


def against_predictions(predictions, ids, logits):
    """How far the merged float32 model is from the run's own predictions (which may have been made
    in bf16).
    """
    if predictions is None:
        return None
    validation = np.flatnonzero(
        predictions["set"] == "val"
    )  # further datasets may use the same ids
    where = dict(zip(predictions["id"][validation].tolist(), validation.tolist()))
    pairs = [(where[name], i) for i, name in enumerate(np.asarray(ids).tolist()) if name in where]
    if not pairs:
        return None
    old, new = np.array(pairs).T
    difference = np.abs(predictions["probability"][old] - sigmoid(logits[new]))
    return {
        "patches": len(pairs),
        "largest": float(difference.max()),
        "mean": float(difference.mean()),
    }


def sigmoid(z):
    return 0.5 * (1 + np.tanh(np.asarray(z, np.float64) / 2))


def export(run, out, args):
    run, out = Path(run), Path(out)
    if not (run / "metrics.json").exists():
        raise UserError(f"{run}: not a finished run (no metrics.json)")
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name the file, e.g. {out}/model.onnx")
    predictions = (
        runs.read_predictions(run / "predictions.csv")
        if (run / "predictions.csv").exists()
        else None
    )
    validation = predictions["set"] == "val" if predictions is not None else np.zeros(0, bool)
    labels, logits = (
        predictions[k][validation] if predictions is not None else np.zeros(0)
        for k in ("label", "logit")
    )
    temperature = best_temperature(labels, logits) if args.calibrate else 1.0
    threshold, rule = best_threshold(labels, sigmoid(logits / temperature), args.threshold)

    with workshop(out) as folder:
        model, config = checkpoint.load_run(run, weights=args.weights)
        metadata = describe(run, config, model, args, threshold, rule, temperature)
        print(
            f"{run}: {metadata['method']} on {metadata['encoder']}, {metadata['dataset']}; "
            f"threshold {threshold:.4g} "
            + f"({rule})"
            + (f", temperature {temperature:.4g}" if args.calibrate else "")
        )
        print(
            f"licence of the base weights: {metadata['licence']}; redistribution: "
            f"{metadata['redistribution']}"
            + (
                ""
                if metadata["redistribution"] == "yes"
                else " (a model with these weights merged in is a derivative of them)"
            )
        )
        count = args.patches or default_count(model.encoder)
        patches, truth, ids, source = validation_patches(run, config, args, count)

        # torch's numbers, with the adapters still beside the weights, so that merging is checked
        # too
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        device = models.resolve_device(args.device)
        peaks = None
        with (
            graph.activation_peaks(model.encoder)
            if args.precision != "fp32"
            else contextlib.nullcontext() as seen
        ):
            reference = models.predict(
                model, patches, batch_size=8, device=device, progress="torch"
            )
            peaks = dict(seen) if seen else None
        model.to("cpu")
        if metadata["method"] == "lora":
            lora.merge_lora(model.encoder)
        for name, array in (
            ("patches", patches),
            ("probability", sigmoid(reference / temperature)),
            ("labels", truth),
        ):
            save_array(folder / f"{name}.npy", array)

        size = (
            sum(p.numel() for p in model.parameters())
            * {"fp32": 4, "fp16": 2, "int8": 1}[args.precision]
        )
        external = args.external or size > LIMIT
        room(folder, int(size * (1 if external else 2) * 1.05) + (1 << 20))
        weights = folder / f"{out.name}.data"
        with open(weights, "wb") as file:
            proto = graph.emit(
                model,
                file,
                args.precision,
                args.opset,
                args.input,
                args.embedding,
                temperature,
                peaks,
            )
            metadata["export_id"] = os.urandom(session.TRAILER).hex()
            file.write(bytes.fromhex(metadata["export_id"]))
            metadata["data_bytes"] = file.tell() if external else 0
        metadata["data_name"] = weights.name
        float32 = sorted(
            {
                i
                for (i, part), peak in (peaks or {}).items()
                if part in ("attn", "mlp") and peak * graph.HEADROOM >= graph.HALF_MAX
            }
        )
        if float32 and args.precision == "fp16":
            print(
                f"activations near the end of float16: parts of the blocks {float32} stay in "
                "float32"
            )
        del model
        free_memory()

        report = {
            "source": source,
            "wanted": parity.WANTED[args.precision],
            "measured": [],
            "predictions.csv": against_predictions(predictions, ids, reference),
        }
        set_metadata(proto, {**metadata, "parity": report})
        model_file = folder / out.name
        graph.save(proto, weights, model_file, inline=not external)
        onnx.checker.check_model(str(model_file))
        report["measured"] = check_process(model_file, folder)
        report["problems"] = parity.problems(report["measured"], args.precision)
        print(session.describe_parity(report))
        if report["predictions.csv"]:
            print(
                "torch fp32 against predictions.csv ({patches} patches): largest |Δp| "
                "{largest:.2e}, "
                "mean {mean:.2e}".format(**report["predictions.csv"])
            )
        if report["problems"]:
            raise UserError(
                f"not exported, {args.precision} is not within its tolerance: "
                f"{report['problems'][0]}"
            )

        set_metadata(proto, {**metadata, "parity": report})
        graph.save(
            proto, weights, model_file, inline=not external
        )  # the same, now with its report inside
        onnx.checker.check_model(str(model_file))
        if not external:
            check_process(model_file, folder, "--quick")
            weights.unlink()
        common.write_json(
            folder / out.with_suffix(".parity.json").name, {**metadata, "parity": report}
        )
        put_in_place(folder, out)
    total = sum(path.stat().st_size for path in (out, Path(f"{out}.data")) if path.exists())
    print(
        f"{out}: {total / 1e6:.1f} MB"
        + (f" with {out.name}.data (keep them together)" if external else "")
    )


def main():
    parser = argparse.ArgumentParser(
        description="Write a finished run as an ONNX model, verified against torch."
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="folder of a finished run")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="where to (default: RUN/model.onnx, model-fp16.onnx, model-int8.onnx)",
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
        help="the encoder's published weights (default: as the run had them)",
    )
    parser.add_argument(
        "--opset",
        type=int,
        default=graph.FUSED,
        metavar="N",
        help=f"ONNX opset, {graph.OLDEST} to {graph.NEWEST}; below {graph.FUSED} attention is "
        "written as "
        f"products and softmax, for older runtimes (default: {graph.FUSED})",
    )
    parser.add_argument(
        "--input",
        choices=("uint8", "float"),
        default="uint8",
        help="uint8: RGB [N, 224, 224, 3], normalisation inside; float: normalised [N, 3, 224, "
        "224], "
        "for hosts that bring it so (default: uint8)",
    )
    parser.add_argument(
        "--embedding", action="store_true", help="add the output embedding [N, D] (default: no)"
    )
    parser.add_argument(
        "--external",
        action="store_true",
        help="weights in a .data file also where one file would do (default: over 2 GiB)",
    )
    parser.add_argument(
        "--threshold",
        default="f1",
        metavar="RULE",
        help="f1, sensitivity=0.9, or a probability; chosen on validation predictions (default: "
        "f1)",
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
    parser.add_argument("--images", metavar="DIR", help="its images, where they lie elsewhere")
    parser.add_argument(
        "--device",
        default="auto",
        metavar="D",
        help="where torch computes: auto, cuda or cpu (default: auto)",
    )
    parser.add_argument(
        "--doctor",
        action="store_true",
        help="check the installation instead; status 1: a GPU is not used",
    )
    args = parser.parse_args()
    if args.doctor:
        from onnx_model import doctor

        return doctor.report()
    if not args.run:
        raise UserError("which run? python export.py runs/…/frac1-fold0 (or --doctor)")
    if not graph.OLDEST <= args.opset <= graph.NEWEST:
        raise UserError(f"--opset {args.opset}: {graph.OLDEST} to {graph.NEWEST} can be written")
    if args.patches is not None and args.patches < 2:
        raise UserError("--patches must be at least 2")
    if not Path(args.run).is_dir():
        raise UserError(f"{args.run}: no such run folder")
    name = "model.onnx" if args.precision == "fp32" else f"model-{args.precision}.onnx"
    out = Path(args.out) if args.out else Path(args.run) / name
    if out.suffix != ".onnx":
        raise UserError(f"--out {out}: must end with .onnx")
    export(args.run, out, args)


if __name__ == "__main__":
    common.command(main)
