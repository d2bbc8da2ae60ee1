"""MeanFlow on data whose flow is known, its loss computed a second time, and its sampler."""

import functools
import math
from functools import partial

import pytest
import torch
from torch import nn

from cm_core.augment import Augment
from cm_core.methods.base import Batch, Models
from cm_core.methods.meanflow import MeanFlow
from cm_core.model import ModelSpec
from cm_core.networks import DhariwalUNetParams, MLPParams, SongUNetParams
from cm_core.precond import AverageVelocity, time_of
from cm_core.sampling import ImageNoise, flow_map_steps, multistep
from cm_core.tensors import expand_like
from flows.stages.models import few_steps
from method_oracles import CPU, NOISE, context, gaussian_batch, shake
from oracles import GaussianConsistency, GaussianFlowMap

both_tangents = pytest.mark.parametrize("tangent", ["sampled", "predicted"])
PLAIN = {"power": 0.0, "t_mean": 0.0, "r_mean": -1.0}  # without weight, and with intervals of all lengths


class Known(AverageVelocity):
    """A model whose velocity is a given function."""

    def __init__(self, exact):
        super().__init__(nn.Identity(), sigma_min=0.0, sigma_data=0.5)
        self.exact = exact

    def velocity(self, *args):
        return self.exact.velocity(*args)


class OnePoint:
    """All images are the same: paths are straight, and every mean velocity is eps - x0."""

    velocity = staticmethod(lambda z, t, span, labels, augment_labels: (z - 0.3) / expand_like(t, z))


@both_tangents
def test_the_loss_vanishes_where_one_path_leads_through_each_point(tangent):
    batch = Batch(torch.full((256, 1, 2, 2), 0.3, dtype=torch.float64), None)
    loss = MeanFlow(tangent=tangent, t_mean=0.0, power=0.0).loss(Models(OnePoint(), OnePoint()), batch, context())
    assert loss.per_sample.max().item() < 1e-10


def test_the_improved_loss_of_the_exact_flow_map_is_the_irreducible_one():
    # V is then the marginal velocity, and |V - v|^2 the variance of v = (z - x0) / t around it: sd^2 / std(z)^2 a pixel
    exact = GaussianFlowMap()
    loss = MeanFlow(**PLAIN, tangent="predicted").loss(Models(exact, exact), gaussian_batch(50_000), context())
    t = time_of(loss.sigma.double())
    relative = loss.per_sample * exact.deviation(t) ** 2 / 0.5**2 / 4
    for part in (t < 0.3, (t >= 0.3) & (t < 0.7), t >= 0.7):
        assert part.sum() > 5000 and relative[part].mean().item() == pytest.approx(1, rel=0.03)


@both_tangents
def test_the_exact_flow_map_has_no_gradient_and_others_have(tangent):
    """By its gain: along every z the mean of the target is the exact mean velocity, whichever the tangent."""
    pulls = {}
    for gain in (1.0, 1.1):
        exact = GaussianFlowMap(gain=gain)
        method = MeanFlow(**PLAIN, tangent=tangent)
        method.loss(Models(exact, exact), gaussian_batch(100_000), context()).per_sample.mean().backward()
        pulls[gain] = exact.gain.grad.item()
    assert pulls[1.1] > 0.1 and abs(pulls[1.0]) < 0.1 * pulls[1.1], pulls


class Wave(nn.Module):
    """u = sin(0.9 z + 0.4 t - 0.7 span), and its calls."""

    def __init__(self):
        super().__init__()
        self.shift, self.calls = nn.Parameter(torch.zeros((), dtype=torch.float64)), []

    def velocity(self, z, t, span, labels=None, augment_labels=None):
        self.calls.append((z, t, span, labels, augment_labels, torch.is_grad_enabled()))
        return (0.9 * z + expand_like(0.4 * t - 0.7 * span, z)).sin() + self.shift


