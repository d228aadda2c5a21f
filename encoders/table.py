"""The table of encoders: what is published under a name, and the shape of its network. To add an
encoder of a known family, add a row; tests/references.py says what its reference is."""

from dataclasses import dataclass

from common import UserError

SIZE = 224  # px, of the patches that most encoders read

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean, std
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
OPTIMUS = (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)
HIBOU = (0.7068, 0.5755, 0.7220), (0.1950, 0.2316, 0.1816)
LUNIT = (0.70322989, 0.53606487, 0.66096631), (0.21716536, 0.26081574, 0.20723464)

SAFE_OR_BIN = ("model.safetensors", "pytorch_model.bin")
BIN_OR_SAFE = ("pytorch_model.bin", "model.safetensors")
POOLS = ("cls", "mean", "cls+mean", "patch-center", "cls+center")


@dataclass(frozen=True)
class Encoder:
    """A row of the table."""

    name: str
    # On the Hugging Face Hub. "torchvision/…": from download.pytorch.org. "": a file of this
    # project.
    repo: str
    licence: str
    params: int  # of the network as published (at `stored` px), without head, pooler and mask token
    dim: int = 768
    depth: int = 12  # transformer blocks; 0: a ResNet
    heads: int = 12
    patch: int = 16  # px
    field: int | None = None  # px: the network reads this much of the image's middle; None: all
    # gelu: fc2(gelu(fc1 x)), exact erf | swiglu: a, b = halves of fc1 x; fc2(silu(a) * b)
    mlp: str = "gelu"
    hidden: int = 3072  # outputs of fc1; with swiglu both halves together
    layerscale: bool = False
    registers: int = 0
    # Which tokens carry a position embedding: all (registers too) | patches. rotary: DINOv3's, none
    # stored. window: Swin's, a bias inside the attention.
    pos: str = "all"
    qkv_bias: bool = True
    stages: tuple = ()  # Swin: blocks per stage; dim, heads and hidden are those of the last stage
    stem: str = "patches"  # Swin: patches (one convolution) | convolutions (CTransPath)
    size: int = SIZE  # px, of the patches that the network reads; --size chooses another
    # Size in px that the file's position embedding is for. Another grid is resampled: as timm does
    # it, bicubic with antialias in float32 (DINOV2 below says why) | dino: as DINO's code, bicubic
    # by a factor that is 0.1 patches too large.
    stored: int = SIZE
    resample: str = "timm"
    norm: tuple = IMAGENET  # mean, std of the normalisation
    pool: str = "cls"  # the published embedding: cls | cls+mean | attention (a query of its own)
    pooler: int = 0  # numbers in the embedding of pool="attention", which has 8 heads
    eps: float = 1e-6  # of every LayerNorm
    keys: str = "timm"  # names in the published file: timm | transformers | torchvision
    files: tuple = SAFE_OR_BIN  # tried in this order
    gated: bool = False  # a logged-in user must accept the licence on the Hub
    derivatives: bool = True  # False: the licence forbids passing on weights made from these (…-ND)
    fp16: bool = False  # the publisher advises fp16 autocast; without it, fp16 is at one's own risk
    revision: str | None = None  # commit that downloads are pinned to; None: the newest

    @property
    def family(self):
        if not self.depth:
            return "ResNet"
        names = {"rotary": "DINOv3", "window": "Swin"}
        return names.get(self.pos, "ViT")

    @property
    def embed_dim(self):
        return embed_dim(self, self.pool)

    @property
    def page(self):
        if self.repo.startswith("torchvision/"):
            return "https://docs.pytorch.org/vision/stable/models.html"
        return f"https://huggingface.co/{self.repo}" if self.repo else "the README"


def embed_dim(spec, pool):
    if pool == "attention":
        return spec.pooler
    return 2 * spec.dim if pool in ("cls+mean", "cls+center") else spec.dim


