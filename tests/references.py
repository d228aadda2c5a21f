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
    "gpfm": ("vit_large_patch14_dinov2", dict(img_size=224)),
    "kaiko-s8": ("vit_small_patch8_224", {}),
    "kaiko-b8": ("vit_base_patch8_224", {}),
    "mstar": ("vit_large_patch16_224", dict(init_values=1e-5)),
    "pathorchestra": ("vit_large_patch16_224", dict(init_values=1e-5)),
    "keep": ("vit_large_patch16_224", dict(init_values=1e-5)),
    "sp22m": ("vit_small_patch16_224", {}),
    "sp85m": ("vit_base_patch16_224", {}),
    "openmidnight": ("vit_giant_patch14_reg4_dinov2", dict(img_size=224)),
}
SWIN = {
    "ctranspath": ("swin_tiny_patch4_window7_224", dict(stem=True)),
    "swin-t": ("swin_tiny_patch4_window7_224", {}),
    "swin-b": ("swin_base_patch4_window7_224", {}),
}
# name → (timm's constructor, transformers' configuration)
DINOV3 = {
    "dinov3-s": (
        "vit_small_patch16_dinov3",
        dict(hidden_size=384, intermediate_size=1536, num_attention_heads=6),
    ),
    "dinov3-s-plus": (
        "vit_small_plus_patch16_dinov3",
        dict(hidden_size=384, intermediate_size=1536, num_attention_heads=6, use_gated_mlp=True),
    ),
    "dinov3-b": (
        "vit_base_patch16_dinov3",
        dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
    ),
    "dinov3-l": (
        "vit_large_patch16_dinov3",
        dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16),
    ),
    "dinov3-h-plus": (
        "vit_huge_plus_patch16_dinov3",
        dict(hidden_size=1280, intermediate_size=5120, num_attention_heads=20, use_gated_mlp=True),
    ),
    "dinov3-7b": (
        "vit_7b_patch16_dinov3",
        dict(hidden_size=4096, intermediate_size=8192, num_attention_heads=32, use_gated_mlp=True),
    ),
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
    "dinov2-s-reg": ("vit_small_patch14_reg4_dinov2", {}),
    "dinov2-b-reg": ("vit_base_patch14_reg4_dinov2", {}),
    "dinov2-l-reg": ("vit_large_patch14_reg4_dinov2", {}),
    "dinov2-g-reg": ("vit_giant_patch14_reg4_dinov2", {}),
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
DINOV2 |= {f"{name}-reg": facts for name, facts in DINOV2.items()}
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
    name: HALF
    for name in (
        "vit-b",
        "vit-h",
        "midnight",
        "kaiko-s16",
        "kaiko-b16",
        "kaiko-l14",
        "kaiko-s8",
        "kaiko-b8",
    )
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


def counterpart(name):
    """timm's network of a row, of whole depth, at 224 px, on the meta device: one embedding."""
    if name in SWIN:
        return swin_model(name)
    if name in DINOV3:
        return dinov3_timm(name, depth=None, bias=False)
    return timm_model(name, img_size=224)


def fill_counterpart(theirs, ours, device="cpu"):
    """Give timm's network (of `counterpart`) the weights of our encoder."""
    make_empty(theirs, device)
    names = theirs.state_dict()
    state = {}
    for name, tensor in ours.state_dict().items():
        name = (
            re.sub(r"ls([12])\.gamma", r"gamma_\1", name) if "blocks.0.gamma_1" in names else name
        )
        gate = name.replace("mlp.fc1.", "mlp.fc1_g.")
        if gate != name and gate in names:
            state[gate], state[name.replace("mlp.fc1.", "mlp.fc1_x.")] = tensor.chunk(2)
        elif name in names:
            state[name] = tensor
        else:
            assert name.endswith("qkv.bias") and not tensor.any(), name  # DINOv3's are zero
    theirs.load_state_dict(state, strict=not any("batches_tracked" in name for name in names))
    return theirs


