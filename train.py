"""Training runs: LoRA (--lora) or end to end, by the protocol of the paper.

    python train.py --data midog2022 --model h-optimus-0 --lora --frac 0.1 --fold 0 1 2 3 4
    python train.py --data midog2022 --model resnet50 --domain A B C D E
    python train.py --data midog2022 --lora --adapter DIR    from an adapter in peft's format
    torchrun --nproc-per-node 4 train.py …    one run on four GPUs: the same samples in their order

Everything random (the patches of a pseudo-epoch, their augmentation, LoRA's dropout) is a pure
function of the seed and of where the run stands: a run continued by --resume ends with the weights
of an uninterrupted one.
"""

import common  # first: Ctrl-C during the imports below ends with one line

# isort: split
import argparse
import gc
import hashlib
import math
import os
import time

import numpy as np
import torch
import torch.distributed as dist

import augment
import checkpoint
import engine
import flags
import lora
import models
import runs
from common import UserError
from dataset.patches import Patches
from dataset.sampler import Sampler, validation_sample
from reporting import figures, metrics

# Loss and AUROC in log.csv and metrics.json: of the whole validation set, of --val-patches.
VALIDATION_COLUMNS = ("val_loss", "val_auroc")
SAMPLE_COLUMNS = ("sample_loss", "sample_auroc")

# ---------------------------------------------------------------- the command's flags


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_arguments(parser)
    flags.add_split_arguments(parser)
    models.add_arguments(parser)
    group = parser.add_argument_group("LoRA")
    group.add_argument(
        "--lora", action="store_true", help="adapt the encoder by LoRA (default: train all of it)"
    )
    group.add_argument("--rank", type=int, help="rank of the adapters (default: 16)")
    group.add_argument("--alpha", type=float, help="their scale is alpha / rank (default: 16)")
    group.add_argument(
        "--dropout", type=float, help="dropout of the adapters' input (default: 0.1)"
    )
    group.add_argument(
        "--targets",
        nargs="+",
        choices=lora.TARGETS,
        metavar="T",
        help=f"layers that get an adapter (default: {' '.join(lora.TARGETS)})",
    )
    group.add_argument(
        "--dora", action="store_true", help="weight-decomposed adapters (Liu et al. 2024)"
    )
    group.add_argument(
        "--rslora", action="store_true", help="scale alpha / sqrt(rank) (Kalajdzievski 2023)"
    )
    group.add_argument(
        "--adapter",
        metavar="DIR",
        help="start from this adapter in peft's format, and from its head if it has one; rank, "
        "alpha, targets … are the adapter's (default: a fresh one)",
    )
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=int, default=100, help="pseudo-epochs (default: 100)")
    group.add_argument(
        "--epoch-size", type=int, default=1280, help="patches of a pseudo-epoch (default: 1280)"
    )
    group.add_argument(
        "--batch-size",
        type=int,
        default=16,
        help="patches per step, over all processes (default: 16)",
    )
    group.add_argument(
        "--lr",
        type=float,
        default=1e-4,
        help="largest learning rate of the one-cycle (default: 1e-4)",
    )
    group.add_argument(
        "--balance",
        choices=("annotation", "slide", "domain"),
        default="annotation",
        help="draw a class's annotations uniformly, or the slide or the domain first (default: "
        "annotation)",
    )
    group.add_argument(
        "--class-weight",
        choices=("balanced",),
        help="draw annotations as they come, and weight the loss so that both classes count the "
        "same (default: half of the patches drawn are of class 1)",
    )
    group.add_argument(
        "--loss",
        choices=("bce", "focal"),
        default="bce",
        help="of training: cross-entropy, or focal loss (Lin et al. 2017) (default: bce)",
    )
    group.add_argument(
        "--focal-gamma", type=float, metavar="G", help="exponent of --loss focal (default: 2)"
    )
    group.add_argument(
        "--soft-labels",
        action="store_true",
        help="train towards the share of experts who voted for the positive class, if the data "
        "have votes; validation and tests keep the labels",
    )
    group.add_argument(
        "--weight-decay",
        type=float,
        default=0.0,
        metavar="W",
        help="AdamW instead of Adam: what is trained, biases and norms too, shrinks by lr * W a "
        "step (default: 0)",
    )
    group.add_argument(
        "--patience",
        type=int,
        metavar="N",
        help="stop after N pseudo-epochs without a lower validation loss (default: never)",
    )
    group.add_argument(
        "--val-patches",
        type=int,
        metavar="N",
        help="validate each pseudo-epoch on a fixed sample of N validation annotations, in "
        f"proportion by class and case; of the {checkpoint.KEPT} epochs with the lowest loss on "
        "it, the one with the lowest loss on the whole validation set is kept. --patience counts "
        "on the sample. An N of the set's size or more gives the results without the flag, in a "
        "run of another name (default: validate on all, as the protocol says; --val-frac makes "
        "the set itself smaller)",
    )
    group.add_argument(
        "--random-share", type=float, default=0.25, help="share of random patches (default: 0.25)"
    )
    group.add_argument(
        "--jitter",
        type=float,
        default=0.0,
        help="move centres by up to this share of the patch (default: 0; the published code: 0.1)",
    )
    augment.add_arguments(group)
    group.add_argument("--tissue", action="store_true", help="random patches from tissue alone")
    group.add_argument(
        "--accumulate",
        type=int,
        default=1,
        metavar="N",
        help="compute each batch in N parts (default: 1, more if it does not fit into memory)",
    )
    group.add_argument(
        "--checkpointing",
        action="store_true",
        help="compute activations again in the backward pass: a third slower, a fraction of the "
        "memory",
    )
    models.add_compile_argument(group)
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="deterministic algorithms on the GPU too (slower)",
    )
    flags.add_run_arguments(parser)
    return parser.parse_args()