def flops(spec, size=None):
    """Floating-point operations for one image in the matrix products and convolutions (a
    multiplication and an addition are two).
    """
    size = size or spec.size
    if spec.family == "ResNet":
        return 8.18e9  # as torchvision states it, times two
    if spec.family == "Swin":
        return swin_flops(spec, size)
    patches = ((spec.field or size) // spec.patch) ** 2
    tokens = patches + 1 + spec.registers
    fc2 = spec.hidden // 2 if spec.mlp == "swiglu" else spec.hidden
    weights = spec.dim * (4 * spec.dim + spec.hidden + fc2)  # of a block's products
    ends = patches * spec.dim * 3 * spec.patch**2
    if spec.pool == "attention":
        ends += tokens * 2 * spec.pooler * (spec.dim + 1) + 2 * spec.pooler**2
    return 2 * (spec.depth * (tokens * weights + 2 * tokens**2 * spec.dim) + ends)


def swin_flops(spec, size):
    last = len(spec.stages) - 1
    side, dim = size // spec.patch, spec.dim >> last
    if spec.stem == "convolutions":
        narrow, middle = dim // 8, dim // 4
        products = side**2 * (4 * narrow * 27 + middle * 9 * narrow + dim * middle)
    else:
        products = side**2 * dim * 3 * spec.patch**2
    for number, blocks in enumerate(spec.stages):
        if number:
            side, dim = side // 2, 2 * dim
            products += side**2 * 2 * dim * dim  # merging: four halves of dim to dim
        products += blocks * side**2 * (12 * dim * dim + 2 * 49 * dim)  # windows of 49 tokens
    return 2 * products


SMALL = dict(dim=384, depth=12, heads=6, hidden=1536)
BASE = dict(dim=768, depth=12, heads=12, hidden=3072)
LARGE = dict(dim=1024, depth=24, heads=16, hidden=4096)
HUGE = dict(dim=1280, depth=32, heads=16, patch=14)
GIANT = dict(dim=1536, depth=40, heads=24, patch=14, mlp="swiglu", hidden=8192, layerscale=True)
RESNET = dict(dim=2048, depth=0, heads=0, patch=0, mlp="", hidden=0, pos="", pool="average")
VIRCHOW = dict(
    **HUGE, mlp="swiglu", hidden=6832, layerscale=True, pool="cls+mean", fp16=True, gated=True
)
OPTIMUS_G = dict(**GIANT, registers=4, pos="patches", norm=OPTIMUS, fp16=True, gated=True)
HIBOU_14 = dict(
    patch=14, mlp="swiglu", layerscale=True, registers=4, pos="patches", norm=HIBOU,
    keys="transformers",
)  # fmt: skip
# DINOv2 and Kaiko-L store their position embedding at 518 px. It is resampled as timm does it
# (antialias); the originals resample without antialias, which gives materially other embeddings.
# Kaiko publishes its model as a timm model, so timm's way is the publisher's; for DINOv2 timm is
# the reference that most benchmarks (and these tests) use.
DINOV2 = dict(patch=14, layerscale=True, stored=518, keys="transformers")
DINOV2_REG = dict(**DINOV2, registers=4, pos="patches")
# DINOv3's files leave out the bias of the keys, which is zero; `params` counts it.
DINOV3 = dict(
    licence="DINOv3", layerscale=True, registers=4, pos="rotary", eps=1e-5, keys="transformers",
    files=("model.safetensors",), gated=True,
)  # fmt: skip
SWIN = dict(patch=4, pos="window", pool="mean", eps=1e-5)
SWIN_T = dict(**SWIN, dim=768, depth=12, heads=24, hidden=3072, stages=(2, 2, 6, 2))
SWIN_B = dict(**SWIN, dim=1024, depth=24, heads=32, hidden=4096, stages=(2, 2, 18, 2))
TORCHVISION = dict(keys="torchvision")
ND = dict(licence="CC-BY-NC-ND-4.0", gated=True, derivatives=False)
NC = "non-commercial"


def dinov3(size):
    return f"facebook/dinov3-{size}-pretrain-lvd1689m"


def kaiko(network):
    """The Kaiko models are republished by 1aurent, under timm's names of their networks."""
    return f"1aurent/{network}.kaiko_ai_towards_large_pathology_fms"


# One row per encoder: name, repository, licence, parameters, network, then what is special.
# fmt: off
ROWS = [
    # the demo's: made by demo/pretrain.py on synthetic tissue; says nothing about real tissue
    Encoder("demo", "", "MIT", 827_520, dim=128, depth=4, heads=4, hidden=512, patch=8, field=64,
            stored=64, layerscale=True, pool="mean", files=("demo/encoder.safetensors",)),
    # the paper's nine
    Encoder("phikon", "owkin/phikon", f"Owkin {NC}", 85_798_656, **BASE, keys="transformers",
            revision="057cc0295895c2df3dd7681a89680da6015cbefe"),
    Encoder("uni", "MahmoodLab/UNI", **ND, params=303_350_784, **LARGE, layerscale=True,
            files=BIN_OR_SAFE, revision="b55a5ec6cade1a39edfe6534189a9b8ca7a022f0"),
    Encoder("virchow", "paige-ai/Virchow", "Apache-2.0", 631_229_184, **VIRCHOW,
            revision="19eebc84ae33e79f1b2d866e6ff90ae50e522f9a"),
    Encoder("virchow2", "paige-ai/Virchow2", params=631_239_424, **{**VIRCHOW, **ND}, registers=4,
            revision="3158645804b69e3f3bc4439d4116edddf0840a72"),
    Encoder("h-optimus-0", "bioptimus/H-optimus-0", "Apache-2.0", 1_134_774_272, **OPTIMUS_G,
            files=BIN_OR_SAFE, revision="b145cc1e6c6b30d3251aa8b1f844e6974188a743"),
    # patch 16, whatever the name of timm's constructor says
    Encoder("prov-gigapath", "prov-gigapath/prov-gigapath", "Apache-2.0", 1_134_953_984,
            **{**GIANT, "patch": 16}, files=BIN_OR_SAFE, gated=True, fp16=True,
            revision="eba85dd46097c3eedfcc2a3a9a930baecb6bcc19"),
    Encoder("resnet50", "torchvision/resnet50-11ad3fa6.pth", "BSD-3-Clause", 23_508_032, **RESNET,
            **TORCHVISION, files=("resnet50-11ad3fa6.pth",)),
    Encoder("vit-b", "google/vit-base-patch16-224-in21k", "Apache-2.0", 85_798_656, **BASE,
            norm=HALF, eps=1e-12, keys="transformers",
            revision="b4569560a39a0f1af58e3ddaf17facf20ab919b0"),
    Encoder("vit-h", "google/vit-huge-patch14-224-in21k", "Apache-2.0", 630_764_800, **HUGE,
            hidden=5120, norm=HALF, eps=1e-12, keys="transformers"),
    # torchvision's two, through the same network
    Encoder("vit-b-tv", "torchvision/vit_b_16-c867db91.pth", "BSD-3-Clause", 85_798_656, **BASE,
            **TORCHVISION, files=("vit_b_16-c867db91.pth",)),
    Encoder("vit-h-swag", "torchvision/vit_h_14_lc_swag-c1eb923e.pth", "SWAG (CC-BY-NC-4.0)",
            630_764_800, **HUGE, hidden=5120, **TORCHVISION,
            files=("vit_h_14_lc_swag-c1eb923e.pth",)),
    # beyond the paper
    Encoder("uni2-h", "MahmoodLab/UNI2-h", **ND, params=681_394_176, **{**GIANT, "depth": 24},
            registers=8, pos="patches", files=BIN_OR_SAFE,
            revision="d517a8dd47902dd7c308b3c36f63bce47e7b9a43"),
    Encoder("h-optimus-1", "bioptimus/H-optimus-1", params=1_134_774_272, **{**OPTIMUS_G, **ND}),
    Encoder("h0-mini", "bioptimus/H0-mini", **ND, params=85_739_520, **{**BASE, "hidden": 4096},
            patch=14, mlp="swiglu", layerscale=True, registers=4, pos="patches", norm=OPTIMUS,
            fp16=True),
    Encoder("phikon-v2", "owkin/phikon-v2", f"Owkin {NC}", 303_350_784, **LARGE, layerscale=True,
            keys="transformers"),
    Encoder("hibou-b", "histai/hibou-b", "Apache-2.0", 85_739_520, **{**BASE, "hidden": 4096},
            **HIBOU_14),
    Encoder("hibou-l", "histai/hibou-L", "Apache-2.0", 303_657_216, **{**LARGE, "hidden": 5472},
            **HIBOU_14, gated=True),
    Encoder("midnight", "kaiko-ai/midnight", "MIT", 1_134_769_664, **GIANT, norm=HALF,
            keys="transformers"),
    Encoder("kaiko-s16", kaiko("vit_small_patch16_224"), f"Kaiko {NC}", 21_665_664, **SMALL,
            norm=HALF),
    Encoder("kaiko-b16", kaiko("vit_base_patch16_224"), f"Kaiko {NC}", 85_798_656, **BASE,
            norm=HALF),
    Encoder("kaiko-l14", kaiko("vit_large_patch14_reg4_dinov2"), f"Kaiko {NC}", 304_370_688,
            **LARGE, patch=14, layerscale=True, registers=4, pos="patches", stored=518, norm=HALF),
    Encoder("lunit-s16", "1aurent/vit_small_patch16_224.lunit_dino", f"Lunit {NC}", 21_665_664,
            **SMALL, norm=LUNIT),
    Encoder("lunit-s8", "1aurent/vit_small_patch8_224.lunit_dino", f"Lunit {NC}", 21_670_272,
            **SMALL, patch=8, norm=LUNIT),
    Encoder("dinov2-s", "facebook/dinov2-small", "Apache-2.0", 22_056_192, **SMALL, **DINOV2,
            revision="ed25f3a31f01632728cabb09d1542f84ab7b0056"),
    Encoder("dinov2-b", "facebook/dinov2-base", "Apache-2.0", 86_579_712, **BASE, **DINOV2,
            revision="f9e44c814b77203eaa57a6bdbbd535f21ede1415"),
    Encoder("dinov2-l", "facebook/dinov2-large", "Apache-2.0", 304_367_616, **LARGE, **DINOV2,
            revision="47b73eefe95e8d44ec3623f8890bd894b6ea2d6c"),
    Encoder("dinov2-g", "facebook/dinov2-giant", "Apache-2.0", 1_136_479_232, **{**GIANT, **DINOV2},
            revision="611a9d42f2335e0f921f1e313ad3c1b7178d206d"),
    Encoder("dinov2-s-reg", "facebook/dinov2-with-registers-small", "Apache-2.0", 22_057_344,
            **SMALL, **DINOV2_REG),
    Encoder("dinov2-b-reg", "facebook/dinov2-with-registers-base", "Apache-2.0", 86_582_016, **BASE,
            **DINOV2_REG),
    Encoder("dinov2-l-reg", "facebook/dinov2-with-registers-large", "Apache-2.0", 304_370_688,
            **LARGE, **DINOV2_REG),
    Encoder("dinov2-g-reg", "facebook/dinov2-with-registers-giant", "Apache-2.0", 1_136_483_840,
            **{**GIANT, **DINOV2_REG}),
    Encoder("gpfm", "majiabo/GPFM", **{**ND, "gated": False}, params=303_227_904, **LARGE, patch=14,
            layerscale=True, files=("GPFM.pth",)),
    Encoder("kaiko-s8", kaiko("vit_small_patch8_224"), f"Kaiko {NC}", 21_670_272, **SMALL, patch=8,
            norm=HALF),
    Encoder("kaiko-b8", kaiko("vit_base_patch8_224"), f"Kaiko {NC}", 85_807_872, **BASE, patch=8,
            norm=HALF),
    Encoder("mstar", "Wangyh/mSTAR", **ND, params=303_350_784, **LARGE, layerscale=True,
            files=BIN_OR_SAFE),
    Encoder("pathorchestra", "AI4Pathology/PathOrchestra", **ND, params=303_350_784, **LARGE,
            layerscale=True, files=BIN_OR_SAFE),
    # the vision transformer alone, without the head that projects it beside the text's embedding
    Encoder("keep", "Astaxanthin/KEEP", "MIT", 303_350_784, **LARGE, layerscale=True),
    Encoder("sp22m", "MountSinaiCompPath/SP22M", "CC-BY-NC-SA-4.0", 21_665_664, **SMALL,
            files=BIN_OR_SAFE),
    Encoder("sp85m", "MountSinaiCompPath/SP85M", "CC-BY-NC-SA-4.0", 85_798_656, **BASE,
            files=BIN_OR_SAFE),
    Encoder("openmidnight", "SophontAI/OpenMidnight", "Apache-2.0", 1_134_774_272, **GIANT,
            registers=4, pos="patches", files=("teacher_checkpoint_load.pt",), gated=True),
    Encoder("dinov3-s", dinov3("vits16"), params=21_600_768, **SMALL, **DINOV3),
    Encoder("dinov3-s-plus", dinov3("vits16plus"), params=28_697_088, **{**SMALL, "hidden": 3072},
            mlp="swiglu", **DINOV3),
    Encoder("dinov3-b", dinov3("vitb16"), params=85_668_864, **BASE, **DINOV3),
    Encoder("dinov3-l", dinov3("vitl16"), params=303_153_152, **LARGE, **DINOV3),
    Encoder("dinov3-h-plus", dinov3("vith16plus"), params=840_632_320, dim=1280, depth=32, heads=20,
            mlp="swiglu", hidden=10240, **DINOV3),
    Encoder("dinov3-7b", dinov3("vit7b16"), params=6_716_030_976, dim=4096, depth=40, heads=32,
            mlp="swiglu", hidden=16384, qkv_bias=False, **DINOV3),
    Encoder("conch-v1.5", "MahmoodLab/conchv1_5", **ND, params=306_109_184, **LARGE,
            layerscale=True, size=448, resample="dino", pool="attention", pooler=768,
            files=("pytorch_model_vision.bin",)),
    # trained at 1 µm/px
    Encoder("ctranspath", "1aurent/swin_tiny_patch4_window7_224.CTransPath",
            "GPL-3.0, academic", 27_520_038, **SWIN_T, stem="convolutions"),
    Encoder("swin-t", "timm/swin_tiny_patch4_window7_224.ms_in1k", "MIT", 27_519_354, **SWIN_T),
    Encoder("swin-b", "timm/swin_base_patch4_window7_224.ms_in1k", "MIT", 86_743_224, **SWIN_B),
]
# fmt: on
ENCODERS = {row.name: row for row in ROWS}


def find_encoder(name):
    if name not in ENCODERS:
        raise UserError(f"--model {name}: unknown encoder; choose among {', '.join(ENCODERS)}")
    return ENCODERS[name]
