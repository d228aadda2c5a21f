"""Augmentation of training patches: batched, on the device, each sample's parameters from its key.

    python augment.py --data D --gallery out.png      augmented samples of each class and domain

The paper's operations (its published code gives the probabilities): rotation by any angle (p 0.5),
flips (p 0.5 each), colour jitter of brightness, contrast, saturation and hue by 0.1 in random order
(p 0.5), Gaussian blur of 5 px, sigma 0.1 to 1 (p 0.1). A patch is rotated within a larger crop, so
that no corner is black; `--stain-jitter` adds jitter of the stains in optical density (Tellez et
al. 2018).

`--augment heavy` adds what scanners and laboratories do beyond that: another scale (a crop of 75 to
100% of the side, p 0.5), elastic deformation (p 0.3), jitter of the stains by 0.1 (p 0.5), Gaussian
noise of up to 0.04 (p 0.3), and JPEG of quality 30 to 95 (p 0.3)."""

import argparse
import functools
import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import common
import flags
from common import UserError
from dataset.patches import Patches, margin
from encoders.dropout import WEYL, splitmix

# Share of the samples that each operation changes, in the order of their random numbers.
PROBABILITY = {"rotate": 0.5, "hflip": 0.5, "vflip": 0.5, "jitter": 0.5, "blur": 0.1, "stain": 0.5}
JITTER = 0.1  # brightness, contrast, saturation: 1 ± JITTER; hue: ± JITTER turns
BLUR, SIGMA = 5, (0.1, 1.0)  # px
GREY = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision rounds it
# Of --augment heavy: share of the samples, and how much.
HEAVY = {"zoom": 0.5, "elastic": 0.3, "noise": 0.3, "jpeg": 0.3}
HEAVY_STAIN = 0.1  # jitter of the stains, unless --stain-jitter says otherwise
ZOOM = (0.75, 1.0)  # side of the crop by the patch's
ELASTIC, KNOTS = 0.02, 7  # largest shift by the patch's side, of so many points along it
NOISE = (0.01, 0.04)  # standard deviation, of 1
QUALITY = (30, 95)  # of JPEG
# Absorbance of haematoxylin, eosin and DAB (Ruifrok and Johnston 2001), rows of length one.
HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
HED = HED / np.linalg.norm(HED, axis=1, keepdims=True)


# ---------------------------------------------------------------- parameters


def uniform(seed, step, samples, n):
    """Random numbers [B, n] in [0, 1); a sample's are a pure function of (seed, step, sample)."""
    seed = torch.tensor((int(seed) + 2**63) % 2**64 - 2**63)  # any whole number, as 64 bits
    samples = torch.as_tensor(np.asarray(samples, np.int64))
    key = splitmix(samples + splitmix(splitmix(seed) + int(step)))
    words = splitmix(key[:, None] + torch.arange(1, n + 1) * WEYL)
    # The upper 53 bits, as many as a float64 holds.
    return ((words >> 11) & (2**53 - 1)).double().numpy() / 2**53


def stain_of(stain, kind="paper"):
    """Jitter of the stains that --stain-jitter (None: not given) and --augment ask for."""
    if stain is not None:
        return stain
    return HEAVY_STAIN if kind == "heavy" else 0.0


def parameters(seed, step, samples, stain=0.0, heavy=False):
    """What happens to each sample: dict of arrays [B] (`order` [B, 4], `stains` [B, 3, 2]).

    Booleans rotate, hflip, vflip, jitter, blur, stain; angle (degrees), brightness, contrast,
    saturation (factors), hue (turns), sigma (px), order of the four colour operations, factor and
    shift of each stain. heavy: also booleans zoom, elastic, noise, jpeg; shown (side of the crop by
    the patch's; 1 without zoom), bend [B, KNOTS, KNOTS, 2] (shifts by half the patch's side; 0
    without elastic), strength (of the noise), key (of its random numbers), quality."""
    more = 8 + 2 * KNOTS**2 if heavy else 0
    u = uniform(seed, step, samples, 24 + more)  # the first 24 are the same
    out = {name: u[:, i] < p for i, (name, p) in enumerate(PROBABILITY.items())}
    out["stain"] &= stain > 0
    out["angle"] = 360 * u[:, 6] - 180
    for i, name in enumerate(("brightness", "contrast", "saturation"), start=7):
        out[name] = 1 - JITTER + 2 * JITTER * u[:, i]
    out["hue"] = JITTER * (2 * u[:, 10] - 1)
    out["sigma"] = SIGMA[0] + (SIGMA[1] - SIGMA[0]) * u[:, 11]
    out["order"] = np.argsort(u[:, 12:16], axis=1)
    jitter = stain * (2 * u[:, 16:22].reshape(-1, 3, 2) - 1)
    out["stains"] = jitter + (1.0, 0.0)
    if heavy:
        u = u[:, 24:]
        out |= {name: u[:, i] < p for i, (name, p) in enumerate(HEAVY.items())}
        out["shown"] = np.where(out["zoom"], ZOOM[0] + (ZOOM[1] - ZOOM[0]) * u[:, 4], 1.0)
        out["strength"] = NOISE[0] + (NOISE[1] - NOISE[0]) * u[:, 5]
        out["key"] = (u[:, 6] * 2**53).astype(np.int64)
        out["quality"] = (QUALITY[0] + (QUALITY[1] - QUALITY[0] + 1) * u[:, 7]).astype(np.int64)
        bend = 2 * ELASTIC * (2 * u[:, 8:].reshape(-1, KNOTS, KNOTS, 2) - 1)
        out["bend"] = bend * out["elastic"][:, None, None, None]
        out["angle"] = np.where(out["rotate"], out["angle"], 0.0)
        out["rotate"] = out["rotate"] | out["zoom"] | out["elastic"]  # one resampling for all
    return out


