"""EDM2's U-Net of magnitude-preserving layers (Karras et al., arXiv:2312.02696, configuration G), and sCM's changes.

It has neither biases nor norms with statistics: activations keep unit variance because weights do. sCM (2410.11081,
section 4.1) embeds time by sines of moderate frequency and normalises the modulation over channels.
"""

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from pydantic import ConfigDict, Field, PositiveInt
from torch import Tensor, nn

from cm_core.networks import modes
from cm_core.networks.blocks import ResidualBlock, attend, decode, in_own_precision, num_heads
from cm_core.networks.guided import FEATURES, guidance_features
from cm_core.networks.layers import BoxDown, BoxUp, EmbeddedUNet, check_image_shape, one_hot, positional_frequencies
from cm_core.networks.magnitude import MPConv, mp_fork, mp_modulated_silu, mp_silu, mp_sum, unit_rms
from cm_core.params import Params

RESIDUAL_SHARE = 0.3  # of a branch in its sum with the main path (EDM2, section 2.5)
LABEL_SHARE = 0.5  # of the class in the embedding (EDM2)
LARGEST = 256.0  # activations are clipped to it, which half precision needs (EDM2, App. B)


class EDM2Params(Params):
    """EDM2-S by default; XS, M, L, XL: channels 128, 256, 320, 384."""

    model_config = ConfigDict(title="EDM2 U-Net (magnitude-preserving)")

    kind: Literal["edm2"] = "edm2"
    """The U-Net of EDM2."""
    channels: int = Field(192, ge=8, multiple_of=4)
    """Base width, in channels (XS 128, S 192, M 256, L 320, XL 384)."""
    channel_mult: tuple[PositiveInt, ...] = Field((1, 2, 3, 4), min_length=1)
    """Width at each resolution in base channels; each entry after the first halves the image (EDM2: 1,2,3,4)."""
    num_blocks: int = Field(3, ge=1)
    """Residual blocks per resolution in the encoder; the decoder has one more (EDM2: 3)."""
    attn_resolutions: tuple[PositiveInt, ...] = (16, 8)
    """Image heights, in pixels, at which every block attends; the middle of the network always does (EDM2: 16,8)."""
    channels_per_head: int = Field(64, ge=1)
    """Channels of one attention head (EDM2: 64)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of dropping an activation (EDM2: 0 for XS and S, 0.1 for the larger ones)."""
    dropout_resolution: int | None = Field(None, ge=1)
    """Largest image height, in pixels, at which blocks drop; null: all of them (ECT, sCM on ImageNet-64: 16)."""
    embedding: Literal["fourier", "positional"] = "fourier"
    """Features of the noise level: random frequencies (EDM2), or a geometric series from 1 down (sCM, section 4.1)."""
    double_norm: bool = False
    """Normalise the modulation by the embedding over channels, too (sCM, section 4.1)."""

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
        if two_times:
            raise ValueError("network.kind=edm2 takes one noise level, and meanflow trains a network of two times")
        width = self.channels * max(self.channel_mult)
        embed = Embedding(self, width, num_classes, augment_dim, takes_guidance)
        return EmbeddedUNet(embed, MPUNet(self, image_shape, width))


