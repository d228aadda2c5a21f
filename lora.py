"""LoRA (Hu et al. 2022) around the linear layers of a transformer: wrap, count, merge, save, load.

    y = W x + b + scale * B A dropout(x)        scale = alpha / rank (rsLoRA: alpha / sqrt(rank))

A [r, in] starts kaiming-uniform(a = sqrt 5), B [out, r] at zero, so a fresh adapter changes
nothing. Parameters are called lora_A, lora_B (DoRA: also lora_magnitude); everything else is
frozen.

The dropout mask is a hash of (seed, step, layer, sample, element): it needs no memory for the
backward pass, a resumed run draws the same one, and so does any number of processes."""

import contextlib
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import common
from common import UserError
from encoders.layers import Linear, linear

TARGETS = ("qkv", "proj", "fc1", "fc2")
MIX1, MIX2, WEYL = (
    -0x40A7B892E31B1A47,
    -0x6B2FB644ECCEEE15,
    -0x61C8864680B583EB,
)  # splitmix64's, as signed numbers


def splitmix(x):
    """splitmix64's finaliser on an int64 tensor; in place where the tensor is its own: half the
    time on CPUs.
    """
    x = (x >> 30).bitwise_and_(0x3FFFFFFFF).bitwise_xor_(x).mul_(MIX1)
    x = (x >> 27).bitwise_and_(0x1FFFFFFFFF).bitwise_xor_(x).mul_(MIX2)
    return (x >> 31).bitwise_and_(0x1FFFFFFFF).bitwise_xor_(x)


