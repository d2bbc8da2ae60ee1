"""Two processes train as one: the same numbers to rounding, the same weights in both, and a lost one ends the other."""

import os

import pytest
import torch

from cm_core.parallel import gradients, graphs, ranks
from cm_core.training.passes import compose_passes
from several import run_in_several
from tiny_training import METHODS, OVERFLOWING, SKIPPED, SpoiledAt, Training

pytestmark = pytest.mark.slow
ROUNDING = 1e-4 if torch.cuda.is_available() else 1e-5  # GPUs add in any order: two runs of one process differ too
STEPS = {"num_steps": 12, "batch_size": 8, "log_every": 1, "save_every": 2, "grid_every": 4}
SAVING = {"accumulate": 2, "checkpoint_activations": True}
SHARED = ("cd-ema", "pd", "scm", "dmd")  # between them they have a target, a teacher, a weighting and a critic


def begin_training(method, *, steps):
    """Return a training that was stopped after so many steps, between two metrics."""
    training = Training(method, log_every=3, save_every=3, grid_every=3)
    if steps:
        next(training.steps(stop_requested=lambda: training.state.step == steps))
    return training


def train(folder):
    """Train by every method as one of two processes, without dropout and with it."""
    torch.set_num_threads(1)
    gradients.BUCKET_BYTES = 1024  # so that gradients go in many buckets
    rank = int(os.environ["RANK"])
    begun = {name: begin_training(METHODS[name], steps=0 if rank else 2) for name in SHARED}
    with ranks.process_group():
        for name, training in begun.items():
            training.state.share()
            held = training.tensors() | training.state._window_tensors()
            torch.save((training.state.step, held), folder / f"shared-{name}-{rank}.pt")
        torch.save(train_spoiled(), folder / f"spoiled-{rank}.pt")
        for way, (method, changes) in WAYS.items():
            torch.save(train_composed(method, **changes), folder / f"{way}-{rank}.pt")
        for name, method in METHODS.items():
            for dropout in (0.0, 0.2):
                training = Training(method, dropout=dropout)
                training.models = compose_passes(training.models, method, training.train, graphs=False)
                metrics = list(training.steps())
                torch.save((metrics, training.tensors()), folder / f"{name}-{dropout}-{rank}.pt")


WAYS = {
    "fp16": (OVERFLOWING, {"precision": "fp16"}),
    **{f"saving-{name}": (METHODS[name], SAVING | {"shaken": True}) for name in SHARED},
}


def train_spoiled():
    """Return the metrics and the state of a training that skips the steps 1 and 3, where one row's loss is nan."""
    return train_composed(SpoiledAt(s1=10, steps=(1, 3)), on_nonfinite="skip")