class Embedding(nn.Module):
    """Noise level, class and augmentation, each a unit vector, in one sum, then SiLU.

    A weight of guidance is added with a gain that starts at zero: weights of unit length cannot.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(
        self, params: EDM2Params, width: int, num_classes: int, augment_dim: int, takes_guidance: bool
    ) -> None:
        super().__init__()
        self.num_classes, self.augment_dim, features = num_classes, augment_dim, params.channels
        self.register_buffer("frequencies", torch.empty(features))
        self.register_buffer("phases", torch.empty(features))
        for own, values in zip((self.frequencies, self.phases), _waves(params), strict=True):
            own.copy_(values)
        self.noise = MPConv(features, width, 0)
        self.label = MPConv(num_classes, width, 0) if num_classes else None
        self.augment = MPConv(augment_dim, width, 0) if augment_dim else None
        self.guidance = MPConv(FEATURES, width, 0, gain=True) if takes_guidance else None

    def forward(
        self,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        _second: None = None,  # of networks of two times
        guidance: Tensor | None = None,
    ) -> Tensor:
        angles = noise_labels[:, None] * self.frequencies + self.phases  # [B, features]
        emb = self.noise(math.sqrt(2) * angles.cos())
        if self.label is not None:
            # One-hot vectors are scaled to unit variance.
            labels = one_hot(class_labels, self.num_classes, noise_labels) * math.sqrt(self.num_classes)
            emb = mp_sum(emb, self.label(labels), LABEL_SHARE)
        if augment_labels is None:
            augment_labels = noise_labels.new_zeros(noise_labels.shape[0], self.augment_dim)
        if self.augment is not None:
            emb = mp_sum(emb, self.augment(augment_labels), LABEL_SHARE)
        elif augment_labels.shape[1]:
            raise ValueError("augment_labels given to a network built with augment_dim=0: transforms would leak")
        if self.guidance is not None:
            assert guidance is not None, "a network that takes a weight of guidance gets one"
            emb = emb + self.guidance(math.sqrt(2) * guidance_features(guidance).to(emb.dtype))
        return mp_silu(emb)


def _waves(params: EDM2Params) -> tuple[Tensor, Tensor]:
    """Return frequencies and phases of the features, each [channels]."""
    # On the CPU: arithmetic on "meta", where shapes are checked, would import PyTorch's compiler for a second.
    with torch.device("cpu"):
        if params.embedding == "fourier":
            return 2 * math.pi * torch.randn(params.channels), 2 * math.pi * torch.rand(params.channels)
        half = params.channels // 2
        quarters = torch.tensor([0.0, -math.pi / 2])  # cosines, then sines
        return positional_frequencies(half, endpoint=False).repeat(2), quarters.repeat_interleave(half)


class MPAttention(nn.Module):
    """Self-attention of unit queries, keys and values, added to the input (EDM2, section 2.4)."""

    def __init__(self, channels: int, per_head: int) -> None:
        super().__init__()
        self.num_heads = num_heads(channels, per_head)
        self.qkv = MPConv(channels, 3 * channels, 1)
        self.proj = MPConv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        attended = attend(self.qkv(x), self.num_heads, partial(unit_rms, dim=-1))
        return mp_sum(x, self.proj(attended), RESIDUAL_SHARE, LARGEST)


class MPBlock(ResidualBlock):
    """Residual block of two convolutions, modulated by the embedding; may resample first, attend last.

    In the encoder the main path is normalised over channels at each pixel; a decoder's takes up the encoder's output.
    """

    def __init__(
        self,
        params: EDM2Params,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        encodes: bool,
        resample: Literal["down", "up"] | None = None,
        attention: bool = False,
    ) -> None:
        super().__init__(params.dropout, params.dropout_resolution)
        self.encodes, self.double_norm = encodes, params.double_norm
        self.resample = {"down": BoxDown, "up": BoxUp, None: nn.Identity}[resample]()
        self.skip = MPConv(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.conv0 = MPConv(out_channels if encodes else in_channels, out_channels, 3)
        self.modulation = MPConv(emb_channels, out_channels, 0, gain=True)
        self.conv1 = MPConv(out_channels, out_channels, 3)
        self.attention = MPAttention(out_channels, params.channels_per_head) if attention else nn.Identity()

    def compute(self, x: Tensor, emb: Tensor, beside: Tensor | None) -> Tensor:
        """Return the output, of [x, beside] for a decoder's block that takes an encoder's output."""
        x = self.resample(x)  # no block that resamples takes an encoder's output
        x, h = mp_fork(self.skip(x), normalised=True) if self.encodes else mp_fork(x, beside)
        h = self.conv0(h)
        factor = 1 + self.modulation(emb)
        if self.double_norm:
            factor = unit_rms(factor, 1)
        h = self.conv1(self.drop(mp_modulated_silu(h, factor)))
        x = x if self.encodes else self.skip(x)
        attends = isinstance(self.attention, MPAttention)
        return self.attention(mp_sum(x, h, RESIDUAL_SHARE, math.inf if attends else LARGEST))


class MPUNet(nn.Module):
    """The U, as in `layers.UNet` with its names of blocks; its input has a further channel of ones in place of biases.

    Raises ValueError if the image cannot be halved often enough, or channels do not divide into heads.
    """

    def __init__(self, params: EDM2Params, image_shape: Sequence[int], emb_channels: int) -> None:
        super().__init__()
        check_image_shape(image_shape, levels=len(params.channel_mult), kind=params.kind)
        image_channels, height, _ = image_shape
        widths = [params.channels * mult for mult in params.channel_mult]
        attends = [height >> level in params.attn_resolutions for level in range(len(widths))]
        encoder, decoder = (partial(MPBlock, params, emb_channels=emb_channels, encodes=on) for on in (True, False))
        self.input = MPConv(image_channels + 1, widths[0], 3)

        self.encoder, skips = nn.ModuleDict(), [widths[0]]
        for level, (before, out) in enumerate(pairwise([widths[0], *widths])):
            if level > 0:
                self.encoder[f"level{level}_down"] = encoder(before, before, resample="down")
                skips.append(before)
            for i in range(params.num_blocks):
                self.encoder[f"level{level}_block{i}"] = encoder(skips[-1], out, attention=attends[level])
                skips.append(out)
        width = widths[-1]
        self.middle = nn.ModuleList(decoder(width, width, attention=on) for on in (True, False))
        self.decoder = nn.ModuleDict()
        for level, out in reversed(list(enumerate(widths))):
            if level < len(widths) - 1:
                self.decoder[f"level{level}_up"] = decoder(width, width, resample="up")
            for i in range(params.num_blocks + 1):
                block = decoder(width + skips.pop(), out, attention=attends[level])
                self.decoder[f"level{level}_block{i}"], width = block, out
        self.output = MPConv(width, image_channels, 3, gain=True)
        for number, block in enumerate(module for module in self.modules() if isinstance(module, MPBlock)):
            block.number = number

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # x [B, C, H, W], emb [B, E]
        x = decode(self.middle, self.decoder, self.encode(x, emb), emb)
        return in_own_precision(self.output, x)

    def encode(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        """Return the outputs of the input layer and of the encoder's blocks, each [B, C', H', W']."""
        x = in_own_precision(self.input, torch.cat([x, torch.ones_like(x[:, :1])], dim=1))
        x = x.to(modes.half_precision(x.device) or x.dtype)
        skips = [x]
        for block in self.encoder.values():
            skips.append(x := block(x, emb))
        return skips
