"""What a run leaves on disk, and how it is loaded again.

A checkpoint while it trains; the model, its predictions and metrics when it is done.
"""

import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import common
import lora
import models
import runs
import weights as published
from common import UserError
from dataset.formats.cells import are_class_names
from reporting import metrics

# ---------------------------------------------------------------- tensors of a run


def trained_state(model, method):
    """What the run's model.safetensors holds: LoRA: adapters and head; full: everything."""
    state = model.state_dict()
    if method == "lora":
        state = {
            name: value
            for name, value in state.items()
            if "lora_" in name or name.startswith("head.")
        }
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}


def save_tensors(path, tensors, **facts):
    """Write tensors, and `facts` (JSON values) into the header.

    As one entry of the header: the library writes several in random order, and equal runs have
    equal files.
    """
    metadata = {common.NAME: json.dumps(facts, sort_keys=True)}
    with common.atomic(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def load_tensors(path):
    """({name: tensor}, facts) of a file of save_tensors. Files of version 0 have an entry for each
    fact. UserError if it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            # Copies: Windows replaces no file that is still mapped.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: truncated, or no safetensors file ({error})") from None
    try:
        if common.NAME in metadata:
            return tensors, json.loads(metadata[common.NAME])
        return tensors, {name: _json_or_text(value) for name, value in metadata.items()}
    except ValueError as error:
        raise UserError(f"{path}: its header is damaged ({error})") from None


def _json_or_text(value):
    try:
        return json.loads(value)
    except ValueError:
        return value


# ---------------------------------------------------------------- while it trains

KEPT = 3  # models that are best on a sample of the validation set, validated on all of it


class Progress:
    """Where a run stands after a pseudo-epoch, and its checkpoint in several files.

    checkpoint.safetensors holds parameters, Adam's moments and the numbers below; each of the best
    models so far has a file of its own, checkpoint.best-<epoch>.safetensors, which the first one
    names, so that a kill between the two does no harm. keep: the number of best models.

    After the last epoch, checkpoint.logits-<epoch>.safetensors holds what a kept model predicts for
    the whole validation set, so that none is validated twice.
    """

    def __init__(self, run, keep=1):
        self.run, self.keep = run, keep
        self.epoch = 0  # pseudo-epochs done
        self.best = []  # (validation loss, epoch) of the models that are kept, the lowest first

    @property
    def best_epochs(self):
        """Pseudo-epochs of the models that are kept, that of the lowest validation loss first."""
        return [epoch for _, epoch in self.best]

    @property
    def best_epoch(self):
        """The pseudo-epoch of the lowest validation loss; None before the first."""
        return self.best[0][1] if self.best else None

    def best_file(self, epoch):
        return self.run.path / f"checkpoint.best-{epoch}.safetensors"

    def logits_file(self, epoch):
        return self.run.path / f"checkpoint.logits-{epoch}.safetensors"

    def is_stale(self, patience):
        """Whether `patience` pseudo-epochs brought no lower validation loss; None: never."""
        return patience is not None and self.epoch - (self.best_epoch or 0) >= patience

    def save(self, model, method, parameters, optimizer, scaler, loss, scores):
        """Take in the validation loss of the epoch just done, and write it all.

        scores: {name: number} of its validation, for the header of its file.
        """
        self.epoch += 1
        state = trained_state(model, method)
        if loss < math.inf:  # equal losses: the earlier epoch
            self.best = sorted([*self.best, (loss, self.epoch)])[: self.keep]
        if self.epoch in self.best_epochs:
            save_tensors(
                self.best_file(self.epoch),
                state,
                format=f"{common.NAME}-run",
                method=method,
                epoch=self.epoch,
                **scores,
            )
        tensors = {f"model.{name}": value for name, value in state.items()}
        for name, parameter in parameters.items():
            for key, value in optimizer.state[parameter].items():
                tensors[f"adam.{name}.{key}"] = value.detach().cpu().contiguous()
        save_tensors(
            self.run.checkpoint,
            tensors,
            epoch=self.epoch,
            best=self.best,
            scaler=scaler.state_dict(),
        )
        kept = set(map(self.best_file, self.best_epochs))
        for old in self.run.path.glob("checkpoint.best-*"):
            if old not in kept:
                old.unlink()

    def restore(self, model, parameters, optimizer, scaler):
        """Continue from checkpoint.safetensors; False if there is none."""
        if not self.run.checkpoint.exists():
            return False
        try:
            self._restore(model, parameters, optimizer, scaler)
        except (UserError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.run.checkpoint}: the run cannot be continued ({error}); start it over with "
                "--force"
            ) from None
        return True

    def _restore(self, model, parameters, optimizer, scaler):
        """Load parameters, Adam's moments and the numbers; any error if they do not fit."""
        tensors, numbers = load_tensors(self.run.checkpoint)
        prefix = "model."
        state = {
            name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)
        }
        missing = parameters.keys() - state.keys()
        if not missing:
            missing = set(model.load_state_dict(state, strict=False).unexpected_keys)
        if missing:
            raise UserError(f"it does not fit this model: {sorted(missing)[0]}")
        for name, parameter in parameters.items():
            prefix = f"adam.{name}."
            moments = {}
            for key, value in tensors.items():
                if key.startswith(prefix):
                    # On GPUs the fused Adam wants its step counter there too.
                    moments[key[len(prefix) :]] = value.to(parameter.device)
            optimizer.state[parameter] = moments
        if numbers["scaler"]:
            scaler.load_state_dict(numbers["scaler"])
        self.epoch = numbers["epoch"]
        if "best" in numbers:
            self.best = [(float(loss), int(epoch)) for loss, epoch in numbers["best"]]
        elif numbers["best_epoch"] is not None:  # earlier versions kept one
            self.best = [(numbers["best_loss"], numbers["best_epoch"])]

    def load(self, epoch):
        """({name: tensor}, facts) of the model that was kept after `epoch`."""
        return load_tensors(self.best_file(epoch))

    def save_logits(self, epoch, logits):
        """Keep the logits [N] of the whole validation set, by the model of `epoch`."""
        save_tensors(self.logits_file(epoch), {"logits": torch.from_numpy(logits)})

    def load_logits(self, epoch, count):
        """The float64 logits [count] that were kept; None if there are none."""
        path = self.logits_file(epoch)
        if not path.exists():
            return None
        logits = load_tensors(path)[0].get("logits")
        if logits is None or logits.dtype != torch.float64 or logits.shape != (count,):
            raise UserError(f"{path}: not the logits of this validation set; delete the file")
        return logits.numpy()


