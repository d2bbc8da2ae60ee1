"""The training loop: a resumed run is the run that never stopped, to the bit; a spoiled one stops and says where."""

import copy
import gc

import numpy as np
import pytest
import torch

from cm_core.methods.ct import CT
from cm_core.methods.edm import EDM
from cm_core.model import build_seeded, load_model, save_model
from cm_core.training.batches import Batches
from cm_core.training.checkpoint import list_states
from cm_core.training.optimizers import Adam, FusedRAdam, RAdam
from cm_core.training.trainer import NonFiniteLossError
from cm_core.types import Loss
from tiny_training import CPU, METHODS, NETWORK, SHAPE, Training


@pytest.mark.parametrize("optimizer", [Adam(), RAdam()], ids=["adam", "radam"])
@pytest.mark.parametrize("name", METHODS)
def test_resumed_training_equals_the_uninterrupted_one_to_the_bit(tmp_path, name, optimizer):
    whole = Training(METHODS[name], optimizer=optimizer)
    metrics = list(whole.steps())

    first = Training(METHODS[name], optimizer=optimizer)
    for entry in first.steps():
        if entry["step"] == 3:
            first.state.save(tmp_path)
            break
    torch.manual_seed(999)  # whatever the global generator holds must not matter
    second = Training(METHODS[name], optimizer=optimizer)
    second.state.restore(list_states(tmp_path)[-1])
    resumed = list(second.steps())

    assert resumed == metrics[3:]
    expected, found = whole.tensors(), second.tensors()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_leaves_no_tensors_to_the_garbage_collector(name):
    """It comes seldom, and a GPU's memory would fill with what only it can free."""
    steps = Training(METHODS[name]).steps()
    next(steps)
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        next(steps)
        gc.collect()
        assert not [found for found in gc.garbage if isinstance(found, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


def test_a_training_stopped_between_two_metrics_resumes_to_the_same_metrics_and_bits(tmp_path):
    every = {"log_every": 3, "save_every": 3, "grid_every": 3}
    whole = Training(METHODS["ct"], **every)
    metrics = list(whole.steps())

    first = Training(METHODS["ct"], **every)
    assert next(first.steps(stop_requested=lambda: first.state.step == 2)) == {}
    first.state.save(tmp_path)
    second = Training(METHODS["ct"], **every)
    second.state.restore(list_states(tmp_path)[-1])
    assert second.state.step == 2
    assert list(second.steps()) == metrics
    expected, found = whole.tensors(), second.tensors()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_the_fused_radam_takes_the_steps_of_radam_also_from_a_state_of_the_other():
    """Beyond the steps that are not rectified (five), and where epsilon matters: some gradients are tiny."""
    settings, generator = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8}, torch.Generator().manual_seed(0)
    gradients = torch.randn(12, 50, generator=generator, dtype=torch.float64) * torch.logspace(-9, 2, 50)
    weights = [torch.nn.Parameter(torch.zeros(50, dtype=torch.float64)) for _ in range(2)]
    plain, fused = (kind([w], **settings) for kind, w in zip((torch.optim.RAdam, FusedRAdam), weights, strict=True))
    for step, gradient in enumerate(gradients):
        if step == 8:
            saved = copy.deepcopy(plain.state_dict()["state"])
            fused.load_state_dict({"state": saved, "param_groups": fused.state_dict()["param_groups"]})
        for optimizer, weight in zip((plain, fused), weights, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
        torch.testing.assert_close(*weights, rtol=1e-9, atol=1e-13)
    assert weights[0][0].abs() > 1e-9 and fused.param_groups[0]["lr"] == 0.01


def test_training_changes_the_weights_and_the_averages_differ():
    training = Training(METHODS["ct"])
    before = training.tensors()
    list(training.steps())
    after = training.tensors()
    moved = [key for key in before if key.startswith("model/") and not torch.equal(before[key], after[key])]
    assert moved
    key = moved[0].removeprefix("model/")
    averages = [after[f"{place}/{key}"] for place in ("ema0", "ema1", "ema2", "target", "model")]
    assert all(not torch.equal(a, b) for i, a in enumerate(averages) for b in averages[:i])


def test_logging_interval_does_not_change_the_training():
    fine, coarse = Training(METHODS["ct"]), Training(METHODS["ct"], log_every=3, save_every=3, grid_every=3)
    fine_metrics, coarse_metrics = list(fine.steps()), list(coarse.steps())
    assert [entry["step"] for entry in coarse_metrics] == [3, 6]
    assert coarse_metrics[0]["loss"] == pytest.approx(np.mean([entry["loss"] for entry in fine_metrics[:3]]), rel=1e-6)
    a, b = fine.tensors(), coarse.tensors()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_learning_rate_ramps_up():
    training = Training(METHODS["ct"], optimizer=Adam(learning_rate=0.1), ramp_steps=4)
    rates = [training.state.optimizer.param_groups[0]["lr"] for _ in training.steps()]
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])


