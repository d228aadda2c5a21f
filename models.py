"""The encoders with their weights, the classifier around an encoder, and the inference loop.

    python models.py                        every encoder: family, size, cost, licence, and whether
                                            its weights can be had here
    python models.py NAME --weights PATH    check a file: strict load, hash, fingerprint of an
                                            embedding, speed

An encoder maps normalised images float [B, 3, size, size] to embeddings [B, D]. The table of
encoders and their networks are in encoders/, published files in weights.py. `PatchClassifier` owns
the normalisation and the head; `predict` is the loop that validation, test, embeddings and the
check of exports share.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

import common
import weights as published
from common import UserError, first_line, note
from encoders.layers import Block
from encoders.swin import Swin
from encoders.table import ENCODERS, POOLS, find_encoder, flops
from encoders.vit import ViT


def build(spec, pool=None, layer=None, size=None):
    """The network of a row, without weights: make it under `torch.device("meta")`."""
    if spec.stages:
        return Swin(spec, size)
    if spec.depth:
        return ViT(spec, size, pool, layer)
    from encoders.resnet import ResNet  # imports torchvision, which only this row needs

    return ResNet(spec, size)


def load_encoder(
    name: str,
    weights: str | os.PathLike | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    pool: str | None = None,
    layer: int | None = None,
    revision: str | None = None,
    size: int | None = None,
) -> nn.Module:
    """The encoder `name` with its published weights, in evaluation mode.

    weights   None: from the Hub (or its cache) | a file or folder as published | "random": seeded
              noise, for tests and dry runs
    dtype     of the parameters (torch.dtype or "fp32" …); None: float32
    pool, layer: see ViT; None: the published embedding of the last block
    size      px of the images; None: the row's. The position embedding is resampled.

    The module maps normalised images float [B, 3, size, size] to [B, D] and has .spec .size
    .embed_dim .blocks .pool .layer .licence .weights_hash. UserError for everything that can be
    wrong with the weights.
    """
    spec = find_encoder(name)
    dtype = torch.float32 if dtype is None else DTYPES.get(dtype, dtype)
    check_choices(spec, pool, layer, size)
    with torch.device("meta"):
        encoder = build(spec, pool, layer, size)
    if weights == "random":
        randomise(encoder, device, dtype)
        encoder.weights_hash = "random"
    else:
        files = published.find_files(spec, weights, revision)
        encoder.weights_hash = published.load(encoder, files, device, dtype)
    encoder.licence = spec.licence
    return encoder.eval()


def unusual_size(encoder):
    """What a run's settings say of --size: None for the size of the encoder's row."""
    return encoder.size if encoder.size != encoder.spec.size else None


def check_choices(spec, pool, layer, size):
    """UserError if --pool, --layer or --size does not fit this encoder."""
    if size not in (None, spec.size):
        if spec.family not in ("ViT", "DINOv3") or spec.field:
            raise UserError(f"--size {size}: {spec.name} reads patches of {spec.size} px only")
        if size < spec.patch or size % spec.patch:
            raise UserError(
                f"--size {size}: {spec.name} reads multiples of its patches of {spec.patch} px, "
                f"such as {spec.patch * round(size / spec.patch) or spec.patch}"
            )
    if spec.family in ("ResNet", "Swin"):
        if pool not in (None, spec.pool) or layer:
            raise UserError(
                f"--pool and --layer choose among the tokens and blocks of a ViT; {spec.name} is a "
                f"{spec.family} and has one embedding ({spec.pool})"
            )
        return
    if pool not in (None, spec.pool, *POOLS):
        raise UserError(f"--pool {pool}: choose among {', '.join(POOLS)}")
    if layer is not None and not 1 <= layer <= spec.depth:
        raise UserError(f"--layer {layer}: {spec.name} has the layers 1 to {spec.depth}")


def randomise(encoder, device, dtype, seed=0):
    """Fill a meta module with seeded noise that lets the image through to the embedding (LayerScale
    1, not 1e-5).
    """
    encoder.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, tensor in encoder.state_dict().items():
            if tensor.dim() > 1:
                tensor.normal_(0, 0.02, generator=generator)
            elif name.endswith(("weight", "gamma", "running_var")):
                tensor.fill_(1)
            else:
                tensor.zero_()
    encoder.to(dtype)


# ---------------------------------------------------------------- device and precision

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


def resolve_device(name="auto"):
    """ "auto" | "cuda[:i]" | "mps" | "cpu" → torch.device; UserError if it does not work."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise NotImplementedError("it holds no numbers")
        torch.zeros(1, device=device)  # the only reliable sign that it works
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"--device {name}: not usable here ({first_line(error)}); use --device cpu or auto"
        ) from None
    return device