def check(args):
    """UserError if a flag is out of range, or two do not go together."""
    flags.check_name(args)
    flags.at_least(args, 1, "epochs", "batch_size", "accumulate")
    flags.at_least(args, 2, "epoch_size")
    if not 0 < args.lr < math.inf:
        raise UserError(f"--lr {args.lr}: give a number above 0")
    if not 0 <= args.random_share <= 0.5:
        raise UserError(f"--random-share {args.random_share}: give a number from 0 to 0.5")
    if not 0 <= args.jitter < 1:
        raise UserError(f"--jitter {args.jitter}: give a number from 0 to below 1")
    augment.check(args)
    if args.focal_gamma is not None and args.loss != "focal":
        raise UserError(f"--focal-gamma {args.focal_gamma:g}: needs --loss focal")
    if args.focal_gamma is not None and not 0 <= args.focal_gamma <= 20:
        raise UserError(f"--focal-gamma {args.focal_gamma:g}: give a number from 0 to 20")
    if not 0 <= args.weight_decay < 1000:
        raise UserError(f"--weight-decay {args.weight_decay:g}: give a number from 0 to below 1000")
    if args.patience is not None:
        flags.at_least(args, 1, "patience")
    if args.val_patches is not None:
        flags.at_least(args, 2, "val_patches")  # one of each class
    if args.accumulate > args.batch_size:
        raise UserError(f"--accumulate {args.accumulate}: more parts than patches in a batch")
    spec = models.find_encoder(args.model)
    if args.accumulate > 1 and not spec.depth:
        raise UserError(
            f"--accumulate {args.accumulate}: {args.model} normalises over the batch, and would "
            "normalise each part by itself; use a smaller --batch-size"
        )
    models.check_compile(args.compile, spec)
    if args.checkpointing and not spec.depth:
        raise UserError(f"--checkpointing works on transformer blocks, {args.model} has none")
    if args.lora and not spec.depth:
        raise UserError(
            f"--lora adapts the linear layers of a transformer, {args.model} has none: train it "
            "end to end, without --lora"
        )
    if args.adapter and not args.lora:
        raise UserError(f"--adapter {args.adapter}: needs --lora")


