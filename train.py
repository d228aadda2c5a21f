"""Training runs: LoRA (--lora) or end to end, by the protocol of the paper.

    python train.py --data midog2022 --model h-optimus-0 --lora --frac 0.1 --fold 0 1 2 3 4
    python train.py --data midog2022 --model resnet50 --domain A B C D E
    torchrun --nproc-per-node 4 train.py …          one run on four GPUs, the same samples in the same order

Everything random (the patches of a pseudo-epoch, their augmentation, LoRA's dropout) is a pure function of the seed
and of where the run stands, so that a run continued by --resume ends with the weights of an uninterrupted one.
"""

import argparse
import contextlib
import copy
import functools
import json
import math
import os
import re
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import augment
import cli
import crops
import data
import evaluate
import lora
import models
import runs
from cli import UserError

WATCH = 16  # steps between looks at the loss: each look waits for the device
CROPS_IN_MEMORY = 4 << 30  # bytes of validation patches that are kept decoded


def learning_rate(step, total, peak):
    """One-cycle: peak / 25 up to peak in 30% of the steps, down to peak / 250,000, by cosines (torch's OneCycleLR)."""
    first, top, last = peak / 25, 0.3 * total - 1, total - 1
    low, high, share = (first, peak, step / top) if step <= top else (
        first / 1e4, peak, (last - step) / max(last - top, 1e-9))
    return low + (high - low) * (1 - math.cos(math.pi * share)) / 2


def run_seed(seed, fold):
    return (int(seed) << 16) + int(fold)


# ---------------------------------------------------------------- processes

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
            raise UserError(f"--batch-size {args.batch_size} --epoch-size {args.epoch_size}: with {world()} processes "
                            "these must divide the batch, and the batch the epoch")
    return device


@contextlib.contextmanager
def others_may_fail():
    """A process that is gone makes the next exchange of all others fail: that ends them with one line."""
    try:
        yield
    except RuntimeError as error:
        if world() == 1 or not re.search("gloo|nccl|connection|peer", str(error), re.IGNORECASE):
            raise
        raise UserError("another process of this job has ended; the same command with --resume continues after the "
                        "last finished pseudo-epoch") from error


# ---------------------------------------------------------------- the model and its state

def load_base(args, dtype, device):
    """The encoder that all runs of this command start from.

    LoRA's frozen weights are held where and in the precision they are used; end to end keeps float32 under autocast.
    """
    return models.load_encoder(args.model, args.weights, *((device, dtype) if args.lora else ("cpu", torch.float32)),
                               args.pool, args.layer, args.revision)


def make_model(args, base, device, seed):
    """PatchClassifier ready for training, and what is trained of it: {name: parameter}."""
    spec = models.find_encoder(args.model)
    # LoRA leaves the weights as they are: one copy of them serves every run.
    encoder = copy.deepcopy(base, {id(p): p for p in base.parameters()} if args.lora else {}).to(device)
    torch.manual_seed(seed)
    if args.lora:
        lora.add_lora(encoder, args.rank, args.alpha, args.dropout, tuple(args.targets), args.dora, args.rslora)
    if args.checkpointing:
        if not spec.depth:
            raise UserError(f"--checkpointing works on transformer blocks, {args.model} has none")
        for block in encoder.blocks:  # LoRA's masks are hashed, so that no random state has to be kept
            block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False,
                                              preserve_rng_state=False)
    model = models.PatchClassifier(encoder).to(device)
    if world() > 1 and not spec.depth:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model, {name: p for name, p in model.named_parameters() if p.requires_grad}


def trained_state(model, method):
    """What the run's model.safetensors holds: LoRA: adapters and head; full: everything."""
    state = model.state_dict()
    if method == "lora":
        state = {name: value for name, value in state.items() if "lora_" in name or name.startswith("head.")}
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}


def save_tensors(path, tensors, **metadata):
    with runs.atomic(path) as temporary:
        save_file(tensors, temporary, metadata={name: json.dumps(value) for name, value in metadata.items()})