# ---------------------------------------------------------------- operations
# on images float [B, 3, S, S] in [0, 1]


def tensor(values, device, dtype=None):
    """An array as a tensor on `device`. No GPU is waited for: what it still has to do goes on."""
    values = torch.as_tensor(values, dtype=dtype)
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def _column(values, like):
    return tensor(values, like.device, like.dtype).view(-1, 1, 1, 1)


def grey(x):
    r, g, b = x.unbind(1)
    return (GREY[0] * r + GREY[1] * g + GREY[2] * b).unsqueeze(1)


def brightness(x, factor):
    return (x * factor).clamp_(0, 1)


def contrast(x, factor):
    mean = grey(x).mean((2, 3), keepdim=True)
    return torch.lerp(mean, x, factor).clamp_(0, 1)


def saturation(x, factor):
    return torch.lerp(grey(x), x, factor).clamp_(0, 1)


def hue(x, turns):
    """Turn the hue (HSV), keeping saturation and value; |turns| ≤ 1/3."""
    value, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = value - low
    r, g, b = x.split(1, dim=1)
    sixth = torch.where(
        value == r,
        g - b,
        torch.where(value == g, (b - r).add_(chroma, alpha=2), (r - g).add_(chroma, alpha=4)),
    )
    sixth.div_(torch.where(chroma == 0, 1, chroma)).add_(6 * turns)  # 6 h
    # Each channel of a hue h: value - chroma * clip(2 - |k - 2|, 0, 1), k = (n + 6 h) mod 6, n = 5,
    # 3, 1; with d = n + 6 h - 2, which lies between -4 and 10, the modulo is ||d - 3| - 3| in the
    # place of |d|.
    d = tensor([0.0, -2.0, -4.0], x.device).view(1, 3, 1, 1) + sixth  # d - 3
    d.abs_().sub_(3).abs_().clamp_(1, 2)
    return torch.addcmul(value.sub_(chroma, alpha=2), chroma, d)


COLOUR = (
    (brightness, "brightness"),
    (contrast, "contrast"),
    (saturation, "saturation"),
    (hue, "hue"),
)


def blur(x, sigma):
    """Gaussian blur with a kernel of BLUR px, reflected at the border; sigma [n] px."""
    half = BLUR // 2
    t = torch.arange(BLUR, dtype=torch.float32, device=x.device) - half
    sigma = tensor(sigma, x.device, torch.float32)
    kernel = torch.exp(-0.5 * (t / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True))[:, :, None, None, None]  # [n, BLUR, 1, 1, 1]
    # Shifted sums, not a convolution: cuDNN would compute that in TF32, and a GPU's images would
    # not be a CPU's.
    for axis, padding in ((3, (half, half, 0, 0)), (2, (0, 0, half, half))):
        length = x.shape[axis]
        padded = F.pad(x, padding, mode="reflect")
        x = padded.narrow(axis, 0, length) * kernel[:, 0]
        for k in range(1, BLUR):
            x.addcmul_(padded.narrow(axis, k, length), kernel[:, k])
    return x