def adapter_settings(args):
    """Settings of LoRA: of the flags, else of --adapter, else the defaults."""
    settings = {"rank": 16, "alpha": 16, "dropout": 0.1, "targets": lora.TARGETS}
    settings |= {"dora": args.dora, "rslora": args.rslora}
    given = {name: getattr(args, name) for name in ("rank", "alpha", "dropout", "targets")}
    given = {name: value for name, value in given.items() if value is not None}
    if len(set(args.targets or ())) < len(args.targets or ()):
        raise UserError(f"--targets {' '.join(args.targets)}: name each target once")
    if args.adapter:
        theirs = lora.peft_settings(args.adapter)
        given |= {name: True for name in ("dora", "rslora") if getattr(args, name)}
        for name, value in given.items():
            same = theirs[name] == value
            if name == "targets":
                same = set(theirs[name]) == set(value)
            if not same and name != "dropout":  # another dropout suits any adapter
                raise UserError(
                    f"--{name}: the adapter of --adapter has {theirs[name]}; leave the flag out"
                )
        given = {name: value for name, value in given.items() if name == "dropout"}
        settings |= theirs | {"adapter": os.path.abspath(args.adapter)}
    settings |= given
    lora.check_settings(settings["rank"], settings["alpha"], settings["dropout"])
    return settings


def settings_of(args, split, base, dtype, adapter):
    """The settings of the run on one split.

    base: the encoder; adapter: adapter_settings(…), {} without LoRA.
    """
    kind, method = engine.TrainingSettings, "full"
    if args.lora:
        kind, method = engine.LoRASettings, "lora"
    return kind(
        **split.settings,
        data=split.dataset["name"],
        model=args.model,
        method=method,
        weights=checkpoint.absolute(args.weights),
        pool=args.pool,
        layer=args.layer,
        size=models.unusual_size(base),
        crop=args.crop,
        name=args.name,
        fit=args.fit,
        mpp=args.mpp,
        dtype=models.name_of(dtype),
        epochs=args.epochs,
        epoch_size=args.epoch_size,
        batch_size=args.batch_size,
        lr=args.lr,
        balance=args.balance,
        random_share=args.random_share,
        jitter=args.jitter,
        stain_jitter=augment.stain_of(args.stain_jitter, args.augment),
        augment=args.augment,
        soft_labels=args.soft_labels,
        tissue=args.tissue,
        loss=args.loss,
        focal_gamma=focal_gamma(args),
        class_weight=args.class_weight,
        weight_decay=args.weight_decay,
        patience=args.patience,
        val_patches=args.val_patches,
        **adapter,
    )


def focal_gamma(args):
    """The exponent of --loss focal; None for another loss."""
    if args.loss != "focal":
        return None
    return 2.0 if args.focal_gamma is None else args.focal_gamma


def choices(settings, adapter_hash):
    """The choices that are not the default, for the run's name."""
    own = []
    if settings.method == "lora":
        if settings.rank != 16:
            own.append(f"r{settings.rank}")
        if settings.alpha != 16:
            own.append(f"a{settings.alpha:g}")
        if settings.dropout != 0.1:
            own.append(f"d{settings.dropout:g}")
        if tuple(settings.targets) != lora.TARGETS:
            own.append("+".join(settings.targets))
        if settings.dora:
            own.append("dora")
        if settings.rslora:
            own.append("rslora")
        if adapter_hash:
            own.append(f"from{adapter_hash[:8]}")
    if settings.loss == "focal":
        own.append("focal")
        if settings.focal_gamma != 2:
            own[-1] += f"{settings.focal_gamma:g}"
    if settings.class_weight:
        own.append(settings.class_weight)
    if settings.augment != "paper":
        own.append(settings.augment)
    if settings.soft_labels:
        own.append("soft")
    if settings.val_patches:
        own.append(f"val{settings.val_patches}")
    return settings.choices(own, settings.pool)


# ---------------------------------------------------------------- the command


