"""Published weights: where they lie, in which format, under which names, and how they get into the
network.

Accepted: model.safetensors, sharded safetensors with their index, pytorch_model.bin and .pth (read
with weights_only=True, memory-mapped); names of timm, of transformers (4 and 5: ViTModel,
Dinov2Model, Dinov2WithRegistersModel) and of torchvision; fp16, bf16 and fp32. Nothing of a file is
ever executed."""

import contextlib
import ctypes
import errno
import functools
import hashlib
import json
import math
import os
import pickle
import re
import socket
import struct
import sys
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from common import UserError

# ---------------------------------------------------------------- names

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

    What no embedding needs is left out: mask tokens, transformers' pooler, torchvision's
    classifier. Names that no rule knows are kept as they are, so that the strict comparison with
    the network reports them."""
    names = list(names)
    if any("patch_embeddings.projection." in name for name in names):
        kind, rule = "transformers", _transformers
    elif any(name.startswith("conv_proj.") for name in names):
        kind, rule = "torchvision", _torchvision
    elif any(name.startswith("layer1.0.") for name in names):
        kind, rule = "resnet", lambda name: None if name.startswith("fc.") else (name, 0)
    else:
        kind, rule = "timm", lambda name: None if name == "mask_token" else (name, 0)
    parts = {}
    for name in names:
        found = rule(name)
        if found is not None:
            ours, place = found
            parts.setdefault(ours, []).append((place, name))
    return {ours: [name for _, name in sorted(found)] for ours, found in parts.items()}, kind


def _transformers(name):
    bare = re.sub(
        r"^(vit|dinov2|dinov2_with_registers)\.", "", name
    )  # saved from a model with a head
    if bare == "embeddings.mask_token" or bare.startswith("pooler."):
        return None
    block = re.fullmatch(
        r"(?:encoder\.layer|encoder\.layers|layers)\.(\d+)\.(.+)\.(weight|bias|lambda1)", bare
    )
    if block:
        number, inner, leaf = block.groups()
        if inner in TRANSFORMERS_BLOCK:
            ours, place = TRANSFORMERS_BLOCK[inner]
            return f"blocks.{number}.{ours}.{'gamma' if leaf == 'lambda1' else leaf}", place
    return TRANSFORMERS.get(bare, name), 0


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


def first_line(error):
    text = str(error).strip()
    return text.splitlines()[0][:160] if text else type(error).__name__


def listing(missing=(), unexpected=(), shapes=()):
    """What differs, in one line that stays readable: the first four of each kind and the count."""
    found = []
    for label, names in (
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape or type", shapes),
    ):
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            found.append(f"{len(names)} {label} ({', '.join(sorted(names)[:4])}{more})")
    return "; ".join(found)


# ---------------------------------------------------------------- files


def read_tensors(file):
    """Tensors of a weights file by name, memory-mapped: nothing is read before it is used."""
    try:
        with open(
            file, "rb"
        ) as handle:  # safetensors says "no such file" of one that may not be read
            start = handle.read(64)
        # Text is no weights file of any kind (those have zeros or a pickle's 0x80 here), whatever
        # torch says of it.
        if (
            re.match(rb"\s*(version https://git-lfs|[<{\[])", start.removeprefix(b"\xef\xbb\xbf"))
            and 0 not in start
        ):
            raise UserError(
                f"{file}: not a weights file (a Git LFS pointer or a web page?); download it again"
            )
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as handle:
                return {name: handle.get_tensor(name) for name in handle.keys()}
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            content = torch.load(
                file, map_location="cpu", weights_only=True
            )  # the format before torch 1.6
    except PermissionError:
        raise UserError(f"{file}: no permission to read it") from None
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise UserError(
                f"{file}: holds more than tensors (Python objects or code), which is never "
                "loaded; ask for "
                "the weights as safetensors"
            ) from None
        raise UserError(f"{file}: truncated or not a weights file; download it again") from None
    except (
        SafetensorError,
        RuntimeError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        OverflowError,
        AssertionError,
        struct.error,
        OSError,
    ) as error:  # damaged pickles raise any of these
        raise UserError(
            f"{file}: truncated or not a weights file ({first_line(error)}); download it again"
        ) from None
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]

    def plain(tensor):
        return (
            isinstance(tensor, torch.Tensor)
            and tensor.layout == torch.strided
            and tensor.device.type == "cpu"
            and not tensor.is_quantized
        )

    if not isinstance(content, dict) or not all(
        isinstance(n, str) and plain(t) for n, t in content.items()
    ):
        raise UserError(f"{file}: holds no state dict (names with plain tensors)")
    return {name: tensor.detach() for name, tensor in content.items()}


def read_own(file):
    """A safetensors file that this project wrote, whole."""
    try:
        with safe_open(file, framework="pt") as handle:
            return {name: handle.get_tensor(name).clone() for name in handle.keys()}
    except SafetensorError as error:
        raise UserError(f"{file}: truncated or not a safetensors file ({error})") from None


def local_files(path, spec):
    """The weights files under `path` (a file, or a folder as it is published)."""
    path = Path(path).expanduser()
    if path.is_file() and not path.name.endswith(".index.json"):
        return [path]
    if path.is_dir():
        inside = [
            path / name
            for name in (
                "model.safetensors",
                INDICES[0],
                "pytorch_model.bin",
                INDICES[1],
                *spec.files,
            )
            if (path / name).is_file()
        ]
        if not inside:
            inside = [
                p
                for p in sorted(path.iterdir())
                if p.suffix in (".safetensors", ".bin", ".pth", ".pt")
            ]
            if len(inside) > 1:
                raise UserError(
                    f"{path}: holds several weights files "
                    f"({', '.join(p.name for p in inside[:4])}); "
                    "name one of them with --weights"
                )
        if not inside:
            raise UserError(
                f"{path}: no weights in this folder (no {' or '.join(spec.files)}); get them from "
                f"{spec.page}"
            )
        path = inside[0]
    if not path.exists():
        raise UserError(
            f"--weights {path}: no such file or folder; the weights of {spec.name} come from "
            f"{spec.page}"
        )
    return shards(path) if path.name.endswith(".index.json") else [path]


INDICES = "model.safetensors.index.json", "pytorch_model.bin.index.json"


def shard_names(index):
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("names of files expected")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index}: not an index of weights files ({first_line(error)})") from None
    return names


def shards(index):
    """The files that an index names; they lie beside it."""
    names = shard_names(index)
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UserError(f"{index}: {listing(missing)} beside it; download the model again")
    return [index.parent / name for name in names]


def find_files(spec, weights=None, revision=None, here=Path(".")):
    """Files of the weights of `spec`: from `weights` (a path), from `here` for the demo's, else
    from the Hub.
    """
    if weights:
        try:
            return local_files(weights, spec)
        except PermissionError as error:
            raise UserError(f"{error.filename}: no permission to read it") from None
    if not spec.repo:
        if not (here / spec.files[0]).is_file():
            raise UserError(
                f"{here / spec.files[0]}: no such file; make it with python -m demo.pretrain, or "
                "use "
                "--weights PATH or --weights random"
            )
        return [here / spec.files[0]]
    if spec.repo.startswith("torchvision/"):
        return [download_torchvision(spec)]
    return download(spec, revision or spec.revision)


# ---------------------------------------------------------------- into the network


def load(encoder, files, device="cpu", dtype=torch.float32):
    """Fill `encoder` (built on meta) from `files`, strictly, in `dtype`; returns the hash of the
    weights.

    One tensor after the other is read, hashed, converted and given back to the system, so the peak
    of memory stays near the size of the network in `dtype`. The hash is SHA-256 over the stored
    tensors (name, type, shape, bytes) under our names: equal for equal weights in any file format.
    """
    spec = encoder.spec
    stored = {}
    for file in files:
        stored.update(read_tensors(file))
    plan, kind = rename(stored)
    expected = {
        name: (tuple(t.shape), t.is_floating_point()) for name, t in encoder.state_dict().items()
    }
    if spec.depth:  # blocks that --layer leaves out are checked, too, though not loaded
        for name in [name for name in expected if name.startswith("blocks.0.")]:
            for number in range(len(encoder.blocks), spec.depth):
                expected[f"blocks.{number}.{name.split('.', 2)[2]}"] = expected[name]
    check(spec, plan, stored, expected, kind, files[0])

    ours = encoder.state_dict()
    special = [name for name in ("pos_embed", "cls_token") if name in ours]

    @torch.no_grad()  # the switch is per thread
    def convert(name):
        parts = [stored[part] for part in plan[name]]
        digest = hashlib.sha256()
        for number, part in enumerate(parts):
            if number == 0:
                shape = [sum(p.shape[0] for p in parts), *part.shape[1:]] if part.dim() else []
                digest.update(f"{name} {part.dtype} {shape}".encode())
            digest.update(memoryview(part.contiguous().reshape(-1).view(torch.uint8).numpy()))
        result = None
        if name in special:
            result = parts[0].to(torch.float64, copy=True)
        elif name in ours:
            target = dtype if parts[0].is_floating_point() else parts[0].dtype
            result = torch.empty(ours[name].shape, dtype=target, device=device)
            row = 0
            for part in parts:
                if part.dim():
                    result[row : row + part.shape[0]].copy_(part)
                    row += part.shape[0]
                else:
                    result.copy_(part)
        for part in parts:
            give_back(part)
        return result, digest.digest()

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        converted = dict(zip(plan, pool.map(convert, plan)))
    whole = hashlib.sha256(b"".join(converted[name][1] for name in sorted(converted)))
    state = {name: tensor for name, (tensor, _) in converted.items() if name in ours}
    if special:
        state["cls_token"], state["pos_embed"] = positions(
            encoder, state["cls_token"], state["pos_embed"], kind
        )
        for name in special:
            state[name] = state[name].to(device, dtype)
    encoder.load_state_dict(state, strict=True, assign=True)
    return whole.hexdigest()


def check(spec, plan, stored, expected, kind, file):
    missing, unexpected, shapes = expected.keys() - plan.keys(), plan.keys() - expected.keys(), []
    for name in expected.keys() & plan.keys():
        wanted, floating = expected[name]
        parts = [tuple(stored[part].shape) for part in plan[name]]
        found = parts[0]
        if len(parts) > 1 and all(p and p[1:] == found[1:] for p in parts):
            found = (sum(p[0] for p in parts), *found[1:])
        fits = found == wanted
        if name == "pos_embed":  # any grid; positions() looks at the number
            fits = len(found) == 3 and (found[0], found[2]) == (wanted[0], wanted[2])
        if not fits:
            shapes.append(f"{name} {list(found)} instead of {list(wanted)}")
        elif any(stored[part].is_floating_point() != floating for part in plan[name]):
            shapes.append(f"{name} of type {stored[plan[name][0]].dtype}")
    if missing or unexpected or shapes:
        raise UserError(
            f"{file}: not the weights of {spec.name} ({kind} names): "
            f"{listing(missing, unexpected, shapes)}; get them from {spec.page}"
        )


def positions(encoder, cls_token, pos_embed, kind):
    """Class token and position embedding as the network has them, from those of the file.

    transformers' models with registers give the class token a position embedding of its own and the
    registers none: it is added to the class token, once. Another grid than the network's is
    resampled in float32, bicubic with antialias, as timm does it."""
    spec = encoder.spec
    prefix = encoder.prefix if spec.pos == "all" else 0
    if spec.pos == "patches" and kind == "transformers":
        cls_token, pos_embed = cls_token + pos_embed[:, :1], pos_embed[:, 1:]
    count = pos_embed.shape[1] - prefix
    side = math.isqrt(max(count, 0))
    if side == 0 or side * side != count:
        raise UserError(
            f"not the weights of {spec.name}: a position embedding for {pos_embed.shape[1]} "
            "tokens, of "
            f"which {prefix} are no patches, is not for a square grid"
        )
    if side != encoder.grid:
        grid = pos_embed[:, prefix:].float().reshape(1, side, side, spec.dim).permute(0, 3, 1, 2)
        grid = F.interpolate(
            grid, size=(encoder.grid, encoder.grid), mode="bicubic", antialias=True
        )
        pos_embed = torch.cat(
            [pos_embed[:, :prefix], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1
        )
    return cls_token, pos_embed


def give_back(tensor):
    """Tell the system that the memory-mapped pages of `tensor` are not needed any more (they stay
    in its cache).

    Without it a file counts towards the process until it is unmapped, and memory would peak at file
    plus network."""
    if not sys.platform.startswith("linux"):
        return
    page = os.sysconf("SC_PAGE_SIZE")
    start = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.nbytes) // page * page
    if end > start:
        _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), 4)  # MADV_DONTNEED


_LIBC = ctypes.CDLL(None) if sys.platform.startswith("linux") else None


# ---------------------------------------------------------------- the Hub


def offline():
    return any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


@functools.cache
def reachable():
    """Whether the Hub can be reached at all; asked once, and answered within three seconds."""
    from huggingface_hub import constants

    if any(
        os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
    ):
        return True  # through a proxy; whether it works is seen when something is asked for
    url = urllib.parse.urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection(
            (url.hostname, url.port or (80 if url.scheme == "http" else 443)), timeout=3
        ).close()
    except OSError:
        return False
    return True


def cached(spec, revision=None):
    """Files of `spec` in the Hub's cache on this machine, or None: asks no network."""
    import huggingface_hub

    for name in (*spec.files, *INDICES):
        file = huggingface_hub.try_to_load_from_cache(spec.repo, name, revision=revision)
        if isinstance(file, str):
            with contextlib.suppress(UserError):  # an index without its shards is no cached model
                return shards(Path(file)) if name in INDICES else [Path(file)]
    return None