def load_tensors(path):
    try:
        with safe_open(path, framework="pt") as file:
            metadata = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{path}: not a readable checkpoint ({error}); start the run over with --force") from None


class Progress:
    """Where a run stands after a pseudo-epoch, and its checkpoint in two files.

    checkpoint.safetensors holds parameters, Adam's moments and the numbers below; the best model so far has a file of
    its own, checkpoint.best-<epoch>.safetensors, named by the first, so that a kill between the two does no harm.
    """

    def __init__(self, run):
        self.run, self.epoch, self.best_epoch, self.best_loss, self.scale = run, 0, None, math.inf, None

    def best_file(self):
        return self.run.path / f"checkpoint.best-{self.best_epoch}.safetensors"

    def save(self, model, method, parameters, optimizer, scaler, loss, auroc):
        """Take in the validation of the epoch just done and write it all."""
        self.epoch += 1
        state = trained_state(model, method)
        if loss < self.best_loss:
            self.best_loss, self.best_epoch = loss, self.epoch
            save_tensors(self.best_file(), state, format="mitosis-run", method=method, epoch=self.epoch,
                         val_loss=loss, val_auroc=auroc)
        tensors = {f"model.{name}": value for name, value in state.items()}
        for name, parameter in parameters.items():
            for key, value in optimizer.state[parameter].items():
                tensors[f"adam.{name}.{key}"] = value.detach().cpu().contiguous()
        save_tensors(self.run.checkpoint, tensors, epoch=self.epoch, best_epoch=self.best_epoch,
                     best_loss=self.best_loss, scaler=scaler.state_dict())
        for old in self.run.path.glob("checkpoint.best-*"):
            if old != self.best_file():
                old.unlink()

    def restore(self, model, parameters, optimizer, scaler):
        """Continue where checkpoint.safetensors stands; False where there is none."""
        if not self.run.checkpoint.exists():
            return False
        tensors, numbers = load_tensors(self.run.checkpoint)
        state = {name[6:]: value for name, value in tensors.items() if name.startswith("model.")}
        missing = parameters.keys() - state.keys() or set(model.load_state_dict(state, strict=False).unexpected_keys)
        if missing:
            raise UserError(f"{self.run.checkpoint}: does not fit this model ({sorted(missing)[0]}); start the run "
                            "over with --force")
        for name, parameter in parameters.items():
            prefix = f"adam.{name}."
            optimizer.state[parameter] = {
                key[len(prefix):]: value if key.endswith(".step") and parameter.device.type == "cpu"
                else value.to(parameter.device) for key, value in tensors.items() if key.startswith(prefix)}
        if numbers["scaler"]:
            scaler.load_state_dict(numbers["scaler"])
        self.epoch, self.best_epoch, self.best_loss = (numbers[k] for k in ("epoch", "best_epoch", "best_loss"))
        return True


