"""Linear probes: the embeddings of all annotated patches in one pass, then every probe asked for
from them.

    python probe.py --data midog2022 --model uni --frac 0.001 0.01 0.1 1 --fold 0 1 2 3 4
    python probe.py --data midog2022 --model uni --domain A B C D E --fold 0 1 2 3 4
    torchrun --nproc-per-node 4 probe.py …          the pass over the patches on four GPUs

The embeddings stay in a memory map under runs/embeddings/; a second command with the same encoder
and data reads them from there. Each probe gets a run folder of its own, which evaluate.py and
export.py take as they take LoRA's."""

import argparse
import contextlib
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import checkpoint
import common
import flags
import logistic
import models
import runs
from common import UserError
from dataset import memmap
from dataset.annotations import shared_cases
from dataset.patches import Patches
from dataset.splits import make_split
from reporting import metrics

PROBES = {
    "uni": "logistic regression of UNI's evaluation: 1/C * |W| / 2, the norm not squared (the "
    "paper's)",
    "l2": "logistic regression with squared L2, C chosen on the validation set",
    "knn": "share of mitotic figures among the nearest neighbours by cosine (not exportable)",
    "prototype": "few shots: the nearer of two class means",
}
C_GRID = tuple(10.0**k for k in range(-6, 3))
SECONDS = 5  # of embeddings are written to the disk together: what a kill can cost


# ---------------------------------------------------------------- embeddings


def embeddings(model, patches, annotations, path, dtype, batch_size):
    """Embeddings [N, D] of all annotated patches, as a read-only memory map; computed where they
    are missing.

    Kept in float32, or in float16 where the encoder's own numbers are that: half the disk, not a
    digit lost. A kill in the middle costs the last seconds. Stored embeddings that belong to other
    weights, pixels, annotations or another normalisation are computed anew, which is said. Under
    torchrun each process takes its share of the rows, and the first returns when all are there (the
    others get None)."""
    encoder, rank, world = (
        model.encoder,
        int(os.environ.get("RANK", 0)),
        int(os.environ.get("WORLD_SIZE", 1)),
    )
    fingerprint = {
        "encoder": encoder.spec.name,
        "weights": encoder.weights_hash,
        "pool": encoder.pool,
        "layer": encoder.layer,
        "tta": model.tta,
        "normalisation": [model.mean.flatten().tolist(), model.std.flatten().tolist()],
        "dtype": models.name_of(dtype),
        "annotations": annotations.fingerprint(),
        "pixels": patches.fingerprint(),
    }
    try:
        return memmap.open_store(path, fingerprint)
    except memmap.Missing:
        pass
    except memmap.Stale as stale:
        if rank == 0:
            print(f"{stale}; computing the embeddings anew", flush=True)
    shape = (len(annotations), encoder.embed_dim)
    kind = np.float16 if dtype == torch.float16 and not model.tta else np.float32
    with memmap.Writer(path, shape, kind, fingerprint, shared=world > 1) as writer:
        todo = writer.todo
        own = todo[todo % world == rank]
        if rank == 0 and 0 < len(todo) < shape[0]:
            print(
                f"embeddings: continuing, {shape[0] - len(todo):,} of {shape[0]:,} are there",
                flush=True,
            )
        waiting, last = [], time.monotonic()

        def flush():
            if waiting:
                writer.write(*map(np.concatenate, zip(*waiting)))
                waiting.clear()

        def keep(rows, values):
            nonlocal last
            waiting.append((rows, values))
            if time.monotonic() - last >= SECONDS:
                flush()
                last = time.monotonic()

        try:
            models.predict(
                model,
                patches,
                own,
                batch_size,
                dtype=dtype,
                output="embedding",
                progress=f"embeddings, {encoder.spec.name}",
                keep=keep,
            )
        finally:  # what is there when it is stopped
            flush()
        if rank:
            return None
        while world > 1 and len(
            writer.todo
        ):  # the other processes' shares; torchrun ends all when one of them fails
            time.sleep(0.2)
        writer.finish()
    return memmap.open_store(path, fingerprint)


# ---------------------------------------------------------------- probes


def linear(features, rows, weight, bias):
    """features[rows] @ weight + bias in float64, in pieces: the whole in float64 can be larger than
    the memory.
    """
    found = [
        features[rows[i : i + 4096]].astype(np.float64) @ weight + bias
        for i in range(0, len(rows), 4096)
    ]
    return np.concatenate(found) if found else np.empty((0, *weight.shape[1:]))