def rotated(x, angle, size, shown=None, bend=None):
    """The middle `size` px of x [n, 3, S, S], turned counter-clockwise by `angle` [n] degrees.

    shown [n]: less of it, enlarged to `size`; bend [n, KNOTS, KNOTS, 2]: shifts in between, smooth.
    """
    missing = margin(size) - x.shape[-1]
    if missing > 0:  # a ready-made patch has no margin: reflect it
        before = missing // 2
        x = F.pad(x, (before, missing - before) * 2, mode="reflect")
    radians = torch.deg2rad(tensor(angle, x.device, torch.float32))
    cos = torch.cos(radians)[:, None] * (size / x.shape[-1])
    sin = torch.sin(radians)[:, None] * (size / x.shape[-1])
    if shown is not None:
        shown = tensor(shown, x.device, torch.float32)[:, None]
        cos, sin = cos * shown, sin * shown
    # Centres of the pixels, as F.affine_grid has them.
    t = (torch.arange(size, device=x.device) * 2 + 1) / size - 1
    grid = torch.empty(len(x), size, size, 2, device=x.device)
    torch.sub((cos * t)[:, None, :], (sin * t)[:, :, None], out=grid[..., 0])
    torch.add((sin * t)[:, None, :], (cos * t)[:, :, None], out=grid[..., 1])
    if bend is None:
        return F.grid_sample(x, grid, align_corners=False)
    bent = np.flatnonzero(bend.any((1, 2, 3)))
    if len(bent):
        knots = tensor(bend[bent], x.device, torch.float32)
        knots = knots.permute(0, 3, 1, 2) * (size / x.shape[-1])  # [n, 2, KNOTS, KNOTS]
        smooth = F.interpolate(knots, size=(size, size), mode="bicubic", align_corners=True)
        grid.index_add_(0, tensor(bent, x.device), smooth.permute(0, 2, 3, 1))
    # Bent over the border of the margin, a corner would be black.
    return F.grid_sample(x, grid, align_corners=False, padding_mode="reflection")


def stain_jitter(x, stains):
    """Scale and shift the optical density of haematoxylin, eosin and the rest.

    stains: [n, 3, 2], factor and shift.
    """
    kind = (x.device, torch.float32)
    to_rgb, to_stains = tensor(HED, *kind), tensor(np.linalg.inv(HED), *kind)
    stains = tensor(stains, *kind)
    density = -torch.log(x.clamp(min=1 / 255)).movedim(1, -1)  # [n, S, S, 3]
    amounts = (density @ to_stains) * stains[:, None, None, :, 0] + stains[:, None, None, :, 1]
    return torch.exp(-(amounts @ to_rgb)).clamp_(0, 1).movedim(-1, 1)


