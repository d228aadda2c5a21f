"""Linear probes: the embeddings of all annotated patches in one pass, then any number of probes.

    python probe.py --data midog2022 --model uni --frac 0.001 0.01 0.1 1 --fold 0 1 2 3 4
    python probe.py --data midog2022 --model uni --domain A B C D E --fold 0 1 2 3 4
    torchrun --nproc-per-node 4 probe.py …          the pass over the patches on four GPUs

The embeddings stay in a memory map under runs/embeddings/; a second command with the same encoder
and data reads them from there. Each probe gets a run folder of its own, which evaluate.py and
export.py read as they read LoRA's.
"""

import common  # first: Ctrl-C during the imports below ends with one line

# isort: split
import argparse
import contextlib
import dataclasses
import math
import time
from pathlib import Path

import numpy as np
import torch

import checkpoint
import engine
import flags
import logistic
import models
import runs
from common import UserError
from dataset import memmap
from dataset.patches import FINGERPRINT, Patches
from dataset.sampler import balanced

PROBES = {
    "uni": "logistic regression of UNI's evaluation: 1/C * |W| / 2, the norm not squared (the "
    "paper's)",
    "l2": "logistic regression with squared L2, C chosen on the validation set",
    "knn": "share of label 1 among the nearest neighbours by cosine (not exportable)",
    "prototype": "few shots: the nearer of two class means",
}
# The flags that only one kind of probe has.
OWN_FLAGS = {
    "uni": ("class_weight",),
    "l2": ("C", "standardize", "class_weight"),
    "knn": ("k",),
    "prototype": ("shots",),
}
C_GRID = tuple(10.0**k for k in range(-6, 3))
SECONDS = 5  # of embeddings are written to the disk together: what a kill can cost


# ---------------------------------------------------------------- the command's flags


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
    group.add_argument(
        "--class-weight",
        choices=("balanced",),
        help="uni, l2: both classes count the same in the loss, as in scikit-learn, and in the "
        "choice of C (default: every annotation does)",
    )
    group.add_argument("--k", type=int, default=20, help="knn: neighbours (default: 20)")
    group.add_argument(
        "--shots", type=int, default=10, help="prototype: patches per class (default: 10)"
    )
    group.add_argument(
        "--tta", action="store_true", help="embedding: mean over the eight flips and quarter turns"
    )
    group.add_argument(
        "--batch-size", type=int, help="patches per forward pass (default: 128 on GPUs, else 64)"
    )
    models.add_compile_argument(group)
    flags.add_run_arguments(parser)
    return parser.parse_args()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeSettings(runs.Settings):
    """The flags that change a probe's result."""

    probe: str
    tta: bool
    C: float | None
    standardize: bool
    k: int
    shots: int
    class_weight: str | None = None  # or "balanced"

    def flags(self):
        names = {name for own in OWN_FLAGS.values() for name in own}
        unused = names - set(OWN_FLAGS[self.probe])
        return {name: value for name, value in super().flags().items() if name not in unused}


def settings_of(args, probe, split, encoder, dtype):
    """The settings of one probe on one split."""
    return ProbeSettings(
        **split.settings,
        data=split.dataset["name"],
        model=args.model,
        method="probe",
        weights=checkpoint.absolute(args.weights),
        pool=encoder.pool,
        layer=args.layer,
        size=models.unusual_size(encoder),
        crop=args.crop,
        name=args.name,
        fit=args.fit,
        mpp=args.mpp,
        dtype=models.name_of(dtype),
        probe=probe,
        tta=args.tta,
        C=args.C,
        standardize=args.standardize,
        k=args.k,
        shots=args.shots,
        class_weight=args.class_weight,
    )


def choices(settings, encoder):
    """The choices that are not the default, for the run's name."""
    own = [] if settings.probe == "uni" else [settings.probe]
    if settings.probe == "l2" and settings.C is not None:
        own.append(f"C{settings.C:g}")
    if settings.probe == "l2" and settings.standardize:
        own.append("standardized")
    if settings.class_weight and "class_weight" in OWN_FLAGS[settings.probe]:
        own.append(settings.class_weight)
    if settings.probe == "knn" and settings.k != 20:
        own.append(f"k{settings.k}")
    if settings.probe == "prototype" and settings.shots != 10:
        own.append(f"shots{settings.shots}")
    pool = settings.pool if settings.pool != encoder.spec.pool else None
    return settings.choices(own, pool, settings.tta)


