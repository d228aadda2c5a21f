"""An exported model in ONNX Runtime: opened on the device asked for, checked, and run on patches
and slides.
"""

import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import onnxruntime

import common
from common import UserError
from dataset.formats.cells import are_class_names
from onnx_model import cuda_graphs, reading
from onnx_model.devices import gpu_index, open_session

FORMAT = f"{common.NAME}-classifier"  # metadata_props["format"] of every exported model
FORMATS = (FORMAT, "mitosis-classifier")  # the second: models of versions before 1.0
# Patches per run on a GPU: of small models; of large ones, or if memory ends.
GPU_BATCHES = 256, 64
SMALL = 700e6  # bytes of a small model: 300 million parameters in float16
TRAILER = 32  # bytes at the end of a .data file: the id of its export, as in the metadata


class Classifier:
    """An exported model in an ONNX Runtime session, warmed up and ready.

    path        the .onnx file (with its .data file beside it, if it has one)
    device      "auto": the first GPU if it really works, else the CPU | "cuda", "cuda:1": this GPU
                or UserError | "tensorrt", "tensorrt:1": the same by TensorRT, whose engines are
                built at the first start, in minutes, and kept | "cpu"
    batch_size  most patches per run; None: on a GPU 256 of a small model, 64 of a large one; on the
                CPU 8 per thread, whose activations stay in its cache
    threads     of the CPU that a run may use; 0: all
    live        on a GPU: calls with 1 or 8 patches are replayed CUDA graphs, which saves the time
                of launching their kernels one by one (cuda_graphs.py). For programs that often
                score a few patches; to be made before other threads use the GPU. .note tells if it
                could not be had

    Attributes: .metadata (dict, as exported) .threshold .mpp (µm/px of the patches, None: unknown)
    .size (px of the input) .patch (px at .mpp that a patch covers; if it is not .size, `score`
    brings it to that) .labels (names of class 0 and 1) .device ("cpu", "cuda:0") .note (the device,
    and why this one). An encoder that was exported without a head has neither threshold nor labels.

    Threads may share one: no call changes its state."""

    def __init__(self, path, device="auto", batch_size=None, threads=0, warm_up=True, live=False):
        self.path = Path(path)
        self.session, self.device, self.note = open_session(self.path, device, threads, live)
        self.metadata = read_metadata(self.session, self.path)
        check_weights(self.path, self.metadata)
        self.labels, self.threshold = self.metadata["labels"], None
        if self.metadata["threshold"] is not None:
            self.threshold = self.metadata["threshold"]["value"]
        self.mpp = self.metadata["mpp"]
        self.patch, self.size = self.metadata["patch"], self.metadata["size"]
        self.input = self.metadata["input"]
        self.outputs = [output.name for output in self.session.get_outputs()]
        if self.input == "uint8":
            self.shape, self.dtype = (self.size, self.size, 3), np.uint8
        else:
            self.shape, self.dtype = (3, self.size, self.size), np.float32
        self.captured = None
        if live:
            self.capture(device, threads)
        self.batch_size = batch_size or self.default_batch(threads)
        if warm_up:
            self.warm_up(may_shrink=batch_size is None)

    def capture(self, device, threads):
        """Capture small batches; where that fails, the session is opened again without."""
        if self.device == "cpu":
            return
        if not cuda_graphs.enabled(self.session):
            reason = "not all of the model runs on CUDA"
            if device.startswith("tensorrt"):
                reason = "not with TensorRT"
            self.note += f"; no CUDA graphs: {reason}"
            return
        try:
            self.captured = cuda_graphs.CapturedRuns(
                self.session, gpu_index(self.device), self.shape, self.dtype, self.outputs[0]
            )
        except Exception as error:  # of onnxruntime and CUDA, which have no common class but this
            reason = common.first_line(error)
            self.session, self.device, self.note = open_session(self.path, device, threads)
            self.note += f"; no CUDA graphs: {reason}"

    def default_batch(self, threads):
        """Patches per run on this device."""
        if self.device == "cpu":
            return min(64, 8 * (threads or os.cpu_count() or 1))
        size = self.path.stat().st_size + self.metadata["data_bytes"]
        return GPU_BATCHES[size > SMALL]

    def warm_up(self, may_shrink=False):
        """The first run allocates memory, and on a GPU chooses its kernels for the shape.

        may_shrink  take a smaller batch if the GPU's memory does not do
        """
        self(np.zeros((1, *self.shape), self.dtype), self.outputs[0])
        if self.device == "cpu":
            return
        try:
            self(np.zeros((self.batch_size, *self.shape), self.dtype), self.outputs[0])
        except Exception:  # out of memory has no class of its own; any other is raised again below
            if not may_shrink or self.batch_size <= GPU_BATCHES[-1]:
                raise
            self.batch_size = GPU_BATCHES[-1]
            self.warm_up()

    def __call__(self, patches, output="probability"):
        """Probabilities float32 [N] of patches uint8 [N, size, size, 3], RGB, at .mpp µm/px (or of
        what else the model's input is).

        patches  a NumPy array, or any array with DLPack on the model's device (a torch, CuPy or
                 JAX tensor), which is read without a copy
        output   "probability" | "embedding" (float32 [N, D], if exported with --embedding)
        """
        if output not in self.outputs:
            advice = "for the embedding, export it with --embedding"
            if output == "probability":
                advice = "it was exported from an adapter without a head"
            raise UserError(
                f"{self.path}: has no output {output} (only {', '.join(self.outputs)}); {advice}"
            )
        if not isinstance(patches, np.ndarray) and not hasattr(patches, "__dlpack__"):
            patches = np.asarray(patches)
        kind = np.dtype(self.dtype).name
        # torch writes its types as "torch.uint8"
        if tuple(patches.shape[1:]) != self.shape or kind not in str(patches.dtype):
            raise ValueError(
                f"patches are {patches.dtype} {list(patches.shape)}; this model takes {kind} "
                f"[N, {', '.join(map(str, self.shape))}]"
            )
        if len(patches) == 0:
            shapes = {value.name: value.shape for value in self.session.get_outputs()}
            return np.zeros((0, *shapes[output][1:]), np.float32)
        run = self.run_bound
        if isinstance(patches, np.ndarray):
            run = self.run_numpy
        parts = [
            run(patches[i : i + self.batch_size], output)
            for i in range(0, len(patches), self.batch_size)
        ]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts)

    def run_numpy(self, patches, output):
        patches = np.ascontiguousarray(patches)
        if self.captured is not None:
            return self.captured(patches, output)
        return self.session.run([output], {"patches": patches})[0]

    def run_bound(self, patches, output):
        """The same for a tensor on the device; only the result, N numbers, is copied."""
        kind, index = patches.__dlpack_device__()
        place = {1: "cpu", 2: f"cuda:{index}", 3: "cpu"}.get(int(kind), f"device {int(kind)}")
        if place != self.device:
            raise ValueError(f"the patches are on {place}, the model on {self.device}")
        if hasattr(patches, "contiguous"):
            patches = patches.contiguous()
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(patches, torch.Tensor) and patches.is_cuda:
            # ONNX Runtime works on a stream of its own.
            torch.cuda.current_stream(patches.device).synchronize()
            if self.captured is not None:
                replayed = self.captured.from_torch(patches, output)
                if replayed is not None:
                    return replayed
        value = onnxruntime.OrtValue.from_dlpack(patches)
        binding = self.session.io_binding()
        binding.bind_ortvalue_input("patches", value)
        binding.bind_output(output, "cpu")
        run = self.session.run_with_iobinding
        if self.captured is not None:
            run = self.captured.run_plain
        run(binding)
        return binding.copy_outputs_to_cpu()[0]

    def score(self, slide, x, y, mpp=None, workers=4):
        """Probabilities float32 [N] of the cells at x, y on a slide, read as training read them.

        Threads read ahead of the model. Outside of the slide is white; a slide whose µm/px is more
        than 10% off the model's is resampled.

        slide    a path (of a DICOM slide: its folder) | openslide.OpenSlide | uint8 [H, W, 3], the
                 pixels of a whole image
        x, y     centres in level-0 px: numbers or arrays [N]
        mpp      µm/px of the slide; None: as its file says
        workers  threads that read

        UserError: the slide cannot be read, its µm/px is unknown, or a patch would lie outside it.
        """
        reader = reading.SlideReader(self.metadata, slide, mpp)
        if reader.mpp is None and self.mpp is not None:
            raise UserError(
                f"{reader.name}: its µm/px is unknown; give mpp= (the model was trained at "
                f"{self.mpp:g})"
            )
        x, y = np.atleast_1d(x).astype(np.float64), np.atleast_1d(y).astype(np.float64)
        if x.ndim != 1 or x.shape != y.shape or not (np.isfinite(x) & np.isfinite(y)).all():
            raise ValueError("x and y must be two equally long lists of finite numbers")
        outside = np.flatnonzero(reader.outside(x, y))
        if len(outside):
            i = outside[0]
            raise UserError(f"({x[i]:g}, {y[i]:g}) lies outside {reader.name} ({reader.extent})")
        return reading.score(self, [reader], np.zeros(len(x), int), x, y, workers)

    def describe(self):
        """What this model is, as text."""
        m = self.metadata
        rows = [
            ("model", f"{self.path} ({m['precision']}, opset {m['opset']})"),
            (
                "encoder",
                f"{m['encoder']}, embedding {m['pool']}; {m['method']} on "
                f"{m['dataset'] or 'unknown data'}",
            ),
            ("licence", f"{m['licence']}; redistribution: {m['redistribution']}"),
            ("input", self.describe_input()),
            ("outputs", ", ".join(self.outputs)),
            ("classes", "none: an encoder without a head"),
            ("made", f"commit {m['commit']}, weights {(m['weights_hash'] or '')[:16]}"),
            ("runs here", self.note),
        ]
        if self.labels:
            rule, temperature = m["threshold"]["rule"], m["temperature"]
            rows[5:6] = [
                ("classes", f"0 {self.labels[0]}, 1 {self.labels[1]}"),
                ("threshold", f"{self.threshold:.6g} ({rule}), temperature {temperature:.4g}"),
            ]
        for name, values in (m.get("metrics") or {}).items():
            if isinstance(values, dict):
                rows.append((f"on {name}", describe_numbers(values)))
        text = "\n".join(f"{name:14}{value}" for name, value in rows)
        return text + "\n\n" + describe_parity(m["parity"])

    def describe_input(self):
        colours, scale = "normalised RGB", "µm/px unknown"
        if self.input == "uint8":
            colours = "RGB"
        if self.mpp is not None:
            scale = f"{self.mpp:g} µm/px"
        elif self.metadata.get("mixed_mpp"):
            counts = self.metadata["mixed_mpp"].items()
            scale = "µm/px mixed (" + ", ".join(f"{mpp}: {n} images" for mpp, n in counts) + ")"
        return (
            f"patches {self.input} [N, {', '.join(map(str, self.shape))}] {colours}, {scale}; "
            f"trained on patches of {self.patch} px, fit {self.metadata['fit']}"
        )


