import io

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


# ---------------------------------------------------------------- heavy


def test_heavy_keeps_the_papers_draws_and_adds_its_own():
    paper = augment.parameters(3, 4, range(20000), 0.1)
    p = augment.parameters(3, 4, range(20000), 0.1, heavy=True)
    for name, values in paper.items():
        if name not in ("rotate", "angle"):
            assert np.array_equal(values, p[name]), name
    assert np.array_equal(p["angle"], np.where(paper["rotate"], paper["angle"], 0))
    for name, wanted in augment.HEAVY.items():
        assert abs(p[name].mean() - wanted) < 0.015, name
    assert p["shown"].min() >= 0.75 and (p["shown"] == 1).mean() == (~p["zoom"]).mean()
    assert p["quality"].min() == 30 and p["quality"].max() == 95
    assert not p["bend"][~p["elastic"]].any() and np.abs(p["bend"]).max() <= 2 * augment.ELASTIC
    assert len(np.unique(p["key"])) == 20000


def test_heavy_is_a_function_of_seed_and_place():
    images = crops(24)
    whole = augment.augment(images, (1, 2, range(24)), stain=0.1, heavy=True)
    again = augment.augment(images, (1, 2, range(24)), stain=0.1, heavy=True)
    assert torch.equal(whole, again) and 0 <= whole.min() and whole.max() <= 1
    parts = [
        augment.augment(images[i : i + 1], (1, 2, [i]), stain=0.1, heavy=True) for i in range(24)
    ]
    # JPEG rounds to whole grey levels, and the last digit may depend on the batch.
    assert (whole - torch.cat(parts)).abs().mean() < 1e-4
    assert not torch.equal(whole, augment.augment(images, (1, 3, range(24)), 224, 0.1, True))


@pytest.mark.parametrize("angle, shown", [(0.0, 0.75), (30.0, 0.9)])
def test_a_smaller_field_is_torchvisions_scale(angle, shown):
    x = torch.nn.functional.avg_pool2d(floats(crops(1)), 9, 1, 4)
    bend = np.zeros((1, augment.KNOTS, augment.KNOTS, 2))
    got = augment.rotated(x, np.array([angle]), 224, np.array([shown]), bend)
    whole = tv.affine(
        x, -angle, [0, 0], 1 / shown, [0, 0], interpolation=tv.InterpolationMode.BILINEAR
    )
    assert (got - tv.center_crop(whole, [224, 224])).abs().max() < 2e-3


def test_a_bend_moves_the_image_smoothly_and_shows_no_black():
    ramp = (torch.arange(320.0) / 320).view(1, 1, 1, 320).expand(1, 3, 320, 320)
    bend = np.zeros((1, augment.KNOTS, augment.KNOTS, 2))
    bend[..., 0] = 0.04  # everything by 0.04 * 112 px to the right
    plain = augment.rotated(ramp, np.zeros(1), 224)
    moved = augment.rotated(ramp, np.zeros(1), 224, np.ones(1), bend)
    assert (moved - plain - 0.04 * 112 / 320).abs().max() < 1e-4
    white = torch.full((8, 320, 320, 3), 255, dtype=torch.uint8)
    largest = np.random.default_rng(0).choice([-1.0, 1.0], (8, augment.KNOTS, augment.KNOTS, 2))
    got = augment.rotated(
        floats(white), np.linspace(0, 350, 8), 224, np.ones(8), largest * 2 * augment.ELASTIC
    )
    assert got.min() > 0.999


def test_noise_is_gaussian_and_its_own_for_each_key():
    x = torch.full((3, 3, 224, 224), 0.5)
    noise = augment.noise(x, np.array([0.02, 0.02, 0.04]), np.array([7, 8, 7])) - 0.5
    assert torch.allclose(noise.std((1, 2, 3)), torch.tensor([0.02, 0.02, 0.04]), rtol=0.02)
    assert noise.mean((1, 2, 3)).abs().max() < 3e-4
    assert ((noise[0] / 0.02).abs() < 1).float().mean() == pytest.approx(0.683, abs=0.02)
    torch.testing.assert_close(2 * noise[0], noise[2], atol=1e-6, rtol=0)  # the key decides
    flat = noise.flatten(1)
    assert abs(torch.corrcoef(flat)[0, 1]) < 0.01
    assert abs(torch.corrcoef(noise[0].flatten(1))[0, 1]) < 0.02  # channels are independent


def test_jpeg_is_the_files():
    x = floats(crops(2, 224)) * 0.5 + 0.2
    got = augment.jpeg(x, np.array([30, 95]))
    for i, quality in enumerate((30, 95)):
        file = io.BytesIO()
        pixels = (x[i] * 255 + 0.5).to(torch.uint8).movedim(0, -1).numpy()
        Image.fromarray(pixels).save(file, format="JPEG", quality=quality)
        assert np.array_equal((got[i] * 255).round().movedim(0, -1), np.asarray(Image.open(file)))
    errors = (got - x).abs().mean((1, 2, 3))
    assert 0 < errors[1] < errors[0] < 0.1


def test_the_gallery_shows_heavy_samples(tmp_path):
    table = small.dataset(tmp_path, cases=3, per_case=2)
    for kind in ("paper", "heavy"):
        out = tmp_path / f"{kind}.png"
        assert small.call(augment, "--data", table, "--gallery", out, "--augment", kind) == 0
    paper, heavy = (np.asarray(Image.open(tmp_path / f"{k}.png")) for k in ("paper", "heavy"))
    assert paper.shape == heavy.shape and (paper != heavy).any()
    assert np.array_equal(paper[:, :262], heavy[:, :262])  # the originals
