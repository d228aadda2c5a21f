"""LoRA (Hu et al. 2022) around the linear layers of a transformer: wrap, count, merge, save, load.

    y = W x + b + scale * B A dropout(x)        scale = alpha / rank (rsLoRA: alpha / sqrt(rank))

A [r, in] starts kaiming-uniform(a = sqrt 5), B [out, r] at zero, so a fresh adapter changes
nothing. Parameters are called lora_A, lora_B (DoRA: also lora_magnitude); everything else is
frozen.

The dropout mask is a hash of (seed, step, layer, sample, element), see encoders/dropout.py: a
resumed run draws the same one, and so does any number of processes."""

import contextlib
import hashlib
import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import common
from common import UserError
from dataset.formats.cells import are_class_names
from encoders.dropout import WEYL, Dropout, add_kept, drop, kept_share, splitmix
from encoders.layers import Linear, linear

TARGETS = ("qkv", "proj", "fc1", "fc2")


class LoRAFunction(torch.autograd.Function):
    """Adapted linear layer.

    For the backward pass it keeps its input as the adapter sees it and h = A dropout(x), which is
    tiny; the frozen weight gets no gradient, so the input itself is not needed. On CPUs it keeps
    the mask too: a byte per element costs less than hashing it again.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale, key, p):
        ctx.p, ctx.scale, ctx.shape = p, scale / kept_share(p), x.shape
        ctx.elements = x.shape[1:].numel()  # of a sample
        x = x.reshape(-1, x.shape[-1])
        seen, keep = drop(x, key, ctx.elements, p)  # not yet divided by the kept share
        h = linear(seen, A.to(x.dtype))  # [n, r]
        y = linear(x, weight, bias)  # [n, out]
        y.addmm_(h, (B * ctx.scale).to(x.dtype).T)
        ctx.save_for_backward(seen, weight, A, B, key, h, keep)
        return y.view(*ctx.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        seen, weight, A, B, key, h, keep = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        gh = linear(g, (B * ctx.scale).to(g.dtype).T)  # [n, r]
        gB = linear(h.T, g.T).T.to(B.dtype) * ctx.scale
        gA = linear(gh.T, seen.T).to(A.dtype)
        gx = None
        if ctx.needs_input_grad[0]:
            back = linear(gh, A.to(g.dtype).T)
            gx = add_kept(linear(g, weight.T), back, key, ctx.elements, ctx.p, keep)
            gx = gx.view(ctx.shape)
        return gx, None, None, gA, gB, None, None, None


class LoRALinear(nn.Module):
    """A frozen nn.Linear with a low-rank correction. `base` keeps weight and bias."""

    def __init__(self, base, rank, alpha, dropout, layer, dora=False, rslora=False):
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.train(base.training)
        self.rank, self.alpha, self.p, self.layer = rank, alpha, dropout, layer
        self.rslora = rslora
        self.scale = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.folded = False
        exact = torch.promote_types(base.weight.dtype, torch.float32)
        kind = {"device": base.weight.device, "dtype": exact}
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **kind))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **kind))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.lora_magnitude = None
        if dora:
            lengths = base.weight.detach().to(kind["dtype"]).norm(dim=1)
            self.lora_magnitude = nn.Parameter(lengths)
        self.register_buffer(
            "key", torch.zeros(1, dtype=torch.int64, device=base.weight.device), persistent=False
        )

    in_features = property(lambda self: self.weight.shape[1])
    out_features = property(lambda self: self.weight.shape[0])

    def forward(self, x):
        p = self.p if self.training else 0.0
        if self.folded:
            return linear(x, self.adapted_weight().to(x.dtype), self.bias)
        key = self.key
        if len(key) != len(x) and p > 0:
            # set_step() was called for another batch, or not at all: masks by the place in this one
            key = key[:1] + torch.arange(len(x), device=x.device) * WEYL
        if self.lora_magnitude is not None:
            return self.dora(x, key, p)
        return LoRAFunction.apply(
            x, self.weight, self.bias, self.lora_A, self.lora_B, self.scale, key, p
        )

    def dora(self, x, key, p):
        """DoRA (Liu et al. 2024): the adapted weight's rows get learned lengths.

        The norm is not differentiated.
        """
        weight, low = self.weight.to(self.lora_A.dtype), self.scale * self.lora_B @ self.lora_A
        factor = (self.lora_magnitude / (weight + low).norm(dim=1).detach()).to(x.dtype)
        seen = Dropout.apply(x, key, p) / kept_share(p) if p > 0 else x
        up = F.linear(F.linear(seen, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype)) * self.scale
        # As in peft: what the factor adds sees the dropout too.
        return (
            F.linear(x, self.weight, self.bias)
            + (factor - 1) * F.linear(seen, self.weight)
            + factor * up
        )

    def adapted_weight(self):
        """W + scale B A, with DoRA's lengths [out, in], in float32 at least."""
        exact = torch.promote_types(self.weight.dtype, torch.float32)
        low = self.lora_B.to(exact) @ self.lora_A.to(exact)
        # Not addmm: compilers fuse a sum with the conversions before and after it.
        weight = torch.add(self.weight, low, alpha=self.scale)
        if self.lora_magnitude is not None:
            weight = weight * (self.lora_magnitude.to(exact) / weight.norm(dim=1))[:, None]
        return weight

    def merged(self):
        """The plain layer with the same outputs; computed in float32 at least, rounded once."""
        weight = self.adapted_weight().detach().to(self.weight.dtype)
        if not weight.isfinite().all():
            raise UserError(
                f"layer {self.layer}: its weights with the adapter are not finite: the training "
                "diverged, or the precision is too small"
            )
        plain = Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.bias = self.bias
        return plain


