"""The training step's parts: schedule, settings, processes."""

import dataclasses

import numpy as np
import pytest
import small
import torch
from sklearn.metrics import log_loss

import engine
from common import UserError

COMMON = dict(
    data="d",
    model="m",
    method="lora",
    frac=1.0,
    fold=3,
    domain=None,
    seed=5,
    by="case",
    val_frac=1.0,
    weights=None,
    pool=None,
    layer=None,
    size=None,
    fit="resize",
    mpp=None,
    dtype="fp32",
)
TRAINING = dict(
    epochs=1,
    epoch_size=2,
    batch_size=1,
    lr=1e-4,
    balance="annotation",
    random_share=0.25,
    jitter=0.0,
    stain_jitter=0.0,
    tissue=False,
)
LORA = dict(rank=16, alpha=16, dropout=0.1, targets=("qkv",), dora=False, rslora=False)


def test_learning_rate_is_torchs_one_cycle():
    for total in (20, 97, 8000):
        p = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.Adam([p], lr=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 1e-4, total_steps=total, cycle_momentum=False
        )
        for step in range(total):
            assert engine.learning_rate(step, total, 1e-4) == pytest.approx(
                optimizer.param_groups[0]["lr"], rel=1e-9
            )
            optimizer.step()
            if step < total - 1:
                schedule.step()


def test_settings_are_the_flags_of_the_configuration():
    settings = engine.LoRASettings(**COMMON, **TRAINING, **LORA)
    expected = COMMON | TRAINING | LORA
    del expected["size"]  # None: as in the runs of earlier versions
    assert settings.flags() == expected
    later = dict(loss="focal", focal_gamma=2.0, class_weight="balanced", weight_decay=0.01)
    later |= dict(patience=3, augment="heavy", soft_labels=True, crop=64, name="lr1e-3")
    assert dataclasses.replace(settings, **later).flags() == expected | later
    assert dataclasses.replace(settings, size=448).flags() == expected | {"size": 448}
    with pytest.raises(AttributeError):
        settings.rank = 8
    assert settings.run_seed == (5 << 16) + 3
    adapted = engine.LoRASettings(**COMMON, **TRAINING, **LORA, adapter="/a")
    assert adapted.flags() == settings.flags() | {"adapter": "/a"}


def test_validation_loss_is_the_log_loss():
    rng = np.random.default_rng(0)
    labels, logits = rng.integers(0, 2, 50), rng.normal(size=50) * 3
    expected = log_loss(labels, 1 / (1 + np.exp(-logits)))
    assert engine.validation_loss(labels, logits) == pytest.approx(expected)
    assert engine.validation_loss(labels, np.where(labels, 1e4, -1e4)) == 0


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, (0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1)),
        ({"RANK": "1"}, "RANK=1"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2"),
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE=abc"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "WORLD_SIZE=2"),
        ({"RANK": "", "TORCHELASTIC_RUN_ID": "x"}, "RANK="),
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"},
            (3, 4),
        ),
    ],
)
def test_only_torchrun_starts_several_processes(monkeypatch, environment, expected):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, tuple):
        assert engine.launched() == expected
    else:
        with pytest.raises(UserError, match=f"{expected} is set.*torchrun"):
            engine.launched()


@pytest.mark.parametrize("script", ["train", "probe"])
def test_numbers_of_processes_left_in_the_environment_are_one_line(tmp_path, script):
    code, out, err = small.command(
        script, "--model", "tiny", "--runs", tmp_path, RANK="0", WORLD_SIZE="2"
    )
    assert code == 2 and err.startswith("error: WORLD_SIZE=2") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_decoded_patches_are_read_once(monkeypatch):
    class Patches:
        size = 224

        def __init__(self):
            self.asked = []

        def read(self, rows):
            self.asked += rows.tolist()
            return np.broadcast_to(rows[:, None, None, None] % 256, (len(rows), 224, 224, 3))

    rows = np.array([7, 5, 9])
    for limit, asked in ((4 << 30, [5, 9, 7]), (0, [5, 9, 7, 5])):
        monkeypatch.setattr(engine, "CROPS_IN_MEMORY", limit)
        patches = Patches()
        decoded = engine.Decoded(patches, rows)
        assert decoded.read(np.array([1, 2]))[:, 0, 0, 0].tolist() == [5, 9]
        assert decoded.read(np.array([0, 1]))[:, 0, 0, 0].tolist() == [7, 5]
        assert patches.asked == asked


# ---------------------------------------------------------------- the loss


def focal_by_formula(p, y, gamma, weight):
    """-Σ w (1 - p_t)^gamma log p_t (Lin et al. 2017), for a mixture of both labels."""
    of_1 = -((1 - p) ** gamma) * np.log(p)
    of_0 = -(p**gamma) * np.log(1 - p)
    return (weight * (y * of_1 + (1 - y) * of_0)).sum()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
def test_focal_loss_is_the_formula_and_its_gradient(gamma):
    rng = np.random.default_rng(0)
    z, weight = rng.normal(size=40) * 3, rng.uniform(0.2, 3, 40)
    y = np.concatenate([np.repeat([0.0, 1.0], 15), rng.random(10)])  # the last ones: votes
    logits = torch.tensor(z, requires_grad=True)
    loss = engine.training_loss(logits, torch.tensor(y), gamma, torch.tensor(weight))
    loss.backward()

    def formula(z):
        return focal_by_formula(1 / (1 + np.exp(-z)), y, gamma, weight)

    assert loss.item() == pytest.approx(formula(z), rel=1e-10)
    steps = 1e-6 * np.eye(40)
    slopes = [(formula(z + step) - formula(z - step)) / 2e-6 for step in steps]
    np.testing.assert_allclose(logits.grad.numpy(), slopes, rtol=1e-5, atol=1e-7)


def test_gamma_0_is_the_plain_loss_and_large_logits_stay_finite():
    logits = torch.tensor([-200.0, -1.0, 0.0, 3.0, 200.0], requires_grad=True)
    targets = torch.tensor([1.0, 0.0, 0.3, 1.0, 0.0])
    plain = engine.training_loss(logits, targets)
    assert torch.equal(
        plain,
        torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum"),
    )
    torch.testing.assert_close(engine.training_loss(logits, targets, 0.0), plain)
    engine.training_loss(logits, targets, 2.0).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("gamma", [None, 2.0])
def test_weights_are_repeated_samples(gamma):
    rng = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(6, generator=rng), torch.tensor([0.0, 1, 1, 0, 1, 0])
    times = torch.tensor([1, 3, 3, 1, 3, 1])
    weighted = engine.training_loss(logits, targets, gamma, times.float())
    repeated = engine.training_loss(
        logits.repeat_interleave(times), targets.repeat_interleave(times), gamma
    )
    torch.testing.assert_close(weighted, repeated)
