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


def test_the_half_life_is_the_shorter_of_its_own_and_the_ramps():
    rule = HalfLifeEma(half_life_images=1000, ramp=0.1)
    assert rule.decay_at(50, 100) == 0.5 ** (100 / 500)
    assert rule.decay_at(200, 100) == rule.decay_at(101, 100) == 0.5 ** (100 / 1000)
    assert rule.model_copy(update={"ramp": None}).decay_at(0, 100) == 0.5 ** (100 / 1000)


def test_power_decay_is_the_papers():
    assert PowerEma().decay_at(99, 1) == pytest.approx(0.99**17.97219860, rel=1e-9)
    assert PowerEma(width=0.05).decay_at(9, 100) == pytest.approx(0.15053493, rel=1e-7)  # 100 images, then 1000
    assert PowerEma(width=0.10).decay_at(1, 1) == pytest.approx(0.5**7.93720394, rel=1e-8)


def test_averages_are_copies_without_gradient_of_parameters_alone():
    module = nn.BatchNorm1d(2)
    ema = Ema(ConstantEma(decay=0.5), module)
    assert list(ema.weights) == ["weight", "bias"] and not any(w.requires_grad for w in ema.weights.values())
    with torch.no_grad():
        module.weight.fill_(3.0)
    assert ema.weights["weight"].tolist() == [1, 1]
    ema.update(module, step=0, batch_size=1)
    assert ema.weights["weight"].tolist() == [2, 2] and module.weight.tolist() == [3, 3]
    assert not ema.weights["weight"].requires_grad


def test_the_target_moves_towards_the_student_and_stays_trainable_by_none():
    target, student = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    target.weight.data.fill_(1.0)
    student.weight.data.fill_(5.0)
    update_target(target, student, decay=0.75)
    assert target.weight.item() == 2 and student.weight.item() == 5 and target.weight.grad_fn is None


def test_half_life_ramp_forgets_the_start():
    rule = HalfLifeEma(half_life_images=500_000, ramp=0.05)
    assert rule.decay_at(0, 512) == 0
    assert rule.decay_at(100, 512) == pytest.approx(0.5 ** (1 / 5))


def test_power_average_of_a_ramp_keeps_its_relative_lag():
    # theta(k) = k averaged with density ~ k^gamma has mean K (gamma + 1) / (gamma + 2)
    rule, num_steps = PowerEma(width=0.10), 4000
    average = run(rule, [float(k + 1) for k in range(num_steps)])
    assert average / num_steps == pytest.approx(7.94 / 8.94, rel=2e-3)
    assert rule.decay_at(0, 1) == 0


def test_target_with_zero_decay_is_the_student():
    target, student = nn.Linear(3, 3), nn.Linear(3, 3)
    update_target(target, student, decay=0.0)
    for a, b in zip(target.parameters(), student.parameters(), strict=True):
        assert torch.equal(a, b)
