"""Samplers against the exact flow of Gaussian data, and images that depend on their own seed alone."""

import pytest
import torch

from cm_core.noise import Noise
from cm_core.sampling import ImageNoise, TeacherSampler, multistep
from oracles import GaussianConsistency, GaussianDenoiser

NOISE, CPU = Noise(), torch.device("cpu")


class FixedNoise(ImageNoise):
    """The first draw is 1, so that samplers start at x = sigma_max; later draws are the generator's."""

    def __init__(self) -> None:
        super().__init__(0, range(1), (1, 1, 1), CPU)
        self.draws = 0

    def draw(self):
        self.draws += 1
        return torch.ones(1, 1, 1, 1) if self.draws == 1 else super().draw()


@pytest.mark.parametrize(
    ("solver", "ends"),
    [
        ("heun", {5: 1.2578863, 10: 0.6097980, 18: 0.5276246, 40: 0.5048769}),
        ("euler", {5: 0.2336289, 10: 0.3652131, 18: 0.4230314, 40: 0.4648508}),
    ],
)
def test_ode_samplers_end_where_the_printed_vectors_say(solver, ends):
    for num_steps, end in ends.items():
        sampler = TeacherSampler(solver=solver, num_steps=num_steps)
        x = sampler.sample(GaussianDenoiser(), FixedNoise(), NOISE)
        assert x.item() == pytest.approx(end, abs=2e-6)


def test_dpm2_is_of_second_order():
    errors = []
    for num_steps in (40, 80):
        x = TeacherSampler(solver="dpm2", num_steps=num_steps).sample(GaussianDenoiser(), FixedNoise(), NOISE)
        errors.append(abs(x.item() - 0.49999023))
    assert 3 < errors[0] / errors[1] < 5.5


@pytest.mark.parametrize(
    "sampler",
    [
        TeacherSampler(solver="ancestral", num_steps=800),
        TeacherSampler(solver="heun", num_steps=100, s_churn=40, s_min=0.05, s_max=50),
    ],
    ids=["ancestral", "churn"],
)
def test_stochastic_samplers_keep_the_data_variance(sampler):
    noise = ImageNoise(0, range(256), (1, 8, 8), CPU)
    x = sampler.sample(GaussianDenoiser(), noise, NOISE)
    assert x.var().item() == pytest.approx(0.25, rel=0.05)


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm2", "ancestral"])
def test_nfe_counts_the_network_calls(solver):
    calls = []

    def denoiser(x, sigma):
        calls.append(sigma)
        return GaussianDenoiser()(x, sigma)

    sampler = TeacherSampler(solver=solver, num_steps=7)
    sampler.sample(denoiser, ImageNoise(0, range(2), (1, 2, 2), CPU), NOISE)
    assert len(calls) == sampler.nfe


@pytest.mark.parametrize("sigmas", [[80.0], [80.0, 0.821], [80.0, 5.0, 0.5]])
def test_multistep_keeps_the_variance(sigmas):
    scale = 0.1  # keeps samples inside -1..1, where clipping changes nothing
    noise = Noise(sigma_data=scale)
    draws = ImageNoise(0, range(512), (1, 8, 8), CPU)
    x = multistep(GaussianConsistency(noise), draws, sigmas, sigma_min=noise.sigma_min)
    # f at a finite level shrinks the variance by sigma^2 / (sigma^2 + sigma_data^2) of the start's excess
    assert x.var().item() == pytest.approx(scale**2, rel=0.03)


def test_renoising_leaves_out_the_variance_an_estimate_already_has():
    noise, seen = Noise(sigma_min=0.3), []

    def f(x, t):
        seen.append(x)
        return torch.zeros_like(x)

    multistep(f, ImageNoise(0, range(512), (1, 8, 8), CPU), [80.0, 0.5], sigma_min=0.3)
    assert seen[1].std().item() == pytest.approx((0.5**2 - noise.sigma_min**2) ** 0.5, rel=0.02)


@pytest.mark.parametrize("sigmas", [[], [80, 80], [0.5, 1.0], [80, 0.002], [80, 0.001]])
def test_multistep_refuses_levels_out_of_order(sigmas):
    with pytest.raises(ValueError, match="must decrease and stay above sigma_min"):
        multistep(GaussianConsistency(NOISE), ImageNoise(0, range(1), (1, 1, 1), CPU), sigmas, sigma_min=0.002)


def test_an_image_does_not_depend_on_its_batch():
    f = GaussianConsistency(NOISE)

    def draw(indices):
        return multistep(f, ImageNoise(3, indices, (3, 4, 4), CPU), [80.0, 0.8], sigma_min=0.002)

    together = draw(range(10))
    assert torch.equal(together, torch.cat([draw(range(0, 7)), draw(range(7, 10))]))
    assert torch.equal(together[4:5], draw([4]))
    assert not torch.equal(together[4], together[5])


def test_another_seed_gives_other_images():
    a, b = (ImageNoise(seed, range(2), (1, 4, 4), CPU).draw() for seed in (0, 1))
    assert (a - b).abs().min() > 0
