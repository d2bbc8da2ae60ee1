"""TCM: whose value the target is, how levels are drawn, and that the exact function is stationary as pairs close up."""

import pytest
import torch
from scipy.stats import t as student_t

from cm_core.distances import Pixelwise
from cm_core.methods.base import Models
from cm_core.methods.tcm import TCM
from cm_core.model import ModelSpec
from cm_core.networks import MLPParams
from cm_core.noise import Noise
from method_oracles import NOISE, context, gaussian_batch
from oracles import GaussianConsistency
from tiny_training import METHODS, Training
from toy_networks import SHAPE, Toy, is_unit_noise, spread, the_batch


@pytest.mark.parametrize("own_target", [True, False])
def test_the_target_is_the_bases_below_the_split_and_the_students_above(own_target):
    method, batch = TCM(ratio=0.9, split=1.5, scale=1.0, freedom=2.0, distance=Pixelwise()), the_batch()
    student, base = Toy(0.9), Toy(0.3)
    target = Toy(0.7) if own_target else student
    loss = method.loss(Models(student, target, None, method.distance.build(SHAPE), base=base), batch, context())
    first = student.calls[0]
    t = first.sigma.double()
    eps = (first.x - batch.x0) / spread(t)
    r, at_split = t - t * 0.1 * (1 + 8 / (1 + t.exp())), t == 1.5
    x_r, below = batch.x0 + spread(r) * eps, r < 1.5
    assert is_unit_noise(eps) and 0.2 < at_split.double().mean() < 0.3 and at_split.sum() < below.sum() < len(t) - 50
    found = torch.where(spread(below), base.value(x_r, r, batch.labels), target.value(x_r, r, batch.labels))
    gap = student.value(first.x, t, batch.labels) - found
    weight = torch.where(at_split, 0.1 / 0.25, 1 / 0.75) / (t - r)
    torch.testing.assert_close(loss.per_sample, weight * (gap**2).mean((1, 2, 3)), rtol=1e-4, atol=1e-7)
    assert torch.equal(loss.sigma, first.sigma) and first.grad and not base.calls[0].grad
    assert all(torch.equal(call.labels, batch.labels) for call in (first, base.calls[0], target.calls[-1]))


@pytest.mark.parametrize(("loc", "scale", "freedom"), [(0.0, 0.2, 0.01), (0.5, 1.0, 3.0), (-1.0, 0.3, 0.5)])
def test_levels_are_drawn_as_a_student_t_cut_to_split_and_sigma_max(loc, scale, freedom):
    method, u = TCM(loc=loc, scale=scale, freedom=freedom), torch.linspace(0, 1, 1001, dtype=torch.float64)
    t = method.quantiles(u, NOISE)
    assert t[[0, -1]].tolist() == pytest.approx([1, 80]) and (t[1:] > t[:-1]).all()
    low, at, high = (
        student_t.cdf((x - loc) / scale, freedom) for x in (0.0, t.log().numpy(), torch.tensor(80.0).log())
    )
    torch.testing.assert_close(torch.from_numpy((at - low) / (high - low)), u, rtol=0, atol=2e-6)
    drawn = method.draw_t(5000, NOISE, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.float32 and (1 <= drawn).all() and (drawn <= 80).all()
    assert abs((drawn < t[500]).double().mean() - 0.5) < 0.03


def test_pairs_lie_as_close_as_in_the_published_code():
    levels = torch.tensor([1.0, 2.0, 80.0], dtype=torch.float64)
    gaps = levels - TCM().closer(levels)
    assert gaps.tolist() == pytest.approx([3.1515e-3, 3.9072e-3, 80e-3], rel=1e-4)
    assert TCM(ratio=0.6).closer(levels)[0] == 1e-6, "never at or below 0, where the base is undefined"


def test_pairs_at_the_split_count_by_their_weight_whatever_their_share():
    """On a loss of 1 everywhere, the expectation is 1 + boundary_weight."""
    one = Models(Toy(0.9), Toy(0.7), None, lambda found, target: found.new_ones(len(found)), base=Toy(0.3))
    for share in (0.0, 0.25, 0.6):
        method = TCM(boundary_share=share)
        found = [method.loss(one, the_batch(), context(seed=seed)) for seed in range(20)]
        t = torch.cat([loss.sigma for loss in found])
        losses = torch.cat([loss.per_sample for loss in found]) * (t - method.closer(t))
        at = (t == 1).double().mean().item()
        expected = (1 - at) / (1 - share) + (0.1 * at / share if share else 0)
        assert losses.mean().item() == pytest.approx(expected, rel=1e-3)
        assert abs(at - share) < 0.03


def test_no_pair_lies_at_the_split_where_none_shall():
    method = TCM(boundary_share=0.0)
    models = Models(Toy(0.9), Toy(0.7), None, method.distance.build(SHAPE), base=Toy(0.3))
    assert not (method.loss(models, the_batch(), context()).sigma == 1).any()


class Scaled(GaussianConsistency):
    """The exact consistency function times a learned gain."""

    def __init__(self):
        super().__init__(Noise(sigma_min=1e-12))
        self.gain = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, x, t, labels=None):
        return self.gain * super().forward(x, t)