@both_tangents
def test_the_loss_is_the_papers_formula(tangent):
    """By hand, du/dt from the derivative of the sine; times and noise are those that the network was asked at."""
    method, wave, batch = MeanFlow(tangent=tangent), Wave(), gaussian_batch(4000)
    batch = batch._replace(labels=torch.arange(4000) % 3)
    loss = method.loss(Models(wave, wave), batch, context())
    z, t, span, labels, _, grad = wave.calls[-1]
    assert grad and labels is batch.labels and not any(call[-1] for call in wave.calls[:-1])
    assert torch.equal(loss.sigma, t / (1 - t))
    t_, span_ = (value.double()[:, None, None, None] for value in (t, span))
    eps = (z - (1 - t_) * batch.x0) / t_
    assert abs(eps.mean()) < 0.05 and eps.std().item() == pytest.approx(1, abs=0.05)
    v = eps - batch.x0
    along = v if tangent == "sampled" else (0.9 * z + 0.4 * t_).sin()
    phase = 0.9 * z + 0.4 * t_ - 0.7 * span_
    change = phase.cos() * (0.9 * along + 0.4 - 0.7)  # r is fixed: t and t - r grow alike
    error = (phase.sin() + span_ * change - v).square().sum((1, 2, 3))
    torch.testing.assert_close(loss.per_sample, error / (error + 1e-3) ** 0.75, rtol=1e-4, atol=1e-5)
    (found,) = torch.autograd.grad(loss.per_sample.sum(), wave.shift)
    pull = 2 * (phase.sin() + span_ * change - v).sum((1, 2, 3)) / (error + 1e-3) ** 0.75
    assert found.item() == pytest.approx(pull.sum().item(), rel=1e-5), "neither change nor weight has a gradient"


def test_times_have_the_published_distributions():
    t, r = MeanFlow().draw_times(100_000, torch.Generator().manual_seed(0))
    assert (r <= t).all() and 0 < r.min() and t.max() < 1
    logit = (t / (1 - t)).log()
    assert logit.mean().item() == pytest.approx(-0.6, abs=0.02) and logit.std().item() == pytest.approx(1.6, abs=0.02)
    normal = torch.distributions.Normal(0.0, 1.0)
    crossed = normal.cdf(torch.tensor((-4.0 + 0.6) / math.hypot(1.6, 1.6))).item()  # r drawn above t is cut at t
    assert (r == t).float().mean().item() == pytest.approx(0.25 + 0.75 * crossed, abs=0.01)
    below = (r / (1 - r)).log()[(r < t) & (logit > 3)]  # where the cut hardly matters
    assert below.mean().item() == pytest.approx(-4, abs=0.1) and below.std().item() == pytest.approx(1.6, abs=0.1)
    t, r = MeanFlow(instant_share=0.9).draw_times(10_000, torch.Generator().manual_seed(0))
    assert (r == t).float().mean().item() > 0.88


def test_augmentation_is_told_to_the_network():
    wave, batch = Wave(), gaussian_batch(16, (1, 8, 8))
    MeanFlow(augment=Augment(transforms=("xflip",))).loss(Models(wave, wave), batch, context())
    flipped = wave.calls[-1][4][:, 0]
    assert set(flipped.tolist()) == {0, 1} and len({id(call[4]) for call in wave.calls}) == 1


@pytest.mark.parametrize("sigmas", [[80.0], [80.0, 1.0], [80.0, 10.0, 1.0, 0.3, 0.05]], ids=len)
def test_sampling_by_the_exact_flow_map_is_exact_at_any_number_of_steps(sigmas):
    model, noise = Known(GaussianFlowMap()), ImageNoise(0, range(64), (1, 2, 2), CPU)
    x = 80 * ImageNoise(0, range(64), (1, 2, 2), CPU).draw()
    expected = GaussianConsistency(NOISE.model_copy(update={"sigma_min": 0.0}))(x, torch.full((64,), 80.0))
    found = flow_map_steps(model, noise, sigmas)
    torch.testing.assert_close(found.float(), expected.clamp(-1, 1), rtol=1e-4, atol=1e-4)
    assert noise._draws == 1, "nothing adds noise again"


