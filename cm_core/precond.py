"""From raw network to denoiser or consistency function: the boundary condition lives here."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from cm_core.tensors import expand_like


class Precond(nn.Module):
    """f(x, sigma) -> x0_hat, with f(x, sigma_min) = x for any network (CM, eq. 5 and App. C).

    The boundary holds by construction, so no loss has to enforce it. With sigma_min = 0 these are the EDM scalings
    (EDM, Table 1), and the same class is the teacher's denoiser; TrigFlow's function too, whose F is -raw (sCM).
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        sigma_min: float,
        sigma_data: float,
        c_noise: Literal["log_sigma", "angle"] = "log_sigma",
        noise_scale: float = 1.0,
        piecewise: bool = False,
        autocast: torch.dtype | None = None,
        guidance: float | None = None,  # of networks that take such a weight: the one that no call names
    ) -> None:
        super().__init__()
        self.net, self.sigma_min, self.sigma_data = net, sigma_min, sigma_data
        self.c_noise, self.noise_scale = c_noise, noise_scale
        self.piecewise, self.autocast, self.guidance = piecewise, autocast, guidance
        self.network_pass: Callable[..., Tensor] | None = None  # a training's wrapper of `net` (training/passes.py)

    def forward(
        self,
        x: Tensor,  # [B, C, H, W]
        sigma: Tensor,  # [B]
        labels: Tensor | None = None,  # [B] int64, -1 for none
        augment_labels: Tensor | None = None,  # [B, 9]
        guidance: Tensor | float | None = None,  # [B], or one weight for all
    ) -> Tensor:
        c_skip, c_out, c_in = self.scalings(sigma)
        raw = self.raw(expand_like(c_in, x) * x, sigma, labels, augment_labels, guidance)
        return expand_like(c_skip, x) * x + expand_like(c_out, x) * raw

    def raw(
        self,
        x_in: Tensor,
        sigma: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        guidance: Tensor | float | None = None,
    ) -> Tensor:
        """Return the network's raw output for its own, scaled input, in that input's dtype.

        Raises ValueError for a weight of guidance given to a network without such an input.
        """
        return self._run(x_in, self.noise_labels(sigma), labels, augment_labels, *self._weights(sigma, guidance))

    def _weights(self, sigma: Tensor, guidance: Tensor | float | None) -> tuple[Tensor | None, ...]:
        """Return what follows augmentation labels: no second time, and the weights [B] of networks that take them."""
        if self.guidance is None:
            if guidance is not None:
                raise ValueError("a weight of guidance given to a network that takes none as an input")
            return ()
        weight = self.guidance if guidance is None else guidance
        return None, weight.to(sigma.dtype) if isinstance(weight, Tensor) else torch.full_like(sigma, weight)

    def _run(self, x_in: Tensor, *conditions: Tensor | None) -> Tensor:
        # Only the body may run in half precision: scalings and combination stay in x's dtype.
        with torch.autocast(x_in.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            network_pass = self.network_pass or self.net
            return network_pass(x_in, *conditions).to(x_in.dtype)

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return c_skip, c_out, c_in, each [B]."""
        shifted = sigma - self.sigma_min
        total_std = (sigma**2 + self.sigma_data**2).sqrt()  # std of x when the data have sigma_data
        if self.piecewise:  # f = x at the boundary, the bare network elsewhere (CM, eq. 4)
            c_skip = (shifted <= 0).to(sigma.dtype)
            c_out = 1 - c_skip
        else:
            c_skip = self.sigma_data**2 / (shifted**2 + self.sigma_data**2)
            c_out = self.sigma_data * shifted / total_std
        return c_skip, c_out, 1 / total_std

    def noise_labels(self, sigma: Tensor) -> Tensor:
        """Return c_noise, the network's input for the noise level, [B]."""
        told = (sigma / self.sigma_data).atan() if self.c_noise == "angle" else sigma.log() / 4
        return self.noise_scale * told


class AverageVelocity(Precond):
    """The flow map of a network u(z, t, t - r), the mean velocity from t to r on z = (1 - t) x0 + t eps (MeanFlow).

    No preconditioning: z_r = z_t - (t - r) u. In this package's terms sigma = t / (1 - t) and x = (1 + sigma) z, so
    that f(x, sigma) -> x0_hat is the map to r = 0, which leaves x unchanged at sigma = 0.
    """

    def forward(  # type: ignore[override]  # no method trains one with weights of guidance
        self,
        x: Tensor,  # [B, C, H, W]
        sigma: Tensor,  # [B]
        labels: Tensor | None = None,  # [B] int64, -1 for none
        augment_labels: Tensor | None = None,  # [B, 9]
        *,
        to: Tensor | None = None,  # [B], the noise level of the result; None: 0
    ) -> Tensor:
        t = time_of(sigma)
        span = t if to is None else t - time_of(to)
        z = expand_like(1 - t, x) * x
        z = z - expand_like(span, x) * self.velocity(z, t, span, labels, augment_labels)
        return z if to is None else expand_like(1 + to, x) * z

    def velocity(
        self, z: Tensor, t: Tensor, span: Tensor, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """Return u(z, t, span), like z, for t and span = t - r in 0..1, [B]."""
        return self._run(z, self.noise_scale * t, labels, augment_labels, self.noise_scale * span)


def time_of(sigma: Tensor) -> Tensor:
    """Return the time in 0..1 at which the straight path from data to noise has the noise-to-signal ratio sigma."""
    return sigma / (1 + sigma)
