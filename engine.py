"""The training step: settings, processes, model, optimiser, and the pseudo-epochs of one run."""

import contextlib
import copy
import dataclasses
import functools
import math
import os
import re

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import augment
import lora
import models
import runs
from common import UserError, first_line
from dataset.patches import margin

EAGER_STEPS = 3  # before a step is captured: they compile, and show whether the batch fits
WATCH = 16  # steps between looks at the loss: each look waits for the device
CROPS_IN_MEMORY = 4 << 30  # bytes of validation patches that are kept decoded


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings(runs.Settings):
    """The flags that change the result of training end to end."""

    epochs: int
    epoch_size: int
    batch_size: int
    lr: float
    balance: str
    random_share: float
    jitter: float
    stain_jitter: float
    tissue: bool
    loss: str = "bce"  # or "focal"
    focal_gamma: float | None = None
    class_weight: str | None = None  # or "balanced"
    weight_decay: float = 0.0
    patience: int | None = None  # pseudo-epochs
    augment: str = "paper"  # or "heavy"
    soft_labels: bool = False
    val_patches: int | None = None  # annotations validated after each pseudo-epoch; None: all


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRASettings(TrainingSettings):
    """The flags that change the result of LoRA."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple
    dora: bool
    rslora: bool
    adapter: str | None = None  # folder of the adapter to start from


def learning_rate(step, total, peak):
    """One-cycle: peak / 25 up to peak in 30% of the steps, down to peak / 250,000, by cosines
    (torch's OneCycleLR).
    """
    first, top, last = peak / 25, 0.3 * total - 1, total - 1
    if step <= top:
        low, high, share = first, peak, step / top
    else:
        low, high, share = first / 1e4, peak, (last - step) / max(last - top, 1e-9)
    return low + (high - low) * (1 - math.cos(math.pi * share)) / 2


# ---------------------------------------------------------------- processes


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def total_over_processes(values):
    """Sum of a float64 array over all processes."""
    if world() == 1:
        return values
    device = {"nccl": "cuda", "gloo": "cpu"}[dist.get_backend()]
    tensor = torch.from_numpy(np.ascontiguousarray(values, np.float64)).to(device)
    dist.all_reduce(tensor)
    return tensor.cpu().numpy()


def launched():
    """(rank of this process, number of processes) as torchrun started them; (0, 1) without it.

    UserError if RANK or WORLD_SIZE is set, but not by torchrun: the job would wait for processes
    that do not exist.
    """
    numbers = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    if os.environ.get("TORCHELASTIC_RUN_ID") and all(text.isdecimal() for text in numbers):
        return int(numbers[0]), int(numbers[1])
    for name, alone in (("RANK", "0"), ("WORLD_SIZE", "1")):
        value = os.environ.get(name)
        if value is not None and value.strip() != alone:
            raise UserError(
                f"{name}={value} is set in the environment, but torchrun did not start this "
                "process: unset RANK WORLD_SIZE, or start several processes with torchrun "
                "--nproc-per-node N"
            )
    return 0, 1


def process_device(name):
    """The device of --device; under torchrun the GPU of this process, unless one is named."""
    device = models.resolve_device(name)
    if launched()[1] > 1 and device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def join_processes(name, device, batch_size, epoch_size):
    """Join the other processes of torchrun, if there are any.

    name, device: of --device, see process_device. A GPU that is named is all processes', and NCCL
    serves one process on each.
    """
    _, count = launched()
    if count == 1:
        return
    own_gpu = device.type == "cuda" and ":" not in name
    dist.init_process_group("nccl" if own_gpu else "gloo")
    if batch_size % count or epoch_size % batch_size:
        raise UserError(
            f"--batch-size {batch_size} --epoch-size {epoch_size}: with {count} processes their "
            "number must divide the batch, and the batch the epoch"
        )


def leave_processes():
    """Wait for the first process, which still writes when the others are done, and leave."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def from_first(value):
    """The first process's `value`, in every process."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@contextlib.contextmanager
def others_may_fail():
    """When one process dies, the next exchange fails in all others: report that in one line."""
    try:
        yield
    except RuntimeError as error:
        if world() == 1 or not re.search("gloo|nccl|connection|peer", str(error), re.IGNORECASE):
            raise
        raise UserError(
            "another process of this job has ended; the same command with --resume continues "
            "after the last finished pseudo-epoch"
        ) from error


# ---------------------------------------------------------------- the model


def adapt(base, rank, alpha, dropout, targets, dora, rslora, adapter=None):
    """A copy of the encoder with adapters, fresh or started from `adapter`.

    It shares the weights of `base`, which LoRA leaves as they are: one copy of them serves every
    run.
    """
    encoder = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    if adapter:
        lora.load_peft(encoder, adapter, dropout)
    else:
        lora.add_lora(encoder, rank, alpha, dropout, tuple(targets), dora, rslora)
    return encoder


def make_model(settings, base, device, checkpointing=False, compiled=False):
    """PatchClassifier ready for training, and what is trained of it: {name: parameter}.

    checkpointing: compute activations again in the backward pass; compiled: see
    models.compile_blocks.
    """
    spec = models.find_encoder(settings.model)
    torch.manual_seed(settings.run_seed)
    if settings.method == "lora":
        names = ("rank", "alpha", "dropout", "targets", "dora", "rslora", "adapter")
        encoder = adapt(base, **{name: getattr(settings, name) for name in names})
    else:
        encoder = copy.deepcopy(base).to(device)
    if compiled:
        models.compile_blocks(encoder, quiet=rank() > 0)
    if checkpointing:
        for block in encoder.blocks:
            # LoRA's masks are hashed, so that no random state has to be kept.
            block.forward = functools.partial(
                torch.utils.checkpoint.checkpoint,
                block.forward,
                use_reentrant=False,
                preserve_rng_state=False,
            )
    model = models.PatchClassifier(encoder).to(device)
    if settings.method == "lora" and settings.adapter:
        _start_head(model.head, settings.adapter)
    if world() > 1 and not spec.depth:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model, {name: p for name, p in model.named_parameters() if p.requires_grad}


def _start_head(head, adapter):
    """Start the head from the adapter's, if its folder brings one."""
    start = lora.load_head(adapter)
    if start is None:
        return
    weight, bias = start
    if weight.shape != head.weight.shape:
        raise UserError(
            f"--adapter {adapter}: its head takes {weight.shape[1]} numbers, the embedding has "
            f"{head.weight.shape[1]}"
        )
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)


