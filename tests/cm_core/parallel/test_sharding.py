"""Two processes that divide the weights train as one that has all: the same numbers to rounding, half of the memory."""

from functools import partial

import pytest
import torch

from cm_core.checkpoint import list_states, load_state
from cm_core.parallel import ranks, sharding
from cm_core.training.config import Train, why_not_sharded
from cm_core.training.optimizers import Optimizer
from cm_core.training.passes import compose_passes
from flows.distributed.launch import processes_for
from flows.errors import UserError
from flows.stages.training import place
from several import run_in_several
from small_stages import small_recipe
from tiny_training import CPU, METHODS, OVERFLOWING, SKIPPED, Training

DIVIDED = {name: method for name, method in METHODS.items() if why_not_sharded(method, Train()) is None}
WAYS = {
    **{name: (name, {}) for name in DIVIDED},
    "checkpointed": ("cd-ema", {"checkpoint_activations": True}),
    "in-parts": ("ict", {"accumulate": 2}),
    "clipped-adam": ("edm", {"clip_norm": 0.05, "optimizer": Optimizer(kind="adam", learning_rate=1e-3)}),
    "both": ("cd-ema", {"accumulate": 2, "checkpoint_activations": True, "shaken": True}),
    "bf16": ("cd", {"precision": "bf16"}),
    "fp16": ("overflowing", {"precision": "fp16"}),
}
RESUMED = ("cd-ema", "pd")  # between them they have a target and a teacher
ROUNDING = dict.fromkeys(("bf16", "fp16"), {"rtol": 1e-2, "atol": 1e-3})  # sums over other rows are rounded
THREE = {"batch_size": 6}  # rows that three processes can divide
EVERY = {"log_every": 3, "save_every": 3, "grid_every": 3}


def prepared(name, changes, **options):
    """Return a training as the stages prepare it, whole or sharded as `sharded_weights` says."""
    method = (METHODS | {"overflowing": OVERFLOWING})[name]
    training = Training(method, dropout=0.2, place=partial(place, device=CPU), **changes, **options)
    graphs = not sharding.is_wanted()
    training.models = compose_passes(training.models, training.method, training.train, graphs=graphs)
    return training


def begin(training, folder):
    """Train until after step 2, between two metrics, and save."""
    next(training.steps(stop_requested=lambda: training.state.step == 2))
    training.state.save(folder)


def held(training):
    """Return how many of the sharded numbers this process holds, how many there are, and what is whole."""
    tensors = training.state._tensors()
    sharded = [tensor for tensor in tensors.values() if sharding.is_sharded(tensor)]
    own, there = sum(tensor.to_local().numel() for tensor in sharded), sum(tensor.numel() for tensor in sharded)
    return own, there, {name for name, tensor in tensors.items() if not sharding.is_sharded(tensor)}


def train(folder):
    """Be one of two processes that shard the weights of every training."""
    torch.set_num_threads(1)
    with ranks.process_group(), sharding.sharded_weights():
        rank = ranks.rank()
        for way, (name, changes) in WAYS.items():
            training = prepared(name, changes)
            metrics = list(training.steps())
            tensors = sharding.gathered(training.state._tensors())
            torch.save((metrics, tensors, held(training)), folder / f"{way}-{rank}.pt")
        for name in RESUMED:
            begin(prepared(name, EVERY), folder / f"begun-by-two-{name}")
            training = prepared(name, EVERY)
            training.state.restore(folder / f"begun-alone-{name}" / "step-000000002" if rank == 0 else None)
            metrics = list(training.steps())
            torch.save((metrics, sharding.gathered(training.state._tensors())), folder / f"resumed-{name}-{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharding")
    for name in RESUMED:
        begin(prepared(name, EVERY), folder / f"begun-alone-{name}")
    run_in_several(train, folder)
    return folder


