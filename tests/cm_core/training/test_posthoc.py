"""Averages rebuilt from snapshots: the vectors of EDM2's formulas, and what averages of that width would have."""

import numpy as np
import pytest
import torch
from torch import nn

from cm_core.checkpoint import save_tensors
from cm_core.training.config import Snapshots, Train
from cm_core.training.ema import ConstantEma, Ema, PowerEma
from cm_core.training.posthoc import (
    WIDEST,
    Snapshot,
    gamma_of,
    inner_product,
    read_index,
    rebuild,
    rebuilding_weights,
    write_index,
)

EVERY = {"log_every": 1, "save_every": 1, "grid_every": 1}
POWER = (PowerEma(width=0.05), PowerEma(width=0.1))


@pytest.mark.parametrize(
    ("width", "gamma"),
    [(0.01, 96.99489782), (0.05, 16.97219860), (0.1, 6.93720394), (0.15, 3.55786877), (0.2, 1.82621378)],
)
def test_the_exponent_of_a_width_is_the_papers(width, gamma):
    assert gamma_of(width) == pytest.approx(gamma, abs=5.1e-9)
    # The standard deviation of the density (gamma + 1) t^gamma on 0..1.
    assert ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5 == pytest.approx(width, rel=1e-8)


def test_the_widest_average_is_the_plain_mean():
    assert gamma_of(WIDEST) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((100, 0.05), (100, 0.05), 0.0924325352),
        ((100, 0.05), (80, 0.1), 0.00129756598),
        ((60, 0.1), (100, 0.05), 9.83205726e-06),
    ],
)
def test_inner_products_of_profiles(first, second, expected):
    a, b = Snapshot(*first), Snapshot(*second)
    assert inner_product(a, b) == pytest.approx(expected, rel=1e-8)
    assert inner_product(b, a) == inner_product(a, b)
    t = (np.arange(200_000) + 0.5) / 200_000 * min(first[0], second[0])
    density = [(gamma_of(w) + 1) * t ** gamma_of(w) / end ** (gamma_of(w) + 1) for end, w in (first, second)]
    assert inner_product(a, b) == pytest.approx((density[0] * density[1]).sum() * t[0] * 2, rel=1e-6)


@pytest.mark.parametrize(
    ("width", "expected"),
    [(0.07, [0.000089, -0.002181, 0.439158, 0.562934]), (0.15, [-0.014496, 0.050141, -0.340512, 1.304866])],
)
def test_weights_that_rebuild_other_widths(width, expected):
    snapshots = [Snapshot(end, known) for end in (50, 100) for known in (0.05, 0.1)]
    weights, error = rebuilding_weights(snapshots, Snapshot(100, width))
    assert weights == pytest.approx(expected, abs=5e-7) and sum(weights) == pytest.approx(1, rel=1e-12)
    assert 0 < error < 0.5


def test_a_width_of_the_snapshots_is_its_own_snapshot():
    snapshots = [Snapshot(end, known) for end in (50, 100) for known in (0.05, 0.1)]
    weights, error = rebuilding_weights(snapshots, Snapshot(100, 0.05))
    assert weights == pytest.approx([0, 0, 1, 0], abs=1e-9) and error < 1e-6


def trained(folder, *, num_steps=512, count=16, dtype=torch.float32, widths=(0.03, 0.07, 0.15)):
    """Let a weight wander, with snapshots; return averages of other widths that were kept all along."""
    train = Train(num_steps=num_steps, emas=POWER, snapshots=Snapshots(count=count), **EVERY)
    module = nn.Linear(64, 1, bias=False)
    kept = {rule.width: Ema(rule, module) for rule in (*POWER, *(PowerEma(width=w) for w in widths))}
    generator, written = torch.Generator().manual_seed(0), []
    for step in range(num_steps):
        with torch.no_grad():
            module.weight += 0.1 * torch.randn(module.weight.shape, generator=generator)
        for ema in kept.values():
            ema.update(module, step=step, batch_size=1)
        if step + 1 in train.snapshot_steps:
            for width in train.snapshot_emas.values():
                written.append(Snapshot(step + 1, width))
                tensors = {name: tensor.to(dtype) for name, tensor in kept[width].weights.items()}
                save_tensors(folder / written[-1].file, tensors)
    write_index(folder, written)
    return {width: ema.weights["weight"] for width, ema in kept.items()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-2), (torch.float16, 1.2e-2)])
def test_rebuilt_averages_are_those_that_were_kept(tmp_path, dtype, tolerance):
    kept = trained(tmp_path, dtype=dtype)
    for width, expected in kept.items():
        found, error = rebuild(tmp_path, width)
        assert found["weight"].dtype == torch.float32 and error < 0.1
        assert (found["weight"] - expected).norm() < tolerance * expected.norm()
    # The check tells widths apart: neighbours differ by more.
    assert (kept[0.07] - kept[0.05]).norm() > 2 * tolerance * kept[0.05].norm()


def test_widths_that_the_snapshots_do_not_give_are_refused_in_one_line(tmp_path):
    trained(tmp_path, num_steps=32, count=4, widths=())
    with pytest.raises(ValueError, match=r"width 0\.002: the closest average of 8 snapshots is \d+% off; allowed: 10%"):
        rebuild(tmp_path, 0.002)
    for width in (0, -1, 0.3):
        with pytest.raises(ValueError, match=r"allowed are widths above 0 and below 0\.2887"):
            rebuild(tmp_path, width)
    with pytest.raises(FileNotFoundError):
        rebuild(tmp_path / "none", 0.05)


def test_the_index_names_what_was_written(tmp_path):
    trained(tmp_path, num_steps=32, count=4, widths=())
    index = read_index(tmp_path)
    assert [one.step for one in index] == [8, 8, 16, 16, 24, 24, 32, 32]
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == sorted(one.file for one in index)


@pytest.mark.parametrize(
    ("num_steps", "log_every", "count", "expected"),
    [
        (100, 1, 4, [25, 50, 75, 100]),
        (100, 20, 4, [40, 80, 100]),
        (4, 1, 16, [1, 2, 3, 4]),
        (90, 100, 2, [90]),
    ],
)
def test_there_are_at_most_so_many_snapshots_and_one_at_the_end(num_steps, log_every, count, expected):
    every = {"log_every": log_every, "save_every": log_every, "grid_every": log_every}
    train = Train(num_steps=num_steps, emas=POWER, snapshots=Snapshots(count=count), **every)
    assert train.snapshot_steps == expected and len(expected) <= count
    assert Train(num_steps=num_steps, emas=POWER, **every).snapshot_steps == []


def test_snapshots_need_two_widths():
    for emas in ((ConstantEma(), POWER[0]), (POWER[0], POWER[0])):
        with pytest.raises(ValueError, match="snapshots need two emas of kind power with different widths"):
            Train(emas=emas, snapshots=Snapshots())