@functools.cache
def _quantiles():
    """Of the normal distribution, float32 [2^16]; made on the CPU, so that they are the same for
    every device.
    """
    ranks = (torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16
    return torch.special.ndtri(ranks).float()


def noise(x, strength, key):
    """Gaussian noise of standard deviation `strength` [n] on x [n, 3, S, S]: a hash of key [n]
    (int64) and place holds four numbers of 16 bits, each the quantile of a normal one.
    """
    normal = tensor(_quantiles(), x.device)
    key, count = tensor(key, x.device), x[0].numel()
    words = splitmix(key[:, None] + torch.arange(1, count // 4 + 2, device=x.device) * WEYL)
    parts = words.view(torch.int16)[:, :count].int() + 2**15
    return (x + _column(strength, x) * normal[parts].view_as(x)).clamp_(0, 1)


def jpeg(x, quality):
    """x [n, 3, S, S] as JPEG of these qualities [n] shows it, with halved chroma as usual."""
    pixels = (x * 255 + 0.5).to(torch.uint8).movedim(1, -1).cpu().numpy()
    decoded = np.empty_like(pixels)
    for i, value in enumerate(quality.tolist()):
        file = io.BytesIO()
        Image.fromarray(pixels[i]).save(file, format="JPEG", quality=value)
        decoded[i] = Image.open(file)
    return torch.from_numpy(decoded).to(x.device).movedim(-1, 1).float().div_(255)


def augment(images, keys, size=224, stain=0.0, heavy=False):
    """Augmented patches float32 [B, 3, size, size] in [0, 1] of crops uint8 [B, S, S, 3], S ≥ size,
    on their device.

    keys    (seed, step, samples), `samples` [B] one number per sample: everything random is a
            function of them, so that a sample's augmentation does not depend on its batch, on the
            device or on the number of processes
    stain   half width of the stain jitter; 0: none (the paper's)
    heavy   --augment heavy
    """
    p = parameters(*keys, stain, heavy)
    S = images.shape[1]
    if S < size:
        raise ValueError(f"crops of {S} px are smaller than the patches of {size} px")
    start = (S - size) // 2
    x = images[:, start : start + size, start : start + size].permute(0, 3, 1, 2).float().div_(255)
    x = x.contiguous()

    # index_select and index_copy_ move whole images: on the CPU several times as fast as x[rows].
    def change(chosen, operation, *names):
        """x[chosen] = operation(x[chosen], the parameters of these samples)."""
        if chosen.any():
            rows = tensor(np.flatnonzero(chosen), x.device)
            values = [p[name][chosen] for name in names]
            x.index_copy_(0, rows, operation(x.index_select(0, rows), *values))

    if p["rotate"].any():
        rows = tensor(np.flatnonzero(p["rotate"]), x.device)
        # Contiguous, because channels that lie beside each other are sampled half as fast.
        whole = images.index_select(0, rows).permute(0, 3, 1, 2).float().div_(255).contiguous()
        names = ("angle", "shown", "bend") if heavy else ("angle",)
        values = {name: p[name][p["rotate"]] for name in names}
        x.index_copy_(0, rows, rotated(whole, size=size, **values))
    change(p["hflip"], lambda x: x.flip(3))
    change(p["vflip"], lambda x: x.flip(2))
    change(p["stain"], stain_jitter, "stains")
    for place in range(4):
        for number, (operation, name) in enumerate(COLOUR):
            change(
                p["jitter"] & (p["order"][:, place] == number),
                lambda x, value, operation=operation: operation(x, _column(value, x)),
                name,
            )
    change(p["blur"], blur, "sigma")
    if heavy:  # in the order of a scanner: optics, sensor, file
        change(p["noise"], noise, "strength", "key")
        change(p["jpeg"], jpeg, "quality")
    return x


# ---------------------------------------------------------------- the gallery


def gallery(annotations, patches, path, seed=0, columns=8, stain=0.0, heavy=False):
    """Write a PNG with a row per domain and class: a patch, then augmented samples of it."""
    picked = []  # (domain, label, row number)
    for domain in np.unique(annotations.domain):
        for label in (1, 0):
            rows = np.flatnonzero((annotations.domain == domain) & (annotations.label == label))
            if len(rows):
                share = uniform(seed, 0, [len(picked)], 1)[0, 0]
                picked.append((domain, label, rows[int(share * len(rows))]))
    size, side, left = 224, 112, 150  # px of a patch, of its picture, of the names' column
    sheet = Image.new("RGB", (left + columns * (side + 4), 22 + len(picked) * (side + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((left, 5), "original", fill="black")
    draw.text((left + side + 4, 5), "augmented", fill="black")
    for line, (domain, label, row) in enumerate(picked):
        large = patches.read([row], margin(size))
        crops = torch.from_numpy(np.repeat(large, columns - 1, 0))
        augmented = augment(crops, (seed, line, range(columns - 1)), size, stain, heavy)
        start = (margin(size) - size) // 2
        original = large[0, start : start + size, start : start + size]
        views = [original, *(augmented.movedim(1, -1) * 255 + 0.5).to(torch.uint8).numpy()]
        top = 22 + line * (side + 4)
        draw.text((6, top + 40), str(domain)[:22] or "–", fill="black")
        draw.text((6, top + 56), annotations.classes[label][:22], fill="black")
        for column, view in enumerate(views):
            small = Image.fromarray(view).resize((side, side), Image.Resampling.BOX)
            sheet.paste(small, (left + column * (side + 4), top))
    with common.atomic(path) as temporary:
        sheet.save(temporary, format="PNG")


def add_arguments(group):
    """The flags of the augmentation, for training and for the gallery."""
    group.add_argument(
        "--augment",
        choices=("paper", "heavy"),
        default="paper",
        help="heavy adds scale, elastic deformation, stains, noise and JPEG to the paper's "
        "rotation, flips, colours and blur (default: paper)",
    )
    group.add_argument(
        "--stain-jitter",
        type=float,
        metavar="S",
        help=f"jitter of the stains (default: 0, none; with --augment heavy {HEAVY_STAIN})",
    )


def check(args):
    """UserError if --stain-jitter is out of range."""
    if args.stain_jitter is not None and not 0 <= args.stain_jitter < 1:
        raise UserError(f"--stain-jitter {args.stain_jitter}: give a number from 0 to below 1")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_arguments(parser)
    parser.add_argument("--gallery", required=True, metavar="PNG", help="picture to write")
    add_arguments(parser)
    parser.add_argument(
        "--seed", type=int, default=0, help="chooses patches and augmentations (default: 0)"
    )
    args = parser.parse_args()
    check(args)
    annotations = flags.from_arguments(args)
    flags.need_images(annotations, args.mpp, crop=args.crop)
    names = set(annotations.image.tolist()) - set(annotations.missing)
    inputs = [annotations.image_path(name) for name in names]
    common.check_output("--gallery", args.gallery, [args.data, *inputs])
    patches = Patches(
        annotations, fit=args.fit, mpp=args.mpp, source_mpp=args.source_mpp, crop=args.crop
    )
    stain, heavy = stain_of(args.stain_jitter, args.augment), args.augment == "heavy"
    gallery(annotations, patches, args.gallery, args.seed, stain=stain, heavy=heavy)
    print(f"{args.gallery}: written")


if __name__ == "__main__":
    common.command(main)
