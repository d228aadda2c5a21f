"""The training step: processes, model, optimiser, and the pseudo-epochs of one run."""

import contextlib
import copy
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
from common import UserError

WATCH = 16  # steps between looks at the loss: each look waits for the device
CROPS_IN_MEMORY = 4 << 30  # bytes of validation patches that are kept decoded


def learning_rate(step, total, peak):
    """One-cycle: peak / 25 up to peak in 30% of the steps, down to peak / 250,000, by cosines
    (torch's OneCycleLR).
    """
    first, top, last = peak / 25, 0.3 * total - 1, total - 1
    low, high, share = (
        (first, peak, step / top)
        if step <= top
        else (first / 1e4, peak, (last - step) / max(last - top, 1e-9))
    )
    return low + (high - low) * (1 - math.cos(math.pi * share)) / 2


def run_seed(seed, fold):
    return (int(seed) << 16) + int(fold)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def total_over_processes(values):
    """Sum of a float64 array over all processes."""
    if world() == 1:
        return values
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.from_numpy(np.ascontiguousarray(values, np.float64)).to(device)
    dist.all_reduce(tensor)
    return tensor.cpu().numpy()


def start_processes(args):
    """Join the other processes of torchrun; returns the device of this one."""
    device = models.resolve_device(args.device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if device.type == "cuda" and ":" not in args.device:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if args.batch_size % world() or args.epoch_size % args.batch_size:
            raise UserError(
                f"--batch-size {args.batch_size} --epoch-size {args.epoch_size}: with {world()} "
                "processes "
                "these must divide the batch, and the batch the epoch"
            )
    return device


@contextlib.contextmanager
def others_may_fail():
    """A process that is gone makes the next exchange of all others fail: that ends them with one
    line.
    """
    try:
        yield
    except RuntimeError as error:
        if world() == 1 or not re.search("gloo|nccl|connection|peer", str(error), re.IGNORECASE):
            raise
        raise UserError(
            "another process of this job has ended; the same command with --resume continues "
            "after the "
            "last finished pseudo-epoch"
        ) from error


def load_base(args, dtype, device):
    """The encoder that all runs of this command start from.

    LoRA's frozen weights are held where and in the precision they are used; end to end keeps
    float32 under autocast."""
    return models.load_encoder(
        args.model,
        args.weights,
        *((device, dtype) if args.lora else ("cpu", torch.float32)),
        args.pool,
        args.layer,
        args.revision,
    )


def make_model(args, base, device, seed):
    """PatchClassifier ready for training, and what is trained of it: {name: parameter}."""
    spec = models.find_encoder(args.model)
    # LoRA leaves the weights as they are: one copy of them serves every run.
    encoder = copy.deepcopy(base, {id(p): p for p in base.parameters()} if args.lora else {}).to(
        device
    )
    torch.manual_seed(seed)
    if args.lora:
        lora.add_lora(
            encoder,
            args.rank,
            args.alpha,
            args.dropout,
            tuple(args.targets),
            args.dora,
            args.rslora,
        )
    if args.checkpointing:
        if not spec.depth:
            raise UserError(f"--checkpointing works on transformer blocks, {args.model} has none")
        for (
            block
        ) in encoder.blocks:  # LoRA's masks are hashed, so that no random state has to be kept
            block.forward = functools.partial(
                torch.utils.checkpoint.checkpoint,
                block.forward,
                use_reentrant=False,
                preserve_rng_state=False,
            )
    model = models.PatchClassifier(encoder).to(device)
    if world() > 1 and not spec.depth:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model, {name: p for name, p in model.named_parameters() if p.requires_grad}


class SampleReader:
    """The patches of a pseudo-epoch, by place in it, for models.reading."""

    def __init__(self, patches, sample, size):
        self.patches, self.sample, self.size = patches, sample, size

    def read(self, places):
        return self.patches.read_sample(self.sample[places], self.size)


class Engine:
    """The steps of one run: model, optimiser and what they need."""

    def __init__(self, args, model, parameters, sampler, patches, device, dtype, seed):
        self.args, self.model, self.parameters = args, model, parameters
        self.sampler, self.patches, self.device, self.dtype, self.seed = (
            sampler,
            patches,
            device,
            dtype,
            seed,
        )
        self.optimizer = torch.optim.Adam(
            parameters.values(), lr=args.lr, fused=device.type in ("cpu", "cuda")
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.steps_per_epoch = math.ceil(args.epoch_size / args.batch_size)
        self.parts = args.accumulate
        trained = model
        if world() > 1:
            trained = torch.nn.parallel.DistributedDataParallel(
                model,
                device_ids=[device] if device.type == "cuda" else None,
                broadcast_buffers=False,
            )
        self.trained = torch.compile(trained) if args.compile else trained

    def epoch(self, number, bar, validated=""):
        """Train one pseudo-epoch; returns its mean loss (over all processes). validated: for the
        progress bar.
        """
        sample = self.sampler.epoch(number)
        B, share = self.args.batch_size, self.args.batch_size // world()
        # Of every batch this process takes a fixed part; the numbers of the samples stay those of
        # the whole batch.
        places = np.arange(len(sample))
        places = places[(places % B) // share == rank()]
        reader = SampleReader(self.patches, sample, augment.margin(models.SIZE))
        losses, watched = [], 0
        self.model.train()
        with models.reading(
            reader, places, range(0, len(places), share), share, self.device
        ) as batches:
            for start, images in batches:
                own = places[start : start + share]
                step = number * self.steps_per_epoch + int(own[0]) // B
                whole = min(B, len(sample) - int(own[0]) // B * B)  # the last batch may be smaller
                losses.append(self.step(step, images, own % B, sample["label"][own], whole))
                if len(losses) % WATCH == 0 or start + share >= len(places):
                    recent = self.watch(losses, watched, sample, places, share, number)
                    bar.set_postfix_str(
                        f"epoch {number + 1}/{self.args.epochs}, loss {recent:.3f}{validated}",
                        refresh=False,
                    )
                    watched = len(losses)
                bar.update(len(own) * world())
        mean = torch.stack(losses).cpu().double().numpy().sum(keepdims=True)
        return float(total_over_processes(mean)[0] / len(sample))

    def step(self, step, images, samples, labels, whole):
        """One optimiser step on this process's part of a batch of `whole` patches; returns the sum
        of its losses.
        """
        labels = torch.from_numpy(labels.astype(np.float32)).to(self.device, non_blocking=True)
        images = images.to(self.device, non_blocking=True)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.args.epochs * self.steps_per_epoch, self.args.lr)
        while True:
            try:
                total = self.backward(step, images, samples, labels, whole)
                break
            except torch.OutOfMemoryError:
                # Half the patches at once, same gradient. Several processes would have to agree on
                # it: they stop.
                if world() > 1 or 2 * self.parts > len(labels):
                    raise UserError(
                        f"out of memory on {self.device} with {len(labels) // self.parts} patches "
                        "at once; "
                        "use --accumulate, --checkpointing or --dtype bf16"
                    ) from None
                self.parts *= 2
                models.note(
                    f"the batch does not fit: gradients are accumulated over {self.parts} parts "
                    "of it from "
                    f"here on (--accumulate {self.parts})"
                )
                torch.cuda.empty_cache()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return total

    def backward(self, step, images, samples, labels, whole):
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        size = math.ceil(len(labels) / self.parts)
        for first in range(0, len(labels), size):
            part = slice(first, first + size)
            patches = augment.augment(
                images[part], (self.seed, step, samples[part]), models.SIZE, self.args.stain_jitter
            )
            if self.args.lora:
                lora.set_step(self.model.encoder, self.seed, step, samples[part])
            last = first + size >= len(labels)
            autocast = torch.autocast(
                self.device.type,
                self.dtype,
                enabled=not self.args.lora and self.dtype != torch.float32,
            )
            with contextlib.nullcontext() if last or world() == 1 else self.trained.no_sync():
                with autocast:
                    logits = self.trained(patches)
                loss = F.binary_cross_entropy_with_logits(
                    logits.float(), labels[part], reduction="sum"
                )
                # The mean over the whole batch; DDP averages over processes, which the factor
                # undoes.
                self.scaler.scale(loss * (world() / whole)).backward()
            total += loss.detach()
        return total

    def watch(self, losses, first, sample, places, share, epoch):
        """Mean of the losses since the step `first` of the epoch. UserError at the first one that
        is not a finite number, with where it was and what to do."""
        recent = torch.stack(losses[first:]).cpu()
        if recent.isfinite().all():
            return recent.sum().item() / len(places[first * share : len(losses) * share])
        bad = first + int((~recent.isfinite()).nonzero()[0, 0])
        own = sample[places[bad * share : (bad + 1) * share]]
        table = self.sampler.annotations
        names = [
            str(table.id[row]) if row >= 0 else f"random ({x:.0f}, {y:.0f})"
            for row, x, y in zip(own["row"], own["x"], own["y"])
        ]
        step = epoch * self.steps_per_epoch + int(places[bad * share]) // self.args.batch_size
        raise UserError(
            f"the loss is not a finite number at step {step}, patches {', '.join(names[:16])}: "
            "try a "
            "smaller --lr, --dtype bf16 or fp32; --resume goes back to the last pseudo-epoch"
        )


def validation_loss(labels, logits):
    """Mean binary cross-entropy in float64."""
    logits = np.asarray(logits, np.float64)
    return float(np.logaddexp(0, np.where(labels == 1, -logits, logits)).mean())


class Decoded:
    """Validation patches, read once and kept as long as they fit; the reader of models.predict."""

    def __init__(self, patches, rows):
        self.patches, self.rows, self.kept = patches, rows, None
        shape = (len(rows), models.SIZE, models.SIZE, 3)
        if math.prod(shape) <= CROPS_IN_MEMORY:
            self.kept, self.there = np.empty(shape, np.uint8), np.zeros(len(rows), bool)

    def __len__(self):
        return len(self.rows)

    def read(self, places):
        if self.kept is None:
            return self.patches.read(self.rows[places])
        todo = places[~self.there[places]]
        if len(todo):
            self.kept[todo], self.there[todo] = self.patches.read(self.rows[todo]), True
        return self.kept[places]


def predict_together(model, patches, count, args, dtype, progress=None):
    """Logits [count] of models.predict, each process doing a part. dtype: of autocast, for a model
    in float32.
    """
    logits, own = np.zeros(count), np.arange(rank(), count, world())
    if len(own):
        with lora.folded(model):
            logits[own] = models.predict(
                model, patches, own, max(args.batch_size, 64), dtype=dtype, progress=progress
            )
    return total_over_processes(logits)
