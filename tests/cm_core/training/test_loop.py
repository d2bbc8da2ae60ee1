"""The training loop: a resumed run is the run that never stopped, to the bit; a spoiled one stops and says where."""

import copy
import gc

import numpy as np
import pytest
import torch

from cm_core.checkpoint import list_states
from cm_core.methods.base import Loss
from cm_core.methods.ct import CT
from cm_core.methods.edm import EDM
from cm_core.model import build_seeded, load_model, save_model
from cm_core.networks.dropout import dropout
from cm_core.networks.magnitude import forced_weights
from cm_core.networks.modes import is_plain
from cm_core.training.batches import Batches
from cm_core.training.optimizers import FusedRAdam, Optimizer
from cm_core.training.trainer import NonFiniteLossError, loss_by_sigma
from tiny_training import CPU, METHODS, NETWORK, SHAPE, SpoiledAt, Training


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(Optimizer(kind="adam", learning_rate=1e-3), id="adam"),
        pytest.param(Optimizer(learning_rate=4e-4), id="radam", marks=pytest.mark.slow),
    ],
)
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"cm_inf-through"}))  # all its passes are forward-mode ones
def test_no_graph_is_alive_where_the_student_begins_a_pass_with_gradients(name):
    """Such a pass could not be captured as a CUDA graph: leaves of a live graph belong to another stream."""
    training, alive = Training(METHODS[name], num_steps=2), []
    student = training.models.student

    def watched(*args):
        capturable = not any(arg is not None and arg.requires_grad for arg in args)
        if torch.is_grad_enabled() and not is_plain() and capturable:
            alive.append([found.shape for found in with_graphs() if id(found) not in before])
        return student.net(*args)

    before = {id(found) for found in with_graphs()}
    student.network_pass = watched
    list(training.steps())
    assert alive and not any(alive)


def with_graphs():
    """Return the tensors at hand, of all that this process holds, that a graph leads to."""
    tensors = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
    return [found for found in tensors if found.requires_grad and not isinstance(found, torch.nn.Parameter)]


@pytest.mark.parametrize("name", ["ct", "dmd"])
def test_a_training_stopped_between_two_metrics_resumes_to_the_same_metrics_and_bits(tmp_path, name):
    every = {"log_every": 3, "save_every": 3, "grid_every": 3}
    whole = Training(METHODS[name], **every)
    metrics = list(whole.steps())

    first = Training(METHODS[name], **every)
    assert next(first.steps(stop_requested=lambda: first.state.step == 2)) == {}
    first.state.save(tmp_path)
    second = Training(METHODS[name], **every)
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


def test_every_pass_of_edm2_sees_weights_of_unit_length_though_the_steps_change_it():
    training = Training(METHODS["edm2"], optimizer=Optimizer(kind="adam", learning_rate=0.1))
    weights, seen = list(forced_weights(training.state.model)), []

    def farthest(*_):
        seen.append(max((w.flatten(1).square().mean(1) - 1).abs().max().item() for w in weights))

    training.state.model.net.register_forward_pre_hook(farthest)
    list(training.steps())
    assert len(seen) == training.train.num_steps and max(seen) < 1e-2
    farthest()
    assert seen[-1] > 2e-2, "the last step's change stays: averages are of the weights that the optimiser leaves"


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


def test_every_step_drops_activations_of_its_own_and_the_target_drops_the_students(monkeypatch):
    """A target in eval mode, or a mask that does not change from step to step, trains all the same, only worse."""
    masks = []

    def recorded(h, p, *, layer):
        out = dropout(h, p, layer=layer)
        masks.append((out == 0).flatten())
        return out

    monkeypatch.setattr("cm_core.networks.blocks.dropout", recorded)
    training = Training(METHODS["cd-ema"], dropout=0.5, num_steps=3)
    training.models.target.eval()  # as it comes from a file
    seen = []
    for _ in training.steps():
        student, target = torch.cat(masks).chunk(2)
        assert torch.equal(student, target) and 0.4 < student.float().mean() < 0.6
        seen.append(student)
        masks.clear()
    next(Training(METHODS["cd-ema"], dropout=0.5).steps(seed=6))
    seen.append(torch.cat(masks).chunk(2)[0])
    for i, mask in enumerate(seen):
        for other in seen[:i]:
            assert 0.4 < (mask == other).float().mean() < 0.6, "masks are independent"


