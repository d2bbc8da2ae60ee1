"""Noise levels: the range, Karras grids, training draws, adding noise. Time is sigma everywhere.

Grids decrease, as samplers walk them; a pair on one trajectory is (t, r) with t > r (EDM, 2206.00364; CM, 2303.01469).
"""

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from cm_core.params import Params
from cm_core.tensors import expand_like


class Noise(Params):
    """The range of noise levels and the spread of the data."""

    sigma_min: float = Field(0.002, gt=0)
    """Smallest noise level, where f(x, sigma_min) = x; data units (CM, section 3)."""
    sigma_max: float = Field(80.0, gt=0)
    """Largest noise level, where samples start; data units (EDM, Table 1)."""
    rho: float = Field(7.0, gt=0)
    """Curvature of the Karras grid (EDM, eq. 5)."""
    sigma_data: float = Field(0.5, gt=0)
    """Standard deviation of the data in [-1, 1] (EDM, Table 1)."""
    c_noise: Literal["log_sigma", "angle"] = "log_sigma"
    """Noise conditioning of the networks: ln(sigma) / 4 (EDM), or arctan(sigma / sigma_data), bounded (sCM)."""

    @model_validator(mode="after")
    def _ordered(self) -> "Noise":
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min={self.sigma_min} must lie below sigma_max={self.sigma_max}")
        return self

    def grid(self, num_scales: int) -> Tensor:
        """Return `num_scales` noise levels from sigma_max down to sigma_min, float64 [N]."""
        return karras_grid(num_scales, sigma_min=self.sigma_min, sigma_max=self.sigma_max, rho=self.rho)


def karras_grid(num_scales: int, *, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """Return the decreasing grid of `num_scales` points, both ends included, float64 [N] (EDM, eq. 5).

    In float64 because the 7th power costs 1e-6 relative in float32. Raises ValueError below two points.
    """
    if num_scales < 2:
        raise ValueError(f"a grid needs at least 2 points, got num_scales={num_scales}")
    u = torch.linspace(0, 1, num_scales, dtype=torch.float64)
    sigmas = (sigma_max ** (1 / rho) + u * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    sigmas[0], sigmas[-1] = (
        sigma_max,
        sigma_min,
    )  # the ends exactly, so that the boundary condition holds to the bit
    return sigmas


def warp(u: Tensor, noise: Noise) -> Tensor:
    """Map 0..1 to sigma_min..sigma_max as the Karras grid does, [B]."""
    low, high = noise.sigma_min ** (1 / noise.rho), noise.sigma_max ** (1 / noise.rho)
    return ((low + u * (high - low)) ** noise.rho).clamp(noise.sigma_min, noise.sigma_max)


def edm_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """Return the weight of a denoiser's squared error at noise levels sigma, like sigma (EDM, Table 1)."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def draw_lognormal(
    batch_size: int, *, p_mean: float, p_std: float, generator: torch.Generator, device: torch.device
) -> Tensor:
    """Draw sigma with ln sigma ~ N(p_mean, p_std^2), not truncated, [B] (EDM, Table 1)."""
    return (torch.randn(batch_size, generator=generator, device=device) * p_std + p_mean).exp()


def lognormal_pair_probabilities(sigmas: Tensor, *, p_mean: float, p_std: float) -> Tensor:
    """Return the probability of each interval of a decreasing grid, [N - 1] (iCT, 2310.14189, section 3.5).

    Entry i belongs to the pair (sigmas[i], sigmas[i + 1]): the lognormal mass between the two levels, normalised.
    """
    cdf = torch.erf((sigmas.log() - p_mean) / (math.sqrt(2) * p_std))
    mass = cdf[:-1] - cdf[1:]
    return mass / mass.sum()


def add_noise(x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """Return x0 + sigma * eps for x0, eps [B, ...] and sigma [B]."""
    return x0 + expand_like(sigma, x0) * eps