def test_clipping_bounds_the_gradient():
    clipped = Training(METHODS["ct"], clip_norm=1e-3)
    seen = []
    clipped.state.optimizer.register_step_pre_hook(
        lambda optimizer, *_: seen.append(
            torch.stack([p.grad.norm() for group in optimizer.param_groups for p in group["params"]]).norm().item()
        )
    )
    metrics = list(clipped.steps())
    assert metrics[0]["grad_norm"] > 1e-3 and max(seen) <= 1e-3 * 1.001


def test_non_finite_loss_stops_before_the_state_can_be_saved(tmp_path):
    class Spoiled(CT):
        def loss(self, models, batch, context):
            loss = super().loss(models, batch, context)
            if context.step == 3:
                per_sample = torch.where(torch.arange(len(loss.sigma)) == 2, torch.nan, loss.per_sample)
                return Loss(per_sample, torch.full_like(loss.sigma, 7.5))
            return loss

    training = Training(Spoiled(s1=10))
    with pytest.raises(NonFiniteLossError, match=r"the loss became nan at step 3, sigma 7\.5"):
        for _ in training.steps():
            training.state.save(tmp_path)
    assert list_states(tmp_path)[-1].name == "step-000000003"


def test_state_of_another_training_is_refused(tmp_path):
    Training(METHODS["cd"]).state.save(tmp_path)
    other = Training(METHODS["ct"])
    with pytest.raises(ValueError, match="state of another training"):
        other.state.restore(list_states(tmp_path)[-1])


def test_only_the_newest_states_are_kept(tmp_path):
    training = Training(METHODS["ct"])
    for _ in training.steps():
        training.state.save(tmp_path)
    assert [path.name for path in list_states(tmp_path)] == ["step-000000005", "step-000000006"]


def test_half_precision_trains_close_to_full_precision():
    losses = {}
    for precision in ("fp32", "bf16"):
        training = Training(EDM(), precision=precision, num_steps=3)
        losses[precision] = [entry["loss"] for entry in training.steps()]
        assert all(p.dtype == torch.float32 for p in training.state.model.parameters())
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)
    assert losses["bf16"] != losses["fp32"]


def test_saved_model_loads_and_computes_the_same(tmp_path):
    training = Training(METHODS["ct"])
    list(training.steps())
    save_model(tmp_path, training.spec, training.state.averaged())
    spec, model = load_model(tmp_path)
    assert spec == training.spec and not model.training
    x, t = torch.randn(2, *SHAPE), torch.tensor([0.5, 20.0])
    expected = build_seeded(training.spec, 9).eval()
    expected.load_state_dict(training.state.averaged())
    torch.testing.assert_close(model(x, t), expected(x, t), rtol=0, atol=0)


def test_weights_of_another_network_are_refused(tmp_path):
    training = Training(METHODS["ct"])
    wider = training.spec.model_copy(update={"network": NETWORK.model_copy(update={"channels": 16})})
    save_model(tmp_path, wider, training.state.averaged())
    with pytest.raises(ValueError, match="weights are of another network"):
        load_model(tmp_path)


def test_folder_without_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no model"):
        load_model(tmp_path)


def test_each_epoch_visits_every_image_once():
    pixels = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1)
    batches = Batches(pixels, None, batch_size=4, seed=0, device=CPU)
    seen = np.concatenate([batches.indices(step) for step in range(5)])  # two epochs of ten
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert list(seen[:10]) != list(seen[10:])


def test_streamed_batches_equal_resident_ones(monkeypatch):
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (10, 4, 4, 3), dtype=np.uint8), np.arange(10)
    resident = Batches(pixels, labels, batch_size=4, seed=0, device=CPU, flip=True)
    monkeypatch.setattr("cm_core.training.batches.ON_DEVICE_BYTES", 0)
    streamed = Batches(pixels, labels, batch_size=4, seed=0, device=CPU, flip=True)
    assert streamed.resident is None
    for step in (0, 1, 2, 7, 3):
        a, b = resident.at(step), streamed.at(step)
        assert torch.equal(a.x0, b.x0) and torch.equal(a.labels, b.labels)


def test_flips_mirror_about_half_of_the_images():
    pixels = np.zeros((64, 2, 2, 1), dtype=np.uint8)
    pixels[:, :, 0] = 255
    x0 = Batches(pixels, None, batch_size=64, seed=0, device=CPU, flip=True).at(0).x0
    left = x0[:, 0, 0, 0] == 1
    assert 16 < left.sum() < 48 and torch.equal(~left, x0[:, 0, 0, 1] == 1)


def test_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match="batch_size=4 needs at least as many images, the data set has 3"):
        Batches(np.zeros((3, 1, 1, 1), np.uint8), None, batch_size=4, seed=0, device=CPU)
