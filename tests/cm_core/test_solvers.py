"""Order of the solvers and the samplers' end points, on data whose flow is known."""

import math

import pytest
import torch

from cm_core.noise import Noise
from cm_core.solvers import STEPS, euler_step
from oracles import GaussianConsistency, GaussianDenoiser

NOISE = Noise()


def trajectory_error(solver: str, num_scales: int) -> float:
    """Relative error at sigma_min after walking the whole grid from sigma_max."""
    sigmas, x = NOISE.grid(num_scales), torch.full((1, 1), 80.0, dtype=torch.float64)
    exact = GaussianConsistency(NOISE)(x, sigmas[:1])
    for t, r in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = STEPS[solver](GaussianDenoiser(), x, t[None], r[None])
    return abs(x / exact - 1).item()


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_measured_order(solver, order):
    coarse, fine = trajectory_error(solver, 400), trajectory_error(solver, 4000)
    assert math.log10(coarse / fine) == pytest.approx(order, abs=0.05)


def test_heun_errors_match_the_known_values():
    for num_scales, error in [(40, 9.8e-3), (400, 8.9e-5), (4000, 8.8e-7)]:
        assert trajectory_error("heun", num_scales) == pytest.approx(error, rel=0.02)


def test_consistency_function_is_constant_along_the_flow():
    sigmas = NOISE.grid(18)
    f = GaussianConsistency(NOISE)
    x = 80 * ((sigmas**2 + 0.25) / (6400 + 0.25)).sqrt()[:, None]
    values = f(x, sigmas)
    torch.testing.assert_close(values, values[:1].expand_as(values), rtol=1e-14, atol=0)


def test_euler_with_the_image_as_denoiser_is_the_straight_noise_path():
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(8, 3, 4, 4, generator=generator, dtype=torch.float64)
    eps = torch.randn(8, 3, 4, 4, generator=generator, dtype=torch.float64)
    t, r = torch.full((8,), 5.0, dtype=torch.float64), torch.full((8,), 3.0, dtype=torch.float64)
    x_r = euler_step(lambda x, sigma: x0, x0 + 5 * eps, t, r)
    torch.testing.assert_close(x_r, x0 + 3 * eps, rtol=1e-12, atol=1e-12)
