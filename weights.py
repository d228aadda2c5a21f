"""Published weights: where they are, in which container, and how they get into the network.

Accepted: model.safetensors, sharded safetensors with their index, pytorch_model.bin and .pth (read
with weights_only=True, memory-mapped); every naming that encoders/names.py knows; fp16, bf16 and
fp32. Nothing in a file is ever executed."""

import contextlib
import ctypes
import errno
import functools
import hashlib
import json
import math
import mmap
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

from common import UserError, first_line
from encoders.names import rename

ROOT = Path(__file__).resolve().parent  # the demo's encoder lies in a folder of the project


def listing(missing=(), unexpected=(), shapes=()):
    """What differs, in one line that stays readable: the first four of each kind and the count."""
    parts = []
    for label, names in (
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape or type", shapes),
    ):
        if names:
            parts.append(f"{len(names)} {label} ({some(names)})")
    return "; ".join(parts)


def some(names):
    """The first four, and how many more."""
    text = ", ".join(sorted(names)[:4])
    if len(names) > 4:
        text += f" and {len(names) - 4} more"
    return text


# ---------------------------------------------------------------- files


# What torch raises for damaged pickles and archives.
DAMAGED = (
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
)
# Text is no weights file of any kind: those have zeros or a pickle's 0x80 among their first bytes.
TEXT = re.compile(rb"\s*(version https://git-lfs|[<{\[])")


def read_tensors(file):
    """Tensors of a weights file by name, memory-mapped: nothing is read before it is used."""
    try:
        # Opened first: safetensors reports a file without read permission as "no such file".
        with open(file, "rb") as handle:
            start = handle.read(64).removeprefix(b"\xef\xbb\xbf")
        if TEXT.match(start) and 0 not in start:
            raise UserError(
                f"{file}: not a weights file (a Git LFS pointer or a web page?); download it again"
            )
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as handle:
                return {name: handle.get_tensor(name) for name in handle.keys()}
        content = torch_load(file)
    except PermissionError:
        raise UserError(f"{file}: no permission to read it") from None
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise UserError(
                f"{file}: holds more than tensors (Python objects or code), which is never loaded; "
                "ask for the weights as safetensors"
            ) from None
        raise UserError(f"{file}: truncated or not a weights file; download it again") from None
    except DAMAGED as error:
        raise UserError(
            f"{file}: truncated or not a weights file ({first_line(error)}); download it again"
        ) from None
    return state_dict(content, file)


def torch_load(file):
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
    # The format before torch 1.6 cannot be memory-mapped.
    return torch.load(file, map_location="cpu", weights_only=True)


WRAPPERS = "state_dict", "model_state_dict", "model", "teacher"


def state_dict(content, file):
    """The tensors by name inside what a checkpoint holds: {"model": …}, {"teacher": {…}}, …"""
    wrapper = content
    while isinstance(wrapper, dict) and wrapper:
        content = wrapper
        inner = [content[key] for key in WRAPPERS if isinstance(content.get(key), dict)]
        wrapper = inner[0] if inner else None
    if not isinstance(content, dict):
        problem = f"it holds a {type(content).__name__}"
    else:
        odd = [str(name) for name, tensor in content.items() if not plain(name, tensor)]
        if not odd:
            return {name: tensor.detach() for name, tensor in content.items()}
        problem = f"not a plain tensor: {some(odd)}"
    raise UserError(f"{file}: holds no state dict (names with plain tensors); {problem}")


def plain(name, tensor):
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        return False
    dense = tensor.layout == torch.strided and not tensor.is_quantized
    return dense and tensor.device.type == "cpu"


def local_files(path, spec):
    """The weights files under `path` (a file, or a folder as it is published)."""
    path = Path(path).expanduser()
    if path.is_dir():
        path = file_in(path, spec)
    if not path.exists():
        raise UserError(
            f"--weights {path}: no such file or folder; the weights of {spec.name} come from "
            f"{spec.page}"
        )
    if path.name.endswith(".index.json"):
        return shards(path)
    return [path]


def file_in(folder, spec):
    """The one weights file (or index of weights files) in a folder."""
    published = "model.safetensors", INDICES[0], "pytorch_model.bin", INDICES[1], *spec.files
    for name in published:
        if (folder / name).is_file():
            return folder / name
    suffixes = ".safetensors", ".bin", ".pth", ".pt", ".ckpt"
    files = [file for file in sorted(folder.iterdir()) if file.suffix in suffixes]
    if len(files) > 1:
        raise UserError(
            f"{folder}: holds several weights files ({', '.join(file.name for file in files[:4])});"
            " name one of them with --weights"
        )
    if not files:
        raise UserError(
            f"{folder}: no weights in this folder (no {' or '.join(spec.files)}); get them from "
            f"{spec.page}"
        )
    return files[0]


