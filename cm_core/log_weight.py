"""A learned weight of noise levels: the uncertainty of a multi-task loss (EDM2, 2312.02696)."""

import math

import torch
from torch import Tensor, nn

FEATURES = 128  # EDM2


class LogWeight(nn.Module):
    """w(sigma): random Fourier features of ln(sigma) / 4 and one linear layer, zero at the start.

    exp(w) * error - w is minimal where exp(-w) is the mean error of the level, so all levels get equal weight.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(FEATURES))
        self.register_buffer("phases", 2 * math.pi * torch.rand(FEATURES))
        self.linear = nn.Linear(FEATURES, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, sigma: Tensor) -> Tensor:  # [B] -> [B]
        features = math.sqrt(2) * torch.cos(sigma.log()[:, None] / 4 * self.frequencies + self.phases)
        return self.linear(features).squeeze(1)
