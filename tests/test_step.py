"""The training step: static buffers, captured and replayed, exchanged between processes, beside a
plain loop."""

import types

import numpy as np
import pytest
import small
import tape
import torch

import augment
import engine
import lora
import models
from dataset.patches import margin

BATCH, SIZE = 4, 224


def settings_for(method="lora", **more):
    own = dict(
        epochs=10, epoch_size=5 * BATCH, batch_size=BATCH, lr=1e-2, seed=3, stain_jitter=0.05
    )
    if method == "lora":
        own |= dict(rank=4, alpha=8)
    return small.training_settings(method, **own | more)


def make_engine(settings, parts=1, device="cpu"):
    """Engine of a tiny encoder for step() alone: nothing is read."""
    device, dtype = torch.device(device), models.DTYPES[settings.dtype]
    held = dtype if settings.method == "lora" else torch.float32
    base = models.load_encoder("tiny", "random", device, held)
    model, parameters = engine.make_model(settings, base, device)
    sampler = types.SimpleNamespace(class_weights=lambda: np.array([0.6, 1.7]))
    patches = types.SimpleNamespace(size=SIZE)
    trainer = engine.Engine(settings, model.train(), parameters, sampler, patches, device, dtype)
    trainer.parts = parts
    return trainer


def batches(count, size=BATCH):
    """[(step, images, samples, labels, whole)]; the last one is smaller, as at an epoch's end."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for step in range(count):
        n = size if step < count - 1 else size // 2
        side = margin(SIZE)
        images = torch.randint(0, 256, (n, side, side, 3), dtype=torch.uint8, generator=generator)
        labels = (np.arange(n) + step) % 2
        out.append((step, images, np.arange(n), labels, n))
    return out


def plain(settings, count):
    """The same steps as most people write them, with tensors made anew → (model, losses)."""
    trainer = make_engine(settings)
    model, dtype = trainer.model, trainer.dtype
    trained = list(trainer.parameters.values())
    kind, more = torch.optim.Adam, {}
    if settings.weight_decay:
        kind, more = torch.optim.AdamW, {"weight_decay": settings.weight_decay}
    optimizer = kind(trained, lr=1.0, fused=True, **more)
    autocast = settings.method == "full" and dtype != torch.float32
    losses = []
    for step, images, samples, labels, whole in batches(count):
        optimizer.param_groups[0]["lr"] = engine.learning_rate(step, trainer.steps, settings.lr)
        optimizer.zero_grad()
        key = (settings.run_seed, step, samples)
        patches = augment.augment(images, key, SIZE, settings.stain_jitter)
        if settings.method == "lora":
            lora.set_step(model.encoder, *key)
        with torch.autocast("cpu", dtype, enabled=autocast):
            logits = model(patches)
        weights = None
        if settings.class_weight:
            weights = torch.tensor([0.6, 1.7])[labels]
        targets = torch.from_numpy(labels).float()
        loss = engine.training_loss(logits.float(), targets, settings.focal_gamma, weights)
        (loss * (1 / whole)).backward()
        optimizer.step()
        losses.append(loss.detach())
    return model, torch.stack(losses)


def run(trainer, count):
    losses = []
    for step, images, samples, labels, whole in batches(count):
        weights = None
        if trainer.class_weights is not None:
            weights = trainer.class_weights[labels]
        losses.append(trainer.step(step, images, samples, labels, whole, weights))
    return trainer.model, torch.stack(losses)


def assert_same(one, other):
    (model, losses), (expected, expected_losses) = one, other
    assert torch.equal(losses, expected_losses)
    state = expected.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert losses.isfinite().all() and not torch.equal(losses[0], losses[1])


KINDS = {
    "lora": dict(dtype="fp32"),
    "lora-bf16": dict(dtype="bf16"),
    "dora": dict(dtype="fp32", dora=True),
    "focal": dict(dtype="fp32", loss="focal", focal_gamma=2.0, class_weight="balanced"),
    "full": dict(method="full", dtype="fp32", weight_decay=0.05),
    "full-bf16": dict(method="full", dtype="bf16"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_static_buffers_is_the_plain_one_bit_by_bit(kind):
    settings = settings_for(**KINDS[kind])
    assert_same(run(make_engine(settings), 12), plain(settings, 12))


@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_step_is_the_eager_one(kind, monkeypatch):
    """The operators are recorded once, and know nothing but the buffers."""
    settings = settings_for(**KINDS[kind])
    monkeypatch.setattr(engine, "record", tape.record)
    trainer, replayed = make_engine(settings), []
    trainer.may_capture = True
    real = trainer.backward
    monkeypatch.setattr(trainer, "backward", lambda *a: replayed.append(a) or real(*a))
    got = run(trainer, 24)
    # Eager ones, the one that is recorded, and the smaller last batch: nothing else is computed
    # by Python.
    assert len(replayed) == engine.EAGER_STEPS + 2
    assert_same(got, run(make_engine(settings), 24))


@pytest.mark.parametrize("what", ["rate", "images", "labels", "keys"])
def test_a_replay_reads_every_buffer(what, monkeypatch):
    """The check of the check: a buffer that is no longer filled changes what is learnt."""
    settings = settings_for(dtype="fp32")
    monkeypatch.setattr(engine, "record", tape.record)
    trainer = make_engine(settings)
    trainer.may_capture = True
    run(trainer, engine.EAGER_STEPS + 2)
    setattr(trainer, what, getattr(trainer, what).clone())
    stale, _ = run(trainer, 4)
    again = make_engine(settings)
    again.may_capture = True
    run(again, engine.EAGER_STEPS + 2)
    fresh, _ = run(again, 4)
    state = fresh.state_dict()
    assert any(not torch.equal(v, state[n]) for n, v in stale.state_dict().items())


def test_parts_and_fp16_are_not_captured(monkeypatch):
    monkeypatch.setattr(engine, "record", None)
    trainer = make_engine(settings_for(dtype="fp32"), parts=2)
    trainer.may_capture = True
    run(trainer, 6)
    assert trainer.replays is None
    assert not make_engine(settings_for(dtype="fp16", method="full")).may_capture


def test_a_step_that_cannot_be_captured_runs_eagerly_with_one_note(monkeypatch, capsys):
    def record(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(engine, "record", record)
    settings = settings_for(dtype="fp32")
    trainer = make_engine(settings)
    trainer.may_capture = True
    got = run(trainer, 8)
    note = "the step runs without a CUDA graph (operation not permitted when stream is cap"
    assert capsys.readouterr().err.count(note) == 1
    assert_same(got, run(make_engine(settings), 8))


def test_out_of_memory_gives_up_the_graph_before_the_batch(monkeypatch, capsys):
    settings = settings_for(dtype="fp32")
    monkeypatch.setattr(engine, "record", tape.record)
    trainer = make_engine(settings)
    trainer.may_capture = True
    real, full = engine.Engine.accumulate, []

    def accumulate(self, batch, whole):
        if self.replays is not None:
            full.append(batch[0])
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch, whole)

    monkeypatch.setattr(engine.Engine, "accumulate", accumulate)
    got = run(trainer, 9)
    assert full == [8] and trainer.parts == 1 and trainer.replays is None
    assert "accumulated" not in capsys.readouterr().err
    monkeypatch.undo()
    assert_same(got, run(make_engine(settings), 9))