def keep_mask(key, elements, p):
    """Boolean [B, elements]: which are kept. key: int64 [B], one per sample. Four 16-bit numbers
    per hash.
    """
    # 1, 2, 3, … times WEYL, in 64 bits. Written (i + 1) * WEYL, inductor would compute with
    # constants beyond them.
    counter = ~torch.arange((elements + 3) // 4, device=key.device) * -WEYL
    words = splitmix(key[:, None] + counter)
    if (
        torch.compiler.is_compiling()
    ):  # code that inductor makes of the view writes beyond its memory on CPUs
        lanes = (
            (words[..., None] >> torch.arange(0, 64, 16, device=key.device))
            .to(torch.int16)
            .flatten(1)
        )
    else:
        lanes = words.view(torch.int16)
    return lanes[:, :elements] >= round(p * 65536) - 32768


def kept_share(p):
    """The true probability of being kept: p in steps of 2^-16."""
    return 1 - round(p * 65536) / 65536


MASK_KEPT_ON = (
    "cpu",
)  # devices; elsewhere the dropout masks are hashed again in the backward pass


class LoRAFunction(torch.autograd.Function):
    """Adapted linear layer. For the backward pass it keeps its input as the adapter sees it, and h
    = A dropout(x), which is tiny; the frozen weight gets no gradient, so the input itself is not
    needed.

    The mask is kept too on CPUs, where a byte per element costs less than hashing it again.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale, key, p):
        ctx.p, ctx.scale, ctx.shape = p, scale / kept_share(p), x.shape
        keep = LoRAFunction.mask(x.shape, key, p)
        x = x.reshape(-1, x.shape[-1])
        seen = x if keep is None else x * keep  # not yet divided by the kept share
        h = linear(seen, A.to(x.dtype))  # [n, r]
        y = linear(x, weight, bias)  # [n, out]
        y.addmm_(h, (B * ctx.scale).to(x.dtype).T)
        ctx.save_for_backward(
            seen, weight, A, B, key, h, keep if x.device.type in MASK_KEPT_ON else None
        )
        return y.view(*ctx.shape[:-1], -1)

    @staticmethod
    def mask(shape, key, p):
        return None if p == 0 else keep_mask(key, shape[1:].numel(), p).view(-1, shape[-1])

    @staticmethod
    def backward(ctx, grad):
        seen, weight, A, B, key, h, keep = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        gh = linear(g, (B * ctx.scale).to(g.dtype).T)  # [n, r]
        gB = linear(h.T, g.T).T.to(B.dtype) * ctx.scale
        gA = linear(gh.T, seen.T).to(A.dtype)
        gx = None
        if ctx.needs_input_grad[0]:
            if keep is None:
                keep = LoRAFunction.mask(ctx.shape, key, ctx.p)
            back = linear(gh, A.to(g.dtype).T)
            gx = linear(g, weight.T)
            gx = (gx.add_(back) if keep is None else gx.addcmul_(back, keep.to(g.dtype))).view(
                ctx.shape
            )
        return gx, None, None, gA, gB, None, None, None


class LoRALinear(nn.Module):
    """A frozen nn.Linear with a low-rank correction. `base` keeps weight and bias."""

    def __init__(self, base, rank, alpha, dropout, layer, dora=False, rslora=False):
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.train(base.training)
        self.rank, self.alpha, self.p, self.layer = rank, alpha, dropout, layer
        self.scale, self.rslora = alpha / math.sqrt(rank) if rslora else alpha / rank, rslora
        self.folded = False
        kind = {
            "device": base.weight.device,
            "dtype": torch.float64 if base.weight.dtype == torch.float64 else torch.float32,
        }
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **kind))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **kind))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.lora_magnitude = (
            nn.Parameter(base.weight.detach().to(kind["dtype"]).norm(dim=1)) if dora else None
        )
        self.register_buffer(
            "key", torch.zeros(1, dtype=torch.int64, device=base.weight.device), persistent=False
        )

    in_features = property(lambda self: self.weight.shape[1])
    out_features = property(lambda self: self.weight.shape[0])

    def forward(self, x):
        p = self.p if self.training else 0.0
        if self.folded:
            return linear(x, self.adapted_weight().to(x.dtype), self.bias)
        # A layer that set_step() was not called for, or for another batch: masks by the place in
        # this batch.
        key = (
            self.key
            if len(self.key) == len(x) or p == 0
            else self.key[:1] + torch.arange(len(x), device=x.device) * WEYL
        )
        if self.lora_magnitude is not None:
            return self.dora(x, key, p)
        return LoRAFunction.apply(
            x, self.weight, self.bias, self.lora_A, self.lora_B, self.scale, key, p
        )

    def dora(self, x, key, p):
        """DoRA (Liu et al. 2024): the adapted weight's rows get learned lengths; the norm is not
        differentiated.
        """
        weight, low = self.weight.to(self.lora_A.dtype), self.scale * self.lora_B @ self.lora_A
        factor = (self.lora_magnitude / (weight + low).norm(dim=1).detach()).to(x.dtype)
        keep = LoRAFunction.mask(x.shape, key, p)
        seen = x if keep is None else x * keep.view(x.shape) / kept_share(p)
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
        weight = torch.addmm(
            self.weight.to(exact), self.lora_B.to(exact), self.lora_A.to(exact), alpha=self.scale
        )
        if self.lora_magnitude is not None:
            weight = weight * (self.lora_magnitude.to(exact) / weight.norm(dim=1))[:, None]
        return weight

    def merged(self):
        """The plain layer with the same outputs; computed in float32 at least, rounded once."""
        weight = self.adapted_weight().detach().to(self.weight.dtype)
        if not weight.isfinite().all():
            raise UserError(
                f"layer {self.layer}: its weights with the adapter are not finite: the training "
                "diverged, "
                "or the precision is too small"
            )
        plain = Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.bias = self.bias
        return plain


def adapted(encoder):
    return [
        (name, module) for name, module in encoder.named_modules() if isinstance(module, LoRALinear)
    ]


def add_lora(encoder, rank=16, alpha=16, dropout=0.1, targets=TARGETS, dora=False, rslora=False):
    """Wrap the target layers of every block of `encoder.blocks`; freeze the rest. Returns their
    number.

    UserError where fewer than targets x depth are found (a name that matches nothing is never
    skipped silently)."""
    if rank < 1 or not 0 <= dropout < 1:
        raise UserError(
            f"--rank {rank} --dropout {dropout}: the rank is at least 1, the dropout in [0, 1)"
        )
    blocks = getattr(encoder, "blocks", None)
    if not blocks:
        raise UserError(
            f"{getattr(getattr(encoder, 'spec', None), 'name', 'this encoder')} has no "
            "transformer blocks "
            "to put LoRA on: train it end to end, without --lora"
        )
    encoder.requires_grad_(False)
    count = 0
    for block in blocks:
        for module in block.modules():
            for name, child in list(module.named_children()):
                if name in targets and isinstance(child, nn.Linear):
                    setattr(
                        module, name, LoRALinear(child, rank, alpha, dropout, count, dora, rslora)
                    )
                    count += 1
    if count != len(targets) * len(blocks):
        raise UserError(
            f"LoRA targets {', '.join(targets)}: {count} layers found, "
            f"{len(targets) * len(blocks)} "
            f"expected ({len(targets)} in each of {len(blocks)} blocks); there are "
            f"{', '.join(TARGETS)}"
        )
    return count


def set_step(encoder, seed, step, samples):
    """Key the dropout masks of the coming forward pass. samples: numbers [B] of the batch's samples
    within the step.
    """
    layers = [module for _, module in adapted(encoder)]
    seed = torch.tensor((seed + 2**63) % 2**64 - 2**63)  # any whole number, as 64 bits
    key = splitmix(
        splitmix(splitmix(seed) + step) + torch.tensor([module.layer for module in layers])
    )
    key = splitmix(key[:, None] + torch.as_tensor(samples, dtype=torch.int64))  # [layers, B]
    for module, own in zip(layers, key.to(layers[0].weight.device)):
        module.key = own


@contextlib.contextmanager
def folded(encoder):
    """Within it the layers compute with W + scale B A, made anew in each forward pass: for
    evaluation in large batches, where this costs less than the two thin products. No weight is
    changed."""
    layers = [module for _, module in adapted(encoder)]
    for module in layers:
        module.folded = True
    try:
        yield
    finally:
        for module in layers:
            module.folded = False


def merge_lora(encoder):
    """Put the adapters into plain layers, once. Returns the encoder; merging again changes nothing.

    UserError where a merged weight would not be finite: then no layer has been merged.
    """
    for _, module in adapted(encoder):
        module.merged()
    for name in [
        name for name, _ in adapted(encoder)
    ]:  # names only: a merged layer's old weights must be free by then
        parent, last = encoder.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        setattr(parent, last, getattr(parent, last).merged())
    return encoder


def lora_state_dict(encoder):
    return {
        f"{name}.{key}": value.detach()
        for name, module in adapted(encoder)
        for key, value in module.named_parameters()
        if key.startswith("lora_")
    }


def load_lora(encoder, state):
    """Fill the adapters, strictly."""
    own = {
        f"{name}.{key}": value
        for name, module in adapted(encoder)
        for key, value in module.named_parameters()
        if key.startswith("lora_")
    }
    wrong = sorted(set(own) ^ set(state)) or [k for k in own if own[k].shape != state[k].shape]
    if wrong:
        raise UserError(
            f"the adapter does not fit: {len(wrong)} tensors differ, for example {wrong[0]}"
        )
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(state[key])


# ---------------------------------------------------------------- peft's format

PREFIX = "base_model.model."  # of every tensor's name in peft's files
PARTS = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_magnitude": "lora_magnitude_vector",
}
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def save_peft(encoder, folder, base=""):
    """Write the adapter as peft does (adapter_config.json, adapter_model.safetensors) for timm's
    model of these names.

    base: name of the model, for the reader. The head is not part of it.
    """
    layers = adapted(encoder)
    if not layers:
        raise UserError(
            "there is no adapter to write: the encoder is not adapted by LoRA, or merged"
        )
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
    common.write_json(folder / CONFIG, config)


def load_peft(encoder, folder):
    """Adapt a plain encoder by an adapter in peft's format; returns the number of adapted layers.

    UserError where it holds what this LoRA has not (biases, ranks that differ by layer, other
    modules, …)."""
    folder = Path(folder)
    config = common.read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{folder / CONFIG}: not the configuration of a LoRA adapter")
    for name, plain in (
        ("bias", "none"),
        ("fan_in_fan_out", False),
        ("modules_to_save", None),
        ("rank_pattern", {}),
        ("alpha_pattern", {}),
        ("layers_to_transform", None),
        ("lora_bias", False),
        ("use_qalora", False),
        ("alora_invocation_tokens", None),
        ("target_parameters", None),
    ):
        if config.get(name) and config[name] != plain:
            raise UserError(
                f"{folder / CONFIG}: {name} = {str(config[name])[:40]} is not supported here"
            )
    try:
        rank, alpha, dropout = (
            int(config["r"]),
            float(config["lora_alpha"]),
            float(config.get("lora_dropout", 0.0)),
        )
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{folder / CONFIG}: r, lora_alpha and lora_dropout must be numbers"
        ) from None
    file = folder / TENSORS
    try:
        stored = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file}: not readable ({error})") from None
    back, state = {theirs: ours for ours, theirs in PARTS.items()}, {}
    for name, value in stored.items():
        found = re.fullmatch(
            re.escape(PREFIX) + r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)", name
        )
        if not found:
            raise UserError(f"{file}: {name[:80]} is no part of a LoRA adapter that fits here")
        state[f"{found[1]}.{back[found[2]]}"] = value
    targets = tuple(t for t in TARGETS if any(f".{t}.lora_A" in name for name in state))
    if not targets:
        raise UserError(f"{file}: holds no adapter of {', '.join(TARGETS)}")
    count = add_lora(
        encoder,
        rank,
        alpha,
        dropout,
        targets,
        bool(config.get("use_dora")),
        bool(config.get("use_rslora")),
    )
    load_lora(encoder, state)
    return count