# ---------------------------------------------------------------- an epoch

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
        self.sampler, self.patches, self.device, self.dtype, self.seed = sampler, patches, device, dtype, seed
        self.optimizer = torch.optim.Adam(parameters.values(), lr=args.lr, fused=device.type in ("cpu", "cuda"))
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.steps_per_epoch = math.ceil(args.epoch_size / args.batch_size)
        self.parts = args.accumulate
        trained = model
        if world() > 1:
            trained = torch.nn.parallel.DistributedDataParallel(
                model, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False)
        self.trained = torch.compile(trained) if args.compile else trained

    def epoch(self, number, bar, validated=""):
        """Train one pseudo-epoch; returns its mean loss (over all processes). validated: for the progress bar."""
        sample = self.sampler.epoch(number)
        B, share = self.args.batch_size, self.args.batch_size // world()
        # Of every batch this process takes a fixed part; the numbers of the samples stay those of the whole batch.
        places = np.arange(len(sample))
        places = places[(places % B) // share == rank()]
        reader = SampleReader(self.patches, sample, augment.margin(models.SIZE))
        losses, watched = [], 0
        self.model.train()
        with models.reading(reader, places, range(0, len(places), share), share, self.device) as batches:
            for start, images in batches:
                own = places[start:start + share]
                step = number * self.steps_per_epoch + int(own[0]) // B
                whole = min(B, len(sample) - int(own[0]) // B * B)  # the last batch may be smaller
                losses.append(self.step(step, images, own % B, sample["label"][own], whole))
                if len(losses) % WATCH == 0 or start + share >= len(places):
                    recent = self.watch(losses, watched, sample, places, share, number)
                    bar.set_postfix_str(f"epoch {number + 1}/{self.args.epochs}, loss {recent:.3f}{validated}",
                                        refresh=False)
                    watched = len(losses)
                bar.update(len(own) * world())
        mean = torch.stack(losses).cpu().double().numpy().sum(keepdims=True)
        return float(total_over_processes(mean)[0] / len(sample))

    def step(self, step, images, samples, labels, whole):
        """One optimiser step on this process's part of a batch of `whole` patches; returns the sum of its losses."""
        labels = torch.from_numpy(labels.astype(np.float32)).to(self.device, non_blocking=True)
        images = images.to(self.device, non_blocking=True)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.args.epochs * self.steps_per_epoch, self.args.lr)
        while True:
            try:
                total = self.backward(step, images, samples, labels, whole)
                break
            except torch.OutOfMemoryError:
                # Half the patches at once, same gradient. Several processes would have to agree on it: they stop.
                if world() > 1 or 2 * self.parts > len(labels):
                    raise UserError(f"out of memory on {self.device} with {len(labels) // self.parts} patches at once; "
                                    "use --accumulate, --checkpointing or --dtype bf16") from None
                self.parts *= 2
                models.note(f"the batch does not fit: gradients are accumulated over {self.parts} parts of it from "
                            f"here on (--accumulate {self.parts})")
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
            patches = augment.augment(images[part], (self.seed, step, samples[part]), models.SIZE,
                                      self.args.stain_jitter)
            if self.args.lora:
                lora.set_step(self.model.encoder, self.seed, step, samples[part])
            last = first + size >= len(labels)
            autocast = torch.autocast(self.device.type, self.dtype,
                                      enabled=not self.args.lora and self.dtype != torch.float32)
            with contextlib.nullcontext() if last or world() == 1 else self.trained.no_sync():
                with autocast:
                    logits = self.trained(patches)
                loss = F.binary_cross_entropy_with_logits(logits.float(), labels[part], reduction="sum")
                # The mean over the whole batch; DDP averages over processes, which the factor undoes.
                self.scaler.scale(loss * (world() / whole)).backward()
            total += loss.detach()
        return total

    def watch(self, losses, first, sample, places, share, epoch):
        """Mean of the losses since the step `first` of the epoch. UserError at the first one that is not a finite
        number, with where it was and what to do."""
        recent = torch.stack(losses[first:]).cpu()
        if recent.isfinite().all():
            return recent.sum().item() / len(places[first * share:len(losses) * share])
        bad = first + int((~recent.isfinite()).nonzero()[0, 0])
        own = sample[places[bad * share:(bad + 1) * share]]
        table = self.sampler.annotations
        names = [str(table.id[row]) if row >= 0 else f"random ({x:.0f}, {y:.0f})"
                 for row, x, y in zip(own["row"], own["x"], own["y"])]
        step = epoch * self.steps_per_epoch + int(places[bad * share]) // self.args.batch_size
        raise UserError(f"the loss is not a finite number at step {step}, patches {', '.join(names[:16])}: try a "
                        "smaller --lr, --dtype bf16 or fp32; --resume goes back to the last pseudo-epoch")


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
    """Logits [count] of models.predict, each process doing a part. dtype: of autocast, for a model in float32."""
    logits, own = np.zeros(count), np.arange(rank(), count, world())
    if len(own):
        with lora.folded(model):
            logits[own] = models.predict(model, patches, own, max(args.batch_size, 64), dtype=dtype, progress=progress)
    return total_over_processes(logits)


# ---------------------------------------------------------------- a run

def configuration(args, annotations, facts, dtype, weights_hash, licence, frac, fold, domain):
    flags = {"data": annotations.name, "model": args.model, "method": "lora" if args.lora else "full", "frac": frac,
             "fold": fold, "domain": domain, "seed": args.seed, "by": args.split, "val_frac": args.val_frac,
             "weights": models.absolute(args.weights), "pool": args.pool, "layer": args.layer, "fit": args.fit,
             "mpp": args.mpp, "dtype": models.name_of(dtype), "epochs": args.epochs, "epoch_size": args.epoch_size,
             "batch_size": args.batch_size, "lr": args.lr, "balance": args.balance,
             "random_share": args.random_share, "jitter": args.jitter, "stain_jitter": args.stain_jitter,
             "tissue": args.tissue}
    if args.lora:
        flags |= {name: getattr(args, name) for name in ("rank", "alpha", "dropout", "targets", "dora", "rslora")}
    return {"flags": flags,
            "data": {"name": annotations.name, "fingerprint": annotations.fingerprint(), **facts},
            "encoder": {"name": args.model, "licence": licence, "weights_hash": weights_hash},
            "source": data.source(args) | {"revision": args.revision}, "environment": runs.environment()}


def suffixes(args):
    """What goes into the run's name beside the method: the choices that are not the default."""
    found = []
    if args.lora:
        found += [f"r{args.rank}"] * (args.rank != 16) + [f"a{args.alpha:g}"] * (args.alpha != 16)
        found += [f"d{args.dropout:g}"] * (args.dropout != 0.1)
        found += ["+".join(args.targets)] * (tuple(args.targets) != lora.TARGETS)
        found += ["dora"] * args.dora + ["rslora"] * args.rslora
    found += [args.pool] * bool(args.pool) + [f"layer{args.layer}"] * bool(args.layer)
    return found + [f"by{args.split}"] * (args.split != "case") + [args.fit] * (args.fit != "resize")


def train(args, annotations, patches, run, split, base, device, dtype):
    """Train the run to its end (from its checkpoint, where there is one) and test it; rank 0 writes."""
    config, first = run.config, rank() == 0
    fold, method = config["flags"]["fold"], config["flags"]["method"]
    seed = run_seed(args.seed, fold)
    model, parameters = make_model(args, base, device, seed)
    sampler = data.Sampler(annotations, split.train, args.epoch_size, args.seed, fold, args.balance,
                           args.random_share, patches.window, args.jitter, patches.tissue if args.tissue else None)
    engine = Engine(args, model, parameters, sampler, patches, device, dtype, seed)
    validation = annotations.rows(split.val)
    labels, val_patches = annotations.label[validation], Decoded(patches, validation)
    wide = None if args.lora else dtype
    state = Progress(run)
    if state.restore(model, parameters, engine.optimizer, engine.scaler) and first:
        print(f"continuing after pseudo-epoch {state.epoch} of {args.epochs}", flush=True)
    if first:
        run.truncate_log(state.epoch)
        if state.epoch == 0:
            trained = sum(p.numel() for p in parameters.values())
            everything = sum(p.numel() for p in model.parameters())
            print(f"training {trained:,} of {everything:,} parameters in {models.name_of(dtype)} on {device}"
                  f"{f', {world()} processes' if world() > 1 else ''}; {len(split.train):,} annotations, validation "
                  f"{len(split.val):,}, test {len(split.test):,}", flush=True)
    bar = cli.progress(total=(args.epochs - state.epoch) * args.epoch_size, desc="training", unit="patches"
                       ) if first else contextlib.nullcontext(Silent())
    with bar as bar:
        validated = ""
        for number in range(state.epoch, args.epochs):
            start = time.perf_counter()
            train_loss = engine.epoch(number, bar, validated)
            rate = args.epoch_size / (time.perf_counter() - start)
            logits = predict_together(model, val_patches, len(validation), args, wide)
            loss, auroc = validation_loss(labels, logits), evaluate.auroc(labels, logits)
            if first:
                lr = learning_rate((number + 1) * engine.steps_per_epoch - 1, args.epochs * engine.steps_per_epoch,
                                   args.lr)
                run.log({"epoch": number + 1, "lr": lr, "train_loss": train_loss, "val_loss": loss,
                         "val_auroc": auroc, "patches_per_s": round(rate, 2)})
                state.save(model, method, parameters, engine.optimizer, engine.scaler, loss, auroc)
                validated = f", validation {loss:.3f}, AUROC {auroc:.3f}"
            if world() > 1:
                dist.barrier()
    return finish(args, annotations, patches, run, split, model, state, val_patches, dtype)


class Silent:
    """The progress bar of the processes that show none."""

    def update(self, n):
        pass

    def set_postfix_str(self, note, refresh=True):
        pass


def finish(args, annotations, patches, run, split, model, state, val_patches, dtype):
    """The best model: its file, its predictions on every set, its metrics. metrics.json comes last."""
    best = None
    if rank() == 0:
        best, numbers = load_tensors(state.best_file())
    if world() > 1:
        box = [best]
        dist.broadcast_object_list(box, src=0)
        best = box[0]
    model.load_state_dict(best, strict=False)
    sets = [("val", annotations, annotations.rows(split.val), val_patches)]
    sets += [(name, annotations, annotations.rows(ids), None)
             for name, ids in {"test": split.test, **split.others}.items()]
    predicted = []
    for name, table, rows, reader in sets:
        reader = reader or Decoded(patches, rows)
        predicted.append((name, table, rows, predict_together(model, reader, len(rows), args,
                                                              None if args.lora else dtype)))
    if rank():
        return []
    columns = runs.predictions(predicted)
    metadata = {"format": "mitosis-run", "method": run.config["flags"]["method"], "encoder": args.model}
    with runs.atomic(run.path / "model.safetensors") as temporary:
        save_file(best, temporary, metadata=metadata)
    runs.write_predictions(run.path / "predictions.csv", columns)
    curves(run.path)
    metrics = evaluate.of_predictions(columns)
    run.finish(metrics | {"training": {"epochs": args.epochs, "best_epoch": numbers["epoch"],
                                       "val_loss": numbers["val_loss"],
                                       "val_auroc": None if math.isnan(numbers["val_auroc"]) else numbers["val_auroc"],
                                       "train_annotations": len(split.train)}})
    return runs.metric_rows(run.path, metrics)


def curves(path):
    """curves.png of the run's log.csv: losses and AUROC over pseudo-epochs."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    log = np.atleast_1d(np.genfromtxt(path / "log.csv", delimiter=",", names=True))
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8), layout="constrained")
    left.plot(log["epoch"], log["train_loss"], "-", color="0.6", label="training")
    left.plot(log["epoch"], log["val_loss"], "-k", label="validation")
    best = int(np.argmin(log["val_loss"]))
    left.plot(log["epoch"][best], log["val_loss"][best], "ok", label="kept")
    left.set(xlabel="pseudo-epoch", ylabel="binary cross-entropy")
    left.legend(frameon=False)
    right.plot(log["epoch"], log["val_auroc"], "-k")
    right.set(xlabel="pseudo-epoch", ylabel="validation AUROC")
    with runs.atomic(path / "curves.png") as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)


def further_tests(args, annotations, tests, path, device, dtype):
    """Predictions of a finished run on the whole datasets of --test, by all processes; rows of the table."""
    pending = [None]
    if rank() == 0:
        pending = [[other.name for other in runs.pending_tests(path, tests)]]
    if world() > 1:  # the first process has written the file and is going to write it again
        dist.broadcast_object_list(pending, src=0)
    wanted = [other for other in tests if other.name in pending[0]]
    if not wanted:
        return []
    model, config = models.load_run(path, args.weights, device)
    predicted = []
    for other in wanted:
        shared = data.shared_cases(annotations, other)
        if shared and rank() == 0:
            print(f"note: {other.name} shares {len(shared)} cases with {annotations.name}, for example "
                  f"{sorted(map(str, shared))[0]}: its figures are not those of unseen cases", flush=True)
        reader = crops.Patches(other, fit=args.fit, mpp=args.mpp)
        wide = dtype if dtype != torch.float32 else None
        predicted.append((other.name, other, np.arange(len(other)), predict_together(
            model, reader, len(other), args, wide, progress=other.name if rank() == 0 else None)))
    if rank():
        return []
    columns = runs.add_predictions(path / "predictions.csv", runs.predictions(predicted))
    metrics = evaluate.of_predictions(columns)
    runs.finish_tests(path, metrics, wanted)
    return runs.metric_rows(path, metrics, {other.name for other in wanted})


# ---------------------------------------------------------------- the command

def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data.add_arguments(parser)
    data.add_split_arguments(parser)
    models.add_arguments(parser)
    group = parser.add_argument_group("LoRA")
    group.add_argument("--lora", action="store_true", help="adapt the encoder by LoRA (default: train all of it)")
    group.add_argument("--rank", type=int, default=16, help="rank of the adapters (default: 16)")
    group.add_argument("--alpha", type=float, default=16, help="their scale is alpha / rank (default: 16)")
    group.add_argument("--dropout", type=float, default=0.1, help="dropout of the adapters' input (default: 0.1)")
    group.add_argument("--targets", nargs="+", default=list(lora.TARGETS), choices=lora.TARGETS, metavar="T",
                       help=f"layers that get an adapter (default: {' '.join(lora.TARGETS)})")
    group.add_argument("--dora", action="store_true", help="weight-decomposed adapters (Liu et al. 2024)")
    group.add_argument("--rslora", action="store_true", help="scale alpha / sqrt(rank) (Kalajdzievski 2023)")
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=int, default=100, help="pseudo-epochs (default: 100)")
    group.add_argument("--epoch-size", type=int, default=1280, help="patches of a pseudo-epoch (default: 1280)")
    group.add_argument("--batch-size", type=int, default=16, help="patches per step, over all processes (default: 16)")
    group.add_argument("--lr", type=float, default=1e-4, help="largest learning rate of the one-cycle (default: 1e-4)")
    group.add_argument("--balance", choices=("annotation", "slide"), default="annotation",
                       help="draw a class's annotations uniformly, or the slide first (default: annotation)")
    group.add_argument("--random-share", type=float, default=0.25, help="share of random patches (default: 0.25)")
    group.add_argument("--jitter", type=float, default=0.0, help="move centres by up to this share of the patch "
                       "(default: 0; the published code: 0.1)")
    group.add_argument("--stain-jitter", type=float, default=0.0, help="augmentation of the stains (default: 0, none)")
    group.add_argument("--tissue", action="store_true", help="random patches from tissue alone")
    group.add_argument("--accumulate", type=int, default=1, metavar="N", help="compute each batch in N parts "
                       "(default: 1, and more where it does not fit)")
    group.add_argument("--checkpointing", action="store_true", help="compute activations again in the backward pass: "
                       "a third slower, a fraction of the memory")
    group.add_argument("--compile", action="store_true", help="torch.compile the training step (for GPUs; "
                       "on CPUs it is slower than without)")
    group.add_argument("--deterministic", action="store_true", help="deterministic algorithms on the GPU too (slower)")
    group = parser.add_argument_group("runs")
    group.add_argument("--runs", default="runs", metavar="DIR", help="folder of all runs (default: runs)")
    data.add_test_arguments(group)
    group.add_argument("--resume", action="store_true", help="continue runs that were begun (does no harm otherwise)")
    group.add_argument("--force", action="store_true", help="repeat runs that are there; a model that was "
                       "exported into one goes too")
    return parser.parse_args()


def check(args):
    for name in ("epochs", "batch_size", "accumulate", "rank"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1")
    if not (math.isfinite(args.lr) and args.lr > 0):
        raise UserError(f"--lr {args.lr}: a number above 0")
    for name in ("jitter", "stain_jitter"):
        if not 0 <= getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: a number in [0, 1)")
    if args.epoch_size < 2 or not 0 <= args.random_share <= 0.5:
        raise UserError(f"--epoch-size {args.epoch_size} --random-share {args.random_share}: 2 patches at least, and a "
                        "share between 0 and 0.5")
    if not 0 <= args.dropout < 1 or not 0 < args.alpha < math.inf or len(set(args.targets)) < len(args.targets):
        raise UserError(f"--dropout {args.dropout} --alpha {args.alpha} --targets {' '.join(args.targets)}: a number "
                        "in [0, 1), one above 0, and each target once")
    if args.accumulate > args.batch_size:
        raise UserError(f"--accumulate {args.accumulate}: more parts than patches in a batch")
    spec = models.find_encoder(args.model)
    if args.accumulate > 1 and not spec.depth:
        raise UserError(f"--accumulate {args.accumulate}: {args.model} normalises over the batch, parts of one would "
                        "be normalised each for itself; use a smaller --batch-size")
    if args.lora and not spec.depth:
        raise UserError(f"--lora adapts the linear layers of a transformer, {args.model} has none: train it end to "
                        "end, without --lora")


@others_may_fail()
def main():
    args = arguments()
    check(args)
    annotations = data.from_arguments(args)
    data.need_images(annotations)
    tests = data.further(args)
    device = start_processes(args)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    dtype = models.resolve_dtype(args.dtype, device, models.find_encoder(args.model))
    if args.weights == "random" and rank() == 0:
        print("WEIGHTS: random numbers, for dry runs and benchmarks: the results mean nothing", flush=True)
    # Before anything is written: what is wrong with the weights is said first.
    base = load_base(args, dtype, device)
    patches, rows, facts = None, [], data.facts(annotations, args.fit)
    for domain in dict.fromkeys(args.domain or [None]):
        for frac in dict.fromkeys(args.frac):
            for fold in dict.fromkeys(args.fold):
                split = data.make_split(annotations, fold, frac, domain, args.seed, args.split, args.val_frac)
                data.check_further(tests, annotations, split)  # before the training, not after it
                config = configuration(args, annotations, facts, dtype, base.weights_hash, base.licence, frac, fold,
                                       split.settings["domain"])
                path = runs.run_path(args.runs, annotations.name, args.model, config["flags"]["method"], frac, fold,
                                     split.settings["domain"], suffixes(args))
                run, finished = open_on_first(path, config, args)
                with run:
                    if rank() == 0:
                        print(f"{'finished' if finished else 'run'}: {path}", flush=True)
                    if not finished:
                        if rank() == 0:
                            split.save(path / "split.json")
                        patches = patches or crops.Patches(annotations, fit=args.fit, mpp=args.mpp,
                                                           source_mpp=args.source_mpp, jitter=args.jitter)
                        rows += train(args, annotations, patches, run, split, base, device, dtype)
                    if tests:
                        rows += further_tests(args, annotations, tests, path, device, dtype)
    if rows:
        print(cli.table(rows, ("run", "set", "patches", "balanced acc", "weighted F1", "AUROC"), right=(2, 3, 4, 5)))
    if dist.is_initialized():
        dist.barrier()  # the first process still writes when the others are done
        dist.destroy_process_group()


def open_on_first(path, config, args):
    """(run, whether it is finished): the first process opens and locks the folder, the others only read from it."""
    if world() == 1:
        run = runs.open_run(path, config, args.resume, args.force)
        return run, run.finished
    answer = [None]
    if rank() == 0:
        try:
            run = runs.open_run(path, config, args.resume, args.force)
            answer = [(run.finished, run.config, None)]
        except UserError as error:
            answer = [(None, None, str(error))]
    dist.broadcast_object_list(answer, src=0)
    finished, kept, error = answer[0]
    if error:
        raise UserError(error)
    return (run if rank() == 0 else runs.Run(path, kept, finished, None)), finished


if __name__ == "__main__":
    cli.command(main)