def test_every_step_draws_noise_and_images_of_its_own():
    asked = []  # noisy images and their levels
    for seed in (5, 5, 6):
        training = Training(METHODS["edm"], num_steps=3)
        training.models.student.register_forward_pre_hook(
            lambda _, args: asked.append(torch.cat([args[0].flatten(), args[1]]))
        )
        list(training.steps(seed=seed))
    assert all(torch.equal(a, b) for a, b in zip(asked[:3], asked[3:6], strict=True))
    assert len({tuple(values.tolist()) for values in asked}) == 6


@pytest.mark.parametrize("name", ["cd-ema", "ct"])
def test_target_and_averages_move_by_their_decay_of_the_step(name):
    training = Training(METHODS[name], optimizer=Optimizer(kind="adam", learning_rate=0.1))
    steps, decays = training.steps(), []
    keys = [key for key, _ in training.state.model.named_parameters()]
    for step in range(training.train.num_steps):
        before = training.tensors()
        next(steps)
        after = training.tensors()
        decays.append(training.method.target_decay_at(step, 6))
        rules = {f"ema{i}": rule.decay_at(step, 4) for i, rule in enumerate(training.train.emas)}
        for place, decay in {"target": decays[-1], **rules}.items():
            for key in keys:
                expected = decay * before[f"{place}/{key}"] + (1 - decay) * after[f"model/{key}"]
                torch.testing.assert_close(after[f"{place}/{key}"], expected, rtol=1e-5, atol=1e-6)
    intervals = (1, 4, 6, 7, 9, 10)  # of the grids of CT with s1 = 10 in six steps
    assert decays == pytest.approx([0.9] * 6 if name == "cd-ema" else [0.9 ** (2 / n) for n in intervals])


def test_logging_interval_does_not_change_the_training():
    fine, coarse = Training(METHODS["ct"]), Training(METHODS["ct"], log_every=3, save_every=3, grid_every=3)
    fine_metrics, coarse_metrics = list(fine.steps()), list(coarse.steps())
    assert [entry["step"] for entry in coarse_metrics] == [3, 6]
    assert coarse_metrics[0]["loss"] == pytest.approx(np.mean([entry["loss"] for entry in fine_metrics[:3]]), rel=1e-6)
    a, b = fine.tensors(), coarse.tensors()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_losses_are_logged_by_noise_level():
    losses, sigmas = (
        torch.tensor([[1.0, 2.0, 6.0], [4.0, 8.0, 1.0]]),
        torch.tensor([[0.3, 0.5, 70.0], [0.49, 0.7, 0.99]]),
    )
    found = loss_by_sigma(losses, sigmas)
    assert found == {
        "loss_at_sigma/0.354": 2.5,
        "loss_at_sigma/0.707": pytest.approx(11 / 3),
        "loss_at_sigma/90.5": 6.0,
    }
    entry = next(Training(METHODS["ect"]).steps())
    assert {key: value for key, value in entry.items() if key.startswith("loss_at_sigma/")}


def test_learning_rate_ramps_up():
    training = Training(METHODS["ct"], optimizer=Optimizer(kind="adam", learning_rate=0.1), ramp_steps=4)
    rates = [training.state.optimizer.param_groups[0]["lr"] for _ in training.steps()]
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])


@pytest.mark.parametrize(
    ("schedule", "start", "rates"),
    [
        ("constant", 0, [0.1] * 6),
        ("linear", 0, [0.1, 0.1 * 5 / 6, 0.1 * 4 / 6, 0.05, 0.1 * 2 / 6, 0.1 / 6]),
        ("linear", 2, [0.1, 0.1, 0.1, 0.075, 0.05, 0.025]),
        ("cosine", 0, [0.1, 0.0933013, 0.075, 0.05, 0.025, 0.0066987]),
        ("inverse_sqrt", 2, [0.1, 0.1, 0.1, 0.1 * (2 / 3) ** 0.5, 0.1 * 0.5**0.5, 0.1 * (2 / 5) ** 0.5]),
    ],
)
def test_learning_rate_falls_as_its_schedule_says_and_a_resumed_training_goes_on_with_it(
    tmp_path, schedule, start, rates
):
    def begin():
        optimizer = Optimizer(kind="adam", learning_rate=0.1)
        return Training(METHODS["ct"], optimizer=optimizer, schedule=schedule, schedule_start=start)

    training, seen = begin(), []
    for _ in training.steps():
        seen.append(training.state.optimizer.param_groups[0]["lr"])
        if training.state.step == 4:
            training.state.save(tmp_path)
    assert seen == pytest.approx(rates, rel=1e-5)
    resumed = begin()
    resumed.state.restore(list_states(tmp_path)[-1])
    again = [resumed.state.optimizer.param_groups[0]["lr"] for _ in resumed.steps()]
    assert again == seen[4:]
    assert all(torch.equal(tensor, resumed.tensors()[name]) for name, tensor in training.tensors().items())


