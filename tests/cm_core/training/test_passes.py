"""The wrappers of a pass change neither losses nor gradients, dropout included."""

import copy

import pytest
import torch

from cm_core.training.config import Train
from cm_core.training.passes import compose, compose_passes, in_parts
from small_networks import build_shaken, pass_through, small_networks
from tiny_training import METHODS, Training

NETWORKS = small_networks(channels_per_head=8, fourier_scale=16)
SAVING = {
    "in parts": {"accumulate": 2},
    "checkpointed": {"checkpoint_activations": True},
    "both": {"accumulate": 4, "checkpoint_activations": True},
}


@pytest.mark.parametrize(
    "saving", [pytest.param(one, marks=pytest.mark.slow) for one in SAVING if one != "both"] + ["both"]
)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_the_plain_steps_whatever_saves_memory(name, saving):
    plain, other = (Training(METHODS[name], num_steps=3, **changes) for changes in ({}, SAVING[saving]))
    other.models = compose_passes(other.models, other.method, other.train, graphs=False)
    for found, wanted in zip(other.steps(), plain.steps(), strict=True):
        assert found == pytest.approx(wanted, rel=2e-4)
    tensors, expected = other.tensors(), plain.tensors()
    assert tensors.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(tensors[key], tensor, rtol=1e-3, atol=1e-5)


def build(name):
    return build_shaken(NETWORKS[name].model_copy(update={"dropout": 0.3}))


@pytest.mark.parametrize("name", NETWORKS)
def test_checkpointed_blocks_give_the_same_gradients_to_the_bit(name):
    net = build(name)
    expected = pass_through(net, net)
    checkpointed = compose(net, Train(checkpoint_activations=True), graphs=False)
    for found, true in zip(pass_through(net, checkpointed), expected, strict=True):
        assert torch.equal(found, true)


@pytest.mark.parametrize("parts", [2, 3])
def test_a_batch_in_parts_gives_the_gradients_of_the_whole(parts):
    net = build("adm")
    expected, net = pass_through(net, net), copy.deepcopy(net)
    in_parts = compose(net, Train(batch_size=6, accumulate=parts, checkpoint_activations=True), graphs=False)
    for found, true in zip(pass_through(net, in_parts), expected, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-3, atol=1e-6)


def test_a_pass_of_fewer_rows_than_parts_has_no_empty_part():
    """A teacher sees one row for each trajectory of CMT, and kernels take no empty batch."""
    seen = []
    rows = in_parts(lambda x, t: seen.append(len(x)) or x, 4)(torch.arange(3.0)[:, None], None)
    assert seen == [1, 1, 1] and torch.equal(rows, torch.arange(3.0)[:, None])


def test_parts_keep_the_activations_of_one_part_only():
    net, kept = build("ddpmpp"), []

    def bytes_kept(network_pass):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            network_pass(torch.randn(6, 1, 8, 8), torch.rand(6))
        return sum(kept)

    assert bytes_kept(compose(net, Train(batch_size=6, accumulate=3), graphs=False)) < bytes_kept(net) / 10


def test_a_network_keeps_its_own_forward():
    net = build("ddpmpp")
    compose(net, Train(batch_size=6, accumulate=3, checkpoint_activations=True), graphs=True)
    assert not [module for module in net.modules() if "forward" in vars(module)]