# ---------------------------------------------------------------- when it is done


def finish(run, tensors, predicted, training):
    """Write model, predictions and metrics of a run, metrics.json last → rows of its table.

    tensors: of model.safetensors, None if the run has no model; predicted: [(set, Annotations, its
    rows, their logits)]; training: facts for metrics.json.
    """
    settings = run.config["flags"]
    if tensors is not None:
        save_tensors(
            run.path / "model.safetensors",
            tensors,
            format=f"{common.NAME}-run",
            method=settings["method"],
            encoder=settings["model"],
        )
    columns = runs.predictions(predicted)
    runs.write_predictions(run.path / "predictions.csv", columns)
    summary = metrics.of_predictions(columns)
    run.finish(summary | {"training": training})
    return runs.metric_rows(run.path, summary)


def add_tests(path, predicted):
    """Add further test sets to the finished run at `path` → their rows of the table.

    predicted: as for finish; the name of a set is that of its dataset.
    """
    columns = runs.add_predictions(path / "predictions.csv", runs.predictions(predicted))
    summary = metrics.of_predictions(columns)
    runs.finish_tests(path, summary, [table for _, table, _, _ in predicted])
    return runs.metric_rows(path, summary, {name for name, *_ in predicted})


# ---------------------------------------------------------------- loading


def absolute(weights):
    """A path given to --weights as a run keeps it, to be found from anywhere; names as they are."""
    if weights and weights != "random" and Path(weights).exists():
        return str(Path(weights).resolve())
    return weights


def _text(value):
    return value is None or isinstance(value, str)


def _switch(value):
    return value is None or isinstance(value, bool)


def _whole(value):
    return value is None or (type(value) is int and 0 <= value < 2**63)


def _positive(value):
    return value is None or (type(value) in (int, float) and 0 < value < 1e9)


def _share(value):
    return value is None or (type(value) in (int, float) and 0 <= value <= 1)


def _scale(value):
    """µm/px; of early versions also a dict, by image or domain."""
    if isinstance(value, dict):
        return all(map(_positive, value.values()))
    return _positive(value)


# What of config.json is used, and when it is right. None: as if it were not there.
ENTRIES = {
    "flags": {
        "model": lambda v: isinstance(v, str),
        "method": lambda v: v in ("probe", "lora", "full"),
        "rank": _whole,
        "alpha": _positive,
        "dropout": _share,
        "targets": lambda v: v is None or (isinstance(v, list) and all(map(_text, v))),
        "layer": _whole,
        "size": _whole,
        "crop": _whole,
        "fold": _whole,
        "mpp": _positive,
        "frac": _share,
        "fit": lambda v: v in (None, "resize", "pad"),
        **dict.fromkeys(("dora", "rslora", "tta"), _switch),
        **dict.fromkeys(("data", "domain", "name", "pool", "probe", "weights"), _text),
    },
    "data": {
        "name": _text,
        "mpp": _scale,
        "mixed_mpp": lambda v: v is None or (isinstance(v, dict) and all(map(_whole, v.values()))),
        "patch": lambda v: _whole(v) and v != 0,
        "classes": lambda v: v is None or are_class_names(v),
    },
    "encoder": dict.fromkeys(("name", "licence", "weights_hash"), _text),
    "source": {
        **dict.fromkeys(("data", "images", "classes", "profile", "positive", "negative"), _text),
        **dict.fromkeys(("columns", "fit", "revision"), _text),
        "crop": _whole,
        "mpp": _positive,
        "source_mpp": _positive,
    },
}


