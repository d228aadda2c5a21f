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
from common import UserError
from dataset.patches import margin

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


def join_processes(device, batch_size, epoch_size):
    """Join the other processes of torchrun, if there are any."""
    _, count = launched()
    if count == 1:
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
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


def make_model(settings, base, device, checkpointing=False):
    """PatchClassifier ready for training, and what is trained of it: {name: parameter}.

    checkpointing: compute activations again in the backward pass.
    """
    spec = models.find_encoder(settings.model)
    torch.manual_seed(settings.run_seed)
    if settings.method == "lora":
        names = ("rank", "alpha", "dropout", "targets", "dora", "rslora", "adapter")
        encoder = adapt(base, **{name: getattr(settings, name) for name in names})
    else:
        encoder = copy.deepcopy(base).to(device)
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


class SampleReader:
    """The patches of a pseudo-epoch, by place in it, for models.reading."""

    def __init__(self, patches, sample, size):
        self.patches, self.sample, self.size = patches, sample, size

    def read(self, places):
        return self.patches.read_sample(self.sample[places], self.size)


class Engine:
    """The steps of one run: model, optimiser and what they need.

    parts: compute each batch in so many; compiled: torch.compile the model.
    """

    def __init__(
        self, settings, model, parameters, sampler, patches, device, dtype, parts=1, compiled=False
    ):
        self.settings, self.model, self.parameters = settings, model, parameters
        self.sampler, self.patches = sampler, patches
        self.device, self.dtype = device, dtype
        self.parts = parts
        choices = {"lr": settings.lr, "fused": device.type in ("cpu", "cuda")}
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
        trained = model
        if world() > 1:
            trained = torch.nn.parallel.DistributedDataParallel(
                model,
                device_ids=[device] if device.type == "cuda" else None,
                broadcast_buffers=False,
            )
        self.trained = torch.compile(trained) if compiled else trained

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
        labels = torch.from_numpy(labels.astype(np.float32)).to(self.device, non_blocking=True)
        if weights is not None:
            weights = torch.from_numpy(weights).to(self.device, non_blocking=True)
        images = images.to(self.device, non_blocking=True)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.steps, self.settings.lr)
        while True:
            try:
                total = self.backward(step, images, samples, labels, whole, weights)
                break
            except torch.OutOfMemoryError:
                # Half the patches at once give the same gradient. Several processes would have to
                # agree on it: they stop.
                if world() > 1 or 2 * self.parts > len(labels):
                    raise UserError(
                        f"out of memory on {self.device} with {len(labels) // self.parts} patches "
                        "at once; use --accumulate, --checkpointing or --dtype bf16"
                    ) from None
                self.parts *= 2
                models.note(
                    f"the batch does not fit into memory: from now on gradients are accumulated "
                    f"over {self.parts} parts of it (--accumulate {self.parts})"
                )
                torch.cuda.empty_cache()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return total

    def backward(self, step, images, samples, labels, whole, weights=None):
        """Gradients of the batch's mean loss, part by part → the sum of the losses (see step)."""
        uses_lora = self.settings.method == "lora"
        seed, stain = self.settings.run_seed, self.settings.stain_jitter
        heavy = self.settings.augment == "heavy"
        autocast = not uses_lora and self.dtype != torch.float32
        size = math.ceil(len(labels) / self.parts)
        total = torch.zeros((), device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        for first in range(0, len(labels), size):
            part = slice(first, first + size)
            key = (seed, step, samples[part])
            patches = augment.augment(images[part], key, self.patches.size, stain, heavy)
            if uses_lora:
                lora.set_step(self.model.encoder, *key)
            synchronised = contextlib.nullcontext()
            if world() > 1 and first + size < len(labels):  # exchange gradients once per batch
                synchronised = self.trained.no_sync()
            with synchronised:
                with torch.autocast(self.device.type, self.dtype, enabled=autocast):
                    logits = self.trained(patches)
                loss = training_loss(
                    logits.float(),
                    labels[part],
                    self.settings.focal_gamma,
                    None if weights is None else weights[part],
                )
                # The mean over the whole batch. DDP averages over processes; the factor undoes it.
                self.scaler.scale(loss * (world() / whole)).backward()
            total += loss.detach()
        return total

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
        batch_size = max(batch_size, 64)
        with lora.folded(model):
            logits[rows] = models.predict(
                model, patches, rows, batch_size, dtype=dtype, progress=progress
            )
    return total_over_processes(logits)