@engine.others_may_fail()
def main():
    # Flags and processes.
    args = arguments()
    check(args)
    adapter, base_facts = {}, {}
    if args.lora:
        adapter = adapter_settings(args)
    if args.adapter:
        base_facts["adapter_hash"] = lora.adapter_hash(args.adapter)
    quiet = engine.launched()[0] > 0
    device = engine.process_device(args.device)
    engine.join_processes(args.device, device, args.batch_size, args.epoch_size)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    dtype = models.resolve_dtype(args.dtype, device, models.find_encoder(args.model))

    # Data and weights: everything that can be wrong with them is found before the training.
    annotations = flags.from_arguments(args, quiet=quiet)
    if args.soft_labels and annotations.share is None:
        raise UserError(f"--soft-labels: {annotations.name} holds no votes of experts")
    flags.need_images(annotations, args.mpp, quiet, args.crop)
    tests = flags.further(args, annotations, quiet)
    splits = flags.splits(args, annotations, tests, quiet)
    if args.weights == "random" and not quiet:
        print(
            "WEIGHTS: random numbers, for dry runs and benchmarks: the results mean nothing",
            flush=True,
        )
    base = load_base(args, dtype, device)
    if args.lora:
        engine.adapt(base, **adapter)  # once, to see that the adapters fit
    facts = flags.facts(annotations, args.fit, args.mpp, args.source_mpp, base.size, args.crop)
    if args.soft_labels:
        facts["votes"] = hashlib.sha256(annotations.share.tobytes()).hexdigest()[:16]
    patches = Patches(
        annotations,
        size=base.size,
        fit=args.fit,
        mpp=args.mpp,
        source_mpp=args.source_mpp,
        jitter=args.jitter,
        crop=args.crop,
    )

    # One run after the other.
    rows = []
    for split in splits:
        settings = settings_of(args, split, base, dtype, adapter)
        source = flags.source(args) | {"revision": args.revision}
        config = runs.configuration(settings, annotations, facts, base, source, **base_facts)
        parts = choices(settings, base_facts.get("adapter_hash"))
        path = runs.folder(args.runs, settings, parts, np.unique(annotations.domain))
        with open_run(path, config, args) as run:
            if not quiet:
                title = "finished" if run.finished else "run"
                print(f"{title}: {path}", flush=True)
                for line in runs.one_class(annotations, split):
                    print(f"problem: {line}", flush=True)
            if not run.finished:
                if not quiet:
                    split.save(path / "split.json")
                rows += train(args, settings, annotations, patches, run, split, base, device, dtype)
                gc.collect()  # blocks that are compiled or checkpointed hold themselves
            if tests:
                rows += further_tests(args, settings, tests, path, device, dtype)
    runs.print_metrics(rows)
    engine.leave_processes()


def load_base(args, dtype, device):
    """The encoder that all runs of this command start from.

    LoRA's frozen weights are held where and in the precision they are used; training end to end
    keeps float32 under autocast.
    """
    if not args.lora:
        device, dtype = "cpu", torch.float32
    return models.load_encoder(
        args.model, args.weights, device, dtype, args.pool, args.layer, args.revision, args.size
    )


def open_run(path, config, args):
    """The Run of a folder: the first process opens and locks it, the others only read from it."""
    if engine.world() == 1:
        return runs.open_run(path, config, args.resume, args.force)
    run = finished = kept = error = None
    if engine.rank() == 0:
        try:
            run = runs.open_run(path, config, args.resume, args.force)
            finished, kept = run.finished, run.config
        except UserError as refusal:
            error = str(refusal)
    finished, kept, error = engine.from_first((finished, kept, error))
    if error:
        raise UserError(error)
    return run or runs.Run(path, kept, finished, None)


