import pytest
import torch
from torch import nn

from cm_core.training.ema import ConstantEma, Ema, HalfLifeEma, PowerEma, update_target


def run(rule, values, batch_size=1):
    module = nn.Linear(1, 1, bias=False).double()
    module.weight.data.fill_(values[0])
    ema = Ema(rule, module)
    for step, value in enumerate(values):
        module.weight.data.fill_(value)
        ema.update(module, step=step, batch_size=batch_size)
    return ema.weights["weight"].item()


def test_constant_decay_is_the_geometric_average():
    values, decay = [1.0, 2.0, -1.0, 0.5], 0.9
    expected = values[0]
    for value in values:
        expected = decay * expected + (1 - decay) * value
    assert run(ConstantEma(decay=decay), values) == pytest.approx(expected, rel=1e-12)


def test_half_life_halves_an_old_weight():
    rule = HalfLifeEma(half_life_images=1000, ramp=None)
    # after the start, 10 steps of 100 images are one half-life
    assert run(rule, [1.0] + [0.0] * 10, batch_size=100) == pytest.approx(0.5, rel=1e-12)


def test_half_life_matches_edm_constants():
    rule = HalfLifeEma(half_life_images=500_000)
    assert rule.decay_at(10**6, 512) == pytest.approx(0.99929, abs=5e-6)
    assert HalfLifeEma(half_life_images=50e6).decay_at(10**7, 4096) == pytest.approx(0.9999432189950708, abs=1e-15)


def test_half_life_ramp_forgets_the_start():
    rule = HalfLifeEma(half_life_images=500_000, ramp=0.05)
    assert rule.decay_at(0, 512) == 0
    assert rule.decay_at(100, 512) == pytest.approx(0.5 ** (1 / 5))


def test_power_average_of_a_ramp_keeps_its_relative_lag():
    # theta(k) = k averaged with density ~ k^gamma has mean K (gamma + 1) / (gamma + 2)
    rule, num_steps = PowerEma(gamma=6.94), 4000
    average = run(rule, [float(k + 1) for k in range(num_steps)])
    assert average / num_steps == pytest.approx(7.94 / 8.94, rel=2e-3)
    assert rule.decay_at(0, 1) == 0


def test_target_with_zero_decay_is_the_student():
    target, student = nn.Linear(3, 3), nn.Linear(3, 3)
    update_target(target, student, decay=0.0)
    for a, b in zip(target.parameters(), student.parameters(), strict=True):
        assert torch.equal(a, b)
