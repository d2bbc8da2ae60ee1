"""One step of the probability-flow ODE dx/dsigma = (x - D(x, sigma)) / sigma, from t to r (EDM, Algorithm 1)."""

from collections.abc import Callable

from torch import Tensor

from cm_core.tensors import expand_like

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (x [B, ...], sigma [B]) -> x0_hat [B, ...]


def slope(denoiser: Denoiser, x: Tensor, sigma: Tensor) -> Tensor:
    """Return dx/dsigma = (x - D(x, sigma)) / sigma, [B, ...]."""
    return (x - denoiser(x, sigma)) / expand_like(sigma, x)


def euler_step(denoiser: Denoiser, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """Move x from level t to level r along the slope at t; one network call, order 1."""
    return x + expand_like(r - t, x) * slope(denoiser, x, t)


def heun_step(denoiser: Denoiser, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """Move x from level t to level r > 0 along the mean of the slopes at both ends; two calls, order 2."""
    slope_t = slope(denoiser, x, t)
    slope_r = slope(denoiser, x + expand_like(r - t, x) * slope_t, r)
    return x + expand_like(r - t, x) * (slope_t + slope_r) / 2


STEPS: dict[str, Callable[[Denoiser, Tensor, Tensor, Tensor], Tensor]] = {
    "euler": euler_step,
    "heun": heun_step,
}