def assert_same(metrics, tensors, training, *, rtol=1e-3, atol=1e-5):
    """Compare a training's numbers with those of `training`, which is taken to its end."""
    for found, wanted in zip(metrics, training.steps(), strict=True):
        assert found == pytest.approx(wanted, rel=rtol)
    expected = training.tensors()
    assert tensors.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(tensors[key], tensor, rtol=rtol, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_two_that_divide_the_weights_take_the_steps_of_one(folder, way):
    (metrics, tensors, _), (others, *_) = (torch.load(folder / f"{way}-{rank}.pt") for rank in (0, 1))
    assert metrics == others
    name, changes = WAYS[way]
    plain = {key: value for key, value in changes.items() if key not in ("accumulate", "checkpoint_activations")}
    assert_same(metrics, tensors, prepared(name, plain), **ROUNDING.get(way, {}))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_each_holds_half_of_the_weights_moments_and_averages(folder, way):
    (first, there, kept), (second, *others) = (torch.load(folder / f"{way}-{rank}.pt")[2] for rank in (0, 1))
    assert [there, kept] == others and first + second == there
    assert max(first, second) < 0.51 * there
    buffers = {"net.embed.frequencies"} | ({"net.embed.phases"} if way == "edm2" else set())
    scale = {"scale", "good_steps", "skipped"} if way == "fp16" else set()
    assert {name.rpartition("/")[2] for name in kept} == {"step", *buffers, *scale}


@pytest.mark.slow
def test_both_skip_the_steps_at_which_the_gradient_of_one_overflows(folder):
    for rank in (0, 1):
        metrics, tensors, _ = torch.load(folder / f"fp16-{rank}.pt")
        assert [entry["skipped_steps"] for entry in metrics] == SKIPPED
        assert tensors["loss_scale/scale"] == 2.0**14 and tensors["loss_scale/good_steps"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_what_two_saved_in_parts_is_whole_and_goes_on_alone(folder, name):
    (saved,) = list_states(folder / f"begun-by-two-{name}")
    (other,) = list_states(folder / f"begun-alone-{name}")
    shapes, expected = ({key: t.shape for key, t in load_state(state)[0].items()} for state in (saved, other))
    assert shapes == expected
    training, alone = prepared(name, EVERY), prepared(name, EVERY)
    training.state.restore(saved)
    assert_same(list(training.steps()), training.tensors(), alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_what_one_saved_goes_on_in_parts(folder, name):
    assert_same(*torch.load(folder / f"resumed-{name}-0.pt"), prepared(name, EVERY))


def train_as_one_of_three(folder):
    torch.set_num_threads(1)
    with ranks.process_group(), sharding.sharded_weights():
        training = prepared("cd-ema", THREE)
        metrics = list(training.steps())
        found = metrics, sharding.gathered(training.state._tensors()), held(training)
        torch.save(found, folder / f"{ranks.rank()}.pt")


@pytest.mark.slow
def test_three_shard_weights_that_do_not_divide_evenly(tmp_path):
    run_in_several(train_as_one_of_three, tmp_path, 3)
    (metrics, tensors, (first, there, _)), *others = (torch.load(tmp_path / f"{rank}.pt") for rank in range(3))
    assert_same(metrics, tensors, prepared("cd-ema", THREE))
    assert first + sum(own for _, _, (own, *_) in others) == there
    assert first > 0.3 * there


def test_a_learned_weight_of_the_loss_rules_sharding_out_and_forced_norms_do_not():
    assert "adaptive_weight=true learns weights of the loss" in why_not_sharded(METHODS["edm2-weighted"], Train())
    assert "edm2" in DIVIDED and why_not_sharded(METHODS["edm2"], Train()) is None


def asked(monkeypatch, value, *overrides, devices="2"):
    """Ask for the processes of a student with CM_SHARD at `value`."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("CM_DEVICES", devices)
    monkeypatch.setenv("CM_SHARD", value)
    return processes_for("student", small_recipe("digits-cd", *overrides).student)


@pytest.mark.parametrize(
    ("value", "overrides", "complaint"),
    [
        ("2", (), r"CM_SHARD=2: must be 1, to shard weights over processes, or 0"),
        ("1", ("student.method=scm",), r"CM_SHARD=1: student\.method\.kind=scm takes forward-mode derivatives"),
        ("1", ("student.method=dmd",), r"CM_SHARD=1: student\.method\.kind=dmd trains two networks in turn"),
        ("1", ("student.train.compile=true",), r"CM_SHARD=1: student\.train\.compile=true is not tried"),
    ],
)
def test_what_cannot_be_sharded_is_refused_in_one_line(monkeypatch, value, overrides, complaint):
    with pytest.raises(UserError, match=f"^{complaint}.*$") as refused:
        asked(monkeypatch, value, *overrides)
    assert "\n" not in str(refused.value)


def test_alone_nothing_is_sharded(monkeypatch):
    assert asked(monkeypatch, "1", "student.method=scm", devices="1") == 1
    with sharding.sharded_weights():
        assert not sharding.is_wanted()
    assert not prepared("ct", {}).state.is_sharded