def read_config(path):
    """config.json of a run with its parts flags, data, encoder and source; UserError if it is
    damaged.
    """
    file = Path(path) / "config.json"
    config = common.read_json(file)
    if not isinstance(config, dict) or "flags" not in config:
        raise UserError(f"{file}: not the configuration of a run")
    for part, entries in ENTRIES.items():
        values = config.setdefault(part, {})
        if not isinstance(values, dict):
            raise UserError(f"{file}: {part} is damaged; restore the file or repeat the run")
        for name, right in entries.items():
            if not right(values.get(name)):
                raise UserError(
                    f"{file}: {part}.{name} is damaged ({json.dumps(values.get(name))[:60]}); "
                    "restore the file or repeat the run"
                )
    flags = config["flags"]
    if flags["method"] == "lora" and None in (flags.get(n) for n in ("rank", "alpha", "targets")):
        raise UserError(f"{file}: rank, alpha or targets of the adapter are missing")
    return config


def load_run(path, weights=None, device="cpu", merge=False):
    """The classifier of a run folder (probe, lora or full) → (PatchClassifier in evaluation mode,
    its config).

    weights  the encoder's, as for load_encoder; None: as the run was given them. They must be those
             of the run.
    merge    LoRA adapters are merged into plain layers
    """
    path = Path(path)
    config = read_config(path)
    file = path / "model.safetensors"
    flags, base = config["flags"], config["encoder"]
    name, method, probe = flags["model"], flags["method"], flags.get("probe")
    revision = config["source"].get("revision")
    if probe == "knn":
        raise UserError(
            f"{path}: a knn probe is its training set, it has no model to load or export; uni and "
            "l2 have one"
        )
    if not file.exists():
        raise UserError(
            f"{path}: no model.safetensors: not a finished run (continue it with --resume)"
        )
    state, _ = load_tensors(file)
    choices = {name: flags.get(name) for name in ("pool", "layer", "size")}
    if method == "full":
        with torch.device("meta"):
            encoder = models.build(models.find_encoder(name), **choices)
        encoder.to_empty(device="cpu")
        encoder.licence, encoder.weights_hash = encoder.spec.licence, base.get("weights_hash")
    else:
        given = weights or flags.get("weights")
        encoder = models.load_encoder(name, given, "cpu", **choices, revision=revision)
        expected = base.get("weights_hash")
        if expected and expected != encoder.weights_hash:
            raise UserError(
                f"{path}: was trained on other weights of {name} (hash {expected[:12]}…, these "
                f"have {encoder.weights_hash[:12]}…); give the same with --weights PATH"
            )
    if method == "lora":
        state = _adapt(encoder, flags, state)
        if merge:
            lora.merge_lora(encoder)
    model = models.PatchClassifier(encoder, tta=bool(flags.get("tta")))
    expected = model.state_dict()
    if method != "full":
        expected = {name: value for name, value in expected.items() if name.startswith("head.")}
    _check_fit(file, expected, state)
    model.load_state_dict(state, strict=False)
    return model.to(device).eval(), config


def _adapt(encoder, flags, state):
    """Put the run's adapters into the encoder → the rest of `state`."""
    lora.add_lora(
        encoder,
        rank=flags["rank"],
        alpha=flags["alpha"],
        dropout=flags.get("dropout") or 0.0,
        targets=tuple(flags["targets"]),
        dora=bool(flags.get("dora")),
        rslora=bool(flags.get("rslora")),
    )
    prefix = "encoder."
    adapters = {name for name in state if name.startswith(prefix)}
    lora.load_lora(encoder, {name[len(prefix) :]: state[name] for name in adapters})
    return {name: value for name, value in state.items() if name not in adapters}


def _check_fit(file, expected, state):
    """UserError unless `state` has exactly the names and shapes of `expected`."""
    shapes = []
    for name, value in expected.items():
        if name in state and state[name].shape != value.shape:
            shapes.append(f"{name} {list(state[name].shape)} instead of {list(value.shape)}")
    missing, surplus = expected.keys() - state.keys(), state.keys() - expected.keys()
    if shapes or missing or surplus:
        listing = published.listing(missing, surplus, shapes)
        raise UserError(f"{file}: not the model of this run: {listing}")