def download(spec, revision=None):
    """Files of `spec` from the Hub, or from its cache. UserError that says which of the many things
    went wrong.
    """
    import huggingface_hub
    from huggingface_hub import errors

    aside = f"or download it elsewhere from {spec.page} and give it with --weights PATH"
    version = f"revision {revision} of {spec.name}" if revision else spec.name
    no_token = (
        f"{spec.name} is gated and there is no token here: accept the licence at {spec.page}, log "
        "in "
        f"(hf auth login, or set HF_TOKEN), {aside}"
    )
    if offline() or not reachable():  # asked first: the Hub's own client tries for half a minute
        files = cached(spec, revision)
        if files:
            return files
        if offline():
            raise UserError(
                f"{version} is not in the cache and the Hub is switched off (HF_HUB_OFFLINE): "
                "unset that, "
                f"{aside}"
            )
        if spec.gated and not huggingface_hub.get_token():
            raise UserError(f"{no_token} (the Hub cannot be reached from here either)")
        raise UserError(
            f"{version} is not in the cache and the Hub cannot be reached (no network?): connect, "
            f"{aside}"
        )

    def fetch(name):
        return Path(huggingface_hub.hf_hub_download(spec.repo, name, revision=revision))

    try:
        for name in (*spec.files, *INDICES):
            try:
                file = fetch(name)
            except errors.LocalEntryNotFoundError:
                raise
            except errors.EntryNotFoundError:
                continue
            if name not in INDICES:
                return [file]
            for shard in shard_names(file):
                fetch(shard)
            return shards(file)
    except errors.GatedRepoError as error:
        if not huggingface_hub.get_token():
            raise UserError(no_token) from None
        reason = (
            "the token is not accepted" if status(error) == 401 else "its licence is not accepted"
        )
        raise UserError(
            f"{spec.name} is gated and {reason} for the account of this token: accept the licence "
            "at "
            f"{spec.page} with that account, {aside}"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"{spec.page} has no revision {revision}: choose another (--revision main is the "
            "newest), "
            f"{aside}"
        ) from None
    except errors.RepositoryNotFoundError:
        who = "for this token (is it valid?)" if huggingface_hub.get_token() else "without a token"
        raise UserError(
            f"{spec.page} cannot be seen {who}: look at the page, log in with hf auth login, "
            f"{aside}"
        ) from None
    except errors.LocalEntryNotFoundError as error:
        cause = status(error.__cause__)
        what = f"answered with status {cause}" if cause else "did not answer (no network?)"
        raise UserError(
            f"{version} is not in the cache and the Hub {what}: try again later, {aside}"
        ) from None
    except errors.HfHubHTTPError as error:
        if status(error) == 401:
            raise UserError(
                f"the Hub does not accept the token it was given: log in again with hf auth login, "
                f"{aside}"
            ) from None
        raise UserError(
            f"the Hub answered with status {status(error)} for {spec.name}: try again later, "
            f"{aside}"
        ) from None
    except (OSError, RuntimeError, ValueError, *_transport_errors()) as error:
        if isinstance(error, OSError) and error.errno in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EACCES,
            errno.EROFS,
        ):
            raise  # the disk's, not the network's
        raise UserError(
            f"the download of {spec.name} broke off ({first_line(error)}): the same command "
            "continues it, "
            f"{aside}"
        ) from None
    raise UserError(
        f"{version} at {spec.page} holds none of {', '.join(spec.files)}: choose another with "
        "--revision "
        f"(main is the newest), {aside}"
    )


