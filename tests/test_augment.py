import numpy as np
import pytest
import small
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv

import augment


def crops(n=6, side=320, seed=0):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (n, side // 16, side // 16, 3), dtype=np.uint8)
    return torch.from_numpy(small.repeat(16, 1).repeat(16, 2))


def floats(images):
    return images.permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize(
    "ours, theirs, factor",
    [
        (augment.brightness, tv.adjust_brightness, 1.1),
        (augment.contrast, tv.adjust_contrast, 0.9),
        (augment.saturation, tv.adjust_saturation, 1.07),
        (augment.hue, tv.adjust_hue, 0.08),
        (augment.hue, tv.adjust_hue, -0.1),
        (augment.contrast, tv.adjust_contrast, 1.1),
    ],
)
def test_colour_operations_equal_torchvision(ours, theirs, factor):
    x = floats(crops())
    x[0, :, :32] = 0.5  # grey: no hue
    assert (ours(x, torch.full((6, 1, 1, 1), factor)) - theirs(x, factor)).abs().max() < 2e-5


def test_blur_equals_torchvision():
    x = floats(crops(2, 224))
    out = augment.blur(x, np.array([0.3, 1.0]))
    for i, sigma in enumerate((0.3, 1.0)):
        assert (out[i] - tv.gaussian_blur(x[i], [5, 5], [sigma, sigma])).abs().max() < 1e-5


@pytest.mark.parametrize("angle", [0.0, 17.0, 90.0, -133.0])
def test_rotation_equals_torchvision_in_the_larger_crop(angle):
    x = floats(crops(1))
    whole = tv.rotate(x, angle, interpolation=tv.InterpolationMode.BILINEAR)
    assert (
        augment.rotated(x, np.array([angle]), 224) - tv.center_crop(whole, [224, 224])
    ).abs().max() < 1e-3


def test_no_black_corner_even_without_margin():
    white = torch.full((1, 224, 224, 3), 255, dtype=torch.uint8)
    for angle in range(0, 360, 15):
        assert augment.rotated(floats(white), np.array([float(angle)]), 224).min() > 0.999


def test_a_whole_augmentation_equals_the_same_steps_one_by_one():
    images, keys = crops(64), (5, 77, range(100, 164))
    p, out = augment.parameters(*keys), augment.augment(images, keys)
    assert all(
        p[name].any() and not p[name].all()
        for name in ("rotate", "hflip", "vflip", "jitter", "blur")
    )
    for i in range(64):
        x = floats(images[i : i + 1])
        if p["rotate"][i]:
            x = tv.rotate(x, p["angle"][i], interpolation=tv.InterpolationMode.BILINEAR)
        x = tv.center_crop(x, [224, 224])
        x = tv.horizontal_flip(x) if p["hflip"][i] else x
        x = tv.vertical_flip(x) if p["vflip"][i] else x
        if p["jitter"][i]:
            for k in p["order"][i]:
                name = ("brightness", "contrast", "saturation", "hue")[k]
                x = getattr(tv, f"adjust_{name}")(x, float(p[name][i]))
        if p["blur"][i]:
            x = tv.gaussian_blur(x, [5, 5], [float(p["sigma"][i])] * 2)
        # Bilinear weights at the cells' edges differ in the last digits; the hue amplifies them
        # where colours are grey.
        assert (out[i] - x[0]).abs().mean() < 1e-5 and (out[i] - x[0]).abs().max() < 5e-3


def test_a_sample_does_not_depend_on_its_batch():
    images = crops(8)
    whole = augment.augment(images, (1, 2, range(8)), stain=0.1)
    parts = torch.cat(
        [augment.augment(images[i : i + 1], (1, 2, [i]), stain=0.1) for i in range(8)]
    )
    assert (whole - parts).abs().max() < 1e-6
    assert not torch.equal(whole, augment.augment(images, (1, 3, range(8)), stain=0.1))


def test_parameters_have_the_protocols_distribution():
    p = augment.parameters(3, 4, range(20000), stain=0.05)
    for name, wanted in augment.PROBABILITY.items():
        assert abs(p[name].mean() - wanted) < 0.015, name
    for name, low, high in (
        ("angle", -180, 180),
        ("brightness", 0.9, 1.1),
        ("contrast", 0.9, 1.1),
        ("saturation", 0.9, 1.1),
        ("hue", -0.1, 0.1),
        ("sigma", 0.1, 1.0),
    ):
        values = p[name]
        assert low <= values.min() and values.max() <= high
        assert abs((values.mean() - low) / (high - low) - 0.5) < 0.01
        assert abs(values.std() / (high - low) - 12**-0.5) < 0.01, name
    assert len({tuple(o) for o in p["order"].tolist()}) == 24
    # No sample's numbers repeat another's, and operations are independent of each other.
    assert len(np.unique(p["angle"])) == 20000
    assert abs(np.corrcoef(p["rotate"], p["hflip"])[0, 1]) < 0.03


def test_samples_of_other_seeds_and_steps_differ():
    draws = np.concatenate(
        [
            augment.uniform(seed, step, range(50), 1)[:, 0]
            for seed in range(20)
            for step in range(20)
        ]
    )
    assert len(np.unique(draws)) == len(draws)


def test_stain_jitter_leaves_white_white_and_keeps_an_unchanged_image():
    x = floats(crops())
    same = augment.stain_jitter(x.clamp(min=1 / 255), np.tile([1.0, 0.0], (6, 3, 1)))
    assert (same - x.clamp(min=1 / 255)).abs().max() < 1e-4
    # More haematoxylin: the density along its own vector grows by the factor.
    pure = (
        torch.exp(-torch.tensor(0.8 * augment.HED[0], dtype=torch.float32))
        .view(1, 3, 1, 1)
        .expand(1, 3, 4, 4)
    )
    stains = np.array([[[1.2, 0.0], [1.0, 0.0], [1.0, 0.0]]])
    wanted = torch.exp(-torch.tensor(0.96 * augment.HED[0], dtype=torch.float32)).view(1, 3, 1, 1)
    assert (augment.stain_jitter(pure, stains) - wanted).abs().max() < 1e-5


def test_crops_smaller_than_the_patch_are_refused():
    with pytest.raises(ValueError):
        augment.augment(crops(1, 208), (0, 0, [0]))


def test_random_numbers_are_those_of_splitmix64():
    """As published (Steele et al. 2014), in Python's whole numbers: earlier runs drew the same."""

    def mix(x):
        x %= 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    for seed, step, sample in ((0, 0, 0), (5 << 16, 1234, 15), (2**62 + 7, 99_999, 1023)):
        key = mix(sample + mix(step + mix(seed)))
        words = [mix(key + (i + 1) * 0x9E3779B97F4A7C15) for i in range(6)]
        expected = [(word >> 11) / 2**53 for word in words]
        assert augment.uniform(seed, step, [sample], 6)[0].tolist() == expected


def test_the_gallery_replaces_no_input(tmp_path, capsys):
    table = small.dataset(tmp_path, cases=3, per_case=2)
    image = tmp_path / "patches" / "00-0.png"
    before = image.read_bytes(), table.read_bytes()
    for name in (image, table, tmp_path):
        assert small.call(augment, "--data", table, "--gallery", name) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: --gallery {name}: ") and error.count("\n") == 1
    assert (image.read_bytes(), table.read_bytes()) == before
    assert small.call(augment, "--data", table, "--gallery", tmp_path / "out.png") == 0
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.format == "PNG"
