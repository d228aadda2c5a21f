"""An exported model in ONNX Runtime: opened on the device asked for, checked, and run on patches
and slides. No torch.
"""

import json
import os
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

import common
from common import UserError
from dataset import slides

FORMAT = f"{common.NAME}-classifier"  # metadata_props["format"] of every exported model
FORMATS = (FORMAT, "mitosis-classifier")  # the second: models of versions before 1.0
TRAILER = 32  # bytes at the end of a .data file: the id of its export, as in the metadata
TOLERANCE = 0.1  # µm/px may be off by this share before a slide is resampled


class Classifier:
    """An exported model in an ONNX Runtime session, warmed up and ready.

    path    the .onnx file (with its .data file beside it, if it has one)
    device  "auto": the first GPU if it really works, else the CPU | "cuda", "cuda:1": this or
            UserError | "cpu"
    batch_size  most patches per run; None: 64 on a GPU, on the CPU 8 per thread, whose activations
                stay in its cache
    threads of the CPU that a run may use; 0: all

    Attributes: .metadata (dict, as exported) .threshold .mpp (µm/px of the patches, None: unknown)
    .size (px of the input) .patch (px to read at .mpp around a candidate; where it is not .size, a
    model trained on 128 px, say, the patch is brought to .size as `read_patch` does) .labels (names
    of class 0 and 1) .device ("cpu", "cuda:0") .note (which device was taken, and why). Threads may
    share one: it has no state that a call changes."""

    def __init__(self, path, device="auto", batch_size=None, threads=0, warm_up=True):
        self.path = Path(path)
        self.session, self.device, self.note = open_session(self.path, device, threads)
        self.batch_size = batch_size or (
            min(64, 8 * (threads or os.cpu_count() or 1)) if self.device == "cpu" else 64
        )
        self.metadata = read_metadata(self.session, self.path)
        check_weights(self.path, self.metadata)
        self.threshold = self.metadata["threshold"]["value"]
        self.mpp, self.patch, self.size, self.labels = (
            self.metadata[k] for k in ("mpp", "patch", "size", "labels")
        )
        self.input, self.outputs = (
            self.metadata["input"],
            [output.name for output in self.session.get_outputs()],
        )
        shape = (self.size, self.size, 3) if self.input == "uint8" else (3, self.size, self.size)
        self.shape, self.dtype = shape, np.uint8 if self.input == "uint8" else np.float32
        if warm_up:  # the first run allocates, and on a GPU chooses its kernels for the shape
            for n in (1,) if self.device == "cpu" else (1, self.batch_size):
                self(np.zeros((n, *shape), self.dtype))

    def __call__(self, patches, output="probability"):
        """Probabilities float32 [N] of patches [N, size, size, 3] uint8 (or what the model's input
        is).

        patches  a NumPy array, or any array with DLPack on the model's device (a torch, CuPy or JAX
        tensor): that
                 is read where it lies, without a copy
        output   "probability" | "embedding" (float32 [N, D], of a model exported with --embedding)
        """
        if output not in self.outputs:
            raise UserError(
                f"{self.path}: has no output {output} (only {', '.join(self.outputs)}); for the "
                "embedding "
                "export it with --embedding"
            )
        if not isinstance(patches, np.ndarray) and not hasattr(patches, "__dlpack__"):
            patches = np.asarray(patches)
        if tuple(patches.shape[1:]) != self.shape or np.dtype(self.dtype).name not in str(
            patches.dtype
        ):
            raise ValueError(
                f"patches are {patches.dtype} {list(patches.shape)}; this model takes "
                f"{np.dtype(self.dtype).name} [N, {', '.join(map(str, self.shape))}]"
            )
        if len(patches) == 0:
            width = [o.shape[1:] for o in self.session.get_outputs() if o.name == output][0]
            return np.zeros((0, *width), np.float32)
        run = self.run_numpy if isinstance(patches, np.ndarray) else self.run_bound
        parts = [
            run(patches[i : i + self.batch_size], output)
            for i in range(0, len(patches), self.batch_size)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def run_numpy(self, patches, output):
        return self.session.run([output], {"patches": np.ascontiguousarray(patches)})[0]

    def run_bound(self, patches, output):
        """The same for a tensor on the device; only the result, N numbers, is copied."""
        kind, index = patches.__dlpack_device__()
        place = {1: "cpu", 2: f"cuda:{index}", 3: "cpu"}.get(int(kind), f"device {int(kind)}")
        if place != self.device:
            raise ValueError(f"the patches are on {place}, the model on {self.device}")
        patches = patches.contiguous() if hasattr(patches, "contiguous") else patches
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(patches, torch.Tensor) and patches.is_cuda:
            torch.cuda.current_stream(
                patches.device
            ).synchronize()  # ONNX Runtime works on a stream of its own
        value = onnxruntime.OrtValue.from_dlpack(patches)
        binding = self.session.io_binding()
        binding.bind_ortvalue_input("patches", value)
        binding.bind_output(output, "cpu")
        self.session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()[0]

    def describe(self):
        """What this model is, as text."""
        m = self.metadata
        rows = [
            ("model", f"{self.path} ({m['precision']}, opset {m['opset']})"),
            ("encoder", f"{m['encoder']}, embedding {m['pool']}; {m['method']} on {m['dataset']}"),
            ("licence", f"{m['licence']}; redistribution: {m['redistribution']}"),
            (
                "input",
                f"patches {self.input} [N, {', '.join(map(str, self.shape))}]"
                + (" RGB" if self.input == "uint8" else " normalised RGB")
                + (", µm/px unknown" if self.mpp is None else f", {self.mpp:g} µm/px")
                + f"; trained on patches of {m['patch']} px, fit {m['fit']}",
            ),
            ("outputs", ", ".join(self.outputs)),
            ("classes", f"0 {self.labels[0]}, 1 {self.labels[1]}"),
            (
                "threshold",
                f"{self.threshold:.6g} ({m['threshold']['rule']}), temperature "
                f"{m['temperature']:.4g}",
            ),
            ("made", f"commit {m['commit']}, weights {m['weights_hash'][:16]}"),
            ("runs here", self.note),
        ]
        for name, values in (m.get("metrics") or {}).items():
            if isinstance(values, dict):
                rows.append(
                    (
                        f"on {name}",
                        ", ".join(
                            f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}"
                            for k, v in values.items()
                            if isinstance(v, (int, float))
                        ),
                    )
                )
        text = "\n".join(f"{name:14}{value}" for name, value in rows)
        return text + "\n\n" + describe_parity(m["parity"])