@pytest.mark.parametrize(("ratio", "share"), [(0.6, 0.0), (0.8, 0.0), (0.8, 0.5)])
def test_the_gradient_at_the_exact_function_vanishes_as_pairs_close_up(ratio, share):
    """On Gaussian data it is known in closed form: of the order of the pairs' gap, and nothing else is left."""
    weight = share / (1 - share) or 1.0  # all pairs count alike
    method = TCM(ratio=ratio, k=0, boundary_share=share, boundary_weight=weight, distance=Pixelwise())
    student, base = Scaled(), Scaled().requires_grad_(False)
    batch = gaussian_batch(100_000)
    loss = method.loss(Models(student, student, None, method.distance.build((1, 2, 2)), base=base), batch, context())
    (found,) = torch.autograd.grad(loss.per_sample.mean(), student.gain)
    t = loss.sigma.double()
    expected = 2 * (0.25 - lagged(t, ratio * t)) / (t * (1 - ratio)) / (1 - share)
    assert found.item() == pytest.approx(expected.mean().item(), abs=0.002)
    nearer = 2 * (0.25 - lagged(t, 0.999 * t)) / (t * 0.001)
    assert expected.mean() > 0.005 and nearer.mean() < 0.0002


def lagged(t, r):
    """E[f(x_t, t) f(x_r, r)] of the exact function, x_t and x_r with the same image and noise."""
    return 0.25 * (0.25 + t * r) / ((0.25 + t**2) * (0.25 + r**2)).sqrt()


def test_the_base_is_left_as_it_is_and_drops_what_the_student_drops():
    training = Training(METHODS["tcm"], dropout=0.5, num_steps=2)
    before = {name: tensor.clone() for name, tensor in training.models.base.state_dict().items()}
    assert not any(name.startswith("base/") for name in training.tensors()), "it is no part of a saved state"
    training.models.base.eval()
    for _ in training.steps():
        pass
    assert training.models.base.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in training.models.base.state_dict().items())


def test_a_truncated_model_samples_at_the_levels_of_its_training_alone():
    spec = ModelSpec(form="unshifted", network=MLPParams(width=8), noise=NOISE, image_shape=(1, 2, 2), truncated_at=1.0)
    spec.check_levels([80.0, 1.0])
    with pytest.raises(ValueError, match=r"trained at noise levels from 1 on alone \(TCM\), got \[80.0, 0.9\]"):
        spec.check_levels([80.0, 0.9])
    whole = spec.model_copy(update={"truncated_at": None})
    whole.check_levels([80.0, 0.9])
    with pytest.raises(ValueError, match="stay above sigma_min"):
        whole.check_levels([80.0, 0.002])
    assert spec.is_consistency_function and whole.edits and not spec.edits