def test_weight_decay_shrinks_the_weights_apart_from_adams_step():
    weights = [torch.nn.Parameter(torch.linspace(-2, 2, 5)) for _ in range(2)]
    for weight, decay in zip(weights, (0.0, 0.3), strict=True):
        optimizer = Optimizer(kind="adam", learning_rate=0.1, weight_decay=decay).build([weight])
        weight.grad = torch.ones(5)
        optimizer.step()
    torch.testing.assert_close(weights[1], weights[0] - 0.1 * 0.3 * torch.linspace(-2, 2, 5))
    with pytest.raises(ValueError, match="weight_decay=0.3 needs kind: adam, and kind is radam"):
        Optimizer(learning_rate=0.1, weight_decay=0.3)


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


@pytest.mark.parametrize(
    "optimizer", [Optimizer(kind="adam", learning_rate=1e-3), Optimizer(learning_rate=4e-4)], ids=["adam", "radam"]
)
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_step_whose_loss_is_not_finite_can_be_skipped_and_is_counted(value, optimizer):
    training = Training(SpoiledAt(s1=10, value=value), on_nonfinite="skip", optimizer=optimizer)
    steps, before = training.steps(), {}
    logged = []
    for entry in steps:
        logged.append(entry)
        if entry["step"] == 3:
            before = training.tensors()
        if entry["step"] == 4:
            same = [name for name, tensor in training.tensors().items() if torch.equal(tensor, before[name])]
            assert all(name in same for name in before if name.startswith(("model/", "optimizer/")))
    assert [entry["nonfinite_steps"] for entry in logged] == [0, 0, 0, 1, 1, 1]
    assert ["loss" in entry for entry in logged] == [True, True, True, False, True, True]
    assert all(np.isfinite(value) for entry in logged for value in entry.values())
    assert all(tensor.isfinite().all() for tensor in training.tensors().values())


def test_skipping_changes_nothing_where_all_losses_are_finite():
    stop, skip = Training(METHODS["ct"]), Training(METHODS["ct"], on_nonfinite="skip")
    plain = list(stop.steps())
    assert [{**entry, "nonfinite_steps": 0} for entry in plain] == list(skip.steps())
    a, b = stop.tensors(), skip.tensors()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_training_that_skips_resumes_to_the_bit_from_a_state_of_one_that_stopped(tmp_path):
    whole = Training(SpoiledAt(s1=10), on_nonfinite="skip")
    metrics = list(whole.steps())

    stopped = Training(SpoiledAt(s1=10))
    with pytest.raises(NonFiniteLossError):
        for _ in stopped.steps():
            stopped.state.save(tmp_path)
    resumed = Training(SpoiledAt(s1=10), on_nonfinite="skip")
    resumed.state.restore(list_states(tmp_path)[-1])
    entries = []
    for entry in resumed.steps():
        entries.append(entry)
        resumed.state.save(tmp_path)
    assert entries == metrics[3:]
    a, b = whole.tensors(), resumed.tensors()
    assert all(torch.equal(a[key], b[key]) for key in a)
    again = Training(SpoiledAt(s1=10), on_nonfinite="skip")
    again.state.restore(list_states(tmp_path)[-1])
    assert again.state.nonfinite == 1, "the count is part of the state"


def test_too_many_steps_without_finite_loss_stop_the_training_that_skips_them():
    training = Training(SpoiledAt(s1=10, steps=(1, 2, 4)), on_nonfinite="skip", max_nonfinite=2)
    seen = []
    with pytest.raises(NonFiniteLossError, match="the loss became nan at step 4, .*; 3 steps were skipped"):
        for entry in training.steps():
            seen.append(entry["step"])
    assert seen == [1, 2, 3, 4]


def test_a_loss_that_is_not_finite_is_no_overflow_of_the_loss_scale():
    training = Training(SpoiledAt(s1=10), on_nonfinite="skip", precision="fp16")
    last = list(training.steps())[-1]
    assert last["nonfinite_steps"] == 1 and last["skipped_steps"] == 0 and last["loss_scale"] == 2.0**16


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