def describe_numbers(values):
    """The numbers of a dict as one line: "auroc 0.9123, n 400"."""
    texts = []
    for name, value in values.items():
        if isinstance(value, float):
            texts.append(f"{name} {value:.4f}")
        elif isinstance(value, int):
            texts.append(f"{name} {value}")
    return ", ".join(texts)


def describe_parity(parity):
    """The parity report as a table."""
    difference = "|Δp|"
    if parity.get("output") == "embedding":
        difference = "|Δe| / |e|"
    header = (
        "provider",
        "batch",
        "patches",
        f"largest {difference}",
        f"mean {difference}",
        "share of limit",
        "changed decisions",
        "Δ AUROC",
    )
    rows = [parity_cells(row) for row in parity["measured"]]
    return (
        f"against torch fp32 on {parity['source']}; required: {parity['wanted']}\n"
        + common.table(rows, header, right=range(1, 8))
        + torch_loss(parity)
        + (f"\nnote: {parity['note']}" if parity.get("note") else "")
    )


def torch_loss(parity):
    """A line on what torch itself loses in float16 on the GPU; empty where that is not known."""
    for row in parity["measured"]:
        if row.get("torch") is not None:
            return f"\ntorch fp16 against torch fp32 on the GPU: largest {row['torch']:.2e}"
    return ""


