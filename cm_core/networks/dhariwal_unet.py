"""ADM, the U-Net of Dhariwal & Nichol (arXiv:2105.05233), as EDM and Consistency Models train it."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field, PositiveInt
from torch import Tensor, nn

from cm_core.networks.layers import (
    EMB_MULT,
    BlockStyle,
    UNet,
    add_augment,
    check_image_shape,
    one_hot,
    positional_frequencies,
)
from cm_core.networks.modes import in_own_precision, keep_parts_float32
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
    scale_shift: bool = True
    """The noise level scales and shifts each block's second norm (ImageNet-64), rather than being added (LSUN-256)."""

    def build(self, image_shape: Sequence[int], num_classes: int, augment_dim: int = 0) -> nn.Module:
        """Return the network for images [C, H, W]; raise ValueError if sizes or heads do not divide evenly."""
        return DhariwalUNet(self, image_shape, num_classes, augment_dim)


class DhariwalUNet(nn.Module):
    """F(x, noise_labels, class_labels, augment_labels) -> [B, C, H, W]; class label -1 means no label."""

    def __init__(
        self, params: DhariwalUNetParams, image_shape: Sequence[int], num_classes: int, augment_dim: int
    ) -> None:
        super().__init__()
        check_image_shape(image_shape, levels=len(params.channel_mult), kind=params.kind)
        image_channels, height, _ = image_shape
        self.embed = Embedding(params.channels, num_classes, augment_dim)
        self.unet = UNet(
            image_channels,
            params.channels,
            params.channel_mult,
            _block_style(params),
            num_blocks=params.num_blocks,
            attn_levels=[i for i in range(len(params.channel_mult)) if height >> i in params.attn_resolutions],
            decoder_attention="every",
            pyramid=False,
        )
        keep_parts_float32(embedding=self.embed, input=self.unet.input, output=self.unet.output)
        for layer in self.unet.residual_ends():  # the other layers keep PyTorch's initialisation, as in ADM
            for p in layer.parameters():
                nn.init.zeros_(p)

    def forward(
        self,
        x: Tensor,  # [B, C, H, W]
        noise_labels: Tensor,  # [B]
        class_labels: Tensor | None = None,  # int64 [B]
        augment_labels: Tensor | None = None,  # [B, augment_dim]
    ) -> Tensor:
        emb = in_own_precision(self.embed, noise_labels, class_labels, augment_labels)
        return self.unet(x, emb)


class Embedding(nn.Module):
    """Noise level and augmentation through two layers; the class is added before the last SiLU."""

    frequencies: Tensor

    def __init__(self, channels: int, num_classes: int, augment_dim: int) -> None:
        super().__init__()
        self.num_classes, width = num_classes, EMB_MULT * channels
        self.register_buffer("frequencies", positional_frequencies(channels // 2, endpoint=False), persistent=False)
        self.augment = nn.Linear(augment_dim, channels, bias=False) if augment_dim else None
        self.layer0 = nn.Linear(channels, width)
        self.layer1 = nn.Linear(width, width)
        self.label = nn.Linear(num_classes, width, bias=False) if num_classes else None
        if self.augment is not None:
            nn.init.zeros_(self.augment.weight)
        if self.label is not None:
            nn.init.normal_(self.label.weight)  # one unit-variance row per class, like an embedding table

    def forward(self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        angles = noise_labels[:, None] * self.frequencies  # [B, channels / 2]
        emb = add_augment(torch.cat([angles.cos(), angles.sin()], dim=1), self.augment, augment_labels)
        emb = self.layer1(F.silu(self.layer0(emb)))
        if self.label is not None:
            emb = emb + self.label(one_hot(class_labels, self.num_classes, noise_labels))
        return F.silu(emb)


def _block_style(params: DhariwalUNetParams) -> BlockStyle:
    return BlockStyle(
        emb_channels=EMB_MULT * params.channels,
        dropout=params.dropout,
        eps=1e-5,
        skip_scale=1.0,
        scale_shift=params.scale_shift,
        channels_per_head=params.channels_per_head,
        resample_filter="box",
        resample_proj=False,
    )
