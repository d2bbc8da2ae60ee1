"""Dropout: a mask is a function of (seed, layer, row, element), whatever the pass, the layout and the precision."""

import pytest
import torch

from cm_core.networks.dropout import LEVELS, dropout, of_these_rows, rows_from, seed_dropout
from cm_core.networks.modes import derivative

CPU, SHAPE = torch.device("cpu"), (6, 5, 4, 3)


@pytest.fixture(autouse=True)
def seed():
    seed_dropout(2**40 + 7, CPU)


def mask(layer=1, p=0.3, **how):
    return dropout(torch.ones(SHAPE, **how), p, layer=layer)


def test_activations_are_kept_as_often_as_asked_and_scaled():
    ones = torch.ones(64, 16, 16, 16)
    out = dropout(ones, 0.3, layer=0)
    kept = round(0.7 * LEVELS)
    assert set(out.unique().tolist()) == {0.0, torch.tensor(LEVELS / kept).item()}
    share = (out > 0).double().mean().item()
    assert share == pytest.approx(0.7, abs=4 * (0.7 * 0.3 / out.numel()) ** 0.5)
    per_channel = (out > 0).double().mean((0, 2, 3))
    assert (per_channel - 0.7).abs().max() < 5 * (0.21 / (out.numel() / 16)) ** 0.5


def test_seed_layer_and_row_all_matter():
    first = mask()
    assert torch.equal(first, mask())
    assert not torch.equal(first, mask(layer=2))
    assert len({tuple(row.flatten().tolist()) for row in first}) == len(first)
    for other in (2**40 + 8, 7):  # the upper word of the seed counts too
        seed_dropout(other, CPU)
        assert not torch.equal(first, mask())


def test_the_seed_holds_however_the_device_is_written():
    first = mask()
    seed_dropout(9, torch.device("cpu", 0))
    assert not torch.equal(first, mask())


def test_layout_and_precision_do_not_matter():
    first = mask() > 0
    channels_last = torch.ones(SHAPE).contiguous(memory_format=torch.channels_last)
    assert torch.equal(dropout(channels_last, 0.3, layer=1) > 0, first)
    assert torch.equal(mask(dtype=torch.bfloat16) > 0, first)


def test_rows_of_a_part_get_the_masks_that_they_have_in_the_whole():
    whole = mask()
    with rows_from(2):
        assert torch.equal(dropout(torch.ones(3, *SHAPE[1:]), 0.3, layer=1), whole[2:5])
        with rows_from(1):
            again = of_these_rows(lambda: dropout(torch.ones(3, *SHAPE[1:]), 0.3, layer=1))
    assert torch.equal(again(), whole[3:6]), "as a backward pass computes it once more"


def test_gradient_and_forward_derivative_pass_where_the_value_passes():
    h = torch.randn(SHAPE, requires_grad=True)
    dropout(h, 0.3, layer=1).backward(torch.ones(SHAPE))
    assert torch.equal(h.grad, mask())
    tangent = torch.randn(SHAPE)
    out, d_out = derivative(lambda h: dropout(h, 0.3, layer=1), (h.detach(),), (tangent,))
    torch.testing.assert_close(out, h.detach() * mask())
    torch.testing.assert_close(d_out, tangent * mask())