def train(args, settings, annotations, patches, run, split, base, device, dtype):
    """Train the run to its end, from its checkpoint if there is one, and test it.

    Returns its rows of the table. The first process writes.
    """
    first = engine.rank() == 0
    trained = settings.epochs * settings.epoch_size // engine.world()
    compiled = models.should_compile(args.compile, device, trained, base.spec)
    model, parameters = engine.make_model(settings, base, device, args.checkpointing, compiled)
    sampler = Sampler(
        annotations,
        split.train,
        settings.epoch_size,
        settings.seed,
        settings.fold,
        settings.balance,
        settings.random_share,
        patches.window,
        settings.jitter,
        patches.tissue if settings.tissue else None,
        halves=not settings.class_weight,
    )
    trainer = engine.Engine(
        settings,
        model,
        parameters,
        sampler,
        patches,
        device,
        dtype,
        args.accumulate,
    )
    validation, sampled = annotations.rows(split.val), samples_validation(settings, split)
    if sampled:
        validation = validation_sample(
            annotations, validation, settings.val_patches, settings.seed, settings.fold
        )
    labels, decoded = annotations.label[validation], engine.Decoded(patches, validation)
    columns = SAMPLE_COLUMNS if sampled else VALIDATION_COLUMNS
    # Training end to end predicts under autocast, LoRA in the precision of its frozen weights.
    autocast = None if args.lora else dtype

    # Where the run stands.
    state = checkpoint.Progress(run, keep=checkpoint.KEPT if sampled else 1)
    continued = state.restore(model, parameters, trainer.optimizer, trainer.scaler)
    if first:
        run.truncate_log(state.epoch)
        if continued:
            print(f"continuing after pseudo-epoch {state.epoch} of {settings.epochs}", flush=True)
        else:
            print(summary(settings, model, parameters, split, dtype, device), flush=True)

    # Pseudo-epochs: train, validate, write the checkpoint.
    todo, validated = (settings.epochs - state.epoch) * settings.epoch_size, ""
    with common.progress(total=todo, desc="training", unit="patches", quiet=not first) as bar:
        for number in range(state.epoch, settings.epochs):
            if engine.from_first(state.is_stale(settings.patience)):
                break
            start = time.perf_counter()
            train_loss = trainer.epoch(number, bar, validated)
            speed = settings.epoch_size / (time.perf_counter() - start)
            logits = engine.predict_together(
                model, decoded, len(validation), settings.batch_size, autocast
            )
            loss, auroc = engine.validation_loss(labels, logits), metrics.auroc(labels, logits)
            if first:
                last_step = (number + 1) * trainer.steps_per_epoch - 1
                scores = dict(zip(columns, (loss, auroc)))
                row = {
                    "epoch": number + 1,
                    "lr": engine.learning_rate(last_step, trainer.steps, settings.lr),
                    "train_loss": train_loss,
                    **scores,
                    "patches_per_s": round(speed, 2),
                }
                if sampled:  # filled for the epochs that are validated on all of it
                    row |= dict.fromkeys(VALIDATION_COLUMNS, "")
                run.log(row)
                state.save(
                    model,
                    settings.method,
                    parameters,
                    trainer.optimizer,
                    trainer.scaler,
                    loss,
                    scores,
                )
                validated = f", validation {loss:.3f}, AUROC {auroc:.3f}"
            if engine.world() > 1:
                dist.barrier()
    if first and state.epoch < settings.epochs:
        print(stopped(state, settings), flush=True)
    if sampled:
        decoded = engine.Decoded(patches, annotations.rows(split.val))
    trainer.optimizer.zero_grad()
    del trainer  # and the memory of its graph
    return finish(settings, annotations, patches, run, split, model, state, decoded, autocast)


def samples_validation(settings, split):
    """Whether a pseudo-epoch is validated on a part of the validation set."""
    return settings.val_patches is not None and settings.val_patches < len(split.val)


def stopped(state, settings):
    """The line about a run that --patience ends."""
    return (
        f"stopped after pseudo-epoch {state.epoch} of {settings.epochs}: no lower validation loss "
        f"since pseudo-epoch {state.best_epoch} (--patience {settings.patience})"
    )


def summary(settings, model, parameters, split, dtype, device):
    """The line about a run that begins."""
    trained = sum(p.numel() for p in parameters.values())
    everything = sum(p.numel() for p in model.parameters())
    place = f"{models.name_of(dtype)} on {device}"
    if engine.world() > 1:
        place += f", {engine.world()} processes"
    validation = f"{len(split.val):,}"
    if samples_validation(settings, split):
        validation += f" ({settings.val_patches:,} of them after each pseudo-epoch)"
    return (
        f"training {trained:,} of {everything:,} parameters in {place}; {len(split.train):,} "
        f"annotations, validation {validation}, test {len(split.test):,}"
    )