INDICES = "model.safetensors.index.json", "pytorch_model.bin.index.json"


def shard_names(index):
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
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


def find_files(spec, weights=None, revision=None):
    """Files of the weights of `spec`: from `weights` (a path), else where they are published."""
    if weights:
        try:
            return local_files(weights, spec)
        except PermissionError as error:
            raise UserError(f"{error.filename}: no permission to read it") from None
    if not spec.repo:
        file = ROOT / spec.files[0]
        if not file.is_file():
            raise UserError(
                f"{file}: no such file; make it with python -m demo.pretrain, or use "
                "--weights PATH or --weights random"
            )
        return [file]
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
    if spec.pos == "rotary":
        zero_key_bias(spec, plan, stored)
    check(spec, plan, stored, expected_tensors(encoder), kind, files[0])

    ours = encoder.state_dict()
    special = [name for name in ("pos_embed", "cls_token") if name in ours]

    @torch.no_grad()  # the switch is per thread
    def convert(name):
        parts = [stored[part] for part in plan[name]]
        digest = fingerprint(name, parts)
        result = None
        if name in special:
            result = parts[0].to(torch.float64, copy=True)
        elif name in ours:
            result = joined(parts, ours[name].shape, dtype, device)
        for part in parts:
            give_back(part)
        return result, digest

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        converted = dict(zip(plan, pool.map(convert, plan)))
    whole = hashlib.sha256(b"".join(converted[name][1] for name in sorted(converted)))
    state = {name: tensor for name, (tensor, _) in converted.items() if name in ours}
    if "pos_embed" in special:
        state["cls_token"], state["pos_embed"] = positions(
            encoder, state["cls_token"], state["pos_embed"]
        )
    for name in special:
        state[name] = state[name].to(device, dtype)
    encoder.load_state_dict(state, strict=True, assign=True)
    return whole.hexdigest()


def zero_key_bias(spec, plan, stored):
    """DINOv3 has no bias of the keys: its files leave it out, or hold one that is masked. Files
    that also leave out those of queries and values mean zeros. This project stores all three.
    """
    for number in range(spec.depth):
        name = f"blocks.{number}.attn.qkv"
        weight = plan.get(f"{name}.weight", [None])[0]
        if weight is None or not spec.qkv_bias:
            continue
        zeros = torch.zeros(spec.dim, dtype=stored[weight].dtype)
        parts = plan.get(f"{name}.bias", [])
        query = value = zeros
        if len(parts) == 1 and stored[parts[0]].shape == (3 * spec.dim,):
            query, _, value = stored[parts[0]].chunk(3)
        elif len(parts) == 2:
            query, value = stored[parts[0]], stored[parts[1]]
        elif parts:
            continue  # check() reports it
        plan[f"{name}.bias"] = []
        for part, bias in (("query", query), ("key", zeros), ("value", value)):
            plan[f"{name}.bias"].append(f"{name}.bias of {part}")
            stored[f"{name}.bias of {part}"] = bias.contiguous()