def test_steps_of_a_flow_map_are_those_of_its_ode():
    """x_r = x_t - (t - r) u(x_t, t, t - r), from t = 0.999 to 0.5 and 0, in the paper's own terms."""
    wave = Wave()
    found = flow_map_steps(Known(wave), ImageNoise(3, range(2), (1, 2, 2), CPU), [999.0, 1.0])
    z = 0.999 * ImageNoise(3, range(2), (1, 2, 2), CPU).draw()
    for t, r in ((0.999, 0.5), (0.5, 0.0)):
        z = z - (t - r) * (0.9 * z + 0.4 * t - 0.7 * (t - r)).sin()
    torch.testing.assert_close(found.double(), z.double().clamp(-1, 1), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="noise levels must decrease"):
        flow_map_steps(Known(wave), ImageNoise(3, range(2), (1, 2, 2), CPU), [1.0, 2.0])


def test_a_students_images_are_steps_of_its_flow_map():
    spec = ModelSpec(form="average_velocity", network=MLPParams(), noise=NOISE, image_shape=(1, 2, 2))
    noise = partial(ImageNoise, 0, range(3), (1, 2, 2), CPU)
    expected = flow_map_steps(Known(GaussianFlowMap()), noise(), [80.0, 2.0])
    assert torch.equal(few_steps(spec, Known(GaussianFlowMap()), noise(), [2.0]), expected)
    with pytest.raises(AssertionError):  # which are not those of consistency sampling
        torch.testing.assert_close(multistep(Known(GaussianFlowMap()), noise(), [80.0, 2.0], sigma_min=0.0), expected)


NETWORKS = {
    "ddpmpp": SongUNetParams(channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,)),
    "adm": DhariwalUNetParams(channels=16, channel_mult=(1,), num_blocks=1, attn_resolutions=(8,), channels_per_head=8),
    "mlp": MLPParams(width=16, depth=1),
}


@functools.cache
def shaken(name):
    spec = ModelSpec(form="average_velocity", network=NETWORKS[name], noise=NOISE, image_shape=(1, 8, 8))
    model = spec.build().double().eval()
    shake(model)
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_know_both_times(name):
    model, generator = shaken(name), torch.Generator().manual_seed(1)
    z = torch.randn(3, 1, 8, 8, generator=generator, dtype=torch.float64)
    t, span = torch.tensor([0.2, 0.6, 0.9], dtype=torch.float64), torch.tensor([0.1, 0.5, 0.3], dtype=torch.float64)
    u = model.velocity(z, t, span)
    changed = model.velocity(z, t + 0.05, span), model.velocity(z, t, span + 0.05), model.velocity(z, span, t)
    assert all((other - u).abs().amax((1, 2, 3)).min() > 1e-4 for other in changed), "nor are the two interchangeable"
    model.zero_grad()
    u.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    torch.testing.assert_close(model(z, torch.zeros(3)), z, rtol=0, atol=0)  # at t = 0 there is nowhere to go


@pytest.mark.parametrize("name", NETWORKS)
def test_the_derivative_agrees_with_central_differences(name, monkeypatch):
    """The target of the loss, on real networks: along the sampled velocity, r fixed."""
    model, batch = shaken(name), gaussian_batch(4, (1, 8, 8))
    found = {}

    def note(function, primals, tangents):
        found["ends"] = [function(*(p + c * d for p, d in zip(primals, tangents, strict=True))) for c in (1e-5, -1e-5)]
        found["change"] = derivative(function, tuple(p.double() for p in primals), tangents)[1]
        return None, found["change"]

    from cm_core.networks.modes import derivative

    monkeypatch.setattr("cm_core.methods.meanflow.derivative", note)
    monkeypatch.setattr(
        MeanFlow, "draw_times", lambda *_: torch.tensor([[0.3, 0.5, 0.7, 0.9], [0.1, 0.5, 0, 0.2]]).double()
    )
    MeanFlow().loss(Models(model, model), batch, context())
    ahead, behind = found["ends"]
    torch.testing.assert_close(found["change"], (ahead - behind) / 2e-5, rtol=1e-5, atol=1e-7)