def _transport_errors():
    """The Hub's client uses requests before its version 1, httpx since; their errors have no common
    base.
    """
    found = []
    for module, name in (("httpx", "HTTPError"), ("requests", "RequestException")):
        if module in sys.modules:
            found.append(getattr(sys.modules[module], name))
    return found


def status(error):
    return getattr(getattr(error, "response", None), "status_code", None)


def torchvision_cache(spec):
    return Path(torch.hub.get_dir()) / "checkpoints" / spec.files[0]


def download_torchvision(spec):
    """The file of a torchvision model from download.pytorch.org, in torch's own cache; its hash is
    in its name.
    """
    file = torchvision_cache(spec)
    if file.is_file():
        return file
    url = f"https://download.pytorch.org/models/{file.name}"
    if offline():
        raise UserError(
            f"{spec.name} is not in {file.parent} and downloads are switched off (HF_HUB_OFFLINE): "
            f"unset it, or download {url} elsewhere and give it with --weights PATH (see "
            f"{spec.page})"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(file), hash_prefix=file.stem.rsplit("-", 1)[1])
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{spec.name}: {url} cannot be downloaded ({first_line(error)}); download it "
            "elsewhere and "
            f"give it with --weights PATH (see {spec.page})"
        ) from None
    return file


def availability(spec, here=Path(".")):
    """Where the weights of `spec` can be had, here and now, in a few words."""
    if not spec.repo:
        return "local" if (here / spec.files[0]).is_file() else "missing (python -m demo.pretrain)"
    if spec.repo.startswith("torchvision/"):
        if torchvision_cache(spec).is_file():
            return "cached"
        return "offline" if offline() else "download" if reachable() else "no network"
    import huggingface_hub

    if cached(spec, spec.revision):
        return "cached"
    needs = "needs token" if spec.gated and not huggingface_hub.get_token() else ""
    if offline() or not reachable():
        return ", ".join(filter(None, (needs, "offline" if offline() else "no network")))
    return needs or ("accept licence, download" if spec.gated else "download")
