"""Second stage of a detector: an exported model, a slide and candidates in, the candidates with scores out.

    python classify.py MODEL.onnx --slide S --candidates C --out O      score candidates
    python classify.py MODEL.onnx                                       what the model is

In a program of one's own:

    from classify import Classifier
    classifier = Classifier("model.onnx", device="auto")
    probability = classifier(patches)                 # uint8 [N, 224, 224, 3], RGB, at classifier.mpp µm/px
    mitotic = probability >= classifier.threshold

A model whose classifier.patch is not 224 was trained on patches of that many px: read those (read_patch does it all).

Needs numpy, onnxruntime, openslide and Pillow (requirements-classify.txt); no torch.
"""

import argparse
import json
import os
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageFont

import candidates as formats
import cli
import runs
import slides
from cli import UserError

FORMAT = "mitosis-classifier"   # metadata_props["format"] of every exported model
TRAILER = 32                    # bytes at the end of a .data file: the id of its export, as in the metadata
TOLERANCE = 0.1                 # µm/px may be off by this share before a slide is resampled


# ---------------------------------------------------------------- the model

class Classifier:
    """An exported model in an ONNX Runtime session, warmed up and ready.

    path    the .onnx file (with its .data file beside it, if it has one)
    device  "auto": the first GPU if it really works, else the CPU | "cuda", "cuda:1": this or UserError | "cpu"
    batch_size  most patches per run; None: 64 on a GPU, on the CPU 8 per thread, whose activations stay in its cache
    threads of the CPU that a run may use; 0: all

    Attributes: .metadata (dict, as exported) .threshold .mpp (µm/px of the patches, None: unknown) .size (px of the
    input) .patch (px to read at .mpp around a candidate; where it is not .size, a model trained on 128 px, say, the
    patch is brought to .size as `read_patch` does) .labels (names of class 0 and 1) .device ("cpu", "cuda:0") .note
    (which device was taken, and why).
    Threads may share one: it has no state that a call changes.
    """

    def __init__(self, path, device="auto", batch_size=None, threads=0, warm_up=True):
        self.path = Path(path)
        self.session, self.device, self.note = open_session(self.path, device, threads)
        self.batch_size = batch_size or (min(64, 8 * (threads or os.cpu_count() or 1)) if self.device == "cpu" else 64)
        self.metadata = read_metadata(self.session, self.path)
        check_weights(self.path, self.metadata)
        self.threshold = self.metadata["threshold"]["value"]
        self.mpp, self.patch, self.size, self.labels = (self.metadata[k] for k in ("mpp", "patch", "size", "labels"))
        self.input, self.outputs = self.metadata["input"], [output.name for output in self.session.get_outputs()]
        shape = (self.size, self.size, 3) if self.input == "uint8" else (3, self.size, self.size)
        self.shape, self.dtype = shape, np.uint8 if self.input == "uint8" else np.float32
        if warm_up:  # the first run allocates, and on a GPU chooses its kernels for the shape
            for n in (1,) if self.device == "cpu" else (1, self.batch_size):
                self(np.zeros((n, *shape), self.dtype))

    def __call__(self, patches, output="probability"):
        """Probabilities float32 [N] of patches [N, size, size, 3] uint8 (or what the model's input is).

        patches  a NumPy array, or any array with DLPack on the model's device (a torch, CuPy or JAX tensor): that
                 is read where it lies, without a copy
        output   "probability" | "embedding" (float32 [N, D], of a model exported with --embedding)
        """
        if output not in self.outputs:
            raise UserError(f"{self.path}: has no output {output} (only {', '.join(self.outputs)}); for the embedding "
                            "export it with --embedding")
        if not isinstance(patches, np.ndarray) and not hasattr(patches, "__dlpack__"):
            patches = np.asarray(patches)
        if tuple(patches.shape[1:]) != self.shape or np.dtype(self.dtype).name not in str(patches.dtype):
            raise ValueError(f"patches are {patches.dtype} {list(patches.shape)}; this model takes "
                             f"{np.dtype(self.dtype).name} [N, {', '.join(map(str, self.shape))}]")
        if len(patches) == 0:
            width = [o.shape[1:] for o in self.session.get_outputs() if o.name == output][0]
            return np.zeros((0, *width), np.float32)
        run = self.run_numpy if isinstance(patches, np.ndarray) else self.run_bound
        parts = [run(patches[i:i + self.batch_size], output) for i in range(0, len(patches), self.batch_size)]
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
            torch.cuda.current_stream(patches.device).synchronize()  # ONNX Runtime works on a stream of its own
        value = onnxruntime.OrtValue.from_dlpack(patches)
        binding = self.session.io_binding()
        binding.bind_ortvalue_input("patches", value)
        binding.bind_output(output, "cpu")
        self.session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()[0]

    def describe(self):
        """What this model is, as text."""
        m = self.metadata
        rows = [("model", f"{self.path} ({m['precision']}, opset {m['opset']})"),
                ("encoder", f"{m['encoder']}, embedding {m['pool']}; {m['method']} on {m['dataset']}"),
                ("licence", f"{m['licence']}; redistribution: {m['redistribution']}"),
                ("input", f"patches {self.input} [N, {', '.join(map(str, self.shape))}]"
                          + (" RGB" if self.input == "uint8" else " normalised RGB")
                          + (", µm/px unknown" if self.mpp is None else f", {self.mpp:g} µm/px")
                          + f"; trained on patches of {m['patch']} px, fit {m['fit']}"),
                ("outputs", ", ".join(self.outputs)),
                ("classes", f"0 {self.labels[0]}, 1 {self.labels[1]}"),
                ("threshold", f"{self.threshold:.6g} ({m['threshold']['rule']}), temperature {m['temperature']:.4g}"),
                ("made", f"commit {m['commit']}, weights {m['weights_hash'][:16]}"),
                ("runs here", self.note)]
        for name, values in (m.get("metrics") or {}).items():
            if isinstance(values, dict):
                rows.append((f"on {name}", ", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}"
                                                     for k, v in values.items() if isinstance(v, (int, float)))))
        text = "\n".join(f"{name:14}{value}" for name, value in rows)
        return text + "\n\n" + describe_parity(m["parity"])


