"""What a run leaves on disk and how it is loaded again: checkpoints while it trains, the model when
it is done.
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
import weights as published
from common import UserError


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


def save_tensors(path, tensors, **metadata):
    with common.atomic(path) as temporary:
        save_file(
            tensors,
            temporary,
            metadata={name: json.dumps(value) for name, value in metadata.items()},
        )


def load_tensors(path):
    try:
        with safe_open(path, framework="pt") as file:
            metadata = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(
            f"{path}: not a readable checkpoint ({error}); start the run over with --force"
        ) from None


class Progress:
    """Where a run stands after a pseudo-epoch, and its checkpoint in two files.

    checkpoint.safetensors holds parameters, Adam's moments and the numbers below; the best model so
    far has a file of its own, checkpoint.best-<epoch>.safetensors, named by the first, so that a
    kill between the two does no harm."""

    def __init__(self, run):
        self.run, self.epoch, self.best_epoch, self.best_loss, self.scale = (
            run,
            0,
            None,
            math.inf,
            None,
        )

    def best_file(self):
        return self.run.path / f"checkpoint.best-{self.best_epoch}.safetensors"

    def save(self, model, method, parameters, optimizer, scaler, loss, auroc):
        """Take in the validation of the epoch just done and write it all."""
        self.epoch += 1
        state = trained_state(model, method)
        if loss < self.best_loss:
            self.best_loss, self.best_epoch = loss, self.epoch
            save_tensors(
                self.best_file(),
                state,
                format=f"{common.NAME}-run",
                method=method,
                epoch=self.epoch,
                val_loss=loss,
                val_auroc=auroc,
            )
        tensors = {f"model.{name}": value for name, value in state.items()}
        for name, parameter in parameters.items():
            for key, value in optimizer.state[parameter].items():
                tensors[f"adam.{name}.{key}"] = value.detach().cpu().contiguous()
        save_tensors(
            self.run.checkpoint,
            tensors,
            epoch=self.epoch,
            best_epoch=self.best_epoch,
            best_loss=self.best_loss,
            scaler=scaler.state_dict(),
        )
        for old in self.run.path.glob("checkpoint.best-*"):
            if old != self.best_file():
                old.unlink()

    def restore(self, model, parameters, optimizer, scaler):
        """Continue where checkpoint.safetensors stands; False where there is none."""
        if not self.run.checkpoint.exists():
            return False
        tensors, numbers = load_tensors(self.run.checkpoint)
        state = {name[6:]: value for name, value in tensors.items() if name.startswith("model.")}
        missing = parameters.keys() - state.keys() or set(
            model.load_state_dict(state, strict=False).unexpected_keys
        )
        if missing:
            raise UserError(
                f"{self.run.checkpoint}: does not fit this model ({sorted(missing)[0]}); start "
                "the run "
                "over with --force"
            )
        for name, parameter in parameters.items():
            prefix = f"adam.{name}."
            optimizer.state[parameter] = {
                key[len(prefix) :]: value
                if key.endswith(".step") and parameter.device.type == "cpu"
                else value.to(parameter.device)
                for key, value in tensors.items()
                if key.startswith(prefix)
            }
        if numbers["scaler"]:
            scaler.load_state_dict(numbers["scaler"])
        self.epoch, self.best_epoch, self.best_loss = (
            numbers[k] for k in ("epoch", "best_epoch", "best_loss")
        )
        return True


def absolute(weights):
    """A path given to --weights as a run keeps it, found from anywhere; names and "random" as they
    are.
    """
    there = weights and weights != "random" and Path(weights).exists()
    return str(Path(weights).resolve()) if there else weights


def load_run(path, weights=None, device="cpu", merge=False):
    """The classifier of a run folder (probe, lora or full) → (PatchClassifier in evaluation mode,
    its config).

    weights  the encoder's, as for load_encoder; None: as the run was given them. They must be those
             of the run.
    merge    LoRA adapters are merged into plain layers
    """
    path = Path(path)
    config = common.read_json(path / "config.json")
    model_file = path / "model.safetensors"
    if isinstance(config, dict) and config.get("flags", {}).get("probe") == "knn":
        raise UserError(
            f"{path}: a knn probe is its training set, there is no model to load or export; uni "
            "and l2 "
            "have one"
        )
    if not model_file.exists():
        raise UserError(
            f"{path}: no model.safetensors: not a finished run (continue it with --resume)"
        )
    try:
        flags, base = config["flags"], config.get("encoder", {})
        name, method = flags["model"], flags["method"]
    except (KeyError, TypeError):
        raise UserError(
            f"{path}/config.json: not the configuration of a run (model or method is missing)"
        ) from None
    state = published.read_own(model_file)
    choices = dict(pool=flags.get("pool"), layer=flags.get("layer"))
    if method == "full":
        with torch.device("meta"):
            encoder = models.build(models.find_encoder(name), **choices)
        encoder.to_empty(device="cpu")
        encoder.licence, encoder.weights_hash = encoder.spec.licence, base.get("weights_hash")
    else:
        encoder = models.load_encoder(
            name,
            weights or flags.get("weights"),
            "cpu",
            **choices,
            revision=config.get("source", {}).get("revision"),
        )
        expected = base.get("weights_hash")
        if expected and expected != encoder.weights_hash:
            raise UserError(
                f"{path}: was trained on other weights of {name} (hash {expected[:12]}…, these "
                "have "
                f"{encoder.weights_hash[:12]}…); give the same with --weights PATH"
            )
    if method == "lora":
        lora.add_lora(
            encoder,
            rank=flags["rank"],
            alpha=flags["alpha"],
            dropout=flags.get("dropout", 0.0),
            targets=tuple(flags["targets"]),
            dora=bool(flags.get("dora")),
            rslora=bool(flags.get("rslora")),
        )
        prefix = "encoder."
        lora.load_lora(
            encoder, {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        )
        state = {k: v for k, v in state.items() if not k.startswith(prefix)}
        if merge:
            lora.merge_lora(encoder)
    model = models.PatchClassifier(encoder, tta=bool(flags.get("tta")))
    wanted = {
        k: v for k, v in model.state_dict().items() if method == "full" or k.startswith("head.")
    }
    shapes = [
        f"{k} {list(state[k].shape)} instead of {list(v.shape)}"
        for k, v in wanted.items()
        if k in state and state[k].shape != v.shape
    ]
    if shapes or wanted.keys() != state.keys():
        raise UserError(
            f"{model_file}: not the model of this run: "
            f"{published.listing(wanted.keys() - state.keys(), state.keys() - wanted.keys(), shapes)}"
        )
    model.load_state_dict(state, strict=False)
    return model.to(device).eval(), config
