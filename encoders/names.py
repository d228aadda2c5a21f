"""The names of tensors in published files, and what they are called here (as in timm).

`rename` recognises the format by the names alone. Names that no rule knows stay as they are, so
that the strict comparison with the network reports them."""

import re

from common import UserError

# The patch embedding, or the first layer, under the name that tells each format.
SIGNATURES = (
    "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.weight",
    "conv_proj.weight",
    "layer1.0.conv1.weight",
)

# transformers writes other names since version 5; files hold either.
TRANSFORMERS_BLOCK = {  # name in a block → (ours, place among the parts that are put together)
    "attention.attention.query": ("attn.qkv", 0),
    "attention.q_proj": ("attn.qkv", 0),
    "attention.attention.key": ("attn.qkv", 1),
    "attention.k_proj": ("attn.qkv", 1),
    "attention.attention.value": ("attn.qkv", 2),
    "attention.v_proj": ("attn.qkv", 2),
    "attention.output.dense": ("attn.proj", 0),
    "attention.o_proj": ("attn.proj", 0),
    "layernorm_before": ("norm1", 0),
    "norm1": ("norm1", 0),
    "layernorm_after": ("norm2", 0),
    "norm2": ("norm2", 0),
    "intermediate.dense": ("mlp.fc1", 0),
    "mlp.weights_in": ("mlp.fc1", 0),
    "mlp.fc1": ("mlp.fc1", 0),
    "mlp.gate_proj": ("mlp.fc1", 0),
    "mlp.up_proj": ("mlp.fc1", 1),
    "output.dense": ("mlp.fc2", 0),
    "mlp.weights_out": ("mlp.fc2", 0),
    "mlp.fc2": ("mlp.fc2", 0),
    "mlp.down_proj": ("mlp.fc2", 0),
    "layer_scale1": ("ls1", 0),
    "layer_scale2": ("ls2", 0),
}
TRANSFORMERS = {
    "embeddings.cls_token": "cls_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
TORCHVISION_BLOCK = {
    "ln_1.": "norm1.",
    "ln_2.": "norm2.",
    "self_attention.in_proj_": "attn.qkv.",
    "self_attention.out_proj.": "attn.proj.",
    "mlp.0.": "mlp.fc1.",
    "mlp.3.": "mlp.fc2.",
    "mlp.linear_1.": "mlp.fc1.",
    "mlp.linear_2.": "mlp.fc2.",  # before torchvision 0.13, and still in its files
}
TORCHVISION = {
    "class_token": "cls_token",
    "encoder.pos_embedding": "pos_embed",
    "conv_proj.weight": "patch_embed.proj.weight",
    "conv_proj.bias": "patch_embed.proj.bias",
    "encoder.ln.weight": "norm.weight",
    "encoder.ln.bias": "norm.bias",
}


def rename(names):
    """Names in a file → ({ours: [names, in the order in which they are joined along the first
    axis]}, format).

    Parts of a larger model that the encoder lies in (`prefix`), and what no embedding needs (mask
    tokens, transformers' pooler, classification heads), are left out.
    """
    names = list(names)
    start = prefix(names)
    inner = {name[len(start) :]: name for name in names if name.startswith(start)}
    kind, rule = naming(inner)
    parts = {}
    for name, full in inner.items():
        renamed = rule(name)
        if renamed is not None:
            ours, place = renamed
            parts.setdefault(ours, []).append((place, full))
    return {ours: [full for _, full in sorted(places)] for ours, places in parts.items()}, kind


def prefix(names):
    """What stands before the encoder's names in a file: "" or, for example, "module.",
    "teacher.backbone." or "visual.".

    The teacher's encoder is chosen if there are a teacher's and a student's: the teacher is what
    self-supervised training publishes. UserError if there are several others.
    """
    starts = set()
    for name in names:
        for signature in SIGNATURES:
            if name == signature or name.endswith("." + signature):
                starts.add(name[: -len(signature)])
    if "" in starts or not starts:
        return ""
    teachers = {start for start in starts if "teacher" in start}
    if len(starts) > 1 and len(teachers) == 1:
        starts = teachers
    if len(starts) > 1:
        raise UserError(
            f"the file holds several encoders ({', '.join(sorted(starts))}): save one of them alone"
        )
    return starts.pop()


def naming(names):
    """The format of these names (without prefix), and the rule name → (ours, place) or None."""
    if any("patch_embeddings.projection." in name for name in names):
        return "transformers", _transformers
    if any(name.startswith("conv_proj.") for name in names):
        return "torchvision", _torchvision
    if any(name.startswith("layer1.0.") for name in names):
        return "resnet", _resnet
    return "timm", _timm


def _timm(name):
    if name == "mask_token":
        return None
    return name, 0


def _resnet(name):
    if name.startswith("fc."):
        return None
    return name, 0


def _transformers(name):
    if name == "embeddings.mask_token" or name.startswith("pooler."):
        return None
    block = re.fullmatch(
        r"(?:encoder\.layer|encoder\.layers|layers)\.(\d+)\.(.+)\.(weight|bias|lambda1)", name
    )
    if block:
        number, inner, leaf = block.groups()
        if inner in TRANSFORMERS_BLOCK:
            ours, place = TRANSFORMERS_BLOCK[inner]
            if leaf == "lambda1":
                leaf = "gamma"
            return f"blocks.{number}.{ours}.{leaf}", place
    return TRANSFORMERS.get(name, name), 0


def _torchvision(name):
    if name.startswith("heads."):
        return None
    block = re.fullmatch(r"encoder\.layers\.encoder_layer_(\d+)\.(.+)", name)
    if block:
        number, inner = block.groups()
        for theirs, ours in TORCHVISION_BLOCK.items():
            if inner.startswith(theirs):
                return f"blocks.{number}.{ours}{inner[len(theirs) :]}", 0
    return TORCHVISION.get(name, name), 0
