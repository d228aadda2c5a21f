"""Training runs: LoRA (--lora) or end to end, by the protocol of the paper.

    python train.py --data midog2022 --model h-optimus-0 --lora --frac 0.1 --fold 0 1 2 3 4
    python train.py --data midog2022 --model resnet50 --domain A B C D E
    torchrun --nproc-per-node 4 train.py …          one run on four GPUs, the same samples in the
    same order

Everything random (the patches of a pseudo-epoch, their augmentation, LoRA's dropout) is a pure
function of the seed and of where the run stands, so that a run continued by --resume ends with the
weights of an uninterrupted one."""

import argparse
import contextlib
import math
import os
import time

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

import checkpoint
import common
import engine
import flags
import lora
import models
import runs
from common import UserError
from dataset.annotations import shared_cases
from dataset.patches import Patches
from dataset.sampler import Sampler
from dataset.splits import make_split
from reporting import figures, metrics

# ---------------------------------------------------------------- a run


def configuration(args, annotations, facts, dtype, weights_hash, licence, frac, fold, domain):
    settings = {
        "data": annotations.name,
        "model": args.model,
        "method": "lora" if args.lora else "full",
        "frac": frac,
        "fold": fold,
        "domain": domain,
        "seed": args.seed,
        "by": args.split,
        "val_frac": args.val_frac,
        "weights": checkpoint.absolute(args.weights),
        "pool": args.pool,
        "layer": args.layer,
        "fit": args.fit,
        "mpp": args.mpp,
        "dtype": models.name_of(dtype),
        "epochs": args.epochs,
        "epoch_size": args.epoch_size,
        "batch_size": args.batch_size,
        "lr": args.lr,
        "balance": args.balance,
        "random_share": args.random_share,
        "jitter": args.jitter,
        "stain_jitter": args.stain_jitter,
        "tissue": args.tissue,
    }
    if args.lora:
        settings |= {
            name: getattr(args, name)
            for name in ("rank", "alpha", "dropout", "targets", "dora", "rslora")
        }
    return {
        "flags": settings,
        "data": {"name": annotations.name, "fingerprint": annotations.fingerprint(), **facts},
        "encoder": {"name": args.model, "licence": licence, "weights_hash": weights_hash},
        "source": flags.source(args) | {"revision": args.revision},
        "environment": runs.environment(),
    }


def suffixes(args):
    """What goes into the run's name beside the method: the choices that are not the default."""
    found = []
    if args.lora:
        found += [f"r{args.rank}"] * (args.rank != 16) + [f"a{args.alpha:g}"] * (args.alpha != 16)
        found += [f"d{args.dropout:g}"] * (args.dropout != 0.1)
        found += ["+".join(args.targets)] * (tuple(args.targets) != lora.TARGETS)
        found += ["dora"] * args.dora + ["rslora"] * args.rslora
    found += [args.pool] * bool(args.pool) + [f"layer{args.layer}"] * bool(args.layer)
    return (
        found + [f"by{args.split}"] * (args.split != "case") + [args.fit] * (args.fit != "resize")
    )