def fit_logistic(X, labels, jobs, penalty, standardize, fixed_C, device):
    """Fit all jobs ({"train": rows, "val": rows, …}) side by side; adds "weight", "bias" and "fit"
    to each.
    """
    grid = (None,) if penalty == "uni" else C_GRID if fixed_C is None else (fixed_C,)
    problems = [(job["train"], C) for job in jobs for C in grid]
    with common.progress(total=len(problems), desc=f"{penalty} probes", unit="fits") as bar:
        fits = logistic.fit(X, labels, problems, penalty, standardize, device=device, progress=bar)
    for number, job in enumerate(jobs):
        own = fits[number * len(grid) : (number + 1) * len(grid)]
        for result in own:
            if not result.converged:
                raise UserError(
                    f"{job['path']}: the {penalty} probe did not converge (excess about "
                    f"{result.excess:.0e} after {result.iterations} iterations); try "
                    "--standardize with "
                    "--probe l2"
                )
        logits = linear(
            X, job["val"], np.stack([f.weight for f in own], 1), np.array([f.bias for f in own])
        )
        losses = (
            np.logaddexp(0, (1 - 2.0 * labels[job["val"], None]) * logits).mean(0)
            if len(logits)
            else [0.0]
        )
        best = int(np.argmin(losses))  # on a tie the smaller C, which comes first
        result, C = own[best], grid[best]
        job["weight"], job["bias"] = result.weight, result.bias
        job["fit"] = {
            "C": logistic.uni_C(X.shape[1]) if C is None else C,
            "train_loss": result.loss,
            "val_loss": float(losses[best]),
            "iterations": result.iterations,
            "excess": result.excess,
            "change": result.change,
        }


def fit_prototypes(X, labels, job, shots, seed):
    """Class means of `shots` training patches per class: the logit is linear, -2 at one mean and +2
    at the other.
    """
    rng = np.random.Generator(np.random.Philox(key=seed))
    means = []
    for label in (0, 1):
        rows = job["train"][labels[job["train"]] == label]
        chosen = np.sort(rng.permutation(rows)[:shots])
        means.append(X[chosen].astype(np.float64).mean(0))
    difference = means[1] - means[0]
    job["weight"] = 4 * difference / max(difference @ difference, 1e-300)
    job["bias"] = -float(job["weight"] @ (means[0] + means[1]) / 2)
    job["fit"] = {"shots": shots}


def knn_logits(features, X, labels, train, rows, k):
    """Log-odds of the mitotic figures among the k training rows nearest by cosine, one of each
    class added.
    """

    def normalised(part):
        part = part.astype(np.float32)
        return part / np.linalg.norm(part, axis=1, keepdims=True).clip(1e-12)

    bank, k = normalised(X[train]), min(k, len(train))
    logits = np.empty(len(rows))
    for i in range(0, len(rows), 1024):
        similarity = normalised(features[rows[i : i + 1024]]) @ bank.T
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        positive = labels[train][nearest].sum(1) + 1.0
        logits[i : i + 1024] = np.log(positive / (k + 2 - positive))
    return logits


# ---------------------------------------------------------------- runs


def configuration(args, probe, annotations, facts, encoder, dtype, split):
    settings = {
        "data": annotations.name,
        "model": args.model,
        "method": "probe",
        "probe": probe,
        **{
            name: split.settings[name]
            for name in ("frac", "fold", "domain", "seed", "by", "val_frac")
        },
        "pool": encoder.pool,
        "layer": args.layer,
        "dtype": models.name_of(dtype),
        "tta": args.tta,
        "fit": args.fit,
        "mpp": args.mpp,
        "weights": checkpoint.absolute(args.weights),
    }
    own = {"uni": (), "l2": ("C", "standardize"), "knn": ("k",), "prototype": ("shots",)}[probe]
    settings |= {name: getattr(args, name) for name in own}
    return {
        "flags": settings,
        "data": {"name": annotations.name, "fingerprint": annotations.fingerprint(), **facts},
        "encoder": {
            "name": args.model,
            "licence": encoder.licence,
            "weights_hash": encoder.weights_hash,
        },
        "source": flags.source(args) | {"revision": args.revision},
        "environment": runs.environment(),
    }