# ---------------------------------------------------------------- the loss


def training_loss(logits, targets, gamma=None, weights=None):
    """Sum of the losses of a batch: cross-entropy or, with `gamma`, focal loss.

    logits, targets, weights (of each loss; None: 1): float [B], targets in [0, 1]. The focal loss
    (Lin et al. 2017) multiplies the cross-entropy of each class by (1 - p)^gamma, p the probability
    given to this class: gamma 0 is the cross-entropy.
    """
    if gamma is None:
        return F.binary_cross_entropy_with_logits(logits, targets, weights, reduction="sum")
    losses = 0
    for target, sign in ((targets, 1), (1 - targets, -1)):
        z = sign * logits
        losses = losses + target * torch.exp(-gamma * F.softplus(z)) * F.softplus(-z)
    if weights is not None:
        losses = losses * weights
    return losses.sum()


# ---------------------------------------------------------------- the pseudo-epochs


def record(work, stream, pool=None):
    """Capture the kernels that work() launches → (function that runs them again, their memory).

    Other threads go on, such as the one that reads patches and pins their memory.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
        work()
    return graph.replay, graph.pool()


class SampleReader:
    """The patches of a pseudo-epoch, by place in it, for models.reading."""

    def __init__(self, patches, sample, size):
        self.patches, self.sample, self.size = patches, sample, size

    def read(self, places):
        return self.patches.read_sample(self.sample[places], self.size)


class Engine:
    """The steps of one run: model, optimiser and what they need.

    A step works on static buffers: augmented images, labels, weights, the keys of the dropout
    masks, and the learning rate. So a GPU captures it, after a few eager ones, as CUDA graphs that
    each later step of a whole batch replays: without them it would wait for thousands of launches.
    Parts of a batch, a smaller last batch, fp16 with its scaler and CPUs run the same code eagerly.

    parts: compute each batch in so many.
    """

    def __init__(self, settings, model, parameters, sampler, patches, device, dtype, parts=1):
        self.settings, self.model, self.parameters = settings, model, parameters
        self.sampler, self.patches = sampler, patches
        self.device, self.dtype = device, dtype
        self.parts = parts
        on_gpu = device.type == "cuda"
        # The fused Adam of GPUs reads float32 there; float64 keeps every digit elsewhere.
        place = {"device": device} if on_gpu else {"dtype": torch.float64}
        self.rate = torch.zeros((), **place)
        choices = {"lr": self.rate, "fused": device.type in ("cpu", "cuda"), "capturable": on_gpu}
        if settings.weight_decay:
            self.optimizer = torch.optim.AdamW(
                parameters.values(), weight_decay=settings.weight_decay, **choices
            )
        else:
            self.optimizer = torch.optim.Adam(parameters.values(), **choices)
        self.class_weights = None
        if settings.class_weight:
            self.class_weights = sampler.class_weights().astype(np.float32)  # [2]
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.steps_per_epoch = math.ceil(settings.epoch_size / settings.batch_size)
        self.steps = settings.epochs * self.steps_per_epoch
        self.make_buffers()
        # A captured step cannot hold the exchange within ResNet50's SyncBatchNorm.
        alone = world() == 1 or bool(model.encoder.blocks)
        self.may_capture = on_gpu and alone and not self.scaler.is_enabled()
        self.eager_steps = 0  # of whole batches
        self.replays = None  # of the captured gradients and update
        self.stream = torch.cuda.Stream(device) if on_gpu else None

    def make_buffers(self):
        """What a step reads and, with several processes, the gradients in one piece."""
        share, size = self.settings.batch_size // world(), self.patches.size
        self.images = torch.zeros(share, 3, size, size, device=self.device)
        self.labels = torch.zeros(share, device=self.device)
        self.weights = torch.ones(share, device=self.device)
        self.adapters = [layer for _, layer in lora.adapted(self.model.encoder)]
        self.keys = torch.zeros(len(self.adapters), share, dtype=torch.int64, device=self.device)
        self.gradients = None
        if world() == 1:
            return
        for parameter in self.parameters.values():
            dist.broadcast(parameter.data, src=0)
        sizes = [parameter.numel() for parameter in self.parameters.values()]
        kind = next(iter(self.parameters.values()))
        self.gradients = torch.zeros(sum(sizes), dtype=kind.dtype, device=self.device)
        for parameter, piece in zip(self.parameters.values(), self.gradients.split(sizes)):
            parameter.grad = piece.view_as(parameter)

    def epoch(self, number, bar, validated=""):
        """Train one pseudo-epoch → its mean loss over all processes.

        validated: text for the progress bar.
        """
        sample = self.sampler.epoch(number)
        batch_size = self.settings.batch_size
        share = batch_size // world()
        # This process's part of every batch; samples keep their number in the whole batch.
        places = np.arange(len(sample))
        places = places[(places % batch_size) // share == rank()]
        reader = SampleReader(self.patches, sample, margin(self.patches.size))
        starts = range(0, len(places), share)
        losses, watched = [], 0
        self.model.train()
        with models.reading(reader, places, starts, share, self.device) as batches:
            for start, images in batches:
                part = places[start : start + share]
                batch = int(part[0]) // batch_size
                # The last batch may be smaller.
                whole = min(batch_size, len(sample) - batch * batch_size)
                step = number * self.steps_per_epoch + batch
                labels, weights = sample["label"][part], None
                if self.class_weights is not None:
                    weights = self.class_weights[labels]
                if self.settings.soft_labels:
                    labels = self.votes(sample[part])
                losses.append(self.step(step, images, part % batch_size, labels, whole, weights))
                if len(losses) % WATCH == 0 or start + share >= len(places):
                    recent = self.watch(losses, watched, sample, places, share, number)
                    epochs = f"epoch {number + 1}/{self.settings.epochs}"
                    bar.set_postfix_str(f"{epochs}, loss {recent:.3f}{validated}", refresh=False)
                    watched = len(losses)
                bar.update(len(part) * world())
        total = torch.stack(losses).cpu().double().numpy().sum(keepdims=True)
        return float(total_over_processes(total)[0] / len(sample))

    def votes(self, sample):
        """Targets float32 [B] of --soft-labels: the share of experts who voted for label 1; random
        patches keep their label, 0.
        """
        share = self.sampler.annotations.share[sample["row"]]
        return np.where(sample["row"] < 0, np.float32(0), share)

    def step(self, step, images, samples, labels, whole, weights=None):
        """One optimiser step on this process's part of a batch → the sum of its losses.

        images: uint8 [B, S, S, 3]; samples: their numbers [B] in the batch; labels: [B] in [0, 1];
        whole: size of the batch over all processes; weights: float32 [B] of the losses, or None.
        """
        images = images.to(self.device, non_blocking=self.device.type == "cuda")
        batch = (step, images, samples, labels, weights)
        with self.own_stream():
            self.rate.fill_(learning_rate(step, self.steps, self.settings.lr))
            captured = self.captured(len(labels), whole)
            while True:
                try:
                    if captured:
                        self.fill(*batch)
                        self.replays[0]()
                        total = self.total.clone()
                    else:
                        total = self.accumulate(batch, whole)
                    break
                except torch.OutOfMemoryError:
                    captured = False
                self.make_room(len(labels))  # the failed attempt has let go of its memory
            if world() > 1:
                dist.all_reduce(self.gradients)
            if captured:
                self.replays[1]()
            else:
                self.update()
                if self.replays and world() == 1:  # they have gradients of their own
                    self.optimizer.zero_grad()
        return total

    @contextlib.contextmanager
    def own_stream(self):
        """On a GPU, work on a stream of the engine's own, in order with what surrounds it: the
        default one cannot be captured.
        """
        if self.stream is None:
            yield
            return
        outside = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream):
            yield
        outside.wait_stream(self.stream)

    def accumulate(self, batch, whole):
        """Gradients of the batch's mean loss, part by part → the sum of the losses (see step)."""
        step, images, samples, labels, weights = batch
        size = math.ceil(len(labels) / self.parts)
        total = torch.zeros((), device=self.device)
        self.clear_gradients()
        for first in range(0, len(labels), size):
            part = slice(first, first + size)
            own = None if weights is None else weights[part]
            self.fill(step, images[part], samples[part], labels[part], own)
            total += self.backward(len(labels[part]), whole)
        return total

    def fill(self, step, images, samples, labels, weights):
        """Augment the patches into the buffers, beside all else that the next pass reads."""
        key = (self.settings.run_seed, step, samples)
        stain, heavy = self.settings.stain_jitter, self.settings.augment == "heavy"
        n = len(labels)
        self.images[:n] = augment.augment(images, key, self.patches.size, stain, heavy)
        self.labels[:n] = augment.tensor(labels, self.device, torch.float32)
        if weights is not None:
            self.weights[:n] = augment.tensor(weights, self.device)
        if self.adapters:
            self.keys[:, :n] = augment.tensor(lora.step_keys(self.adapters, *key), self.device)
            lora.use_keys(self.adapters, self.keys[:, :n])

    def backward(self, n, whole):
        """Add the gradients of the first n patches in the buffers → the sum of their losses."""
        autocast = self.settings.method != "lora" and self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=autocast):
            logits = self.model(self.images[:n])
        weights = None if self.class_weights is None else self.weights[:n]
        gamma = self.settings.focal_gamma
        loss = training_loss(logits.float(), self.labels[:n], gamma, weights)
        # The mean over the whole batch; processes add up their parts of it.
        self.scaler.scale(loss * (1 / whole)).backward()
        return loss.detach()

    def clear_gradients(self):
        if self.gradients is None:
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self.gradients.zero_()

    def update(self):
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def captured(self, n, whole):
        """Whether this step is replayed; captures it first when its time has come."""
        if not self.may_capture or self.parts > 1 or n < len(self.labels):
            return False
        if self.replays is None and self.eager_steps < EAGER_STEPS:
            self.eager_steps += 1
            return False
        if self.replays is None:
            try:
                self.capture(n, whole)
            except RuntimeError as error:  # out of memory too: a graph's is its own
                self.may_capture = False
                if rank() == 0:
                    # What went wrong within a capture is behind the error of ending it.
                    reason = first_line(error.__context__ or error)
                    models.note(f"the step runs without a CUDA graph ({reason})")
                return False
        return True

    def capture(self, n, whole):
        """Record, without running it, the step of a whole batch in two pieces: what comes before
        the exchange between processes, and after it.
        """

        def before():
            self.clear_gradients()
            self.total = self.backward(n, whole)

        if self.adapters:
            lora.use_keys(self.adapters, self.keys)
        first, pool = record(before, self.stream)
        second, _ = record(self.update, self.stream, pool)
        self.replays = (first, second)

    def make_room(self, n):
        """After a step that did not fit into memory: give up the graph, or halve the parts.

        Half the patches at once give the same gradient. Several processes would have to agree on
        it: they stop.
        """
        if self.replays is not None:
            self.replays, self.may_capture = None, False
            models.note("memory is short: from now on steps run without a CUDA graph")
        elif world() > 1 or 2 * self.parts > n:
            raise UserError(
                f"out of memory on {self.device} with {n // self.parts} patches at once; use "
                "--accumulate, --checkpointing or --dtype bf16"
            )
        else:
            self.parts *= 2
            models.note(
                f"the batch does not fit into memory: from now on gradients are accumulated over "
                f"{self.parts} parts of it (--accumulate {self.parts})"
            )
        torch.cuda.empty_cache()

    def watch(self, losses, first, sample, places, share, epoch):
        """Mean of the losses since step `first` of the epoch.

        UserError at the first one that is not finite: where it was and what to do.
        """
        recent = torch.stack(losses[first:]).cpu()
        if recent.isfinite().all():
            return recent.sum().item() / len(places[first * share : len(losses) * share])
        bad = first + int((~recent.isfinite()).nonzero()[0, 0])
        part = places[bad * share : (bad + 1) * share]
        ids, names = self.sampler.annotations.id, []
        for row, x, y in sample[part][["row", "x", "y"]].tolist():
            if row >= 0:
                names.append(str(ids[row]))
            else:
                names.append(f"random ({x:.0f}, {y:.0f})")
        step = epoch * self.steps_per_epoch + int(part[0]) // self.settings.batch_size
        raise UserError(
            f"the loss is not a finite number at step {step}, patches {', '.join(names[:16])}: "
            "try a smaller --lr, --dtype bf16 or fp32; --resume goes back to the last pseudo-epoch"
        )