def adapted(encoder):
    """[(name, LoRALinear)] of an encoder."""
    return [
        (name, module) for name, module in encoder.named_modules() if isinstance(module, LoRALinear)
    ]


def check_settings(rank, alpha, dropout):
    """UserError if an adapter cannot have this rank, alpha and dropout."""
    if rank < 1:
        raise UserError(f"--rank {rank}: give 1 or more")
    if not 0 < alpha < 1e6:
        raise UserError(f"--alpha {alpha}: give a number above 0, at most a million")
    if not 0 <= dropout < 1 or kept_share(dropout) <= 0:
        raise UserError(f"--dropout {dropout}: give a number from 0 to 0.9999")


def add_lora(
    encoder: nn.Module,
    rank: int = 16,
    alpha: float = 16,
    dropout: float = 0.1,
    targets: tuple[str, ...] = TARGETS,
    dora: bool = False,
    rslora: bool = False,
) -> int:
    """Wrap the target layers of every block of `encoder.blocks` and freeze everything else.

    Returns the number of wrapped layers: targets x depth. UserError if there are fewer, so that a
    name that matches nothing is never skipped silently.
    """
    check_settings(rank, alpha, dropout)
    blocks = getattr(encoder, "blocks", None)
    if not blocks:
        name = getattr(getattr(encoder, "spec", None), "name", "this encoder")
        raise UserError(
            f"{name} has no transformer blocks for LoRA: train it end to end, without --lora"
        )
    encoder.requires_grad_(False)
    count = 0
    for block in blocks:
        for module in block.modules():
            for name, child in list(module.named_children()):
                if name not in targets or not isinstance(child, nn.Linear):
                    continue
                width = min(child.in_features, child.out_features)
                if rank > width:
                    raise UserError(
                        f"--rank {rank}: the layer {name} is {width} wide; give at most that"
                    )
                adapter = LoRALinear(child, rank, alpha, dropout, count, dora, rslora)
                setattr(module, name, adapter)
                count += 1
    expected = len(targets) * len(blocks)
    if count != expected:
        raise UserError(
            f"LoRA targets {', '.join(targets)}: {count} layers found, {expected} expected "
            f"({len(targets)} in each of {len(blocks)} blocks); possible targets: "
            f"{', '.join(TARGETS)}"
        )
    return count


