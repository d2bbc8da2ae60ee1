"""Samplers against the exact flow of Gaussian data, and images that depend on their own seed alone."""

import math

import pytest
import torch
from pydantic import ValidationError

from cm_core.guidance import autoguided, guided
from cm_core.noise import Noise
from cm_core.sampling import ImageNoise, TeacherSampler, euler_steps, multistep
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


class KnownNoise(ImageNoise):
    """Draw k is k + 1 everywhere, for two images of one value."""

    def __init__(self):
        super().__init__(0, range(2), (1, 1, 1), CPU)
        self.drawn = 0

    def draw(self):
        self.drawn += 1
        return torch.full((2, 1, 1, 1), float(self.drawn))


def denoised(x, t):
    return math.sin(x) / (1 + t)


class KnownDenoiser:
    """The same for tensors; it writes down what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, x, sigma, labels=None):
        assert x.dtype == sigma.dtype == torch.float32 and x.shape[0] == len(sigma)
        self.asked.append((x, sigma, labels))
        return x.sin() / (1 + expand_like(sigma, x))


def step_by_hand(solver, x, t, r, draw):
    """One step in Python's numbers, from EDM's Algorithm 2, DPM-Solver-2 and ancestral sampling as written."""

    def d(x, t):
        return (x - denoised(x, t)) / t

    if solver == "heun" and r > 0:
        return x + (r - t) * (d(x, t) + d(x + (r - t) * d(x, t), r)) / 2
    if solver == "dpm2":
        middle = ((t ** (1 / 3) + r ** (1 / 3)) / 2) ** 3
        return x + (r - t) * d(x + (middle - t) * d(x, t), middle)
    if solver == "ancestral" and r > 0:
        up = (r**2 * (t**2 - r**2) / t**2) ** 0.5
        return x + ((r**2 - up**2) ** 0.5 - t) * d(x, t) + up * draw()
    return x + (r - t) * d(x, t)


CHURN = {"s_churn": 0.6, "s_min": 0.1, "s_max": 3.0, "s_noise": 1.1}
LEVELS = Noise(sigma_min=0.1, sigma_max=4.0, rho=3.0)


@pytest.mark.parametrize("churn", [{}, CHURN, CHURN | {"s_churn": 99.0, "s_max": 4.0}], ids=["ode", "sde", "most"])
@pytest.mark.parametrize("solver", ["euler", "heun", "dpm2", "ancestral"])
def test_samplers_take_the_steps_of_their_papers(solver, churn):
    noise, denoiser = KnownNoise(), KnownDenoiser()
    sampler = TeacherSampler(solver=solver, num_steps=4, **churn)
    found = sampler.sample(denoiser, noise, LEVELS)

    draws = iter(range(1, 99))
    levels = [(4 ** (1 / 3) + i / 3 * (0.1 ** (1 / 3) - 4 ** (1 / 3))) ** 3 for i in range(3)] + [0.1, 0.0]
    x = 4.0 * next(draws)
    for t, r in zip(levels, levels[1:], strict=False):
        if churn and 0.1 <= t <= churn["s_max"]:
            raised = t * (1 + min(churn["s_churn"] / 4, 2**0.5 - 1))
            x, t = x + (raised**2 - t**2) ** 0.5 * 1.1 * next(draws), raised
        x = step_by_hand(solver, x, t, r, lambda: next(draws))
    assert found.dtype == torch.float32 and found.shape == (2, 1, 1, 1)
    assert found.flatten().tolist() == pytest.approx([x, x], rel=1e-5)
    assert noise.drawn == next(draws) - 1 and len(denoiser.asked) == sampler.nfe


def test_calls_of_the_network_per_image():
    nfe = {solver: TeacherSampler(solver=solver, num_steps=7).nfe for solver in ("euler", "heun", "dpm2", "ancestral")}
    assert nfe == {"euler": 7, "heun": 13, "dpm2": 14, "ancestral": 7}
    assert TeacherSampler(num_steps=7, guidance=0.0).nfe == 26


def test_the_denoiser_of_labelled_images_sees_their_labels():
    denoiser, labels = KnownDenoiser(), torch.tensor([3, 5])
    TeacherSampler(solver="euler", num_steps=2).sample(denoiser, KnownNoise(), LEVELS, labels)
    assert [asked.tolist() for *_, asked in denoiser.asked] == [[3, 5]] * 2
    TeacherSampler(solver="euler", num_steps=2, guidance=2.0).sample(denoiser, KnownNoise(), LEVELS, labels)
    assert denoiser.asked[-1][2].tolist() == [3, -1, 5, -1]


def test_euler_steps_walk_from_level_to_level():
    denoiser, noise = KnownDenoiser(), KnownNoise()
    found = euler_steps(denoiser, noise, [4.0, 1.0, 0.25])
    x = step_by_hand("euler", step_by_hand("euler", 4.0, 4.0, 1.0, None), 1.0, 0.25, None)
    assert found.dtype == torch.float32 and found.flatten().tolist() == pytest.approx([x, x], rel=1e-6)
    assert [sigma.tolist() for _, sigma, _ in denoiser.asked] == [[4, 4], [1, 1]] and noise.drawn == 1
    ends = [euler_steps(lambda x, sigma, sign=sign: sign * 9 + 0 * x, noise, [1.0, 0.1]) for sign in (1, -1)]
    assert [end.flatten().tolist() for end in ends] == [[1, 1], [-1, -1]]


def test_multistep_asks_for_each_level_once_with_the_variance_that_is_missing():
    asked = []

    def f(x, sigma):
        asked.append((x.flatten().tolist(), sigma.tolist()))
        return 10 * x

    found = multistep(f, KnownNoise(), [4.0, 0.5], sigma_min=0.3)
    assert asked[0] == ([4, 4], [4, 4])
    assert asked[1] == (pytest.approx([1 + 2 * 0.4] * 2), [0.5, 0.5])  # 1 is the first estimate, clipped
    assert found.flatten().tolist() == [1, 1]
    assert multistep(lambda x, sigma: -10 * x, KnownNoise(), [4.0], sigma_min=0.3).flatten().tolist() == [-1, -1]


def test_noise_of_images_is_fixed_by_seed_index_and_draw():
    """These very numbers: an image of a seed stays the same from version to version."""
    noise = ImageNoise(3, [0, 7], (1, 2, 2), CPU)
    assert len(noise) == 2
    first, second = noise.draw(), noise.draw()
    assert first.shape == (2, 1, 2, 2) and first.dtype == torch.float32
    assert first.flatten().tolist() == pytest.approx(FIRST, abs=1e-5)
    assert second.flatten().tolist() == pytest.approx(SECOND, abs=1e-5)


FIRST = [0.703659, -1.186892, 1.031222, 1.005688, -0.155756, -0.433602, -0.979068, -0.827056]
SECOND = [-0.299714, 1.266261, 0.416664, 0.490785, 0.774979, -1.188745, 1.176298, -1.093567]


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


def test_guidance_acts_within_its_interval_alone():
    sigma = torch.tensor([0.1, 0.2, 0.5, 1.0, 1.1, 40.0])  # the lower end belongs to those below it
    x, labels = torch.randn(6, 1, 2, 2), torch.tensor([0, 1, 0, 1, 1, 0])
    denoiser, weak = TwoClasses(), GaussianDenoiser()
    plain = denoiser(x, sigma, labels)
    for found, everywhere in (
        (guided(denoiser, 3.0, (0.2, 1.0)), guided(denoiser, 3.0)),
        (autoguided(denoiser, weak, 3.0, (0.2, 1.0)), autoguided(denoiser, weak, 3.0)),
    ):
        inside = torch.tensor([False, False, True, True, False, False])
        expected = torch.where(inside[:, None, None, None], everywhere(x, sigma, labels), plain)
        torch.testing.assert_close(found(x, sigma, labels), expected)
        assert not torch.allclose(everywhere(x, sigma, labels), plain, atol=1e-2)


def test_autoguidance_extrapolates_from_the_weaker_model():
    x, sigma, labels = torch.randn(6, 1, 2, 2), torch.rand(6) + 0.1, torch.tensor([0, 1, 0, 1, 1, 0])
    strong, weak = TwoClasses(), GaussianDenoiser(sigma_data=1.0)
    found = autoguided(strong, weak, 2.5)(x, sigma, labels)
    expected = weak(x, sigma) + 2.5 * (strong(x, sigma, labels) - weak(x, sigma))
    torch.testing.assert_close(found, expected)
    assert autoguided(strong, weak, 1.0) is strong
    torch.testing.assert_close(autoguided(strong, strong, 7.0)(x, sigma, labels), strong(x, sigma, labels))


def test_samplers_guide_by_a_weaker_model_without_labels():
    """D_weak + 2 (D - D_weak) of two Gaussian denoisers, of data half as wide and as wide as they are."""
    wide = GaussianDenoiser(sigma_data=1.0)
    sampler = TeacherSampler(solver="euler", num_steps=3, guidance=2.0, guidance_interval=(1.0, 90.0))
    noise = ImageNoise(0, range(4), (1, 2, 2), CPU)
    found = sampler.sample(GaussianDenoiser(), noise, NOISE, weak=wide)
    x = 80 * ImageNoise(0, range(4), (1, 2, 2), CPU).draw().double()
    levels = [*NOISE.grid(3).tolist(), 0.0]
    for t, r in zip(levels, levels[1:], strict=False):
        narrow, broad = 0.25 / (t**2 + 0.25), 1 / (t**2 + 1)
        factor = broad + 2 * (narrow - broad) if 1 < t <= 90 else narrow
        x = x + (r - t) * (x - factor * x) / t
    torch.testing.assert_close(found.double(), x, rtol=1e-4, atol=1e-6)
    assert sampler.nfe == 6


@pytest.mark.parametrize(
    ("interval", "guidance", "words"),
    [
        ((2.0, 1.0), 2.0, r"guidance_interval=\[2, 1\] must be two noise levels, 0 <= low < high"),
        ((-1.0, 1.0), 2.0, "must be two noise levels"),
        ((0.0, 1.0), 1.0, "has no effect with guidance=1"),
    ],
)
def test_intervals_that_make_no_sense_are_refused(interval, guidance, words):
    with pytest.raises(ValidationError, match=words):
        TeacherSampler(guidance=guidance, guidance_interval=interval)


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