def train_composed(method, **changes):
    training = Training(method, **changes)
    training.models = compose_passes(training.models, training.method, training.train, graphs=False)
    return list(training.steps()), training.tensors()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_in_several(train, folder)
    return {path.stem: torch.load(path) for path in folder.iterdir()}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_take_the_steps_of_one(trained, name, dropout):
    alone = Training(METHODS[name], dropout=dropout)
    expected, (metrics, tensors) = list(alone.steps()), trained[f"{name}-{dropout}-0"]
    assert [entry.keys() for entry in metrics] == [entry.keys() for entry in expected]
    for found, wanted in zip(metrics, expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-3)
    for key, tensor in alone.tensors().items():
        torch.testing.assert_close(tensors[key], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_both_hold_the_same_metrics_and_bits(trained, name):
    for dropout in (0.0, 0.2):
        (metrics, first), (others, second) = (trained[f"{name}-{dropout}-{rank}"] for rank in (0, 1))
        assert metrics == others
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_all_skip_the_steps_at_which_one_has_a_loss_that_is_not_finite(trained):
    (expected, alone), (metrics, first), (others, second) = train_spoiled(), trained["spoiled-0"], trained["spoiled-1"]
    assert [entry["nonfinite_steps"] for entry in metrics] == [0, 1, 1, 2, 2, 2]
    for found, wanted in zip(metrics, expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-3)
    assert metrics == others and all(torch.equal(first[key], second[key]) for key in first)
    for key, tensor in alone.items():
        torch.testing.assert_close(first[key], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_loss_scaling_and_savings_of_memory_give_the_plain_steps_of_one(trained, way):
    """Parts of a batch, recomputed blocks, two ranks and dropout together; and fp16, whose scale every rank shares."""
    method, changes = WAYS[way]
    (metrics, first), (others, second) = trained[f"{way}-0"], trained[f"{way}-1"]
    assert metrics == others and all(torch.equal(first[key], second[key]) for key in first)
    alone = Training(method, **{key: value for key, value in changes.items() if key not in SAVING})
    rounding, atol = (1e-2, 1e-3) if "precision" in changes else (1e-3, 1e-5)
    for found, wanted in zip(metrics, alone.steps(), strict=True):
        assert found == pytest.approx(wanted, rel=rounding)
    for key, tensor in alone.tensors().items():
        torch.testing.assert_close(first[key], tensor, rtol=rounding, atol=atol)


def test_every_rank_skips_the_steps_at_which_the_gradient_of_one_overflows(trained):
    for rank in (0, 1):
        metrics, tensors = trained[f"fp16-{rank}"]
        assert [entry["skipped_steps"] for entry in metrics] == SKIPPED
        assert tensors["loss_scale/scale"] == 2.0**14 and tensors["loss_scale/good_steps"] == 2


@pytest.mark.parametrize("name", SHARED)
def test_all_hold_the_state_of_the_first_to_the_bit(trained, name):
    training = begin_training(METHODS[name], steps=2)
    expected = training.tensors() | training.state._window_tensors()
    (step, first), (other_step, second) = (trained[f"shared-{name}-{rank}"] for rank in (0, 1))
    assert step == other_step == 2 and first.keys() == second.keys() == expected.keys()
    assert all(torch.equal(first[key], second[key]) for key in expected)
    for key, tensor in expected.items():  # computed by as many threads as there are: not the same bits
        torch.testing.assert_close(first[key], tensor, rtol=1e-3, atol=1e-5)


def test_alone_nothing_is_divided():
    assert ranks.is_main() and ranks.world_size() == 1
    assert ranks.agree(True) and not ranks.agree(False)


def test_gradients_come_in_pieces_as_the_backward_pass_computes_them(monkeypatch):
    net = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))  # 288 bytes a layer
    net(torch.ones(2, 8)).square().sum().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(gradients, "BUCKET_BYTES", 300)
    sent = []
    buckets = gradients.GradientBuckets(lambda bucket: sent.append((bucket, net[0].weight.grad)))
    with buckets.taken_from(net.parameters()):
        net(torch.ones(2, 8)).square().sum().backward()
    assert len(sent) == 2 and all(first is None for _, first in sent)  # the first layer's gradient comes last
    found = [bucket for bucket, _ in sent] + [buckets.rest()]
    assert all(bucket.nbytes >= 300 for bucket in found[:-1]) and buckets.rest() is None
    for p, gradient in zip(net.parameters(), expected, strict=True):
        assert torch.equal(p.grad, gradient)
    for bucket in found:
        bucket.mul_(2)  # a sum in its place is the gradient
    assert all(torch.equal(p.grad, 2 * gradient) for p, gradient in zip(net.parameters(), expected, strict=True))


@pytest.mark.parametrize("processes", [1, 2])
def test_gradients_of_half_precision_stand_ins_become_those_of_the_parameters(processes, monkeypatch):
    conv, norm = torch.nn.Conv2d(2, 4, 3), torch.nn.GroupNorm(2, 4)
    net = torch.nn.Sequential(conv, norm, torch.nn.Conv2d(4, 3, 1)).to(memory_format=torch.channels_last)
    x, parameters = torch.randn(2, 2, 5, 4), list(net.parameters())
    casting = graphs._CastWeights(net, frozenset(parameters), torch.bfloat16)
    with torch.no_grad():
        conv.weight.mul_(2)
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.autograd.grad(net(x).float().square().sum(), parameters)
        with casting.in_place():
            casting.update()
            out = net(x)
    assert list(net.parameters()) == parameters
    monkeypatch.setattr(ranks, "world_size", lambda: processes)
    half_weights, buckets = casting.half_weights, gradients.GradientBuckets(lambda bucket: None)
    assert set(half_weights) == {conv.weight, net[2].weight}
    with buckets.taken_from(parameters, half_weights):
        out.float().square().sum().backward(inputs=[half_weights.get(p, p) for p in parameters])
    last = buckets.rest()
    assert last is None if processes == 1 else len(last) == sum(p.numel() for p in parameters)
    for p, gradient in zip(parameters, expected, strict=True):
        assert torch.equal(p.grad, gradient) and p.grad.stride() == p.stride() and p.grad.dtype == torch.float32


class Recorded:
    """A recorded pass whose backward pass is still to come; a GPU's would be graphs."""

    awaits_backward = True

    def __init__(self, forward, parameters, args, casting):
        self._forward = forward

    def forward(self, args):
        return self._forward(*args).detach()


def test_a_shared_network_refuses_a_second_pass_with_gradients_beside_a_recorded_one(monkeypatch):
    monkeypatch.setattr(graphs, "fuses", lambda x: True)
    monkeypatch.setattr(graphs, "_Pass", Recorded)
    net, x = torch.nn.Linear(2, 2), torch.ones(2, 2)
    replayed = graphs.with_cuda_graphs(net)
    replayed(x)  # the first of its kind runs plainly
    replayed(x)  # recorded
    replayed(x)  # alone, it is taken and this one runs plainly again
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="one pass at a time"):
        replayed(x)
    with torch.no_grad():
        assert torch.equal(replayed(x), torch.nn.functional.linear(x, net.weight, net.bias))