def set_step(encoder, seed, step, samples):
    """Key the dropout masks of the next forward pass.

    samples: numbers [B] of the batch's samples within the step.
    """
    layers = [module for _, module in adapted(encoder)]
    keys = step_keys(layers, seed, step, samples)
    use_keys(layers, keys.to(layers[0].weight.device))


def step_keys(layers, seed, step, samples):
    """Keys int64 [layers, B] of the dropout masks of a step, on the CPU; see set_step."""
    seed = torch.tensor((seed + 2**63) % 2**64 - 2**63)  # any whole number, as 64 bits
    numbers = torch.tensor([module.layer for module in layers])
    keys = splitmix(splitmix(splitmix(seed) + step) + numbers)
    return splitmix(keys[:, None] + torch.as_tensor(samples, dtype=torch.int64))


def use_keys(layers, keys):
    """Let the layers read their rows of `keys` [layers, B] in the next forward passes."""
    for module, key in zip(layers, keys):
        module.key = key


@contextlib.contextmanager
def folded(encoder):
    """Within it the layers compute with W + scale B A, made anew in each forward pass.

    For evaluation in large batches, where this costs less than the two thin products. No weight is
    changed.
    """
    layers = [module for _, module in adapted(encoder)]
    for module in layers:
        module.folded = True
    try:
        yield
    finally:
        for module in layers:
            module.folded = False


def merge_lora(encoder: nn.Module) -> nn.Module:
    """Put the adapters into plain layers, once. Returns the encoder; merging again changes nothing.

    UserError if a merged weight would not be finite; then no layer has been merged.
    """
    for _, module in adapted(encoder):
        module.merged()
    # By name: each layer's old weights must be free before the next one is merged.
    for name in [name for name, _ in adapted(encoder)]:
        parent, _, last = name.rpartition(".")
        parent = encoder.get_submodule(parent)
        setattr(parent, last, getattr(parent, last).merged())
    return encoder


def adapter_parameters(encoder):
    """{name: parameter} of all adapters."""
    return {
        f"{name}.{key}": value
        for name, module in adapted(encoder)
        for key, value in module.named_parameters()
        if key.startswith("lora_")
    }


def lora_state_dict(encoder):
    return {name: value.detach() for name, value in adapter_parameters(encoder).items()}


def load_lora(encoder, state):
    """Fill the adapters; UserError unless `state` has exactly their names and shapes."""
    parameters = adapter_parameters(encoder)
    wrong = sorted(set(parameters) ^ set(state))
    wrong = wrong or [name for name in parameters if parameters[name].shape != state[name].shape]
    if wrong:
        raise UserError(
            f"the adapter does not fit: {len(wrong)} tensors differ, for example {wrong[0]}"
        )
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(state[name])


# ---------------------------------------------------------------- peft's format