# ---------------------------------------------------------------- the command


@dataclasses.dataclass
class Job:
    """One probe on one split: rows of its training and validation set, its run, its solution."""

    train: np.ndarray
    val: np.ndarray
    path: Path
    settings: ProbeSettings = None
    split: object = None
    config: dict = None
    run: runs.Run = None
    weight: np.ndarray = None  # [D] float64
    bias: float = None
    facts: dict = dataclasses.field(default_factory=dict)  # about the fit, for metrics.json


def main():
    # Flags, data, encoder.
    args = arguments()
    flags.check_name(args)
    flags.at_least(args, 1, "k", "shots")
    if args.batch_size is not None:
        flags.at_least(args, 1, "batch_size")
    models.check_compile(args.compile, models.find_encoder(args.model))
    if args.class_weight and not {"uni", "l2"} & set(args.probe):
        raise UserError(f"--class-weight {args.class_weight}: only the probes uni and l2 have one")
    if args.C is not None and not 0 < args.C < math.inf:
        raise UserError(f"--C {args.C}: give a finite number above 0")
    rank, _ = engine.launched()
    device = engine.process_device(args.device)
    annotations = flags.from_arguments(args, quiet=rank > 0)
    flags.need_images(annotations, args.mpp, rank > 0, args.crop)
    tests = flags.further(args, annotations, quiet=rank > 0)
    splits = flags.splits(args, annotations, tests, quiet=rank > 0)
    dtype = models.resolve_dtype(args.dtype, device, models.find_encoder(args.model))
    encoder = models.load_encoder(
        args.model, args.weights, device, dtype, args.pool, args.layer, args.revision, args.size
    )
    model = models.PatchClassifier(encoder, tta=args.tta).to(device)
    size = encoder.size
    patches = Patches(
        annotations,
        size=size,
        fit=args.fit,
        mpp=args.mpp,
        source_mpp=args.source_mpp,
        crop=args.crop,
    )
    jobs = []
    if rank == 0:
        jobs = plan(args, annotations, splits, encoder, dtype)

    # The long pass. Every process computes a share of the rows, further test sets included.
    X = all_embeddings(model, annotations, patches, args, dtype)
    features = []
    for other in tests:
        reader = Patches(other, size=size, fit=args.fit, mpp=args.mpp, crop=args.crop)
        features.append((other, all_embeddings(model, other, reader, args, dtype)))
    if rank > 0:
        return

    # All probes side by side; finished runs are named and left alone.
    with contextlib.ExitStack() as opened:
        for job in jobs:
            run = runs.open_run(job.path, job.config, args.resume, args.force)
            job.run = opened.enter_context(run)
            if job.run.finished:
                print(f"finished: {job.path}")
        todo = [job for job in jobs if not job.run.finished]
        fit(todo, X, annotations.label, args, device)
        rows = []
        for job in todo:
            rows += finish(job, annotations, X)
        for job in jobs:
            rows += further_tests(job, annotations, X, features)
    runs.print_metrics(rows)


def plan(args, annotations, splits, encoder, dtype):
    """The Jobs of all probes and splits; UserError if an existing run was done differently."""
    facts = flags.facts(annotations, args.fit, args.mpp, args.source_mpp, encoder.size, args.crop)
    jobs = []
    source = flags.source(args) | {"revision": args.revision}
    domains = np.unique(annotations.domain)
    for probe in dict.fromkeys(args.probe):
        for split in splits:
            settings = settings_of(args, probe, split, encoder, dtype)
            path = runs.folder(args.runs, settings, choices(settings, encoder), domains)
            config = runs.configuration(settings, annotations, facts, encoder, source)
            if (path / "config.json").exists() and not args.force:
                # What it refuses is known before the long pass.
                runs.open_run(path, config, args.resume).close()
            train, val = np.sort(annotations.rows(split.train)), annotations.rows(split.val)
            jobs.append(Job(train, val, path, settings, split, config))
    lines = [line for split in splits for line in runs.one_class(annotations, split)]
    for line in dict.fromkeys(lines):
        print(f"problem: {line}", flush=True)
    return jobs