def parity_cells(row):
    """A row of "measured" in the parity report as texts: provider, batch, patches, largest and mean
    difference, its share of the limit (not known of int8 and of earlier reports), changed
    decisions, change of AUROC.
    """
    change = used = "–"
    if row["auroc_change"] is not None:
        change = f"{row['auroc_change']:+.5f}"
    if row.get("used") is not None:
        used = f"{row['used']:.3f}"
    return [
        row["provider"].replace("ExecutionProvider", ""),
        str(row["batch"]),
        str(row["patches"]),
        f"{row['largest']:.2e}",
        f"{row['mean']:.2e}",
        used,
        str(row["changed"]),
        change,
    ]


# ---------------------------------------------------------------- metadata


def read_metadata(session, path):
    """metadata_props of an exported model as a dict, checked: what it says decides how slides are
    read and what is called a mitotic figure.
    """
    props = session.get_modelmeta().custom_metadata_map
    if props.get("format") not in FORMATS:
        raise UserError(
            f"{path}: not a model exported by export.py (its metadata is missing), so its classes, "
            "threshold and µm/px are unknown"
        )
    metadata = {}
    for key, value in props.items():
        if key == "format":
            continue
        try:
            metadata[key] = json.loads(value)
        except (ValueError, RecursionError):
            raise damaged(path, key) from None
    for key, right in CHECKS.items():
        if key not in metadata or not right(metadata[key]):
            raise damaged(path, key, metadata.get(key))
    size = metadata["size"]
    kind, shape = "tensor(float)", [3, size, size]
    if metadata["input"] == "uint8":
        kind, shape = "tensor(uint8)", [size, size, 3]
    if metadata.get("crop") not in (None, metadata["patch"]):
        raise damaged(path, "crop", metadata["crop"])
    if not are_scales(metadata.get("mixed_mpp")):
        raise damaged(path, "mixed_mpp", metadata["mixed_mpp"])
    has_head = "probability" in [output.name for output in session.get_outputs()]
    for key in ("labels", "threshold"):
        if (metadata[key] is not None) != has_head:
            raise damaged(path, key)
    given = session.get_inputs()[0]
    if (given.name, given.type, given.shape[1:]) != ("patches", kind, shape):
        raise damaged(path, "size or input")
    return metadata


