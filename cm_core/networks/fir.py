"""Downsampling and upsampling by 2 with the filter [1, 3, 3, 1] (NCSN++)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FirDown(nn.Module):
    """Downsample; `padding` on each side."""

    kernel: Tensor

    def __init__(self, padding: int = 1) -> None:
        super().__init__()
        self.padding = padding
        self.register_buffer("kernel", _fir_kernel(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, _depthwise(self.kernel, x), stride=2, padding=self.padding, groups=x.shape[1])


class FirUp(nn.Module):
    """Upsample."""

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