def fingerprint(name, parts):
    """SHA-256 of a tensor that is stored in parts, one below the other."""
    shape = []
    if parts[0].dim():
        shape = [sum(part.shape[0] for part in parts), *parts[0].shape[1:]]
    digest = hashlib.sha256(f"{name} {parts[0].dtype} {shape}".encode())
    for part in parts:
        digest.update(memoryview(part.contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.digest()


def joined(parts, shape, dtype, device):
    """The parts, one below the other, as one tensor; integers keep their type."""
    target = dtype if parts[0].is_floating_point() else parts[0].dtype
    result = torch.empty(shape, dtype=target, device=device)
    row = 0
    for part in parts:
        if part.dim():
            result[row : row + part.shape[0]].copy_(part)
            row += part.shape[0]
        else:
            result.copy_(part)
    return result


def expected_tensors(encoder):
    """{name: (shape, whether its numbers are floating-point)} of a file for this network. Blocks
    that --layer leaves out are checked, though not loaded.
    """
    expected = {
        name: (tuple(tensor.shape), tensor.is_floating_point())
        for name, tensor in encoder.state_dict().items()
    }
    first_block = [name for name in expected if name.startswith("blocks.0.")]
    for name in first_block:
        for number in range(len(encoder.blocks), encoder.spec.depth):
            expected[f"blocks.{number}.{name.split('.', 2)[2]}"] = expected[name]
    return expected


def check(spec, plan, stored, expected, kind, file):
    """UserError unless the file holds exactly the expected tensors."""
    missing, unexpected, shapes = expected.keys() - plan.keys(), plan.keys() - expected.keys(), []
    for name in expected.keys() & plan.keys():
        shape, floating = expected[name]
        parts = [tuple(stored[part].shape) for part in plan[name]]
        stored_shape = parts[0]
        if len(parts) > 1 and all(part and part[1:] == parts[0][1:] for part in parts):
            stored_shape = (sum(part[0] for part in parts), *parts[0][1:])
        fits = stored_shape == shape
        if name == "pos_embed":  # any grid; positions() looks at the number of tokens
            fits = len(stored_shape) == 3 and stored_shape[::2] == shape[::2]
        if not fits:
            shapes.append(f"{name} {list(stored_shape)} instead of {list(shape)}")
        elif any(stored[part].is_floating_point() != floating for part in plan[name]):
            shapes.append(f"{name} of type {stored[plan[name][0]].dtype}")
    if missing or unexpected or shapes:
        raise UserError(
            f"{file}: not the weights of {spec.name} ({kind} names): "
            f"{listing(missing, unexpected, shapes)}; get them from {spec.page}"
        )


def positions(encoder, cls_token, pos_embed):
    """Class token and position embedding as the network has them, from those of the file.

    Files of DINOv2 with registers give the class token a position embedding and the registers none:
    it is added to the class token, once. A grid of another size than the network's is resampled in
    float32 as the row's `resample` says.
    """
    spec = encoder.spec
    prefix = encoder.prefix if spec.pos == "all" else 0
    count = pos_embed.shape[1] - prefix
    if spec.pos == "patches" and math.isqrt(count - 1) ** 2 == count - 1 and count > 1:
        cls_token, pos_embed, count = cls_token + pos_embed[:, :1], pos_embed[:, 1:], count - 1
    side = math.isqrt(max(count, 0))
    if side == 0 or side * side != count:
        raise UserError(
            f"not the weights of {spec.name}: a position embedding for {pos_embed.shape[1]} "
            f"tokens, {prefix} of them no patches, is not for a square grid"
        )
    if side != encoder.grid:
        grid = pos_embed[:, prefix:].float().reshape(1, side, side, spec.dim).permute(0, 3, 1, 2)
        if spec.resample == "timm":
            shape = encoder.grid, encoder.grid
            grid = F.interpolate(grid, size=shape, mode="bicubic", antialias=True)
        else:  # as in DINO, whose factor is a little too large to be safe from rounding
            grid = F.interpolate(grid, scale_factor=(encoder.grid + 0.1) / side, mode="bicubic")
        grid = grid.permute(0, 2, 3, 1).flatten(1, 2)
        pos_embed = torch.cat([pos_embed[:, :prefix], grid], dim=1)
    return cls_token, pos_embed


def give_back(tensor):
    """Tell the system that the memory-mapped pages of `tensor` are no longer needed (they stay in
    its cache).

    Without it a file counts towards the process until it is unmapped, and memory would peak at file
    plus network.
    """
    if not sys.platform.startswith("linux"):
        return
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.nbytes) // page * page
    if end > start:
        _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), 4)  # MADV_DONTNEED


_LIBC = ctypes.CDLL(None) if sys.platform.startswith("linux") else None


# ---------------------------------------------------------------- the Hub


def offline():
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            return True
    return False


PROXIES = "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"


