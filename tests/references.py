"""The reference implementation of every encoder (timm, transformers, torchvision), for the tests of
models.py.

Constructors are written out from the model cards, independently of the table in models.py.
"""

import re

import torch

GLU = {"mlp": "swiglu"}
TIMM = {  # name → (constructor, arguments)
    "uni": ("vit_large_patch16_224", dict(init_values=1e-5)),
    "virchow": (
        "vit_huge_patch14_224",
        dict(mlp_ratio=5.3375, init_values=1e-5, global_pool="", **GLU),
    ),
    "virchow2": (
        "vit_huge_patch14_224",
        dict(mlp_ratio=5.3375, init_values=1e-5, global_pool="", reg_tokens=4, **GLU),
    ),
    "h-optimus-0": ("vit_giant_patch14_reg4_dinov2", dict(img_size=224, init_values=1e-5)),
    "h-optimus-1": ("vit_giant_patch14_reg4_dinov2", dict(img_size=224, init_values=1e-5)),
    "prov-gigapath": (
        "vit_giant_patch14_dinov2",
        dict(img_size=224, patch_size=16, mlp_ratio=5.33334, init_values=1e-5),
    ),
    "uni2-h": (
        "vit_giant_patch14_224",
        dict(
            embed_dim=1536,
            depth=24,
            num_heads=24,
            no_embed_class=True,
            reg_tokens=8,
            mlp_ratio=5.33334,
            init_values=1e-5,
            **GLU,
        ),
    ),
    "h0-mini": (
        "vit_base_patch14_reg4_dinov2",
        dict(img_size=224, mlp_ratio=4096 / 768, init_values=1e-5, global_pool="", **GLU),
    ),
    "kaiko-s16": ("vit_small_patch16_224", {}),
    "kaiko-b16": ("vit_base_patch16_224", {}),
    "kaiko-l14": ("vit_large_patch14_reg4_dinov2", dict(img_size=518)),
    "lunit-s16": ("vit_small_patch16_224", {}),
    "lunit-s8": ("vit_small_patch8_224", {}),
}
# What timm's constructor would be for the models that transformers publishes: the names and shapes
# of our network.
EQUIVALENT = {
    "phikon": ("vit_base_patch16_224", {}),
    "vit-b": ("vit_base_patch16_224", {}),
    "vit-h": ("vit_huge_patch14_224", {}),
    "vit-b-tv": ("vit_base_patch16_224", {}),
    "vit-h-swag": ("vit_huge_patch14_224", {}),
    "phikon-v2": ("vit_large_patch16_224", dict(init_values=1e-5)),
    "hibou-b": ("vit_base_patch14_reg4_dinov2", dict(img_size=224, mlp_ratio=4096 / 768, **GLU)),
    "hibou-l": ("vit_large_patch14_reg4_dinov2", dict(img_size=224, mlp_ratio=5472 / 1024, **GLU)),
    "midnight": ("vit_giant_patch14_dinov2", dict(img_size=224)),
    "dinov2-s": ("vit_small_patch14_dinov2", {}),
    "dinov2-b": ("vit_base_patch14_dinov2", {}),
    "dinov2-l": ("vit_large_patch14_dinov2", {}),
    "dinov2-g": ("vit_giant_patch14_dinov2", {}),
}
DINO = dict(layer_norm_eps=1e-6, image_size=224)
TRANSFORMERS = {  # name → (model, configuration)
    "phikon": (
        "ViT",
        dict(
            hidden_size=768,
            num_attention_heads=12,
            intermediate_size=3072,
            patch_size=16,
            layer_norm_eps=1e-6,
        ),
    ),
    "vit-b": (
        "ViT",
        dict(
            hidden_size=768,
            num_attention_heads=12,
            intermediate_size=3072,
            patch_size=16,
            layer_norm_eps=1e-12,
        ),
    ),
    "vit-h": (
        "ViT",
        dict(
            hidden_size=1280,
            num_attention_heads=16,
            intermediate_size=5120,
            patch_size=14,
            layer_norm_eps=1e-12,
        ),
    ),
    "phikon-v2": ("Dinov2", dict(hidden_size=1024, num_attention_heads=16, patch_size=16, **DINO)),
    "midnight": (
        "Dinov2",
        dict(hidden_size=1536, num_attention_heads=24, patch_size=14, use_swiglu_ffn=True, **DINO),
    ),
    "hibou-b": (
        "Dinov2WithRegisters",
        dict(
            hidden_size=768,
            num_attention_heads=12,
            patch_size=14,
            use_swiglu_ffn=True,
            num_register_tokens=4,
            **DINO,
        ),
    ),
    "hibou-l": (
        "Dinov2WithRegisters",
        dict(
            hidden_size=1024,
            num_attention_heads=16,
            patch_size=14,
            use_swiglu_ffn=True,
            num_register_tokens=4,
            **DINO,
        ),
    ),
}
# DINOv2 itself: published as transformers files, but the reference is timm (resampling of the
# position embedding).
DINOV2 = {
    "dinov2-s": (384, 6, False),
    "dinov2-b": (768, 12, False),
    "dinov2-l": (1024, 16, False),
    "dinov2-g": (1536, 24, True),
}
TORCHVISION = {
    "vit-b-tv": dict(patch_size=16, num_heads=12, hidden_dim=768, mlp_dim=3072),
    "vit-h-swag": dict(patch_size=14, num_heads=16, hidden_dim=1280, mlp_dim=5120),
}
CLS_MEAN = {"virchow": 1, "virchow2": 5}  # first patch token

