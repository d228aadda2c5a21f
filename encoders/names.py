"""The names of tensors in published files, and what they are called here (as in timm).

`rename` recognises the format by the names alone. Names that no rule knows stay as they are, so
that the strict comparison with the network reports them."""

import re

from common import UserError

# The patch embedding, or the first layer, under the name that tells each format.
SIGNATURES = (
    "patch_embed.proj.weight",
    "patch_embed.proj.0.weight",
    "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embeddings.weight",
    "conv_proj.weight",
    "layer1.0.conv1.weight",
)

# timm, DINO, DINOv2, DINOv3 and Swin: what differs from timm's vision transformer.
TIMM = {"register_tokens": "reg_token", "storage_tokens": "reg_token"}
TIMM_BLOCK = {  # name in a block → (ours, place among the parts that are put together)
    "ls1.weight": ("ls1.gamma", 0),
    "ls2.weight": ("ls2.gamma", 0),
    "gamma_1": ("ls1.gamma", 0),
    "gamma_2": ("ls2.gamma", 0),
    "attn.q_bias": ("attn.qkv.bias", 0),
    "attn.v_bias": ("attn.qkv.bias", 2),
    "mlp.w12.weight": ("mlp.fc1.weight", 0),
    "mlp.w12.bias": ("mlp.fc1.bias", 0),
    "mlp.w1.weight": ("mlp.fc1.weight", 0),
    "mlp.w1.bias": ("mlp.fc1.bias", 0),
    "mlp.w2.weight": ("mlp.fc1.weight", 1),
    "mlp.w2.bias": ("mlp.fc1.bias", 1),
    "mlp.w3.weight": ("mlp.fc2.weight", 0),
    "mlp.w3.bias": ("mlp.fc2.bias", 0),
    "mlp.fc1_g.weight": ("mlp.fc1.weight", 0),
    "mlp.fc1_g.bias": ("mlp.fc1.bias", 0),
    "mlp.fc1_x.weight": ("mlp.fc1.weight", 1),
    "mlp.fc1_x.bias": ("mlp.fc1.bias", 1),
}
# Classifiers, what only pretraining uses, and constants that the networks compute themselves.
TIMM_UNUSED = re.compile(
    r"mask_token|head\.(fc\.)?(weight|bias)|local_cls_norm\..*|rope_embed\.periods"
    r"|.*\.(bias_mask|relative_position_index|attn_mask|num_batches_tracked)"
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
POOLER = {"attn_pool_contrast.": "pooler.", "ln_contrast.": "pooler.norm."}
TRANSFORMERS = {
    "embeddings.cls_token": "cls_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "embeddings.patch_embeddings.weight": "patch_embed.proj.weight",  # DINOv3
    "embeddings.patch_embeddings.bias": "patch_embed.proj.bias",
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
    if start.endswith("trunk."):
        parts |= pooler(names, start.removesuffix("trunk."))
    return {ours: [full for _, full in sorted(places)] for ours, places in parts.items()}, kind


def pooler(names, start):
    """CONCH's attention pooler, which lies beside its "trunk."; in the form of `parts` above."""
    parts = {}
    for name in names:
        for theirs, ours in POOLER.items():
            if name.startswith(start + theirs):
                parts[ours + name[len(start + theirs) :]] = [(0, name)]
    return parts


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
    if any(name.startswith("embeddings.patch_embeddings.") for name in names):
        return "transformers", _transformers
    if any(name.startswith("conv_proj.") for name in names):
        return "torchvision", _torchvision
    if any(name.startswith("layer1.0.") for name in names):
        return "resnet", _resnet
    if "layers.0.downsample.reduction.weight" in names:
        return "timm 0.5 Swin", _early_swin
    return "timm", _timm


def _timm(name):
    if TIMM_UNUSED.fullmatch(name):
        return None
    # DINOv2 trains with its blocks in chunks: blocks.CHUNK.NUMBER, numbered throughout.
    name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)
    block = re.fullmatch(r"(blocks\.\d+\.)(.+)", name)
    if block and block[2] in TIMM_BLOCK:
        ours, place = TIMM_BLOCK[block[2]]
        return block[1] + ours, place
    return TIMM.get(name, name), 0


def _early_swin(name):
    """timm 0.5 and the original merge patches at the end of a stage, later versions of timm (and
    this project) at the start of the next.
    """
    stage = re.fullmatch(r"layers\.(\d+)\.downsample\.(.+)", name)
    if stage:
        return f"layers.{int(stage[1]) + 1}.downsample.{stage[2]}", 0
    return _timm(name)


def _resnet(name):
    if name.startswith("fc."):
        return None
    return name, 0


def _transformers(name):
    if name == "embeddings.mask_token" or name.startswith("pooler."):
        return None
    block = re.fullmatch(
        r"(?:encoder\.layer|encoder\.layers|layers|layer|model\.layer)\.(\d+)\.(.+)"
        r"\.(weight|bias|lambda1)",
        name,
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