def damaged(path, key, value=None):
    text = ""
    if value is not None:
        text = f" is {json.dumps(value)[:60]}"
    return UserError(f"{path}: its metadata is damaged ({key}{text}); export it again")


def is_number(value, low, high):
    return type(value) in (int, float) and low <= value <= high  # NaN is in no range


def is_text(value):
    return isinstance(value, str) and value.isprintable()


def are_labels(value):
    return value is None or are_class_names(value)


def are_scales(value):
    """None or {µm/px as text: number of images}."""
    if value is None:
        return True
    try:
        return bool(value) and all(
            is_number(float(scale), 0.01, 100) and type(count) is int
            for scale, count in value.items()
        )
    except (AttributeError, ValueError):
        return False


def is_threshold(value):
    return value is None or (
        isinstance(value, dict)
        and is_number(value.get("value"), 0, 1)
        and is_text(value.get("rule"))
    )


def are_colours(value):
    """Mean and standard deviation of red, green and blue."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(v, list) and len(v) == 3 for v in value)
        and all(is_number(v, 0, 1) for v in value[0])
        and all(is_number(v, 1e-3, 1) for v in value[1])
    )


def is_parity(value):
    return (
        isinstance(value, dict)
        and is_text(value.get("source"))
        and is_text(value.get("wanted"))
        and (value.get("note") is None or is_text(value["note"]))
        and isinstance(value.get("measured"), list)
        and all(isinstance(row, dict) and is_measured(row) for row in value["measured"])
    )


def is_measured(row):
    change = row.get("auroc_change", "missing")
    return (
        is_text(row.get("provider"))
        and all(is_number(row.get(key), 0, 1e9) for key in ("batch", "patches", "changed"))
        and all(is_number(row.get(key), 0, math.inf) for key in ("largest", "mean"))
        and all(
            row.get(key) is None or is_number(row[key], 0, math.inf) for key in ("used", "torch")
        )
        and (change is None or is_number(change, -1, 1))
    )


def are_metrics(value):
    """{set: {metric: …}}; of versions before 1.0 also without sets."""
    if not isinstance(value, dict):
        return False
    for name, numbers in value.items():
        if not is_text(name) or (isinstance(numbers, dict) and not all(map(is_text, numbers))):
            return False
    return True


CHECKS = {  # what metadata a model must have, and when it is right
    "encoder": is_text,
    "pool": is_text,
    "method": is_text,
    "dataset": lambda v: v is None or is_text(v),
    "licence": is_text,
    "redistribution": is_text,
    "commit": lambda v: v is None or is_text(v),
    "weights_hash": lambda v: v is None or is_text(v),
    "precision": is_text,
    "opset": lambda v: is_number(v, 1, 1000),
    "input": lambda v: v in ("uint8", "float"),
    "size": lambda v: type(v) is int and 1 <= v <= 4096,
    "patch": lambda v: type(v) is int and 1 <= v <= 65536,
    "fit": lambda v: v in ("resize", "pad"),
    "mpp": lambda v: v is None or is_number(v, 0.01, 100),
    "labels": are_labels,
    "threshold": is_threshold,
    "temperature": lambda v: is_number(v, 1e-6, 1e6),
    "normalisation": are_colours,
    "metrics": are_metrics,
    "parity": is_parity,
    "data_bytes": lambda v: type(v) is int and v >= 0,
}


def check_weights(path, metadata):
    """The .data file must be the one that this .onnx was exported with: whole, and of the same
    export.
    """
    if not metadata["data_bytes"]:
        return
    name, identity = metadata.get("data_name", f"{Path(path).name}.data"), metadata.get("export_id")
    if not is_text(name) or not re.fullmatch(r"[^/\\:]+", name) or name in (".", ".."):
        raise damaged(path, "data_name", name)
    if not is_text(identity) or not re.fullmatch(f"[0-9a-f]{{{2 * TRAILER}}}", identity):
        raise damaged(path, "export_id", identity)
    weights = Path(path).with_name(name)
    size = 0
    if weights.is_file():
        size = weights.stat().st_size
    if size != metadata["data_bytes"] or size < TRAILER:
        raise UserError(
            f"{weights}: has {size:,} bytes, {metadata['data_bytes']:,} belong to "
            f"{Path(path).name}; copy both files again"
        )
    with open(weights, "rb") as file:
        file.seek(-TRAILER, os.SEEK_END)
        if file.read().hex() != identity:
            raise UserError(
                f"{weights}: belongs to another export than {Path(path).name}; copy both files "
                "again"
            )
