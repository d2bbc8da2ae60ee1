"""Steps of the probability-flow ODE dx/dsigma = (x - D(x, sigma)) / sigma, from t to r.

Euler and Heun (EDM, 2206.00364, Algorithm 1), and the multistep DPM-Solver++ (2211.01095, Algorithm 2).
"""

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


def dpmpp_step(
    estimate: Tensor, x: Tensor, t: Tensor, r: Tensor, earlier: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Move x from level t to level r > 0 by the estimate D(x, t); `earlier` is that of the step before, and its level.

    One network call, order 2; the first step, without an earlier estimate, is Euler's. In alpha = 1, ln t - ln r is the
    step in half the logarithm of the signal-to-noise ratio (2M of DPM-Solver++).
    """
    if earlier is not None:
        before, level = earlier
        ahead = (t / r).log() / (level / t).log() / 2
        estimate = estimate + expand_like(ahead, x) * (estimate - before)
    share = expand_like(r / t, x)
    return share * x + (1 - share) * estimate


STEPS: dict[str, Callable[[Denoiser, Tensor, Tensor, Tensor], Tensor]] = {
    "euler": euler_step,
    "heun": heun_step,
}