PREFIX = "base_model.model."  # of every tensor's name in peft's files
PARTS = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_magnitude": "lora_magnitude_vector",
}
CONFIG, TENSORS, HEAD = "adapter_config.json", "adapter_model.safetensors", "head.safetensors"
HEADS = ("head", "classifier", "fc")  # names of a classifier among peft's modules_to_save
# Entries of adapter_config.json that are read below, or change no result of a finished adapter.
# Any other one that is set is refused.
READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora"}
READ |= {"init_lora_weights", "modules_to_save", "bias"}
HARMLESS = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
HARMLESS |= {"inference_mode", "target_modules", "exclude_modules", "layers_pattern"}
HARMLESS |= {"megatron_core", "qalora_group_size", "eva_config", "runtime_config"}
HARMLESS |= {"ensure_weight_tying"}
# Initialisations that leave the base weights as published. Others (PiSSA, OLoRA, CorDA, LoftQ,
# LoRA-GA) train on a changed base, so their adapter alone is not the model.
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def save_peft(
    encoder: nn.Module, folder, base: str = "", head: nn.Linear | None = None, classes=None
) -> None:
    """Write the adapter in peft's format, for timm's model with the same names of layers.

    base: name of the model, for the reader. head: written beside it as head.safetensors, which peft
    ignores and load_head reads. classes: names of the labels 0 and 1, which go into its header.
    """
    layers = adapted(encoder)
    if not layers:
        raise UserError("no adapter to write: the encoder has none, or it is merged already")
    first = layers[0][1]
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.p,
        "bias": "none",
        # With the block's part ("attn.proj"): "proj" alone is the patch embedding's too.
        "target_modules": sorted({".".join(name.split(".")[-2:]) for name, _ in layers}),
        "fan_in_fan_out": False,
        "use_dora": first.lora_magnitude is not None,
        "use_rslora": first.rslora,
        "modules_to_save": None,
    }
    tensors = {}
    for name, value in lora_state_dict(encoder).items():
        layer, _, part = name.rpartition(".")
        tensors[f"{PREFIX}{layer}.{PARTS[part]}"] = value.to("cpu", copy=True).contiguous()
    folder = Path(folder)
    with common.atomic(folder / TENSORS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    if head is None:
        (folder / HEAD).unlink(missing_ok=True)  # of an earlier adapter in this folder
    else:
        state = {"head.weight": head.weight, "head.bias": head.bias}
        state = {name: value.detach().float().cpu() for name, value in state.items()}
        metadata = {"classes": json.dumps(classes)} if classes else None
        with common.atomic(folder / HEAD) as temporary:
            save_file(state, temporary, metadata=metadata)
    common.write_json(folder / CONFIG, config)


def peft_settings(folder) -> dict:
    """Settings of an adapter in peft's format: add_lora's arguments, without the encoder.

    UserError if it is none, or its configuration asks for what add_lora does not do.
    """
    path = Path(folder) / CONFIG
    config = common.read_json(path)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{path}: not the configuration of a LoRA adapter")
    start = config.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        raise UserError(
            f"{path}: init_lora_weights = {str(start)[:40]} changes the base weights, which this "
            "adapter alone does not hold; convert it with peft's save_pretrained(…, "
            "path_initial_model_for_weight_conversion=…)"
        )
    for name, value in config.items():
        supported = name in READ or name in HARMLESS or not value
        if name == "bias":
            supported = value in (None, "none")
        if not supported:
            raise UserError(f"{path}: {name} = {str(value)[:40]} is not supported")
    saved = config.get("modules_to_save") or []
    for name in saved if isinstance(saved, list) else [saved]:
        if name not in HEADS:
            raise UserError(
                f"{path}: modules_to_save = {str(name)[:40]} is not supported, only a classifier "
                f"called {', '.join(HEADS)}"
            )
    settings = {"dropout": config.get("lora_dropout", 0.0)}
    settings |= {"rank": config.get("r"), "alpha": config.get("lora_alpha")}
    for name, kinds in (("rank", int), ("alpha", (int, float)), ("dropout", (int, float))):
        if isinstance(settings[name], bool) or not isinstance(settings[name], kinds):
            raise UserError(
                f"{path}: r must be a whole number, lora_alpha and lora_dropout numbers"
            )
    try:
        check_settings(**settings)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    names = _peft_tensors(folder)
    targets = tuple(t for t in TARGETS if any(f".{t}.lora_A" in name for name in names))
    if not targets:
        raise UserError(f"{Path(folder) / TENSORS}: holds no adapter of {', '.join(TARGETS)}")
    dora, rslora = bool(config.get("use_dora")), bool(config.get("use_rslora"))
    return {**settings, "targets": targets, "dora": dora, "rslora": rslora}


def load_peft(encoder: nn.Module, folder, dropout: float | None = None) -> int:
    """Adapt a plain encoder by an adapter in peft's format → number of adapted layers.

    dropout: for further training, instead of the adapter's. UserError if it asks for what add_lora
    does not do (biases, ranks that differ by layer, other modules, …) or does not fit the encoder.
    """
    settings = peft_settings(folder)
    if dropout is not None:
        settings["dropout"] = dropout
    file, theirs = Path(folder) / TENSORS, {theirs: ours for ours, theirs in PARTS.items()}
    state = {}
    for name, value in _peft_tensors(folder).items():
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.(" + "|".join(PARTS.values()) + ")", name)
        if match:
            state[f"{match[1]}.{theirs[match[2]]}"] = value
        elif not _is_head(name):
            raise UserError(f"{file}: {name[:80]} does not belong to a LoRA adapter")
    for name, value in state.items():
        if name.endswith("lora_A") and value.shape[0] != settings["rank"]:
            raise UserError(f"{file}: {name} has not the rank {settings['rank']} of {CONFIG}")
    try:
        count = add_lora(encoder, **settings)
        load_lora(encoder, state)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    return count


def load_head(folder) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Weight [1, D] and bias [1] of the classifier in an adapter's folder, or None if it has none.

    It is either save_peft's head.safetensors or peft's modules_to_save. Two rows, as trained with
    cross-entropy, are those of label 0 and label 1: their difference gives the logit.
    """
    file = Path(folder) / HEAD
    if file.is_file():
        tensors = _read(file)
    else:
        file = Path(folder) / TENSORS
        tensors = {name: value for name, value in _peft_tensors(folder).items() if _is_head(name)}
        if not tensors:
            return None
    parts = {name.rpartition(".")[2]: value.float() for name, value in tensors.items()}
    weight, bias = parts.get("weight"), parts.get("bias")
    if weight is None or weight.dim() != 2 or len(weight) not in (1, 2) or len(tensors) > 2:
        raise UserError(f"{file}: its classifier is no linear layer of one or two outputs")
    if bias is None:
        bias = torch.zeros(len(weight))
    if bias.shape != weight.shape[:1] or not (weight.isfinite().all() and bias.isfinite().all()):
        raise UserError(f"{file}: its classifier is damaged")
    if len(weight) == 2:
        weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
    return weight, bias


def head_classes(folder) -> list | None:
    """Names of the labels 0 and 1 in the header of an adapter's head.safetensors, None if it does
    not say them.
    """
    file = Path(folder) / HEAD
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as handle:
            names = json.loads((handle.metadata() or {}).get("classes", "null"))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not readable ({error})") from None
    if names is not None and not are_class_names(names):
        raise UserError(f"{file}: the class names in its header are damaged")
    return names


def adapter_hash(folder) -> str:
    """Hash of an adapter in peft's format: of its settings and tensors, head included."""
    digest = hashlib.sha256(json.dumps(peft_settings(folder), sort_keys=True).encode())
    tensors = dict(_peft_tensors(folder))
    if (Path(folder) / HEAD).is_file():
        tensors |= _read(Path(folder) / HEAD)
    for name in sorted(tensors):
        value = tensors[name].float().contiguous()
        digest.update(f"{name} {list(value.shape)}".encode() + value.numpy().tobytes())
    return digest.hexdigest()


def _peft_tensors(folder):
    """{name: tensor} of adapter_model.safetensors."""
    file = Path(folder) / TENSORS
    if not file.is_file() and (Path(folder) / "adapter_model.bin").is_file():
        raise UserError(
            f"{folder}: the adapter is pickled (adapter_model.bin), which is not read; save it "
            "with peft's save_pretrained(…, safe_serialization=True)"
        )
    return _read(file)


def _read(file):
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file}: not readable ({error})") from None


def _is_head(name):
    return re.fullmatch(rf"{re.escape(PREFIX)}({'|'.join(HEADS)})\.(weight|bias)", name) is not None
