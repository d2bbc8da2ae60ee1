"""A weight of guidance as an input of a network, beside the noise level (2210.03142, section 3.1; 2310.04378)."""

import torch
from torch import Tensor, nn

OCTAVES = 6  # angular frequencies 1, 1/2, ..., 1/32 of a weight: weights from 0 to 30 differ, near ones are alike
FEATURES = 2 * OCTAVES
LAYER = ".guidance."  # in the names of the layer's tensors


def guidance_features(weights: Tensor) -> Tensor:
    """Return cosines and sines of weights of guidance [B], smooth in them, [B, 2 OCTAVES]."""
    angles = torch.stack([weights / 2**octave for octave in range(OCTAVES)], dim=1)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class GuidanceLayer(nn.Linear):
    """What a weight of guidance adds to an embedding; zero at first, so that a network keeps its function."""

    def __init__(self, width: int) -> None:
        super().__init__(FEATURES, width, bias=False)
        self.reset()

    def reset(self) -> None:
        """Start at zero."""
        nn.init.zeros_(self.weight)

    def forward(self, weights: Tensor | None) -> Tensor:  # [B] -> [B, width]
        assert weights is not None, "a network that takes a weight of guidance gets one"
        return super().forward(guidance_features(weights).to(self.weight.dtype))