def train(args, annotations, patches, run, split, base, device, dtype):
    """Train the run to its end (from its checkpoint, where there is one) and test it; rank 0
    writes.
    """
    config, first = run.config, engine.rank() == 0
    fold, method = config["flags"]["fold"], config["flags"]["method"]
    seed = engine.run_seed(args.seed, fold)
    model, parameters = engine.make_model(args, base, device, seed)
    sampler = Sampler(
        annotations,
        split.train,
        args.epoch_size,
        args.seed,
        fold,
        args.balance,
        args.random_share,
        patches.window,
        args.jitter,
        patches.tissue if args.tissue else None,
    )
    trainer = engine.Engine(args, model, parameters, sampler, patches, device, dtype, seed)
    validation = annotations.rows(split.val)
    labels, val_patches = annotations.label[validation], engine.Decoded(patches, validation)
    wide = None if args.lora else dtype
    state = checkpoint.Progress(run)
    if state.restore(model, parameters, trainer.optimizer, trainer.scaler) and first:
        print(f"continuing after pseudo-epoch {state.epoch} of {args.epochs}", flush=True)
    if first:
        run.truncate_log(state.epoch)
        if state.epoch == 0:
            trained = sum(p.numel() for p in parameters.values())
            everything = sum(p.numel() for p in model.parameters())
            print(
                f"training {trained:,} of {everything:,} parameters in {models.name_of(dtype)} on "
                f"{device}"
                f"{f', {engine.world()} processes' if engine.world() > 1 else ''}; "
                f"{len(split.train):,} annotations, validation "
                f"{len(split.val):,}, test {len(split.test):,}",
                flush=True,
            )
    bar = (
        common.progress(
            total=(args.epochs - state.epoch) * args.epoch_size, desc="training", unit="patches"
        )
        if first
        else contextlib.nullcontext(Silent())
    )
    with bar as bar:
        validated = ""
        for number in range(state.epoch, args.epochs):
            start = time.perf_counter()
            train_loss = trainer.epoch(number, bar, validated)
            rate = args.epoch_size / (time.perf_counter() - start)
            logits = engine.predict_together(model, val_patches, len(validation), args, wide)
            loss, auroc = engine.validation_loss(labels, logits), metrics.auroc(labels, logits)
            if first:
                lr = engine.learning_rate(
                    (number + 1) * trainer.steps_per_epoch - 1,
                    args.epochs * trainer.steps_per_epoch,
                    args.lr,
                )
                run.log(
                    {
                        "epoch": number + 1,
                        "lr": lr,
                        "train_loss": train_loss,
                        "val_loss": loss,
                        "val_auroc": auroc,
                        "patches_per_s": round(rate, 2),
                    }
                )
                state.save(
                    model, method, parameters, trainer.optimizer, trainer.scaler, loss, auroc
                )
                validated = f", validation {loss:.3f}, AUROC {auroc:.3f}"
            if engine.world() > 1:
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
    if engine.rank() == 0:
        best, numbers = checkpoint.load_tensors(state.best_file())
    if engine.world() > 1:
        box = [best]
        dist.broadcast_object_list(box, src=0)
        best = box[0]
    model.load_state_dict(best, strict=False)
    sets = [("val", annotations, annotations.rows(split.val), val_patches)]
    sets += [
        (name, annotations, annotations.rows(ids), None)
        for name, ids in {"test": split.test, **split.others}.items()
    ]
    predicted = []
    for name, table, rows, reader in sets:
        reader = reader or engine.Decoded(patches, rows)
        predicted.append(
            (
                name,
                table,
                rows,
                engine.predict_together(
                    model, reader, len(rows), args, None if args.lora else dtype
                ),
            )
        )
    if engine.rank():
        return []
    columns = runs.predictions(predicted)
    metadata = {
        "format": f"{common.NAME}-run",
        "method": run.config["flags"]["method"],
        "encoder": args.model,
    }
    with common.atomic(run.path / "model.safetensors") as temporary:
        save_file(best, temporary, metadata=metadata)
    runs.write_predictions(run.path / "predictions.csv", columns)
    figures.curves(run.path)
    summary = metrics.of_predictions(columns)
    run.finish(
        summary
        | {
            "training": {
                "epochs": args.epochs,
                "best_epoch": numbers["epoch"],
                "val_loss": numbers["val_loss"],
                "val_auroc": None if math.isnan(numbers["val_auroc"]) else numbers["val_auroc"],
                "train_annotations": len(split.train),
            }
        }
    )
    return runs.metric_rows(run.path, summary)


def further_tests(args, annotations, tests, path, device, dtype):
    """Predictions of a finished run on the whole datasets of --test, by all processes; rows of the
    table.
    """
    pending = [None]
    if engine.rank() == 0:
        pending = [[other.name for other in runs.pending_tests(path, tests)]]
    if engine.world() > 1:  # the first process has written the file and is going to write it again
        dist.broadcast_object_list(pending, src=0)
    wanted = [other for other in tests if other.name in pending[0]]
    if not wanted:
        return []
    model, config = checkpoint.load_run(path, args.weights, device)
    predicted = []
    for other in wanted:
        shared = shared_cases(annotations, other)
        if shared and engine.rank() == 0:
            print(
                f"note: {other.name} shares {len(shared)} cases with {annotations.name}, for "
                "example "
                f"{sorted(map(str, shared))[0]}: its figures are not those of unseen cases",
                flush=True,
            )
        reader = Patches(other, fit=args.fit, mpp=args.mpp)
        wide = dtype if dtype != torch.float32 else None
        predicted.append(
            (
                other.name,
                other,
                np.arange(len(other)),
                engine.predict_together(
                    model,
                    reader,
                    len(other),
                    args,
                    wide,
                    progress=other.name if engine.rank() == 0 else None,
                ),
            )
        )
    if engine.rank():
        return []
    columns = runs.add_predictions(path / "predictions.csv", runs.predictions(predicted))
    summary = metrics.of_predictions(columns)
    runs.finish_tests(path, summary, wanted)
    return runs.metric_rows(path, summary, {other.name for other in wanted})


