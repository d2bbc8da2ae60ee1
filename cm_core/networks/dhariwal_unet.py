"""ADM, the U-Net of Dhariwal & Nichol (arXiv:2105.05233), as EDM and Consistency Models train it."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field, PositiveInt, model_validator
from torch import Tensor, nn

from cm_core.networks.guided import GuidanceLayer
from cm_core.networks.layers import (
    EMB_MULT,
    BlockStyle,
    EmbeddedUNet,
    UNet,
    add_augment,
    one_hot,
    positional_frequencies,
)
from cm_core.params import Params


class DhariwalUNetParams(Params):
    """ADM of ImageNet-64; of LSUN-256: channels 256, channel_mult 1,1,2,2,4,4, num_blocks 2, scale_shift false."""

    model_config = ConfigDict(title="ADM U-Net (Dhariwal)")

    kind: Literal["dhariwal_unet"] = "dhariwal_unet"
    """The U-Net of ADM."""
    channels: int = Field(192, ge=8, multiple_of=4)
    """Base width, in channels (ImageNet-64: 192; LSUN-256: 256)."""
    channel_mult: tuple[PositiveInt, ...] = Field((1, 2, 3, 4), min_length=1)
    """Width at each resolution in base channels; each entry after the first halves the image (ImageNet-64: 1,2,3,4)."""
    num_blocks: int = Field(3, ge=1)
    """Residual blocks per resolution in the encoder; the decoder has one more (ImageNet-64: 3; LSUN-256: 2)."""
    attn_resolutions: tuple[PositiveInt, ...] = (32, 16, 8)
    """Image heights, in pixels, at which every block attends; the middle of the network always does (ADM: 32,16,8)."""
    channels_per_head: int = Field(64, ge=1)
    """Channels of one attention head (ADM: 64)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of dropping an activation (ADM's and EDM's ImageNet-64 teachers: 0.1; CD and CT students: 0)."""
    dropout_resolution: int | None = Field(None, ge=1)
    """Largest image height, in pixels, at which blocks drop; null: all of them (sCM on ImageNet-64: 16)."""
    scale_shift: bool = True
    """The noise level scales and shifts each block's second norm (ImageNet-64), rather than being added (LSUN-256)."""
    double_norm: bool = False
    """Normalise that scale and shift over channels: adaptive double normalisation, for continuous time (sCM, 4.1)."""
    norm_groups: PositiveInt | None = None
    """Groups of every norm (ADM: 32); empty: min(32, channels / 4), the same for widths from 128 (EDM)."""

    @model_validator(mode="after")
    def _has_what_it_normalises(self) -> "DhariwalUNetParams":
        if self.double_norm and not self.scale_shift:
            raise ValueError("double_norm=true normalises scale and shift by the noise level, and scale_shift is false")
        return self

    def build(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        augment_dim: int = 0,
        *,
        two_times: bool = False,
        takes_guidance: bool = False,
    ) -> nn.Module:
        """Return the network for images [C, H, W]; raise ValueError if sizes or heads do not divide evenly."""
        embed = Embedding(self.channels, num_classes, augment_dim, two_times, takes_guidance)
        unet = UNet(self, image_shape, self._style(), decoder_attention="every", pyramid=False)
        for layer in unet.residual_ends():  # the other layers keep PyTorch's initialisation, as in ADM
            for p in layer.parameters():
                nn.init.zeros_(p)
        return EmbeddedUNet(embed, unet)

    def _style(self) -> BlockStyle:
        return BlockStyle(
            emb_channels=EMB_MULT * self.channels,
            dropout=self.dropout,
            dropout_resolution=self.dropout_resolution,
            eps=1e-5,
            skip_scale=1.0,
            scale_shift=self.scale_shift,
            double_norm=self.double_norm,
            channels_per_head=self.channels_per_head,
            resample_filter="box",
            resample_proj=False,
            norm_groups=self.norm_groups,
        )


class Embedding(nn.Module):
    """Noise level and augmentation through two layers; the class is added before the last SiLU.

    A second time and a weight of guidance have features and weights of their own in the first layer, as if the features
    were concatenated.
    """

    frequencies: Tensor

    def __init__(
        self, channels: int, num_classes: int, augment_dim: int, two_times: bool, takes_guidance: bool
    ) -> None:
        super().__init__()
        self.num_classes, width = num_classes, EMB_MULT * channels
        self.register_buffer("frequencies", positional_frequencies(channels // 2, endpoint=False), persistent=False)
        self.augment = nn.Linear(augment_dim, channels, bias=False) if augment_dim else None
        self.layer0 = nn.Linear(channels, width)
        self.layer1 = nn.Linear(width, width)
        self.label = nn.Linear(num_classes, width, bias=False) if num_classes else None
        self.second = nn.Linear(channels, width, bias=False) if two_times else None
        self.guidance = GuidanceLayer(width) if takes_guidance else None
        if self.augment is not None:
            nn.init.zeros_(self.augment.weight)
        if self.label is not None:
            nn.init.normal_(self.label.weight)  # one unit-variance row per class, like an embedding table

    def forward(
        self,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        second_labels: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        h = self.layer0(add_augment(self._features(noise_labels), self.augment, augment_labels))
        if self.second is not None:
            assert second_labels is not None, "a network of two times gets both"
            h = h + self.second(self._features(second_labels))
        if self.guidance is not None:
            h = h + self.guidance(guidance)
        emb = self.layer1(F.silu(h))
        if self.label is not None:
            emb = emb + self.label(one_hot(class_labels, self.num_classes, noise_labels))
        return F.silu(emb)

    def _features(self, times: Tensor) -> Tensor:
        angles = times[:, None] * self.frequencies  # [B, channels / 2]
        return torch.cat([angles.cos(), angles.sin()], dim=1)