def resolve_dtype(name, device, spec=None):
    """ "auto" | "fp32" | "bf16" | "fp16" → torch.dtype.

    auto: bf16 on GPUs that compute in it (compute capability 8.0 and later), else fp32. Publishers
    that advise half precision (rows with `fp16`) mean fp16 autocast; bf16 is the safer equal. Users
    of other encoders saw NaN in fp16 (UNI), so asking for it there prints a note.
    """
    device = torch.device(device)
    if name in (None, "auto"):
        if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16
        return torch.float32
    if name not in DTYPES:
        raise UserError(f"--dtype {name}: choose among auto, {', '.join(DTYPES)}")
    if name == "fp16" and spec is not None and not spec.fp16:
        note(
            f"note: the publisher of {spec.name} does not advise fp16; bf16 and fp32 are the safe "
            "choices"
        )
    return DTYPES[name]


def add_arguments(parser):
    """The flags that every command with an encoder shares."""
    group = parser.add_argument_group("encoder")
    group.add_argument(
        "--model",
        default="demo",
        metavar="NAME",
        help="which encoder; `python models.py` lists them (default: demo)",
    )
    group.add_argument(
        "--weights",
        metavar="PATH",
        help="file or folder of its published weights, or the word `random` (default: the Hub)",
    )
    group.add_argument(
        "--revision",
        metavar="R",
        help="commit or branch on the Hub (default: the pinned one, else main)",
    )
    group.add_argument(
        "--pool", choices=POOLS, help="which tokens make the embedding (default: as published)"
    )
    group.add_argument(
        "--size",
        type=int,
        metavar="PX",
        help="side of the patches that the encoder reads, a multiple of its patch size; the "
        "position embedding is resampled (default: as published, 224 for most)",
    )
    group.add_argument(
        "--layer",
        type=int,
        metavar="N",
        help="read the embedding after block N (default: the last)",
    )
    group.add_argument(
        "--dtype",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="precision of the encoder; auto: bf16 on GPUs that have it, else fp32 (default: auto)",
    )
    group.add_argument(
        "--device",
        default="auto",
        metavar="D",
        help="auto, cuda, cuda:1, mps or cpu (default: auto)",
    )


def add_compile_argument(group):
    """--compile, for the commands that put many patches through an encoder."""
    group.add_argument(
        "--compile",
        nargs="?",
        const="on",
        choices=("auto", "on", "off"),
        default="auto",
        help="auto, on or off: compile the transformer blocks, which takes up to a "
        f"minute the first time; auto: on CUDA GPUs, from {COMPILE_FROM:,} patches on (default: "
        "auto)",
    )


# ---------------------------------------------------------------- compiled blocks

# Patches through the encoder that earn the compilation. On 16 cores it took 25 s; on an H200 it
# saves 0.2 ms per patch of h-optimus-0 in inference, 0.6 ms or more in training.
COMPILE_FROM = 64_000
# The user's choice, if any: torch sets the variable itself once it is used.
COMPILER_CACHE = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
# Ways to call a block that are compiled: with and without gradients, adapters, `first`, per shape.
FORMS = 64


