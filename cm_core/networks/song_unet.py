"""DDPM++ and NCSN++ (Song et al., arXiv:2011.13456) in the form of EDM (arXiv:2206.00364, App. F.1).

The published networks differ in three choices: embedding, encoder and resampling filter.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from cm_core.networks.guided import GuidanceLayer
from cm_core.networks.layers import (
    EMB_MULT,
    Attention,
    BlockStyle,
    EmbeddedUNet,
    Filter,
    UNet,
    add_augment,
    one_hot,
    positional_frequencies,
)
from cm_core.params import Params


class SongUNetParams(Params):
    """DDPM++ by default; NCSN++ is `fourier_scale: 16, encoder: residual, resample_filter: fir`."""

    model_config = ConfigDict(title="Song U-Net (DDPM++, NCSN++)")

    kind: Literal["song_unet"] = "song_unet"
    """The U-Net of DDPM++ and NCSN++."""
    channels: int = Field(128, ge=8, multiple_of=4)
    """Base width, in channels (EDM: 128)."""
    channel_mult: tuple[PositiveInt, ...] = Field((2, 2, 2), min_length=1)
    """Width at each resolution in base channels; each entry after the first halves the image (EDM: 2,2,2 at 32 px)."""
    num_blocks: int = Field(4, ge=1)
    """Residual blocks per resolution in the encoder; the decoder has one more (EDM: 4)."""
    attn_resolutions: tuple[PositiveInt, ...] = (16,)
    """Image heights, in pixels, at which blocks attend; the middle of the network always does (EDM: 16)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of dropping an activation (EDM's CIFAR-10 teachers: 0.13; CD and CT students: 0)."""
    dropout_resolution: int | None = Field(None, ge=1)
    """Largest image height, in pixels, at which blocks drop; null: all of them (sCM on ImageNet-64: 16)."""
    fourier_scale: PositiveFloat | None = None
    """Standard deviation of random Fourier frequencies of the noise level (NCSN++: 16; iCT: 0.02); null: positional."""
    encoder: Literal["standard", "residual"] = "standard"
    """residual: a pyramid of the input image joins the encoder at each resolution (NCSN++)."""
    resample_filter: Filter = "box"
    """box: 2x2 average and repetition (DDPM++); fir: [1, 3, 3, 1] (NCSN++)."""

    def build(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        augment_dim: int = 0,
        *,
        two_times: bool = False,
        takes_guidance: bool = False,
    ) -> nn.Module:
        """Return the network for images [C, H, W]; raise ValueError if they cannot be halved often enough."""
        return SongUNet(self, image_shape, Embedding(self, num_classes, augment_dim, two_times, takes_guidance))

    def style(self) -> BlockStyle:
        """Return the settings of all blocks."""
        return BlockStyle(
            emb_channels=EMB_MULT * self.channels,
            dropout=self.dropout,
            dropout_resolution=self.dropout_resolution,
            eps=1e-6,
            skip_scale=math.sqrt(0.5),
            scale_shift=False,
            channels_per_head=None,
            resample_filter=self.resample_filter,
            resample_proj=True,
        )


class SongUNet(EmbeddedUNet):
    """The network with its initialisation.

    EDM's checkpoints use other names: map_* is `embed.*` (frequencies without the factor 2 pi), enc and
    dec are `unet.encoder` and `unet.decoder` with RxR for `levelL`, RxR_conv is `input`, aux_residual `pyramid`,
    in0 and in1 `middle`, aux_norm and aux_conv `output_norm` and `output`; a block's norm2, qkv and proj belong to
    `attention`, and the rows of qkv are there in the order (head, channel, 3) rather than (3, head, channel).
    """

    def __init__(self, params: SongUNetParams, image_shape: Sequence[int], embed: "Embedding") -> None:
        pyramid = params.encoder == "residual"
        unet = UNet(params, image_shape, params.style(), decoder_attention="last", pyramid=pyramid)
        super().__init__(embed, unet)
        # Xavier-uniform weights, zero biases; residual branches start near zero, queries and keys small.
        gains: dict[nn.Module, float] = {layer: 1e-5 for layer in unet.residual_ends()}
        gains |= {module.qkv: math.sqrt(0.2) for module in self.modules() if isinstance(module, Attention)}
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight, gains.get(module, 1.0))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if embed.guidance is not None:
            embed.guidance.reset()


class Embedding(nn.Module):
    """Noise level, class and augmentation, summed as features, then two layers, each with SiLU.

    A second time and a weight of guidance have features and weights of their own in the first layer, as if the features
    were concatenated.
    """

    frequencies: Tensor

    def __init__(
        self, params: SongUNetParams, num_classes: int, augment_dim: int, two_times: bool, takes_guidance: bool
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.register_buffer("frequencies", _frequencies(params))  # random ones belong to the checkpoint
        features, width = 2 * len(self.frequencies), EMB_MULT * params.channels
        self.label = nn.Linear(num_classes, features) if num_classes else None
        self.augment = nn.Linear(augment_dim, features, bias=False) if augment_dim else None
        self.layer0 = nn.Linear(features, width)
        self.layer1 = nn.Linear(width, width)
        self.second = nn.Linear(features, width, bias=False) if two_times else None
        self.guidance = GuidanceLayer(width) if takes_guidance else None

    def forward(
        self,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        second_labels: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        emb = self._features(noise_labels)
        if self.label is not None:
            # One-hot vectors are scaled to unit variance.
            emb = emb + self.label(one_hot(class_labels, self.num_classes, noise_labels) * math.sqrt(self.num_classes))
        emb = add_augment(emb, self.augment, augment_labels)
        h = self.layer0(emb)
        if self.second is not None:
            assert second_labels is not None, "a network of two times gets both"
            h = h + self.second(self._features(second_labels))
        if self.guidance is not None:
            h = h + self.guidance(guidance)
        return F.silu(self.layer1(F.silu(h)))

    def _features(self, times: Tensor) -> Tensor:
        angles = times[:, None] * self.frequencies  # [B, features / 2]
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # sin first: the order of score_sde's weights


def _frequencies(params: SongUNetParams) -> Tensor:
    """Return the angular frequencies: a geometric series, or twice as many random ones."""
    if params.fourier_scale is None:
        return positional_frequencies(params.channels // 2, endpoint=True)
    # On the CPU: arithmetic on "meta", where shapes are checked, would import PyTorch's compiler for a second.
    random = 2 * math.pi * params.fourier_scale * torch.randn(params.channels, device="cpu")
    return random.to(torch.get_default_device())
