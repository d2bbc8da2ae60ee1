"""Downsampling and upsampling by 2: boxes (DDPM++, ADM) and the filter [1, 3, 3, 1] (NCSN++)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cm_core.networks import modes

Filter = Literal["box", "fir"]


class BoxDown(nn.Module):
    """Downsample by 2x2 averaging."""

    def forward(self, x: Tensor) -> Tensor:
        if modes.fuses(x):
            from cm_core.networks.kernels import downsample

            return downsample(x, 1 / 4)
        return F.avg_pool2d(x, 2)


class BoxUp(nn.Module):
    """Upsample by repeating each pixel."""

    def forward(self, x: Tensor) -> Tensor:
        if modes.fuses(x):
            from cm_core.networks.kernels import upsample

            return upsample(x, 1.0)
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class FirDown(nn.Module):
    """Downsample with the filter [1, 3, 3, 1] (NCSN++)."""

    kernel: Tensor

    def __init__(self, padding: int = 1) -> None:
        super().__init__()
        self.padding = padding
        self.register_buffer("kernel", _fir_kernel(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, _depthwise(self.kernel, x), stride=2, padding=self.padding, groups=x.shape[1])


class FirUp(nn.Module):
    """Upsample with the filter [1, 3, 3, 1] (NCSN++)."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", _fir_kernel(4), persistent=False)  # only a fourth of its inputs are nonzero

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, _depthwise(self.kernel, x), stride=2, padding=1, groups=x.shape[1])


def _fir_kernel(gain: int = 1) -> Tensor:
    # Numbers, as in positional_frequencies, and exact ones.
    taps = [tap / 8 for tap in (1, 3, 3, 1)]
    return torch.tensor([[gain * row * column for column in taps] for row in taps])


def _depthwise(kernel: Tensor, x: Tensor) -> Tensor:
    return kernel.to(x.dtype).expand(x.shape[1], 1, *kernel.shape)


DOWN = {"box": BoxDown, "fir": FirDown}
UP = {"box": BoxUp, "fir": FirUp}


class PyramidInput(nn.Module):
    """Downsample the running image pyramid: convolution first, then the filter (NCSN++)."""

    def __init__(self, in_channels: int, out_channels: int, resample_filter: Filter) -> None:
        super().__init__()
        fir = resample_filter == "fir"
        # All padding comes before the convolution, so that the filter meets no border of its own.
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=2 if fir else 1)
        self.down = FirDown(padding=0) if fir else BoxDown()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.conv(x))