def suffixes(args, probe, encoder):
    """What goes into the run's name beside the method: the choices that are not the default."""
    found = [] if probe == "uni" else [probe]
    if probe == "l2":
        found += [f"C{args.C:g}"] if args.C is not None else []
        found += ["standardized"] * args.standardize
    if probe == "knn" and args.k != 20:
        found += [f"k{args.k}"]
    if probe == "prototype" and args.shots != 10:
        found += [f"shots{args.shots}"]
    if encoder.pool != encoder.spec.pool:
        found += [encoder.pool]
    found += [f"layer{args.layer}"] * bool(args.layer) + ["tta"] * args.tta
    return (
        found + [f"by{args.split}"] * (args.split != "case") + [args.fit] * (args.fit != "resize")
    )


def all_embeddings(model, annotations, args, dtype):
    """Embeddings of one dataset, from their place below the runs' folder."""
    flags.need_images(annotations)
    encoder = model.encoder
    patches = Patches(annotations, fit=args.fit, mpp=args.mpp, source_mpp=args.source_mpp)
    name = "-".join(
        [encoder.spec.name, encoder.pool]
        + [f"layer{args.layer}"] * bool(args.layer)
        + ["tta"] * args.tta
    )
    path = Path(args.runs) / "embeddings" / annotations.name / name
    return embeddings(model, patches, annotations, path, dtype, args.batch_size)


def logits_of(job, features, rows, X, labels, k):
    if job["probe"] == "knn":
        return knn_logits(features, X, labels, job["train"], rows, k)
    return linear(features, rows, job["weight"], job["bias"])


def finish(job, annotations, X, args):
    """Predictions, metrics and the head of one fitted probe into its run folder; returns its rows
    of the table.
    """
    run, split = job["run"], job["split"]
    rows = {"val": job["val"], "test": annotations.rows(split.test)}
    rows |= {name: annotations.rows(ids) for name, ids in split.others.items()}
    columns = runs.predictions(
        [
            (name, annotations, own, logits_of(job, X, own, X, annotations.label, args.k))
            for name, own in rows.items()
        ]
    )
    split.save(run.path / "split.json")
    if job["probe"] != "knn":
        head = {
            "head.weight": torch.tensor(job["weight"], dtype=torch.float32)[None],
            "head.bias": torch.tensor([job["bias"]], dtype=torch.float32),
        }
        with common.atomic(run.path / "model.safetensors") as temporary:
            save_file(
                head,
                temporary,
                metadata={"format": f"{common.NAME}-run", "method": "probe", "encoder": args.model},
            )
    runs.write_predictions(run.path / "predictions.csv", columns)
    summary = metrics.of_predictions(columns)
    run.finish(
        summary | {"training": {"train_annotations": len(split.train), **job.get("fit", {})}}
    )
    return runs.metric_rows(run.path, summary)


def further_tests(job, annotations, X, tests, args):
    """Predictions of a finished run on the whole datasets of --test, where they are missing; rows
    of the table.
    """
    path = job["path"]
    pending = runs.pending_tests(path, [other for other, _ in tests])
    missing = [(other, features) for other, features in tests if other in pending]
    if not missing:
        return []
    if job["probe"] != "knn" and "weight" not in job:  # fitted by an earlier command
        head = load_file(path / "model.safetensors")
        job["weight"], job["bias"] = (
            head["head.weight"][0].double().numpy(),
            head["head.bias"].item(),
        )
    columns = runs.add_predictions(
        path / "predictions.csv",
        runs.predictions(
            [
                (
                    other.name,
                    other,
                    rows,
                    logits_of(job, features, rows, X, annotations.label, args.k),
                )
                for other, features in missing
                for rows in [np.arange(len(other))]
            ]
        ),
    )
    summary = metrics.of_predictions(columns)
    runs.finish_tests(path, summary, pending)
    return runs.metric_rows(path, summary, {other.name for other, _ in missing})