def fit(jobs, X, labels, args, device):
    """Solve all probes, those of one kind together."""
    kinds = {}
    for job in jobs:
        kinds.setdefault(job.settings.probe, []).append(job)
    for probe, group in kinds.items():
        if probe in ("uni", "l2"):
            standardize = args.standardize and probe == "l2"
            fit_logistic(X, labels, group, probe, standardize, args.C, device, args.class_weight)
        elif probe == "prototype":
            for job in group:
                fit_prototypes(X, labels, job, args.shots, job.settings.run_seed)


def finish(job, annotations, X):
    """Head, predictions and metrics of one solved probe into its run folder → rows of the table."""
    predicted = []
    for name, ids in runs.sets_of(job.split).items():
        rows = annotations.rows(ids)
        predicted.append((name, annotations, rows, logits_of(job, X, rows, X, annotations.label)))
    job.split.save(job.run.path / "split.json")
    head = None
    if job.settings.probe != "knn":
        head = {
            "head.weight": torch.tensor(job.weight, dtype=torch.float32)[None],
            "head.bias": torch.tensor([job.bias], dtype=torch.float32),
        }
    training = {"train_annotations": len(job.split.train), **job.facts}
    return checkpoint.finish(job.run, head, predicted, training)


def further_tests(job, annotations, X, tests):
    """Predictions of a finished run on the whole datasets of --test, where they are missing.

    tests: [(Annotations, their embeddings)]. Returns rows of the table.
    """
    names = [other.name for other in runs.pending_tests(job.path, [other for other, _ in tests])]
    pending = [(other, features) for other, features in tests if other.name in names]
    if not pending:
        return []
    if job.settings.probe != "knn" and job.weight is None:  # solved by an earlier command
        head, _ = checkpoint.load_tensors(job.path / "model.safetensors")
        job.weight = head["head.weight"][0].double().numpy()
        job.bias = head["head.bias"].item()
    predicted = []
    for other, features in pending:
        rows = np.arange(len(other))
        logits = logits_of(job, features, rows, X, annotations.label)
        predicted.append((other.name, other, rows, logits))
    return checkpoint.add_tests(job.path, predicted)


# ---------------------------------------------------------------- embeddings


def all_embeddings(model, annotations, patches, args, dtype):
    """Embeddings of one dataset, from their place below the runs' folder."""
    encoder = model.encoder
    parts = [encoder.spec.name, encoder.pool]
    if args.layer:
        parts.append(f"layer{args.layer}")
    if models.unusual_size(encoder):
        parts.append(f"{encoder.size}px")
    if args.crop:
        parts.append(f"crop{args.crop}")
    if args.tta:
        parts.append("tta")
    path = Path(args.runs) / "embeddings" / annotations.name / "-".join(parts)
    return embeddings(model, patches, annotations, path, dtype, args.batch_size, args.compile)


