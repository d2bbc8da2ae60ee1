"""Samplers against the exact flow of Gaussian data, and images that depend on their own seed alone."""

import pytest
import torch

from cm_core.guidance import guided
from cm_core.noise import Noise
from cm_core.sampling import ImageNoise, TeacherSampler, multistep
from cm_core.tensors import expand_like
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


class TwoClasses(torch.nn.Module):
    """D(x, sigma, label): class 0 is N(0, sd^2), class 1 N(m, sd^2), no label their common denoiser at equal odds."""

    mean, variance = 0.3, 0.25

    def forward(self, x, sigma, labels):
        level = expand_like(sigma, x)
        shrink = self.variance / (level**2 + self.variance)
        of_zero, of_one = x * shrink, self.mean + (x - self.mean) * shrink
        one = torch.sigmoid(self.mean * (x - self.mean / 2) / (level**2 + self.variance))
        mixed = of_zero + one * (of_one - of_zero)
        labels = expand_like(labels, x)
        return torch.where(labels == 0, of_zero, torch.where(labels == 1, of_one, mixed))


def test_guidance_extrapolates_from_no_label_to_the_label():
    x, sigma, labels = torch.randn(6, 1, 2, 2), torch.rand(6) + 0.1, torch.tensor([0, 1, 0, 1, 1, 0])
    denoiser = TwoClasses()
    without = denoiser(x, sigma, torch.full_like(labels, -1))
    for guidance in (0.0, 1.0, 2.5):
        expected = without + guidance * (denoiser(x, sigma, labels) - without)
        torch.testing.assert_close(guided(denoiser, guidance)(x, sigma, labels), expected)
    assert guided(denoiser, 1.0) is denoiser


def test_guided_samples_move_away_from_the_other_class():
    def mean_of(guidance):
        noise = ImageNoise(0, range(64), (1, 4, 4), CPU)
        labels = torch.ones(64, dtype=torch.int64)
        sampler = TeacherSampler(num_steps=12, guidance=guidance)
        return sampler.sample(TwoClasses(), noise, NOISE, labels).mean().item()

    unguided = mean_of(1.0)
    assert unguided == pytest.approx(0.3, abs=0.05)
    assert mean_of(0.0) < unguided - 0.05 and mean_of(3.0) > unguided + 0.05


def test_guidance_counts_both_calls_and_needs_labels():
    sampler = TeacherSampler(num_steps=5, guidance=2.0)
    assert sampler.nfe == 2 * TeacherSampler(num_steps=5).nfe
    with pytest.raises(ValueError, match=r"guidance=2\.0 needs a model of labelled images"):
        sampler.sample(GaussianDenoiser(), ImageNoise(0, range(1), (1, 2, 2), CPU), NOISE)
