"""Trainings in fp16: scaled losses change nothing but rounding; steps that overflow are skipped, counted, resumed."""

import pytest
import torch

from cm_core.methods.edm import EDM
from cm_core.training import loss_scale
from cm_core.training.optimizers import Optimizer
from cm_core.training.trainer import LossScaleError
from small_networks import relative
from tiny_training import METHODS, Training


@pytest.mark.parametrize("name", ["ect", "ict", "cd", "scm", "dmd"])
def test_fp16_trains_close_to_full_precision_with_fp32_master_weights(name):
    losses, weights = {}, {}
    for precision in ("fp32", "fp16"):
        training = Training(METHODS[name], precision=precision, num_steps=3)
        losses[precision] = [entry.get("loss", entry.get("critic_loss")) for entry in training.steps()]
        weights[precision] = list(training.state.model.parameters())
        assert all(p.dtype == torch.float32 for p in weights[precision])
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=0.01)
    assert 0 < relative(weights["fp16"], weights["fp32"]) < 0.01


def test_the_scale_cancels_before_gradients_are_clipped_logged_and_used():
    norms, gradients = [], []
    for initial in (2.0, 2.0**10):
        training = Training(METHODS["cd"], precision="fp16", num_steps=1, clip_norm=0.5)
        training.state.loss_scale.scale.fill_(initial)
        training.state.optimizer.register_step_pre_hook(
            lambda *_, of=training: gradients.append([p.grad.clone() for p in of.state.student.parameters()])
        )
        norms += [entry["grad_norm"] for entry in training.steps()]
    assert norms[0] == pytest.approx(norms[1], rel=0.01)
    assert relative(*gradients) < 0.02


@pytest.mark.parametrize(
    "optimizer", [Optimizer(kind="adam", learning_rate=1e-3), Optimizer(learning_rate=4e-4)], ids=["adam", "radam"]
)
def test_a_step_that_overflows_changes_no_weight_and_halves_the_scale(optimizer):
    training = Training(EDM(), precision="fp16", num_steps=3, optimizer=optimizer)
    training.state.loss_scale.scale.fill_(2.0**120)  # fp16 ends at 65,504
    before = training.tensors()
    steps = training.steps()
    first = next(steps)
    after = training.tensors()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed <= {"loss_scale/scale", "loss_scale/skipped", "optimizer"} | {
        key for key in before if key.startswith("ema")
    }, changed
    assert (first["loss_scale"], first["skipped_steps"]) == (2.0**119, 1.0) and "grad_norm" not in first
    assert first["loss"] > 0
    training.state.loss_scale.scale.fill_(2.0)
    assert next(steps)["skipped_steps"] == 1.0
    assert any(not torch.equal(before[key], tensor) for key, tensor in training.tensors().items() if "model/" in key)


def test_the_scale_grows_after_many_good_steps(monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 2)
    training = Training(EDM(), precision="fp16", num_steps=5)
    training.state.loss_scale.scale.fill_(2.0)
    assert [entry["loss_scale"] for entry in training.steps()] == [2.0, 4.0, 4.0, 8.0, 8.0]


class Steep(EDM):
    slope: float

    def loss(self, models, batch, context):
        loss = super().loss(models, batch, context)
        return loss._replace(per_sample=loss.per_sample * self.slope)


def test_a_scale_below_one_trains():
    """ECT's weight 1 / (t - r) at q = 256 brings it there: a limit of 1 ended trainings whose steps were good."""
    adam = Optimizer(kind="adam", learning_rate=1e-4)  # to which the loss's scale is the same
    training = Training(Steep(slope=1e9), precision="fp16", num_steps=30, optimizer=adam)
    *_, last = training.steps()
    assert loss_scale.LEAST < last["loss_scale"] < 1 and 16 < last["skipped_steps"] < 30
    assert last["grad_norm"] > 1e6


def test_gradients_that_overflow_at_every_scale_end_the_training():
    training = Training(Steep(slope=1e30), precision="fp16", num_steps=50)
    with pytest.raises(LossScaleError, match="40 steps overflowed, down to a loss scale of 5.96046e-08"):
        list(training.steps())


@pytest.mark.parametrize("name", ["cd-ema", "pd", "dmd"])
def test_an_fp16_training_with_skipped_steps_resumes_to_the_bit(tmp_path, name):
    def begin(**changes):
        training = Training(METHODS[name], precision="fp16", log_every=3, save_every=3, grid_every=3, **changes)
        training.state.loss_scale.scale.fill_(2.0**40)  # the first steps overflow
        return training

    whole = begin()
    list(whole.steps())
    assert 0 < whole.state.loss_scale.skipped < 6
    stopped = begin()
    next(stopped.steps(stop_requested=lambda: stopped.state.step == 4))
    next(stopped.steps(stop_requested=lambda: stopped.state.step == 4))
    stopped.state.save(tmp_path)
    resumed = Training(METHODS[name], precision="fp16", log_every=3, save_every=3, grid_every=3)
    resumed.state.restore(next(tmp_path.glob("step-*")))
    assert resumed.state.began == stopped.state.began
    list(resumed.steps())
    expected, found = whole.tensors(), resumed.tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