def describe_parity(parity):
    """The parity report as a table."""
    header = ("provider", "batch", "patches", "largest |Δp|", "mean |Δp|", "changed decisions", "Δ AUROC")
    rows = [(r["provider"].replace("ExecutionProvider", ""), r["batch"], r["patches"], f"{r['largest']:.2e}",
             f"{r['mean']:.2e}", r["changed"], "–" if r["auroc_change"] is None else f"{r['auroc_change']:+.5f}")
            for r in parity["measured"]]
    return (f"against torch fp32 on {parity['source']}; wanted: {parity['wanted']}\n"
            + cli.table(rows, header, right=range(1, 7)))


def open_session(path, device="auto", threads=0):
    """InferenceSession of a file → (session, "cpu" | "cuda:i", note). UserError where the device is not obtained."""
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
            # Loaded by path out of the nvidia packages: the provider's own search finds them only by luck.
            with muted():
                if hasattr(onnxruntime, "preload_dlls"):
                    onnxruntime.preload_dlls()
            # TF32 would cost float32 models their digits; the default search of algorithms runs for every batch size
            options = {"device_id": str(index), "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
            try:
                session = start(path, [("CUDAExecutionProvider", options), "CPUExecutionProvider"], threads)
            except UserError as error:
                session, reason = None, str(error)
            # Asked for is not obtained: a session without its libraries silently falls back to the CPU.
            if session is not None and session.get_providers()[0] == "CUDAExecutionProvider":
                return session, f"cuda:{index}", f"CUDA, device {index} (onnxruntime {onnxruntime.__version__})"
            reason = reason or ("the CUDA provider did not load: a library is missing, or there is no GPU or driver "
                                "(python export.py --doctor says which)")
        else:
            reason = "no NVIDIA device"
    if kind == "cuda":
        raise UserError(f"--device {device}: {reason}")
    session = start(path, ["CPUExecutionProvider"], threads)
    return session, "cpu", f"CPU (onnxruntime {onnxruntime.__version__})" + (f"; not CUDA: {reason}" if reason else "")


def nvidia_device(folder=Path("/dev")):
    """Whether the system shows an NVIDIA GPU; in a container the first may be nvidia3, in WSL all are behind dxg."""
    return (folder / "dxg").exists() or any(folder.glob("nvidia[0-9]*"))


def start(path, providers, threads):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what matters is raised here as an error of one line
    if threads != 1:
        # threads that spin while they wait for work take the processor from the threads that read slides
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        with muted():
            return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions have no common class but this one
        text = str(error).strip().split("\n")[0]
        weights = Path(f"{path}.data")
        if "external" in text.lower() or "out of bounds" in text or (weights.exists() and weights.name in text):
            raise UserError(f"{path}: its weights in {weights.name} are missing or cut off; copy both files again, or "
                            "export again") from None
        raise UserError(f"{path}: onnxruntime {onnxruntime.__version__} cannot load it ({text[:200]})") from None


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
    if props.get("format") != FORMAT:
        raise UserError(f"{path}: not a model exported by export.py (its metadata is missing), so its classes, "
                        "threshold and µm/px are unknown")
    try:
        return {key: json.loads(value) for key, value in props.items() if key != "format"}
    except ValueError:
        raise UserError(f"{path}: its metadata is damaged; export it again") from None


def check_weights(path, metadata):
    """The .data file must be the one that this .onnx was exported with: whole, and of the same export."""
    if not metadata.get("data_bytes"):
        return
    weights = Path(f"{path}.data") if not metadata.get("data_name") else Path(path).with_name(metadata["data_name"])
    found = weights.stat().st_size if weights.exists() else 0
    if found != metadata["data_bytes"]:
        raise UserError(f"{weights}: has {found:,} bytes, {metadata['data_bytes']:,} belong to {Path(path).name}; "
                        "copy both files again")
    with open(weights, "rb") as file:
        file.seek(-TRAILER, os.SEEK_END)
        if file.read() != bytes.fromhex(metadata["export_id"]):
            raise UserError(f"{weights}: belongs to another export than {Path(path).name}; copy both files again")


# ---------------------------------------------------------------- pixels

def resolution(metadata, found, name, given=None):
    """(mpp, source_mpp) to read a slide with, both None: as it is; and a line that says what was done.

    metadata  of the model; found: µm/px of the slide's file or None; given: --mpp, which wins
    """
    source, wanted = given or found, metadata["mpp"]
    if wanted is None:
        return None, None, f"{name}: the model does not know its µm/px; the slide is read as it is"
    if source is None:
        return None, None, f"{name}: µm/px unknown; taken as the model's {wanted:g} (--mpp says otherwise)"
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
    if metadata["fit"] == "pad" and patch > size:  # padded patches keep their scale, so larger ones are cut
        start = (patch - size) // 2
        return pixels[start:start + size, start:start + size]
    if metadata["fit"] == "pad":
        border = (size - patch) // 2
        return np.pad(pixels, ((border, size - patch - border),) * 2 + ((0, 0),), constant_values=slides.WHITE)
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))


