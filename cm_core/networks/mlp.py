"""A small multi-layer perceptron for data of any shape: oracles, toy data, fast tests."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from cm_core.networks.guided import GuidanceLayer
from cm_core.networks.layers import one_hot
from cm_core.params import Params


class MLPParams(Params):
    """Flattens its input; the noise level scales and shifts every hidden layer. Smooth, so all derivatives exist."""

    model_config = ConfigDict(title="MLP (toy data)")

    kind: Literal["mlp"] = "mlp"
    """A multi-layer perceptron for toy data."""
    width: int = Field(128, ge=1)
    """Units of each hidden layer."""
    depth: int = Field(3, ge=1)
    """Number of hidden layers."""

    def build(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        augment_dim: int = 0,
        *,
        two_times: bool = False,
        takes_guidance: bool = False,
    ) -> nn.Module:
        """Return the network for samples of `image_shape`, which may have any number of axes."""
        return MLP(self, image_shape, num_classes, augment_dim, two_times, takes_guidance)


class MLP(nn.Module):
    """F(x, noise_labels, class_labels, augment_labels) -> like x; class label -1 means no label."""

    frequencies: Tensor
    num_octaves = 4  # noise features: cos and sin of 1, 2, 4, 8 times the label

    def __init__(
        self,
        params: MLPParams,
        image_shape: Sequence[int],
        num_classes: int,
        augment_dim: int,
        two_times: bool,
        takes_guidance: bool,
    ) -> None:
        super().__init__()
        size, times = math.prod(image_shape), 2 if two_times else 1
        self.num_classes, self.augment_dim, self.two_times = num_classes, augment_dim, two_times
        self.register_buffer("frequencies", 2.0 ** torch.arange(self.num_octaves), persistent=False)
        self.embed = nn.Linear(2 * self.num_octaves * times + num_classes + augment_dim, params.width)
        sizes = [size] + [params.width] * params.depth
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in zip(sizes, sizes[1:], strict=False))
        self.affine = nn.ModuleList(nn.Linear(params.width, 2 * params.width) for _ in self.hidden)
        self.output = nn.Linear(params.width, size)
        self.guidance = GuidanceLayer(params.width) if takes_guidance else None
        for layer in (*self.affine, self.output):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: Tensor,  # [B, ...]
        noise_labels: Tensor,  # [B]
        class_labels: Tensor | None = None,  # int64 [B]
        augment_labels: Tensor | None = None,  # [B, augment_dim]
        second_labels: Tensor | None = None,  # [B], of a network of two times
        guidance: Tensor | None = None,  # [B], of a network that takes weights of guidance
    ) -> Tensor:
        emb = self.features(noise_labels, class_labels, augment_labels)
        if self.two_times:
            assert second_labels is not None, "a network of two times gets both"
            emb = torch.cat([emb, self._waves(second_labels)], dim=1)
        emb = self.embed(emb)
        emb = F.silu(emb if self.guidance is None else emb + self.guidance(guidance))
        h = x.flatten(1)
        for hidden, affine in zip(self.hidden, self.affine, strict=True):
            scale, shift = affine(emb).chunk(2, dim=1)
            h = F.silu(hidden(h) * (1 + scale) + shift)
        return self.output(h).view_as(x)

    def features(self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        if augment_labels is None:
            augment_labels = noise_labels.new_zeros(noise_labels.shape[0], self.augment_dim)
        labels = one_hot(class_labels, self.num_classes, noise_labels)
        return torch.cat([self._waves(noise_labels), labels, augment_labels], dim=1)

    def _waves(self, times: Tensor) -> Tensor:
        angles = times[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)