def finish(settings, annotations, patches, run, split, model, state, decoded, autocast):
    """The chosen model: its file, its predictions on every set, its metrics → rows of the table.

    decoded: the whole validation set.
    """
    epochs = engine.from_first(state.best_epochs)
    if not epochs:
        raise UserError(
            f"{run.path}: no pseudo-epoch has a finite validation loss; start over with --force "
            "and a smaller --lr"
        )
    epoch, on_all, scores = epochs[0], {}, {}
    if samples_validation(settings, split):
        on_all = validate_kept(epochs, settings, model, state, decoded, autocast)
        labels = annotations.label[decoded.rows]
        for number, logits in on_all.items():
            loss, auroc = engine.validation_loss(labels, logits), metrics.auroc(labels, logits)
            scores[number] = dict(zip(VALIDATION_COLUMNS, (loss, auroc)))
        # Of equal losses that of the epoch that was better on the sample: it comes first.
        epoch = min(epochs, key=lambda number: scores[number]["val_loss"])
        if engine.rank() == 0:
            run.complete_log(scores)
            print(chosen(epoch, scores), flush=True)
    best, numbers = load_kept(epoch, model, state)
    predicted = []
    for name, ids in runs.sets_of(split).items():
        rows = annotations.rows(ids)
        if name == "val" and on_all:
            logits = on_all[epoch]
        else:
            reader = decoded if name == "val" else engine.Decoded(patches, rows)
            logits = engine.predict_together(
                model, reader, len(rows), settings.batch_size, autocast
            )
        predicted.append((name, annotations, rows, logits))
    if engine.rank():
        return []
    figures.curves(run.path)
    training = {"epochs": state.epoch, "best_epoch": epoch}
    measured = numbers | scores.get(epoch, {})
    for name in (*VALIDATION_COLUMNS, *SAMPLE_COLUMNS):
        if name in measured:
            training[name] = None if math.isnan(measured[name]) else measured[name]
    training["train_annotations"] = len(split.train)
    return checkpoint.finish(run, best, predicted, training)


def load_kept(epoch, model, state):
    """Load the model that was kept after `epoch`, in every process → (its tensors, in the first
    process the facts of its file).
    """
    tensors = facts = None
    if engine.rank() == 0:
        tensors, facts = state.load(epoch)
    tensors = engine.from_first(tensors)
    model.load_state_dict(tensors, strict=False)
    return tensors, facts


def validate_kept(epochs, settings, model, state, decoded, autocast):
    """{epoch: logits of the whole validation set} of the models that were kept after `epochs`; what
    an interrupted run has computed is not computed again.
    """
    first, found = engine.rank() == 0, {}
    for epoch in epochs:
        logits = engine.from_first(state.load_logits(epoch, len(decoded)) if first else None)
        if logits is None:
            load_kept(epoch, model, state)
            title = f"validating pseudo-epoch {epoch}" if first else None
            logits = engine.predict_together(
                model, decoded, len(decoded), settings.batch_size, autocast, title
            )
            if first:
                state.save_logits(epoch, logits)
        found[epoch] = logits
    return found


def chosen(epoch, scores):
    """The line about the choice among the epochs that were best on the sample."""
    losses = [f"{number} has {values['val_loss']:.4f}" for number, values in scores.items()]
    return (
        f"kept pseudo-epoch {epoch}: the lowest loss on the whole validation set "
        f"({', '.join(losses)})"
    )


def further_tests(args, settings, tests, path, device, dtype):
    """Predictions of a finished run on the whole datasets of --test, where they are missing.

    By all processes; returns rows of the table.
    """
    names = None
    if engine.rank() == 0:
        names = [other.name for other in runs.pending_tests(path, tests)]
    # The first process has written the files and is going to write them again.
    names = engine.from_first(names)
    pending = [other for other in tests if other.name in names]
    if not pending:
        return []
    model, _ = checkpoint.load_run(path, args.weights, device)
    autocast = dtype if dtype != torch.float32 else None
    patches = sum(len(other) for other in pending) // engine.world()
    if models.should_compile(args.compile, device, patches, model.encoder.spec):
        models.compile_blocks(model.encoder, quiet=engine.rank() > 0)
    predicted = []
    for other in pending:
        reader = Patches(
            other,
            size=model.encoder.size,
            fit=settings.fit,
            mpp=settings.mpp,
            crop=settings.crop,
        )
        title = other.name if engine.rank() == 0 else None
        logits = engine.predict_together(
            model, reader, len(other), settings.batch_size, autocast, title
        )
        predicted.append((other.name, other, np.arange(len(other)), logits))
    if engine.rank():
        return []
    return checkpoint.add_tests(path, predicted)


if __name__ == "__main__":
    common.command(main)