def score(classifier, jobs, workers=4, batch_size=64, progress=None, failed=None):
    """Probabilities of jobs (image, x, y, mpp, source_mpp) → float32 [n]; NaN where `failed` allowed it.

    Threads read ahead of the model. Jobs next to each other in a slide are read one after the other, so that a tile
    is decoded once; the result is in the order of `jobs`.
    failed    called with (image, x, y, error) where a patch cannot be read; None: UserError
    """
    m = classifier.metadata
    order = sorted(range(len(jobs)), key=lambda i: (str(jobs[i][0]), int(jobs[i][2] // 512), jobs[i][1]))
    result = np.full(len(jobs), np.nan, np.float32)

    def read(indices):
        batch, good = np.empty((len(indices), m["size"], m["size"], 3), np.uint8), []
        for i in indices:
            image, x, y, mpp, source_mpp = jobs[i]
            try:
                batch[len(good)] = read_patch(image, x, y, m, mpp, source_mpp)
            except (UserError, OSError, ValueError) as error:
                if failed is None:
                    raise UserError(f"{image}: cannot be read at ({x:g}, {y:g}): {error}; --skip leaves out what "
                                    "cannot be scored") from None
                failed(image, x, y, error)
                continue
            good.append(i)
        return batch[:len(good)], good

    # Pieces smaller than a batch, so that several threads work on one; enough of them ahead to ride over slow tiles.
    piece = max(1, min(16, batch_size))
    pieces = deque(order[i:i + piece] for i in range(0, len(order), piece))
    with ThreadPoolExecutor(workers, thread_name_prefix="read") as pool:
        running = deque()
        try:
            while pieces or running:
                while pieces and len(running) < workers + 2 * -(-batch_size // piece):
                    running.append(pool.submit(read, pieces.popleft()))
                taken = [running.popleft().result() for _ in range(min(len(running), -(-batch_size // piece)))]
                indices = [i for _, good in taken for i in good]
                if indices:
                    batch = taken[0][0] if len(taken) == 1 else np.concatenate([b for b, _ in taken])
                    result[indices] = classifier(batch)
                if progress is not None:
                    progress.update(sum(len(b) for b, _ in taken))
        finally:
            for future in running:
                future.cancel()
    return result


# ---------------------------------------------------------------- the command

def find_images(found, slide):
    """Which file each candidate lies on → (list of paths or None, files of the wanted images that do not exist)."""
    slide = Path(slide)
    if not slide.exists():
        raise UserError(f"--slide {slide}: no such file or folder")
    names = sorted({name for name in found.images if name})
    if slide.is_file():
        if not names:
            return [slide] * len(found), []
        # Formats know a slide by its name; of conversions (.svs → .tiff) only the stem is the same.
        same = [n for n in names if Path(n).name == slide.name] or [n for n in names if Path(n).stem == slide.stem]
        if not same and len(names) == 1:
            print(f"note: the candidates are said to lie on {names[0]}; taken for {slide.name}", file=sys.stderr)
            same = names
        if not same:
            raise UserError(f"--slide {slide}: {found.path.name} has no candidates on it, only on {names[0]} and "
                            f"{len(names) - 1} others" if names else "")
        return [slide if name in same else None for name in found.images], []
    if not names:
        raise UserError(f"--slide {slide}: {found.path.name} does not say on which image its candidates lie; give the "
                        "slide's file")
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
    """Jobs for `score` → (jobs, their rows); what cannot be scored is an error, or with `skip` named and left out."""
    problems = [f"{path}: no such file" for path in missing]
    sizes, scales = {}, {}
    for path in dict.fromkeys(path for path in images if path is not None and path not in missing):
        try:
            sizes[path] = slides.dimensions(path)
            found_mpp = slides.microns_per_pixel(path)
        except (UserError, OSError, ValueError) as error:
            problems.append(str(error) if str(path) in str(error) else f"{path}: cannot be read ({error})")
            sizes.pop(path, None)
            continue
        mpp, source, text = resolution(metadata, found_mpp, path.name, given)
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
                raise UserError(f"{path}: its µm/px is unknown and the candidates are in millimetres; give --mpp")
            x, y = x * 1000 / known, y * 1000 / known
        width, height = sizes[path]
        half = metadata["patch"] / 2 * (mpp / source if mpp else 1)
        if not (-half < x < width + half and -half < y < height + half):
            problems.append(f"candidate {found.ids[i]} at ({x:g}, {y:g}) lies outside {path.name} "
                            f"({width} × {height} px)")
            continue
        jobs.append((path, float(x), float(y), mpp, source))
        rows.append(i)
    if problems and not skip:
        more = f" (and {len(problems) - 1} more like this)" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more}; right slide, level-0 coordinates? --skip leaves out what "
                        "cannot be scored")
    for text in problems[:5]:
        say(f"left out: {text}")
    if len(problems) > 5:
        say(f"left out: {len(problems) - 5} more")
    return jobs, rows


def overlay(path, jobs, probability, threshold, labels, longest=2000):
    """Draw the scored candidates of the first slide that has any on a view of it that holds them all."""
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
            draw.text((cx + radius + 3, cy), f"{p:.2f}", fill=colour, font=font, anchor="lm", **halo)
    legend = f"red: {labels[1]} (p from {threshold:.3g} on), blue: {labels[0]}"
    box = draw.textbbox((8, 6), legend, font=font)
    draw.rectangle((0, 0, box[2] + 8, box[3] + 6), fill="white")
    draw.text((8, 6), legend, fill="black", font=font)
    with runs.atomic(path) as temporary:
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
        view = Image.fromarray(slide.pixels()[top:top + height, left:left + width])
    return view.resize((max(1, round(width * scale)), max(1, round(height * scale)))), scale


def check_output(flag, path):
    """UserError for a file that could not be written: found before the scoring, not after."""
    if path.is_dir():
        raise UserError(f"{flag} {path}: is a folder; name a file in it")
    if not path.resolve().parent.is_dir():
        raise UserError(f"{flag} {path}: its folder does not exist")


def main():
    parser = argparse.ArgumentParser(description="Score a detector's candidates with an exported model; with the "
                                                 "model alone: say what it is.")
    parser.add_argument("model", metavar="MODEL.onnx", help="made by export.py")
    parser.add_argument("--slide", metavar="S", help="the slide or image; a folder where candidates name their images")
    parser.add_argument("--candidates", metavar="C",
                        help="MIDOG JSON, MIDOG challenge JSON, CSV (x, y, filename), SlideRunner SQLite, QuPath "
                             "GeoJSON")
    parser.add_argument("--out", metavar="O", help="the same format, with probability and class added")
    parser.add_argument("--relabel", action="store_true",
                        help="also replace the class that the format keeps itself: category_id, agreedClass, label "
                             "(default: no; GeoJSON always has the new one)")
    parser.add_argument("--threshold", type=float, metavar="P",
                        help="from which probability on it is a mitotic figure (default: the model's)")
    parser.add_argument("--mpp", type=float, metavar="M", help="µm/px of the slide (default: what its file says)")
    parser.add_argument("--device", default="auto", metavar="D",
                        help="auto, cuda, cuda:1 or cpu; cuda that is not obtained is an error (default: auto)")
    parser.add_argument("--batch-size", type=int, metavar="N",
                        help="patches per run (default: 64 on a GPU, on the CPU 8 per thread, up to 64)")
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="threads that read (default: 4)")
    parser.add_argument("--threads", type=int, default=0, metavar="N",
                        help="threads of the CPU that the model may use (default: all)")
    parser.add_argument("--skip", action="store_true",
                        help="leave out what cannot be scored (unreadable slides, candidates outside) and name it; the "
                             "exit status is 1 then (default: an error before anything is written)")
    parser.add_argument("--overlay", metavar="PNG", help="draw the scored candidates of the (first) slide")
    args = parser.parse_args()
    given = [args.slide, args.candidates, args.out]
    if any(given) and not all(given):
        raise UserError("--slide, --candidates and --out belong together; without them the model is described")
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
        raise UserError(f"--out {out}: is the file of the candidates itself; it is never written to, choose another")
    check_output("--out", out)
    if args.overlay:
        check_output("--overlay", Path(args.overlay))
    images, missing = find_images(found, args.slide)
    elsewhere = sum(path is None for path in images)
    classifier = Classifier(args.model, args.device, args.batch_size, args.threads)
    if classifier.input != "uint8":
        raise UserError(f"{args.model}: was exported with --input float, for hosts that normalise; this command needs "
                        "one with --input uint8")
    if args.relabel and found.kind == "sqlite":
        formats.class_numbers(found, classifier.labels, relabel=True)  # its error must not come after the scoring
    say(f"{args.model}: {classifier.note}")
    threshold = classifier.threshold if args.threshold is None else args.threshold
    jobs, rows = plan(found, images, missing, classifier.metadata, args.mpp, args.skip, say)

    failures = []

    def failed(image, x, y, error):
        failures.append(f"{image}: cannot be read at ({x:g}, {y:g}): {error}")

    probability = np.full(len(found), np.nan, np.float32)
    start_time = time.perf_counter()
    with cli.progress(total=len(jobs), desc="candidates", unit="candidates") as bar:
        probability[rows] = score(classifier, jobs, args.workers, args.batch_size or 64, bar,
                                  failed if args.skip else None)
    seconds = time.perf_counter() - start_time
    for text in failures[:5]:
        say(f"left out: {text}")
    formats.write(found, out, probability, threshold, classifier.labels, args.relabel)
    if args.overlay and len(jobs):
        overlay(args.overlay, jobs, probability[rows], threshold, classifier.labels)
    scored = int((~np.isnan(probability)).sum())
    positive = int((probability >= threshold).sum())
    print(f"{out}: {scored} candidates scored, {positive} {classifier.labels[1]}, {scored - positive} "
          f"{classifier.labels[0]} (threshold {threshold:.4g}); {scored / max(seconds, 1e-9):.1f} candidates/s")
    if elsewhere:
        print(f"{elsewhere} candidates lie on other images and are left as they were")
    left = len(found) - elsewhere - scored
    if left:
        print(f"{left} candidates could not be scored and have no probability")
    return 1 if left else 0


if __name__ == "__main__":
    cli.command(main)