def embeddings(model, patches, annotations, path, dtype, batch_size=None, choice="off"):
    """Embeddings [N, D] of all annotated patches as a read-only memory map, computed if missing.

    In float32, or float16 if the encoder's own numbers are that: half the disk, not a digit lost. A
    kill costs the last seconds. Stored embeddings of other weights, pixels, annotations or another
    normalisation are computed anew, which is said. Under torchrun each process computes a share of
    the rows, and the first returns when all are done (the others get None). choice: of --compile.
    """
    encoder = model.encoder
    rank, world = engine.launched()
    fingerprint = {
        "version": FINGERPRINT,
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
        share = todo[todo % world == rank]
        if models.should_compile(choice, model.head.weight.device, len(share), encoder.spec):
            models.compile_blocks(encoder, quiet=rank > 0)
        if rank == 0 and 0 < len(todo) < len(annotations):
            done = len(annotations) - len(todo)
            print(f"embeddings: continuing, {done:,} of {len(annotations):,} are done", flush=True)
        waiting, written = [], time.monotonic()

        def flush():
            if waiting:
                writer.write(*map(np.concatenate, zip(*waiting)))
                waiting.clear()

        def keep(rows, values):
            nonlocal written
            waiting.append((rows, values))
            if time.monotonic() - written >= SECONDS:
                flush()
                written = time.monotonic()

        try:
            models.predict(
                model,
                patches,
                share,
                batch_size,
                dtype=dtype,
                output="embedding",
                progress=f"embeddings, {encoder.spec.name}",
                keep=keep,
            )
        finally:  # what is computed when it is stopped
            flush()
        if rank > 0:
            return None
        # The other processes' shares; torchrun ends all when one of them fails.
        while world > 1 and len(writer.todo):
            time.sleep(0.2)
        writer.finish()
    return memmap.open_store(path, fingerprint)


# ---------------------------------------------------------------- probes


def linear(features, rows, weight, bias):
    """features[rows] @ weight + bias in float64, in pieces: all of it may not fit into memory."""
    pieces = []
    for i in range(0, len(rows), 4096):
        pieces.append(features[rows[i : i + 4096]].astype(np.float64) @ weight + bias)
    return np.concatenate(pieces) if pieces else np.empty((0, *weight.shape[1:]))


def fit_logistic(X, labels, jobs, penalty, standardize, fixed_C, device, class_weight=None):
    """Fit all jobs side by side; sets their weight, bias and facts.

    The probe l2 without a fixed C tries C_GRID and keeps the C of the lowest validation loss, in
    which the classes weigh as in training.
    """
    if penalty == "uni":
        grid = (None,)
    elif fixed_C is None:
        grid = C_GRID
    else:
        grid = (fixed_C,)
    problems = [(job.train, C) for job in jobs for C in grid]
    with common.progress(total=len(problems), desc=f"{penalty} probes", unit="fits") as bar:
        fits = logistic.fit(
            X,
            labels,
            problems,
            penalty,
            standardize,
            device=device,
            progress=bar,
            class_weight=class_weight,
        )
    for number, job in enumerate(jobs):
        results = fits[number * len(grid) : (number + 1) * len(grid)]
        for result in results:
            if not result.converged:
                raise UserError(
                    f"{job.path}: the {penalty} probe did not converge (excess about "
                    f"{result.excess:.0e} after {result.iterations} iterations); try "
                    "--standardize with --probe l2"
                )
        weights = np.stack([result.weight for result in results], 1)  # [D, C]
        logits = linear(X, job.val, weights, np.array([result.bias for result in results]))
        losses = [0.0]
        if len(logits):
            losses = np.logaddexp(0, (1 - 2.0 * labels[job.val, None]) * logits)  # [n, C]
            if class_weight:
                losses *= balanced(labels[job.train].mean())[labels[job.val], None]
            losses = losses.mean(0)
        best = int(np.argmin(losses))  # on a tie the smaller C, which comes first
        result, C = results[best], grid[best]
        job.weight, job.bias = result.weight, result.bias
        job.facts = {
            "C": logistic.uni_C(X.shape[1]) if C is None else C,
            "train_loss": result.loss,
            "val_loss": float(losses[best]),
            "iterations": result.iterations,
            "excess": result.excess,
            "change": result.change,
        }


def fit_prototypes(X, labels, job, shots, seed):
    """Class means of `shots` training patches per class; sets the job's weight, bias and facts.

    The logit is linear, -2 at one mean and +2 at the other.
    """
    rng = np.random.Generator(np.random.Philox(key=seed))
    means = []
    for label in (0, 1):
        rows = job.train[labels[job.train] == label]
        chosen = np.sort(rng.permutation(rows)[:shots])
        means.append(X[chosen].astype(np.float64).mean(0))
    difference = means[1] - means[0]
    job.weight = 4 * difference / max(difference @ difference, 1e-300)
    job.bias = -float(job.weight @ (means[0] + means[1]) / 2)
    job.facts = {"shots": shots}


def logits_of(job, features, rows, X, labels):
    """Logits [n] of features[rows] by a solved probe; X, labels: of its own dataset."""
    if job.settings.probe == "knn":
        return knn_logits(features, X, labels, job.train, rows, job.settings.k)
    return linear(features, rows, job.weight, job.bias)


def knn_logits(features, X, labels, train, rows, k):
    """Log-odds of label 1 among the k training rows nearest by cosine, one of each
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


if __name__ == "__main__":
    common.command(main)
