"""The exact solution everything is tested against: data N(0, sigma_data^2 I), whose denoiser and flow are known."""

import torch
from torch import Tensor, nn

from cm_core.networks.dropout import dropout
from cm_core.noise import Noise
from cm_core.tensors import expand_like


class GaussianDenoiser(nn.Module):
    """D(x, sigma) = x sigma_data^2 / (sigma^2 + sigma_data^2), exact for Gaussian data."""

    def __init__(self, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.sigma_data = sigma_data

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        return x * expand_like(self.sigma_data**2 / (sigma**2 + self.sigma_data**2), x)


class GaussianConsistency(nn.Module):
    """f(x, t) = x sqrt((sigma_min^2 + sigma_data^2) / (t^2 + sigma_data^2)), the exact consistency function."""

    def __init__(self, noise: Noise) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        variance = self.noise.sigma_data**2
        return x * expand_like(((self.noise.sigma_min**2 + variance) / (t**2 + variance)).sqrt(), x)


class GaussianFlowMap(nn.Module):
    """The exact mean velocity of z = (1 - t) x0 + t eps, in whose trajectories z is proportional to its deviation."""

    def __init__(self, sigma_data: float = 0.5, gain: float = 1.0) -> None:
        super().__init__()
        self.sigma_data, self.gain = sigma_data, nn.Parameter(torch.tensor(gain, dtype=torch.float64))

    def deviation(self, t: Tensor) -> Tensor:
        return ((1 - t) ** 2 * self.sigma_data**2 + t**2).sqrt()

    def velocity(self, z: Tensor, t: Tensor, span: Tensor, labels: Tensor | None = None, _: None = None) -> Tensor:
        t, span = t.double(), span.double()
        growth = (t - (1 - t) * self.sigma_data**2) / self.deviation(t)
        longer = torch.where(span > 0, span, 1.0)
        mean = torch.where(span > 0, (self.deviation(t) - self.deviation(t - longer)) / longer, growth)
        return self.gain * z * expand_like(mean / self.deviation(t), z)


class HalfAngleNet(nn.Module):
    """The raw network that makes Precond with EDM's scalings and c_noise "angle" the exact consistency function.

    f = sigma_data x_in has to come out of c_skip x + c_out raw, so raw = x_in (1 - cos) / sin = x_in tan(angle / 2).
    """

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain, dtype=torch.float64))

    def forward(
        self, x: Tensor, angle: Tensor, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        return self.gain.to(x.dtype) * expand_like((angle / 2).tan(), x) * x


class ConstantNet(nn.Module):
    """A raw network that returns a fixed multiple of its input plus a constant; any shape."""

    def __init__(self, gain: float = 0.3, bias: float = 0.7) -> None:
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.tensor(gain)), nn.Parameter(torch.tensor(bias))

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        return self.gain * x + self.bias


class DropoutNet(nn.Module):
    """A raw network whose output shows its dropout mask."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor, c_noise: Tensor, *conditions: Tensor | None) -> Tensor:
        return self.scale * (dropout(torch.ones_like(x), 0.5, layer=0) if self.training else torch.ones_like(x))