# ---------------------------------------------------------------- the command


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
    group.add_argument("--rank", type=int, default=16, help="rank of the adapters (default: 16)")
    group.add_argument(
        "--alpha", type=float, default=16, help="their scale is alpha / rank (default: 16)"
    )
    group.add_argument(
        "--dropout", type=float, default=0.1, help="dropout of the adapters' input (default: 0.1)"
    )
    group.add_argument(
        "--targets",
        nargs="+",
        default=list(lora.TARGETS),
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
        choices=("annotation", "slide"),
        default="annotation",
        help="draw a class's annotations uniformly, or the slide first (default: annotation)",
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
    group.add_argument(
        "--stain-jitter",
        type=float,
        default=0.0,
        help="augmentation of the stains (default: 0, none)",
    )
    group.add_argument("--tissue", action="store_true", help="random patches from tissue alone")
    group.add_argument(
        "--accumulate",
        type=int,
        default=1,
        metavar="N",
        help="compute each batch in N parts (default: 1, and more where it does not fit)",
    )
    group.add_argument(
        "--checkpointing",
        action="store_true",
        help="compute activations again in the backward pass: "
        "a third slower, a fraction of the memory",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the training step (for GPUs; on CPUs it is slower than without)",
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="deterministic algorithms on the GPU too (slower)",
    )
    group = parser.add_argument_group("runs")
    group.add_argument(
        "--runs", default="runs", metavar="DIR", help="folder of all runs (default: runs)"
    )
    flags.add_test_arguments(group)
    group.add_argument(
        "--resume",
        action="store_true",
        help="continue runs that were begun (does no harm otherwise)",
    )
    group.add_argument(
        "--force",
        action="store_true",
        help="repeat runs that are there; a model that was exported into one goes too",
    )
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
        raise UserError(
            f"--epoch-size {args.epoch_size} --random-share {args.random_share}: 2 patches at "
            "least, and a "
            "share between 0 and 0.5"
        )
    if (
        not 0 <= args.dropout < 1
        or not 0 < args.alpha < math.inf
        or len(set(args.targets)) < len(args.targets)
    ):
        raise UserError(
            f"--dropout {args.dropout} --alpha {args.alpha} --targets {' '.join(args.targets)}: a "
            "number "
            "in [0, 1), one above 0, and each target once"
        )
    if args.accumulate > args.batch_size:
        raise UserError(f"--accumulate {args.accumulate}: more parts than patches in a batch")
    spec = models.find_encoder(args.model)
    if args.accumulate > 1 and not spec.depth:
        raise UserError(
            f"--accumulate {args.accumulate}: {args.model} normalises over the batch, parts of "
            "one would "
            "be normalised each for itself; use a smaller --batch-size"
        )
    if args.lora and not spec.depth:
        raise UserError(
            f"--lora adapts the linear layers of a transformer, {args.model} has none: train it "
            "end to "
            "end, without --lora"
        )


@engine.others_may_fail()
def main():
    args = arguments()
    check(args)
    annotations = flags.from_arguments(args)
    flags.need_images(annotations)
    tests = flags.further(args)
    device = engine.start_processes(args)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    dtype = models.resolve_dtype(args.dtype, device, models.find_encoder(args.model))
    if args.weights == "random" and engine.rank() == 0:
        print(
            "WEIGHTS: random numbers, for dry runs and benchmarks: the results mean nothing",
            flush=True,
        )
    # Before anything is written: what is wrong with the weights is said first.
    base = engine.load_base(args, dtype, device)
    patches, rows, facts = None, [], flags.facts(annotations, args.fit)
    for domain in dict.fromkeys(args.domain or [None]):
        for frac in dict.fromkeys(args.frac):
            for fold in dict.fromkeys(args.fold):
                split = make_split(
                    annotations, fold, frac, domain, args.seed, args.split, args.val_frac
                )
                flags.check_further(tests, annotations, split)  # before the training, not after it
                config = configuration(
                    args,
                    annotations,
                    facts,
                    dtype,
                    base.weights_hash,
                    base.licence,
                    frac,
                    fold,
                    split.settings["domain"],
                )
                path = runs.run_path(
                    args.runs,
                    annotations.name,
                    args.model,
                    config["flags"]["method"],
                    frac,
                    fold,
                    split.settings["domain"],
                    suffixes(args),
                )
                run, finished = open_on_first(path, config, args)
                with run:
                    if engine.rank() == 0:
                        print(f"{'finished' if finished else 'run'}: {path}", flush=True)
                    if not finished:
                        if engine.rank() == 0:
                            split.save(path / "split.json")
                        patches = patches or Patches(
                            annotations,
                            fit=args.fit,
                            mpp=args.mpp,
                            source_mpp=args.source_mpp,
                            jitter=args.jitter,
                        )
                        rows += train(args, annotations, patches, run, split, base, device, dtype)
                    if tests:
                        rows += further_tests(args, annotations, tests, path, device, dtype)
    if rows:
        print(
            common.table(
                rows,
                ("run", "set", "patches", "balanced acc", "weighted F1", "AUROC"),
                right=(2, 3, 4, 5),
            )
        )
    if dist.is_initialized():
        dist.barrier()  # the first process still writes when the others are done
        dist.destroy_process_group()


def open_on_first(path, config, args):
    """(run, whether it is finished): the first process opens and locks the folder, the others only
    read from it.
    """
    if engine.world() == 1:
        run = runs.open_run(path, config, args.resume, args.force)
        return run, run.finished
    answer = [None]
    if engine.rank() == 0:
        try:
            run = runs.open_run(path, config, args.resume, args.force)
            answer = [(run.finished, run.config, None)]
        except UserError as error:
            answer = [(None, None, str(error))]
    dist.broadcast_object_list(answer, src=0)
    finished, kept, error = answer[0]
    if error:
        raise UserError(error)
    return (run if engine.rank() == 0 else runs.Run(path, kept, finished, None)), finished


if __name__ == "__main__":
    common.command(main)