def check_compile(choice, spec):
    """UserError if --compile asks for what this encoder does not have."""
    if choice == "on" and not spec.depth:
        raise UserError(f"--compile works on transformer blocks, {spec.name} has none")


def should_compile(choice, device, patches, spec):
    """Whether to compile an encoder's blocks. choice: of --compile; patches: that go through it."""
    if choice == "auto":
        return bool(spec.depth) and device.type == "cuda" and patches >= COMPILE_FROM
    return choice == "on"


def compile_blocks(encoder, quiet=False):
    """Run the encoder's blocks through torch.compile from now on, in place; each is compiled when
    it is first called in a new way.

    One compilation serves all blocks that are called alike. `predict` gives such an encoder batches
    of one size only.
    """
    for block in encoder.blocks:
        block.forward = functools.partial(block_compiler(quiet), block)
    encoder.compiled = True


@functools.cache
def block_compiler(quiet=False):
    """Block.forward(block, …) through torch.compile, the same function for all blocks.

    Where the compiler fails, that call and all later ones run as they are written, after one note.
    """
    from torch._dynamo import config, exc  # seconds to import
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    config.recompile_limit = max(config.recompile_limit, FORMS)
    # A failure in the backward pass would come too late to run the block in another way.
    functorch.force_non_lazy_backward_lowering = True
    if torch.are_deterministic_algorithms_enabled():
        inductor.deterministic = True  # no kernels chosen by the time they take
    folder = compiler_cache()
    say = (lambda text: None) if quiet else note
    if config.disable:
        say("TORCH_COMPILE_DISABLE is set: going on with blocks that are not compiled")
        return Block.forward
    try:
        # fullgraph: what cannot be compiled is an error here, not silently slower.
        compiled = torch.compile(Block.forward, dynamic=False, fullgraph=True)
    except RuntimeError as error:  # not for this version of Python
        say(failure(error))
        return Block.forward
    state = "new"

    def run(block, *args, **kwargs):
        nonlocal state
        if state == "failed":
            return Block.forward(block, *args, **kwargs)
        if state == "new":
            state = "used"
            say(f"compiling the network's blocks (once; kept in {folder})")
        try:
            return compiled(block, *args, **kwargs)
        except (exc.TorchDynamoException, exc.FailOnRecompileLimitHit) as error:
            cause = getattr(error, "inner_exception", error)
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            state = "failed"
            say(failure(cause))
        return Block.forward(block, *args, **kwargs)

    return run


def failure(error):
    return (
        f"the compiler fails here ({first_line(error)}): going on with blocks that are "
        "not compiled, as by --compile off"
    )


def compiler_cache():
    """The folder that keeps compiled code: $TORCHINDUCTOR_CACHE_DIR, else beside torch's downloads,
    else (not writable) torch's own choice, a temporary one.
    """
    if COMPILER_CACHE:
        return COMPILER_CACHE
    folder = Path(torch.hub.get_dir()).parent / "inductor"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
            return str(folder)
    return "a temporary folder"


# ---------------------------------------------------------------- the classifier