@functools.cache
def reachable():
    """Whether the Hub can be reached; asked once, and answered within three seconds."""
    from huggingface_hub import constants

    if any(os.environ.get(name) for name in PROXIES):
        return True  # the first request shows whether the proxy works
    try:
        url = urllib.parse.urlsplit(constants.ENDPOINT)
        port = url.port or {"http": 80}.get(url.scheme, 443)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError("write it as https://HOST")
    except ValueError as error:
        raise UserError(f"HF_ENDPOINT={constants.ENDPOINT}: not an address ({error})") from None
    try:
        socket.create_connection((url.hostname, port), timeout=3).close()
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
    """Files of `spec` from the Hub, or from its cache. UserError that says what went wrong and what
    to do.
    """
    from huggingface_hub import errors

    elsewhere = f"or download it elsewhere from {spec.page} and give it with --weights PATH"
    if offline() or not reachable():  # asked first: the Hub's client retries for half a minute
        files = cached(spec, revision)
        if files:
            return files
        raise UserError(why_not_reached(spec, revision, elsewhere))
    # The bases of the Hub's error include that of its HTTP library: httpx, httpx2 or requests.
    transport = [base for base in errors.HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"]
    try:
        files = fetch(spec, revision)
    except (OSError, RuntimeError, ValueError, errors.EntryNotFoundError, *transport) as error:
        if getattr(error, "errno", None) in DISK_ERRORS:
            raise
        raise UserError(f"{why_failed(error, spec, revision)}, {elsewhere}") from None
    if not files:
        raise UserError(
            f"{version(spec, revision)} at {spec.page} holds none of {', '.join(spec.files)}: "
            f"choose another with --revision (main is the newest), {elsewhere}"
        )
    return files


DISK_ERRORS = errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS  # not the network's fault


def fetch(spec, revision):
    """The first of the files of `spec` that its repository holds; None if it holds none."""
    import huggingface_hub
    from huggingface_hub import errors

    def get(name):
        return Path(huggingface_hub.hf_hub_download(spec.repo, name, revision=revision))

    for name in (*spec.files, *INDICES):
        try:
            file = get(name)
        except errors.LocalEntryNotFoundError:
            raise
        except errors.EntryNotFoundError:
            continue
        if name not in INDICES:
            return [file]
        for shard in shard_names(file):
            get(shard)
        return shards(file)
    return None


def version(spec, revision):
    return f"revision {revision} of {spec.name}" if revision else spec.name


def no_token(spec):
    return (
        f"{spec.name} is gated and no token is set: accept the licence at {spec.page}, log in "
        "(hf auth login, or set HF_TOKEN)"
    )


def why_not_reached(spec, revision, elsewhere):
    import huggingface_hub

    missing = f"{version(spec, revision)} is not in the cache and the Hub"
    if offline():
        return f"{missing} is switched off (HF_HUB_OFFLINE): unset that, {elsewhere}"
    if spec.gated and not huggingface_hub.get_token():
        return f"{no_token(spec)}, {elsewhere} (the Hub cannot be reached from here either)"
    return f"{missing} cannot be reached (no network?): connect, {elsewhere}"


def why_failed(error, spec, revision):
    """What an error of the Hub's client means and what to do about it."""
    import huggingface_hub
    from huggingface_hub import errors

    token = huggingface_hub.get_token()
    if isinstance(error, errors.GatedRepoError):
        if not token:
            return no_token(spec)
        reason = "its licence is not accepted"
        if status(error) == 401:
            reason = "the token is not accepted"
        return (
            f"{spec.name} is gated and {reason} for the account of this token: accept the licence "
            f"at {spec.page} with that account"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"{spec.page} has no revision {revision}: choose another (--revision main is the "
            "newest)"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        who = "for this token (is it valid?)" if token else "without a token"
        return f"{spec.page} cannot be seen {who}: look at the page, log in with hf auth login"
    if isinstance(error, errors.LocalEntryNotFoundError):
        problem = "did not answer (no network?)"
        if status(error.__cause__):
            problem = f"answered with status {status(error.__cause__)}"
        return (
            f"{version(spec, revision)} is not in the cache and the Hub {problem}: try again later"
        )
    if isinstance(error, errors.HfHubHTTPError):
        if status(error) == 401:
            return "the Hub does not accept this token: log in again with hf auth login"
        return f"the Hub answered with status {status(error)} for {spec.name}: try again later"
    return (
        f"the download of {spec.name} broke off ({first_line(error)}): the same command continues "
        "it"
    )


def status(error):
    return getattr(getattr(error, "response", None), "status_code", None)


def torchvision_cache(spec):
    return Path(torch.hub.get_dir()) / "checkpoints" / spec.files[0]


def download_torchvision(spec):
    """The file of a torchvision model from download.pytorch.org, in torch's cache; its hash is in
    its name.
    """
    file = torchvision_cache(spec)
    if file.is_file():
        return file
    url = f"https://download.pytorch.org/models/{file.name}"
    if offline():
        raise UserError(
            f"{spec.name} is not in {file.parent} and downloads are switched off (HF_HUB_OFFLINE): "
            f"unset that, or download {url} elsewhere and give it with --weights PATH (see "
            f"{spec.page})"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(file), hash_prefix=file.stem.rsplit("-", 1)[1])
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{spec.name}: {url} cannot be downloaded ({first_line(error)}); download it "
            f"elsewhere and give it with --weights PATH (see {spec.page})"
        ) from None
    return file


def availability(spec):
    """Where the weights of `spec` can be had from this machine now, in a few words."""
    if not spec.repo:
        exists = (ROOT / spec.files[0]).is_file()
        return "local" if exists else "missing (python -m demo.pretrain)"
    if spec.repo.startswith("torchvision/"):
        available = torchvision_cache(spec).is_file()
    else:
        available = cached(spec, spec.revision)
    if available:
        return "cached"
    needs = []
    if spec.gated and not has_token():
        needs.append("needs token")
    if offline():
        needs.append("offline")
    elif not reachable():
        needs.append("no network")
    if not needs and spec.gated:
        return "accept licence, download"
    return ", ".join(needs) or "download"


def has_token():
    import huggingface_hub

    return bool(huggingface_hub.get_token())