def describe_parity(parity):
    """The parity report as a table."""
    header = (
        "provider",
        "batch",
        "patches",
        "largest |Δp|",
        "mean |Δp|",
        "changed decisions",
        "Δ AUROC",
    )
    rows = [
        (
            r["provider"].replace("ExecutionProvider", ""),
            r["batch"],
            r["patches"],
            f"{r['largest']:.2e}",
            f"{r['mean']:.2e}",
            r["changed"],
            "–" if r["auroc_change"] is None else f"{r['auroc_change']:+.5f}",
        )
        for r in parity["measured"]
    ]
    return f"against torch fp32 on {parity['source']}; wanted: {parity['wanted']}\n" + common.table(
        rows, header, right=range(1, 7)
    )


def open_session(path, device="auto", threads=0):
    """InferenceSession of a file → (session, "cpu" | "cuda:i", note). UserError where the device is
    not obtained.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    kind, _, index = str(device).partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise UserError(f"--device {device}: there are auto, cpu, cuda and cuda:1")
    index = int(index or 0)
    reason = ""
    if kind != "cpu":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            reason = "this onnxruntime has no CUDA (pip install onnxruntime-gpu[cuda,cudnn])"
        elif kind == "cuda" or nvidia_device() or os.name == "nt":
            # Loaded by path out of the nvidia packages: the provider's own search finds them only
            # by luck.
            with muted():
                if hasattr(onnxruntime, "preload_dlls"):
                    onnxruntime.preload_dlls()
            # TF32 would cost float32 models their digits; the default search of algorithms runs for
            # every batch size
            options = {
                "device_id": str(index),
                "use_tf32": "0",
                "cudnn_conv_algo_search": "HEURISTIC",
            }
            try:
                session = start(
                    path, [("CUDAExecutionProvider", options), "CPUExecutionProvider"], threads
                )
            except UserError as error:
                session, reason = None, str(error)
            # Asked for is not obtained: a session without its libraries silently falls back to the
            # CPU.
            if session is not None and session.get_providers()[0] == "CUDAExecutionProvider":
                return (
                    session,
                    f"cuda:{index}",
                    f"CUDA, device {index} (onnxruntime {onnxruntime.__version__})",
                )
            reason = reason or (
                "the CUDA provider did not load: a library is missing, or there is no GPU or "
                "driver "
                "(python export.py --doctor says which)"
            )
        else:
            reason = "no NVIDIA device"
    if kind == "cuda":
        raise UserError(f"--device {device}: {reason}")
    session = start(path, ["CPUExecutionProvider"], threads)
    return (
        session,
        "cpu",
        f"CPU (onnxruntime {onnxruntime.__version__})"
        + (f"; not CUDA: {reason}" if reason else ""),
    )


def nvidia_device(folder=Path("/dev")):
    """Whether the system shows an NVIDIA GPU; in a container the first may be nvidia3, in WSL all
    are behind dxg.
    """
    return (folder / "dxg").exists() or any(folder.glob("nvidia[0-9]*"))


def start(path, providers, threads):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what matters is raised here as an error of one line
    if threads != 1:
        # threads that spin while they wait for work take the processor from the threads that read
        # slides
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        with muted():
            return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions have no common class but this one
        text = str(error).strip().split("\n")[0]
        weights = Path(f"{path}.data")
        if (
            "external" in text.lower()
            or "out of bounds" in text
            or (weights.exists() and weights.name in text)
        ):
            raise UserError(
                f"{path}: its weights in {weights.name} are missing or cut off; copy both files "
                "again, or "
                "export again"
            ) from None
        raise UserError(
            f"{path}: onnxruntime {onnxruntime.__version__} cannot load it ({text[:200]})"
        ) from None


class muted:
    """Stderr of C++ libraries sent away: a provider that does not load writes pages there."""

    def __enter__(self):
        sys.stderr.flush()
        self.kept = os.dup(2)
        empty = os.open(os.devnull, os.O_WRONLY)
        os.dup2(empty, 2)
        os.close(empty)

    def __exit__(self, *exception):
        os.dup2(self.kept, 2)
        os.close(self.kept)


def read_metadata(session, path):
    """metadata_props of an exported model as a dict: every value is JSON."""
    props = session.get_modelmeta().custom_metadata_map
    if props.get("format") not in FORMATS:
        raise UserError(
            f"{path}: not a model exported by export.py (its metadata is missing), so its classes, "
            "threshold and µm/px are unknown"
        )
    try:
        return {key: json.loads(value) for key, value in props.items() if key != "format"}
    except ValueError:
        raise UserError(f"{path}: its metadata is damaged; export it again") from None


def check_weights(path, metadata):
    """The .data file must be the one that this .onnx was exported with: whole, and of the same
    export.
    """
    if not metadata.get("data_bytes"):
        return
    weights = (
        Path(f"{path}.data")
        if not metadata.get("data_name")
        else Path(path).with_name(metadata["data_name"])
    )
    found = weights.stat().st_size if weights.exists() else 0
    if found != metadata["data_bytes"]:
        raise UserError(
            f"{weights}: has {found:,} bytes, {metadata['data_bytes']:,} belong to "
            f"{Path(path).name}; "
            "copy both files again"
        )
    with open(weights, "rb") as file:
        file.seek(-TRAILER, os.SEEK_END)
        if file.read() != bytes.fromhex(metadata["export_id"]):
            raise UserError(
                f"{weights}: belongs to another export than {Path(path).name}; copy both files "
                "again"
            )


def resolution(metadata, found, name, given=None):
    """(mpp, source_mpp) to read a slide with, both None: as it is; and a line that says what was
    done.

    metadata  of the model; found: µm/px of the slide's file or None; given: --mpp, which wins
    """
    source, wanted = given or found, metadata["mpp"]
    if wanted is None:
        return None, None, f"{name}: the model does not know its µm/px; the slide is read as it is"
    if source is None:
        return (
            None,
            None,
            f"{name}: µm/px unknown; taken as the model's {wanted:g} (--mpp says otherwise)",
        )
    if abs(source / wanted - 1) <= TOLERANCE:
        return None, None, f"{name}: {source:.4g} µm/px, read as it is (model: {wanted:g})"
    return wanted, source, f"{name}: {source:.4g} µm/px, resampled to the model's {wanted:g}"


def read_patch(image, x, y, metadata, mpp=None, source_mpp=None):
    """The patch around (x, y), level 0, as the model wants it: uint8 [size, size, 3].

    metadata  of the model: "patch" px are read and brought to "size" px as "fit" says
    """
    patch, size = metadata["patch"], metadata["size"]
    pixels = slides.read(image, x, y, patch, mpp=mpp, source_mpp=source_mpp)
    if patch == size:
        return pixels
    if (
        metadata["fit"] == "pad" and patch > size
    ):  # padded patches keep their scale, so larger ones are cut
        start = (patch - size) // 2
        return pixels[start : start + size, start : start + size]
    if metadata["fit"] == "pad":
        border = (size - patch) // 2
        return np.pad(
            pixels, ((border, size - patch - border),) * 2 + ((0, 0),), constant_values=slides.WHITE
        )
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))


def score(classifier, jobs, workers=4, batch_size=64, progress=None, failed=None):
    """Probabilities of jobs (image, x, y, mpp, source_mpp) → float32 [n]; NaN where `failed`
    allowed it.

    Threads read ahead of the model. Jobs next to each other in a slide are read one after the
    other, so that a tile
    is decoded once; the result is in the order of `jobs`.
    failed    called with (image, x, y, error) where a patch cannot be read; None: UserError
    """
    m = classifier.metadata
    order = sorted(
        range(len(jobs)), key=lambda i: (str(jobs[i][0]), int(jobs[i][2] // 512), jobs[i][1])
    )
    result = np.full(len(jobs), np.nan, np.float32)

    def read(indices):
        batch, good = np.empty((len(indices), m["size"], m["size"], 3), np.uint8), []
        for i in indices:
            image, x, y, mpp, source_mpp = jobs[i]
            try:
                batch[len(good)] = read_patch(image, x, y, m, mpp, source_mpp)
            except (UserError, OSError, ValueError) as error:
                if failed is None:
                    raise UserError(
                        f"{image}: cannot be read at ({x:g}, {y:g}): {error}; --skip leaves out "
                        "what "
                        "cannot be scored"
                    ) from None
                failed(image, x, y, error)
                continue
            good.append(i)
        return batch[: len(good)], good

    # Pieces smaller than a batch, so that several threads work on one; enough of them ahead to ride
    # over slow tiles.
    piece = max(1, min(16, batch_size))
    pieces = deque(order[i : i + piece] for i in range(0, len(order), piece))
    with ThreadPoolExecutor(workers, thread_name_prefix="read") as pool:
        running = deque()
        try:
            while pieces or running:
                while pieces and len(running) < workers + 2 * -(-batch_size // piece):
                    running.append(pool.submit(read, pieces.popleft()))
                taken = [
                    running.popleft().result()
                    for _ in range(min(len(running), -(-batch_size // piece)))
                ]
                indices = [i for _, good in taken for i in good]
                if indices:
                    batch = (
                        taken[0][0] if len(taken) == 1 else np.concatenate([b for b, _ in taken])
                    )
                    result[indices] = classifier(batch)
                if progress is not None:
                    progress.update(sum(len(b) for b, _ in taken))
        finally:
            for future in running:
                future.cancel()
    return result