# Normalisation of the model cards.
IN = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
OPTIMUS = (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)
HIBOU = (0.7068, 0.5755, 0.7220), (0.1950, 0.2316, 0.1816)
LUNIT = (0.70322989, 0.53606487, 0.66096631), (0.21716536, 0.26081574, 0.20723464)
NORMALISATION = {
    "h-optimus-0": OPTIMUS,
    "h-optimus-1": OPTIMUS,
    "h0-mini": OPTIMUS,
    "hibou-b": HIBOU,
    "hibou-l": HIBOU,
    "lunit-s16": LUNIT,
    "lunit-s8": LUNIT,
}
NORMALISATION |= {
    name: HALF for name in ("vit-b", "vit-h", "midnight", "kaiko-s16", "kaiko-b16", "kaiko-l14")
}


def timm_model(name, **changes):
    """timm's network, on the meta device, at the resolution of the published file."""
    import timm

    constructor, arguments = (TIMM | EQUIVALENT)[name]
    arguments = {**arguments, **changes}
    if arguments.pop("mlp", None) == "swiglu":
        arguments |= dict(mlp_layer=timm.layers.SwiGLUPacked, act_layer=torch.nn.SiLU)
    with torch.device("meta"):
        return timm.create_model(constructor, num_classes=0, **arguments).eval()


def transformers_model(name, depth):
    import transformers

    if name in DINOV2:
        dim, heads, swiglu = DINOV2[name]
        kind, arguments = (
            "Dinov2",
            dict(
                hidden_size=dim,
                num_attention_heads=heads,
                patch_size=14,
                use_swiglu_ffn=swiglu,
                layer_norm_eps=1e-6,
                image_size=518,
            ),
        )
    else:
        kind, arguments = TRANSFORMERS[name]
    config = getattr(transformers, f"{kind}Config")(num_hidden_layers=depth, **arguments)
    with torch.device("meta"):
        return getattr(transformers, f"{kind}Model")(config).eval()


def torchvision_model(name, depth):
    from torchvision.models import VisionTransformer

    with torch.device("meta"):
        return VisionTransformer(image_size=224, num_layers=depth, **TORCHVISION[name]).eval()


_NOISE = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))


def noise(count, start):
    """`count` seeded normal numbers; a short period, prime against every width, makes them cheap."""
    start %= len(_NOISE)
    repeats = -(-(start + count) // len(_NOISE))
    return _NOISE.repeat(repeats)[start : start + count]


def fill(model, seed=0):
    """Non-trivial seeded weights for a meta model: position embeddings, registers and LayerScale
    that matter.
    """
    model.to_empty(device="cpu")
    with torch.no_grad():
        for number, (name, tensor) in enumerate(model.state_dict().items()):
            if not tensor.is_floating_point():
                tensor.zero_()
                continue
            value = noise(tensor.numel(), 7919 * (number + 1) + 104729 * seed).view(tensor.shape)
            if "running_var" in name:
                value = 1 + 0.1 * value.abs()
            elif re.search(r"norm\w*\.weight|ln\w*\.weight|bn\d\.weight|gamma|lambda1", name):
                value = 0.8 + 0.2 * value
            elif re.search(r"pos|token|bias|running_mean", name):
                value = 0.1 * value
            else:
                value = value / (tensor[0].numel() ** 0.5)
            tensor.copy_(value)
    return model


def old_names(state):
    """transformers 5 names → those of transformers 4, which the published files have."""
    old, halves = {}, {}
    for name, tensor in state.items():
        name = re.sub(r"^layers\.", "encoder.layer.", name)
        for new, was in (
            ("attention.q_proj", "attention.attention.query"),
            ("attention.k_proj", "attention.attention.key"),
            ("attention.v_proj", "attention.attention.value"),
            ("attention.o_proj", "attention.output.dense"),
            ("mlp.down_proj", "mlp.weights_out"),
        ):
            name = name.replace(new, was)
        if "layernorm_before" in "".join(state):  # ViT
            name = name.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")
        if "gate_proj" in name or "up_proj" in name:
            which = "gate" if "gate_proj" in name else "up"
            halves.setdefault(re.sub("gate_proj|up_proj", "weights_in", name), {})[which] = tensor
        else:
            old[name] = tensor
    for name, half in halves.items():
        old[name] = torch.cat([half["gate"], half["up"]])
    return old


def new_names(state):
    """The same in the names of transformers 5."""
    new = {}
    for name, tensor in old_names(state).items():
        if "weights_in" in name:  # the two halves of SwiGLU
            for part, half in zip(("gate_proj", "up_proj"), tensor.chunk(2)):
                new[name.replace("weights_in", part)] = half
            continue
        for was, is_now in (
            ("attention.attention.query", "attention.q_proj"),
            ("attention.attention.key", "attention.k_proj"),
            ("attention.attention.value", "attention.v_proj"),
            ("attention.output.dense", "attention.o_proj"),
            ("mlp.weights_out", "mlp.down_proj"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
        ):
            name = name.replace(was, is_now)
        new[name] = tensor
    layers = {name: name.replace("encoder.layer.", "layers.") for name in new}
    return {layers[name]: tensor for name, tensor in new.items()}


def embedding_of(name, tokens):
    """The published embedding from the tokens after the final norm [B, T, dim]."""
    if name in CLS_MEAN:
        return torch.cat([tokens[:, 0], tokens[:, CLS_MEAN[name] :].mean(1)], dim=-1)
    return tokens[:, 0]