# ---------------------------------------------------------------- validation


def validation_loss(labels, logits):
    """Mean binary cross-entropy in float64."""
    logits = np.asarray(logits, np.float64)
    return float(np.logaddexp(0, np.where(labels == 1, -logits, logits)).mean())


class Decoded:
    """Annotated patches, read once and kept if they fit into CROPS_IN_MEMORY; the reader of
    models.predict.
    """

    def __init__(self, patches, rows):
        self.patches, self.rows, self.images = patches, rows, None
        shape = (len(rows), patches.size, patches.size, 3)
        if math.prod(shape) <= CROPS_IN_MEMORY:
            self.images = np.empty(shape, np.uint8)
            self.decoded = np.zeros(len(rows), bool)

    def __len__(self):
        return len(self.rows)

    def read(self, places):
        if self.images is None:
            return self.patches.read(self.rows[places])
        todo = places[~self.decoded[places]]
        if len(todo):
            self.images[todo] = self.patches.read(self.rows[todo])
            self.decoded[todo] = True
        return self.images[places]


def predict_together(model, patches, count, batch_size, dtype, progress=None):
    """Logits [count] of models.predict, each process computing a part.

    dtype: of autocast, for a model in float32.
    """
    logits, rows = np.zeros(count), np.arange(rank(), count, world())
    if len(rows):
        device = next(model.parameters()).device
        batch_size = max(batch_size, models.default_batch(device))
        with lora.folded(model):
            logits[rows] = models.predict(
                model, patches, rows, batch_size, dtype=dtype, progress=progress
            )
    return total_over_processes(logits)