class ConvStem(torch.nn.Module):
    """CTransPath's patch embedding, for timm's Swin transformer: images [B, 3, S, S] → [B, S/4,
    S/4, 96].
    """

    def __init__(self, img_size, patch_size, in_chans, embed_dim, norm_layer, **unused):
        super().__init__()
        self.grid_size, self.num_patches = (56, 56), 56 * 56
        layers, channels = [], in_chans
        for out in (embed_dim // 8, embed_dim // 4):
            layers += [
                torch.nn.Conv2d(channels, out, 3, stride=2, padding=1, bias=False),
                torch.nn.BatchNorm2d(out),
                torch.nn.ReLU(),
            ]
            channels = out
        self.proj = torch.nn.Sequential(*layers, torch.nn.Conv2d(channels, embed_dim, 1))
        self.norm = norm_layer(embed_dim)

    def forward(self, x):
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Conch(torch.nn.Module):
    """CONCH v1.5: timm's ViT-L/16 at 448 px, whose file holds positions for 224 px, and a pooler
    with one query.
    """

    def __init__(self, depth):
        super().__init__()
        self.trunk = timm_model("uni", depth=depth)
        with torch.device("meta"):
            pooler = torch.nn.Module()
            pooler.query = torch.nn.Parameter(torch.empty(1, 768))
            pooler.ln_q, pooler.ln_k = torch.nn.LayerNorm(768), torch.nn.LayerNorm(1024)
            pooler.to_q = torch.nn.Linear(768, 768, bias=False)
            pooler.to_kv = torch.nn.Linear(1024, 2 * 768, bias=False)
            pooler.to_out = torch.nn.Linear(768, 768, bias=False)
            self.attn_pool_contrast, self.ln_contrast = pooler, torch.nn.LayerNorm(768)
        self.depth = depth

    def forward(self, x):
        large = timm_model("uni", depth=self.depth, img_size=448).to_empty(device="cpu")
        state = dict(self.trunk.state_dict())
        pos = state["pos_embed"]
        grid = pos[:, 1:].float().unflatten(1, (14, 14)).permute(0, 3, 1, 2)
        factor = (28 + 0.1) / 14
        grid = torch.nn.functional.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
        grid = grid.permute(0, 2, 3, 1).flatten(1, 2).to(pos.dtype)
        state["pos_embed"] = torch.cat([pos[:, :1], grid], dim=1)
        large.load_state_dict(state)
        return self.pool(large.to(x.dtype).forward_features(x))

    def pool(self, tokens):
        """Tokens [B, T, 1024] → embedding [B, 768]."""
        pooler = self.attn_pool_contrast
        query = pooler.to_q(pooler.ln_q(pooler.query)).view(8, 96)
        keys, values = pooler.to_kv(pooler.ln_k(tokens)).chunk(2, dim=-1)
        keys, values = (t.unflatten(-1, (8, 96)) for t in (keys, values))
        scores = torch.einsum("hd,bthd->bht", query * 96**-0.5, keys)
        pooled = torch.einsum("bht,bthd->bhd", scores.softmax(-1), values).flatten(1)
        return self.ln_contrast(pooler.to_out(pooled))


def swin_model(name, depths=None):
    """timm's network on the meta device, of `depths` blocks per stage; see `fill`."""
    import timm

    constructor, arguments = SWIN[name]
    arguments = dict(arguments)
    if arguments.pop("stem", False):
        arguments["embed_layer"] = ConvStem
    if depths:
        arguments["depths"] = depths
    with torch.device("meta"):
        return timm.create_model(constructor, num_classes=0, **arguments).eval()


def dinov3_transformers(name, depth):
    """transformers' network with seeded weights, zero bias of the keys (it has none)."""
    import transformers

    config = transformers.DINOv3ViTConfig(
        num_hidden_layers=depth,
        num_register_tokens=4,
        hidden_act="silu" if "use_gated_mlp" in DINOV3[name][1] else "gelu",
        image_size=224,
        **DINOV3[name][1],
    )
    return fill(transformers.DINOv3ViTModel(config).eval(), empty=False)


def dinov3_timm(name, depth, bias=True):
    """timm's network; with `bias`, the one that has biases of queries and values."""
    import timm

    constructor = DINOV3[name][0] + ("_qkvb" if bias else "")
    arguments = {"depth": depth} if depth else {}
    with torch.device("meta"):
        network = timm.create_model(constructor, num_classes=0, global_pool="token", **arguments)
    return network.eval()


def dinov3_timm_names(state):
    """transformers' tensors of DINOv3 in timm's names."""
    ours, qkv = {}, {}
    for name, tensor in state.items():
        name = re.sub(r"^(model\.)?layer\.", "blocks.", name)
        for theirs, timms in (
            ("embeddings.patch_embeddings", "patch_embed.proj"),
            ("embeddings.register_tokens", "reg_token"),
            ("embeddings.", ""),
            ("layer_scale1.lambda1", "gamma_1"),
            ("layer_scale2.lambda1", "gamma_2"),
            ("attention.o_proj", "attn.proj"),
            ("attention.q_proj.bias", "attn.q_bias"),
            ("attention.v_proj.bias", "attn.v_bias"),
            ("mlp.down_proj", "mlp.fc2"),
            ("mlp.gate_proj", "mlp.fc1_g"),
        ):
            name = name.replace(theirs, timms)
        gated = any("gate_proj" in other for other in state)
        name = name.replace("mlp.up_proj", "mlp.fc1_x" if gated else "mlp.fc1")
        part = re.fullmatch(r"(.*)attention\.([qkv])_proj\.weight", name)
        if part:
            qkv.setdefault(part[1], {})[part[2]] = tensor
        elif name != "mask_token":
            ours[name] = tensor
    for block, parts in qkv.items():
        ours[f"{block}attn.qkv.weight"] = torch.cat([parts[part] for part in "qkv"])
    return ours


def dinov3_native_names(state):
    """timm's tensors of DINOv3 in the names of its own files, with a bias of the keys that is
    masked.
    """
    native = {}
    for name, tensor in state.items():
        for timms, theirs in (
            ("reg_token", "storage_tokens"),
            ("gamma_1", "ls1.gamma"),
            ("gamma_2", "ls2.gamma"),
            ("mlp.fc1_g", "mlp.w1"),
            ("mlp.fc1_x", "mlp.w2"),
        ):
            name = name.replace(timms, theirs)
        native[name] = tensor
    gated = any("mlp.w1." in name for name in native)
    for name in list(native):
        if gated and "mlp.fc2" in name:
            native[name.replace("mlp.fc2", "mlp.w3")] = native.pop(name)
        if name.endswith("attn.q_bias"):
            query = native.pop(name)
            value = native.pop(name.replace("q_bias", "v_bias"))
            start = name.removesuffix("q_bias")
            native[f"{start}qkv.bias"] = torch.cat([query, query.new_full(query.shape, 7.0), value])
            mask = torch.ones(3, len(query))
            mask[1] = 0
            native[f"{start}qkv.bias_mask"] = mask.flatten()
    native["mask_token"] = torch.zeros(1, 1, native["cls_token"].shape[-1])
    native["rope_embed.periods"] = torch.ones(16, dtype=torch.bfloat16)
    return native


def dinov2_native_names(state, pos_of_class):
    """timm's tensors of DINOv2 with registers in the names of its own training code, the blocks in
    chunks.
    """
    native = {}
    for name, tensor in state.items():
        name = name.replace("reg_token", "register_tokens")
        name = name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        name = re.sub(r"^blocks\.(\d+)\.", lambda m: f"blocks.{int(m[1]) // 10}.{m[1]}.", name)
        native[name] = tensor
    native["cls_token"] = state["cls_token"] - pos_of_class
    native["pos_embed"] = torch.cat([pos_of_class, state["pos_embed"]], dim=1)
    native["mask_token"] = torch.zeros(1, state["cls_token"].shape[-1])
    return native


def transformers_model(name, depth):
    import transformers

    if name in DINOV2:
        dim, heads, swiglu = DINOV2[name]
        registers = {}
        if name.endswith("-reg"):
            registers["num_register_tokens"] = 4
        kind, arguments = (
            "Dinov2WithRegisters" if registers else "Dinov2",
            dict(
                **registers,
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
    """`count` seeded normal numbers. A short period, prime against every width, keeps it cheap."""
    start %= len(_NOISE)
    repeats = -(-(start + count) // len(_NOISE))
    return _NOISE.repeat(repeats)[start : start + count]


def make_empty(model, device="cpu"):
    """Memory for a meta model's parameters; timm's constants are computed."""
    model.to_empty(device=device)
    for module in model.modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()


def fill(model, seed=0, empty=True):
    """Non-trivial seeded weights for a meta model: position embeddings, registers and LayerScale
    that matter.
    """
    if empty:
        make_empty(model)
    with torch.no_grad():
        for number, (name, tensor) in enumerate(model.state_dict().items()):
            if not tensor.is_floating_point():
                tensor.zero_()
                continue
            value = noise(tensor.numel(), 7919 * (number + 1) + 104729 * seed).view(tensor.shape)
            if "running_var" in name:
                value = 1 + 0.1 * value.abs()
            elif re.search(
                r"norm\w*\.weight|ln\w*\.weight|bn\d\.weight|gamma|lambda1|proj\.[14]\.weight", name
            ):
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
