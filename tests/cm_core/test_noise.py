import math

import pytest
import torch

from cm_core.noise import Noise, add_noise, draw_lognormal, karras_grid, lognormal_pair_probabilities
from cm_core.precond import Precond
from oracles import ConstantNet

CPU = torch.device("cpu")
GRID_18 = [0.002, 0.007528, 0.022935, 0.059947, 0.139516, 0.296442, 0.585348, 1.088171, 1.923340, 3.256822]
GRID_18 += [5.315195, 8.400935, 12.910082, 19.352453, 28.374585, 40.785574, 57.585985, 80.0]


def test_grid_matches_the_printed_vector():
    grid = Noise().grid(18).flip(0)
    torch.testing.assert_close(grid, torch.tensor(GRID_18, dtype=torch.float64), rtol=1e-4, atol=1e-6)


def test_grid_of_40_points():
    grid = Noise().grid(40).flip(0)
    first = torch.tensor([0.002, 0.003677, 0.006437, 0.010812, 0.017522], dtype=torch.float64)
    last = torch.tensor([44.630, 51.880, 60.117, 69.451, 80], dtype=torch.float64)
    torch.testing.assert_close(grid[:5], first, rtol=0, atol=5e-7)
    torch.testing.assert_close(grid[-5:], last, rtol=0, atol=5e-4)


@pytest.mark.parametrize("num_scales", [2, 3, 18, 151, 1281])
def test_grid_decreases_between_exact_ends(num_scales):
    grid = Noise().grid(num_scales)
    assert len(grid) == num_scales
    assert grid[0] == 80 and grid[-1] == 0.002
    assert (grid.diff() < 0).all()


def test_grid_needs_two_points():
    with pytest.raises(ValueError, match="at least 2 points, got num_scales=1"):
        karras_grid(1, sigma_min=0.002, sigma_max=80, rho=7)


def test_range_must_be_ordered():
    with pytest.raises(ValueError, match=r"sigma_min=80\.0 must lie below sigma_max=80\.0"):
        Noise(sigma_min=80)


def test_pair_probabilities_match_ict():
    grid = Noise().grid(11)
    p = lognormal_pair_probabilities(grid, p_mean=-1.1, p_std=2.0).flip(0)
    expected = [0.062633, 0.181737, 0.245501, 0.213494, 0.142446, 0.080605, 0.041080, 0.019580, 0.008944, 0.003980]
    torch.testing.assert_close(p, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=5e-7)
    weights = 1 / (grid[:-1] - grid[1:]).flip(0)
    ends = torch.tensor([67.931, 14.627, 4.2882, 1.5453], dtype=torch.float64)
    torch.testing.assert_close(weights[:4], ends, rtol=1e-4, atol=0)


def test_lognormal_draw_has_the_asked_moments():
    sigma = draw_lognormal(
        200_000, p_mean=-1.2, p_std=1.2, generator=torch.Generator().manual_seed(0), device=torch.device("cpu")
    )
    logs = sigma.log()
    assert abs(logs.mean().item() + 1.2) < 4 * 1.2 / math.sqrt(len(logs))
    assert abs(logs.std().item() - 1.2) < 0.01


def test_add_noise_broadcasts_over_samples():
    x0, eps = torch.zeros(3, 2, 4, 4), torch.ones(3, 2, 4, 4)
    x_t = add_noise(x0, eps, torch.tensor([1.0, 2.0, 3.0]))
    assert x_t[:, 0, 0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("num_scales", "index", "sigma"),
    [
        (40, 22, 1.38237),
        (201, 106, 1.91284),
        (40, 17, 4.36556),
        (40, 18, 3.51970),
        (151, 67, 3.99122),
        (151, 62, 5.24850),
        (18, 11, 0.58535),
    ],
)
def test_published_two_step_indices_are_these_levels(num_scales, index, sigma):
    assert Noise().grid(num_scales)[index].item() == pytest.approx(sigma, abs=6e-6)


def test_angles_of_trigflow_match_the_printed_map():
    told = Precond(ConstantNet(), sigma_min=0.0, sigma_data=0.5, c_noise="angle").noise_labels
    sigmas = torch.tensor([0.002, 0.5, 0.821, 1.526, 80], dtype=torch.float64)
    angles = torch.tensor([0.004000, 0.785398, 1.023776, 1.254166, 1.564546], dtype=torch.float64)
    torch.testing.assert_close(told(sigmas), angles, rtol=0, atol=6e-7)
    assert 0.5 * math.tan(1.1) == pytest.approx(0.98238, abs=6e-6)  # the second step of sCM's samples


def test_grid_of_another_range_and_curvature():
    grid = karras_grid(3, sigma_min=1.0, sigma_max=9.0, rho=2.0)
    assert grid.tolist() == pytest.approx([9, 4, 1]) and grid.dtype == torch.float64
    assert torch.equal(Noise(sigma_min=1, sigma_max=9, rho=2).grid(3), grid)
    ends = karras_grid(40, sigma_min=0.3, sigma_max=0.7, rho=7.0)
    assert ends[0].item() == 0.7 and ends[-1].item() == 0.3


def test_lognormal_draws_are_the_generators():
    found = draw_lognormal(5, p_mean=0.5, p_std=2.0, generator=torch.Generator().manual_seed(0), device=CPU)
    expected = (0.5 + 2.0 * torch.randn(5, generator=torch.Generator().manual_seed(0))).exp()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_pair_probabilities_of_a_two_point_grid_are_one():
    assert lognormal_pair_probabilities(torch.tensor([2.0, 1.0]), p_mean=0.3, p_std=0.7).tolist() == [1]
    even = lognormal_pair_probabilities(torch.tensor([4.0, 2.0, 1.0]), p_mean=math.log(2), p_std=0.7)
    assert even.tolist() == pytest.approx([0.5, 0.5])


def test_noise_is_added_to_the_image():
    x0, eps = torch.full((2, 1, 1, 1), 3.0), torch.full((2, 1, 1, 1), 5.0)
    assert add_noise(x0, eps, torch.tensor([0.0, 2.0])).flatten().tolist() == [3, 13]