class PatchClassifier(nn.Module):
    """Normalisation, encoder, head: images → logits.

    forward: uint8 [B, size, size, 3] or float [B, 3, size, size] in [0, 1] → logits [B] (positive:
             mitotic figure); size: the encoder's, 224 px for most
    embed:   the same images → embeddings [B, D]
    Both return float32 (float64 for a float64 encoder): normalisation and head stay in it whatever
    the encoder's precision. `tta`: in evaluation mode the embedding is the mean over the eight
    flips and quarter turns; the head is linear, so this is the mean of their logits too.
    """

    def __init__(self, encoder: nn.Module, tta: bool = False):
        super().__init__()
        self.encoder, self.tta = encoder, tta
        self.at_once = math.inf  # patches that fit into memory, as far as `predict` has seen
        parameter = next(encoder.parameters())
        device = parameter.device
        self.precision = torch.float32
        if parameter.dtype == torch.float64:
            self.precision = torch.float64
        self.head = nn.Linear(encoder.embed_dim, 1, device=device, dtype=self.precision)
        # Not in the state dict: they belong to the row, not to a run.
        for name, values in zip(("mean", "std"), encoder.spec.norm):
            values = torch.tensor(values, dtype=self.precision, device=device).view(1, 3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def embed(self, images):
        if images.dtype == torch.uint8:  # [B, S, S, 3]
            images = images.permute(0, 3, 1, 2).to(self.precision) / 255
        x = (images.to(self.precision) - self.mean) / self.std  # [B, 3, S, S]
        x = x.to(next(self.encoder.parameters()).dtype)
        if self.tta and not self.training:
            embeddings = []
            for flip in (x, x.flip(3)):
                for turns in range(4):
                    view = torch.rot90(flip, turns, (2, 3))
                    embeddings.append(self.encoder(view).to(self.precision))
            return torch.stack(embeddings).mean(dim=0)
        return self.encoder(x).to(self.precision)

    def classify(self, embedding):  # [B, D] → logits [B]
        device = embedding.device.type
        if torch.is_autocast_enabled(device):  # the head is not worth the loss of digits
            with torch.autocast(device, enabled=False):
                return self.head(embedding).squeeze(-1)
        return self.head(embedding).squeeze(-1)

    def forward(self, images):
        return self.classify(self.embed(images))


def predict(
    model: PatchClassifier,
    patches,
    rows: np.ndarray | None = None,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    output: str = "logits",
    progress: str | None = "patches",
    keep: Callable | None = None,
) -> np.ndarray | None:
    """Run a PatchClassifier over `patches` → float32 [n] ("logits") or [n, D] ("embedding"), in the
    order of `rows`.

    patches   anything with .read(rows) → uint8 [n, size, size, 3] (dataset.patches.Patches), or
              such an array
    rows      row numbers; None: all
    batch_size  None: 128 on CUDA GPUs, else 64
    device    the model is moved there first; None: it stays where it is
    dtype     bf16 or fp16 with float32 parameters: autocast; else the precision of the parameters
    progress  text before the progress bar; None: no bar
    keep      called with (row numbers, values) of every batch; then nothing is collected, and None
              returned

    A thread reads the next batches while the model works. With compiled blocks, and in passes of
    several batches on CUDA, the last batch is filled up: one shape. A batch that does not fit into
    memory is computed in parts. UserError if an output is not finite.
    """
    assert output in ("logits", "embedding"), output
    if isinstance(patches, np.ndarray):
        patches = ArrayPatches(patches)
    rows = np.arange(len(patches)) if rows is None else np.asarray(rows)
    if device is not None:
        model.to(device)
    device = next(model.encoder.parameters()).device
    batch_size = batch_size or default_batch(device)
    precision, autocast = inference_precision(model, dtype)
    compiled = getattr(model.encoder, "compiled", False)
    one_shape = compiled or (device.type == "cuda" and len(rows) > batch_size)
    result = None
    if keep is None:
        shape = (len(rows), model.encoder.embed_dim) if output == "embedding" else (len(rows),)
        result = np.empty(shape, np.float32)
    bar = contextlib.nullcontext()
    if progress:
        bar = common.progress(total=len(rows), desc=progress, unit="patches")

    def collect(start, values):
        values = values.float().cpu().numpy()
        batch_rows = rows[start : start + len(values)]
        check_finite(values, batch_rows, precision)
        if keep is None:
            result[start : start + len(values)] = values
        else:
            keep(batch_rows, values)
        if progress:
            bar.update(len(values))

    starts = range(0, len(rows), batch_size)
    training = model.training
    model.eval()
    try:
        with (
            # inference_mode does not go with compiled code.
            torch.no_grad() if compiled else torch.inference_mode(),
            bar,
            reading(patches, rows, starts, batch_size, device) as batches,
        ):
            # A batch's result is fetched after the next one is queued: fetching waits for the GPU.
            waiting = None
            for start, images in batches:
                count = len(images)
                images = images.to(device, non_blocking=device.type == "cuda")
                if one_shape and count < batch_size:
                    filling = images[-1:].expand(batch_size - count, -1, -1, -1)
                    images = torch.cat([images, filling])
                with torch.autocast(device.type, precision, enabled=autocast):
                    values = output_of(model, images, output)
                if waiting:
                    collect(*waiting)
                waiting = start, values[:count]
            if waiting:
                collect(*waiting)
    finally:
        model.train(training)
    return result


def output_of(model, images, output):
    """Logits [B] or embeddings [B, D] of a batch, in as few parts as fit into memory."""
    function = model.embed if output == "embedding" else model
    while True:
        size = min(len(images), model.at_once)
        try:
            return torch.cat([function(part) for part in images.split(size)])
        except torch.OutOfMemoryError:
            if size == 1:
                raise UserError(
                    f"out of memory on {images.device} with a single patch; use --dtype bf16"
                ) from None
        model.at_once = (size + 1) // 2
        note(f"{size} patches do not fit into memory: from now on {model.at_once} at once")
        torch.cuda.empty_cache()


def default_batch(device):
    """Patches per forward pass: enough to keep a GPU busy."""
    return 128 if device.type == "cuda" else 64


def inference_precision(model, dtype):
    """(torch.dtype to compute in, whether by autocast) for `predict`."""
    stored = next(model.encoder.parameters()).dtype
    precision = DTYPES.get(dtype, dtype) or stored
    autocast = stored == torch.float32 and precision in (torch.bfloat16, torch.float16)
    if precision != stored and not autocast:
        raise ValueError(
            f"a model in {stored} cannot run in {precision}: load it in that precision"
        )
    return precision, autocast


def check_finite(values, rows, precision):
    finite = np.isfinite(values.reshape(len(values), -1)).all(axis=1)
    if not finite.all():
        raise UserError(
            f"the model's output is not a finite number (first at patch {rows[~finite][0]}) in "
            f"{name_of(precision)}; use --dtype bf16 or fp32, and check the weights with "
            "python models.py NAME"
        )


class ArrayPatches:
    """An array that reads like dataset.patches.Patches."""

    def __init__(self, array):
        self.array = array

    def __len__(self):
        return len(self.array)

    def read(self, rows):
        return self.array[rows]


@contextlib.contextmanager
def reading(patches, rows, starts, batch_size, device, ahead=3):
    """Iterator over (start, uint8 tensor [n, S, S, 3]), read by a thread up to `ahead` batches
    early.
    """
    batches, stop = queue.Queue(ahead), threading.Event()

    def put(item):
        # A loop, so that the thread ends even if nobody takes from the queue any more.
        while not stop.is_set():
            try:
                return batches.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work():
        try:
            for start in starts:
                if stop.is_set():
                    return
                images = torch.from_numpy(
                    np.ascontiguousarray(patches.read(rows[start : start + batch_size]))
                )
                put((start, images.pin_memory() if device.type == "cuda" else images))
            put(None)
        except BaseException as error:  # belongs to whoever waits for the batch
            put(error)

    def iterate():
        while (item := batches.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    thread = threading.Thread(target=work, name="patches", daemon=True)
    thread.start()
    try:
        yield iterate()
    finally:
        stop.set()
        thread.join()


def name_of(dtype):
    return next(name for name, value in DTYPES.items() if value == dtype)


# ---------------------------------------------------------------- the command


def table():
    rows = []
    for spec in ENCODERS.values():
        row = {
            "name": spec.name,
            "family": spec.family,
            "dim": spec.embed_dim,
            "layers": spec.depth or "–",
            "patch": spec.patch or "–",
            "px": spec.size,
            "M params": f"{spec.params / 1e6:,.1f}",
            "GFLOP": f"{flops(spec) / 1e9:,.1f}",
            "licence": spec.licence,
            "gated": "yes" if spec.gated else "no",
            "weights here": published.availability(spec),
        }
        rows.append(row)
    lines = [tuple(row.values()) for row in rows]
    return common.table(lines, tuple(row), right=(2, 3, 4, 5, 6, 7))


def fixed_image(size):
    """A synthetic image float32 [1, 3, size, size] in [0, 1], the same everywhere: no library's
    random numbers.
    """
    y, x = np.mgrid[0:size, 0:size] / size
    channels = []
    for c in range(3):
        channels.append(0.5 + 0.25 * np.sin(7 * x + 3 * c) + 0.25 * np.cos(11 * y * (1 + x) + c))
    return torch.from_numpy(np.stack(channels)[None].astype(np.float32))


@torch.inference_mode()
def seconds_per_image(model, image, batch_size=8):
    batch = image.expand(batch_size, -1, -1, -1)
    for count in (2, 8):  # warm up, then time
        start = time.perf_counter()
        for _ in range(count):
            last = model.embed(batch)
        last.sum().item()  # waits for the device
    return (time.perf_counter() - start) / count / batch_size


def verify(args):
    """Load an encoder strictly and print what identifies its weights: hash and an embedding."""
    device = resolve_device(args.device)
    spec = find_encoder(args.name)
    dtype = resolve_dtype(args.dtype, device, spec)
    start = time.perf_counter()
    encoder = load_encoder(
        args.name, args.weights, device, dtype, args.pool, args.layer, args.revision, args.size
    )
    seconds = time.perf_counter() - start
    model = PatchClassifier(encoder).eval()
    image = fixed_image(encoder.size).to(device)
    with torch.inference_mode():
        embedding = model.embed(image)[0].cpu().double()
    if not embedding.isfinite().all():
        raise UserError(
            f"{spec.name}: the embedding of the test image is not finite in {name_of(dtype)}"
        )
    milliseconds = 1000 * seconds_per_image(model, image)
    parameters = sum(p.numel() for p in encoder.parameters())
    first = " ".join(f"{value:.5f}" for value in embedding[:4])
    source = spec.repo or "in this project"
    for label, value in (
        ("encoder", f"{spec.name} ({source}), licence {spec.licence}"),
        ("loaded", f"strictly, {parameters:,} parameters in {name_of(dtype)}, {seconds:.1f} s"),
        ("hash", f"{encoder.weights_hash} (of the tensors: the same in every file format)"),
        (
            "embedding",
            f"{encoder.pool}, {encoder.embed_dim} numbers, norm {embedding.norm():.5f}, first four "
            f"{first}",
        ),
        ("speed", f"{milliseconds:.2f} ms per image ({device.type}, batch 8)"),
    ):
        print(f"{label:10}{value}")


def main():
    parser = argparse.ArgumentParser(
        description="The table of encoders; with a NAME, a check of its weights."
    )
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="load this encoder strictly and report on it"
    )
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    add_arguments(parser)
    args = parser.parse_args()
    if args.name:
        verify(args)
    elif args.json:
        rows = {}
        for name, spec in ENCODERS.items():
            rows[name] = {**vars(spec), "embed_dim": spec.embed_dim}
        print(json.dumps(rows, indent=1))
    else:
        print(table())
        print(
            "\ndim: of the embedding. px: of the patches that the network reads. GFLOP: for one "
            "patch (an addition counts, too).\n"
            "Position embeddings stored at 518 px (DINOv2, kaiko-l14) are resampled as in timm: "
            "bicubic, antialias, float32.\n"
            "Every encoder can be loaded without the Hub: --weights PATH (file or folder)."
        )


if __name__ == "__main__":
    common.command(main)