# ---------------------------------------------------------------- the command


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_arguments(parser)
    flags.add_split_arguments(parser)
    models.add_arguments(parser)
    group = parser.add_argument_group("probe")
    group.add_argument(
        "--probe",
        nargs="+",
        choices=PROBES,
        default=["uni"],
        metavar="P",
        help="; ".join(f"{name}: {text}" for name, text in PROBES.items()) + " (default: uni)",
    )
    group.add_argument(
        "--C", type=float, help="l2: this C instead of the choice on the validation set"
    )
    group.add_argument(
        "--standardize", action="store_true", help="l2: features of zero mean and unit variance"
    )
    group.add_argument("--k", type=int, default=20, help="knn: neighbours (default: 20)")
    group.add_argument(
        "--shots", type=int, default=10, help="prototype: patches per class (default: 10)"
    )
    group.add_argument(
        "--tta", action="store_true", help="embedding: mean over the eight flips and quarter turns"
    )
    group.add_argument(
        "--batch-size", type=int, default=64, help="patches per forward pass (default: 64)"
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


def main():
    args = arguments()
    for name, least in (("k", 1), ("shots", 1), ("batch_size", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least {least}")
    if args.C is not None and not 0 < args.C < math.inf:
        raise UserError(f"--C {args.C}: a finite number above 0")
    annotations, others = flags.from_arguments(args), flags.further(args)
    flags.need_images(annotations)
    rank = int(os.environ.get("RANK", 0))
    device = models.resolve_device(args.device)
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    dtype = models.resolve_dtype(args.dtype, device, models.find_encoder(args.model))
    encoder = models.load_encoder(
        args.model, args.weights, device, dtype, args.pool, args.layer, args.revision
    )
    model = models.PatchClassifier(encoder, tta=args.tta).to(device)

    # The runs that are to be done; the finished ones are named and left alone.
    jobs, facts = [], flags.facts(annotations, args.fit)
    for probe in dict.fromkeys(args.probe) if rank == 0 else ():
        for domain in dict.fromkeys(args.domain or [None]):
            for frac in dict.fromkeys(args.frac):
                for fold in dict.fromkeys(args.fold):
                    split = make_split(
                        annotations, fold, frac, domain, args.seed, args.split, args.val_frac
                    )
                    flags.check_further(others, annotations, split)
                    path = runs.run_path(
                        args.runs,
                        annotations.name,
                        args.model,
                        "probe",
                        frac,
                        fold,
                        split.settings["domain"],
                        suffixes(args, probe, encoder),
                    )
                    config = configuration(args, probe, annotations, facts, encoder, dtype, split)
                    jobs.append(
                        {
                            "probe": probe,
                            "path": path,
                            "config": config,
                            "split": split,
                            "frac": frac,
                            "fold": fold,
                            "train": np.sort(annotations.rows(split.train)),
                            "val": annotations.rows(split.val),
                        }
                    )
                    if (path / "config.json").exists() and not args.force:
                        runs.open_run(
                            path, config, args.resume
                        ).close()  # what it refuses, before the long pass

    # Further test sets too, before the other processes leave: each holds a share of the rows.
    X, tests = all_embeddings(model, annotations, args, dtype), []
    for other in others:
        shared = shared_cases(annotations, other)
        if shared and rank == 0:
            print(
                f"note: {other.name} shares {len(shared)} cases with {annotations.name}, for "
                "example "
                f"{sorted(map(str, shared))[0]}: its figures are not those of unseen cases",
                flush=True,
            )
        tests.append((other, all_embeddings(model, other, args, dtype)))
    if rank:
        return
    with contextlib.ExitStack() as opened:
        for job in jobs:
            job["run"] = opened.enter_context(
                runs.open_run(job["path"], job["config"], args.resume, args.force)
            )
            if job["run"].finished:
                print(f"finished: {job['path']}")
        todo = [job for job in jobs if not job["run"].finished]
        for probe in dict.fromkeys(job["probe"] for job in todo):
            own = [job for job in todo if job["probe"] == probe]
            if probe in ("uni", "l2"):
                fit_logistic(
                    X,
                    annotations.label,
                    own,
                    probe,
                    args.standardize and probe == "l2",
                    args.C,
                    device,
                )
            elif probe == "prototype":
                for job in own:
                    fit_prototypes(
                        X, annotations.label, job, args.shots, (args.seed << 16) + job["fold"]
                    )
        rows = [row for job in todo for row in finish(job, annotations, X, args)]
        rows += [row for job in jobs for row in further_tests(job, annotations, X, tests, args)]
    if rows:
        print(
            common.table(
                rows,
                ("run", "set", "patches", "balanced acc", "weighted F1", "AUROC"),
                right=(2, 3, 4, 5),
            )
        )


if __name__ == "__main__":
    common.command(main)
