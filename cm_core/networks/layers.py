"""Shared parts of the U-Nets: embeddings, attention, the residual block and the U itself.

The design follows EDM's re-implementations (arXiv:2206.00364, App. F.1) of DDPM++ and NCSN++ (arXiv:2011.13456) and of
ADM (arXiv:2105.05233): one block whose style selects the network.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cm_core.networks import modes
from cm_core.networks.blocks import ResidualBlock, attend, decode, in_own_precision, keep_parts_float32, num_heads
from cm_core.networks.fir import FirDown, FirUp
from cm_core.networks.magnitude import unit_rms
from cm_core.tensors import expand_like

if TYPE_CHECKING:
    from cm_core.networks.dhariwal_unet import DhariwalUNetParams
    from cm_core.networks.edm2 import MPUNet
    from cm_core.networks.song_unet import SongUNetParams

EMB_MULT = 4  # width of the embedding in base channels: all published configurations
MAX_PERIOD = 10_000  # longest period of the positional embedding (DDPM)

Filter = Literal["box", "fir"]


def conv_without_bias(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Convolve without the bias, which the caller fuses into a later kernel. 1x1 is a matmul over channels last."""
    if conv.kernel_size != (1, 1):
        return F.conv2d(x, conv.weight, None, conv.stride, conv.padding)
    return F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1)).permute(0, 3, 1, 2)


def bias_of(conv: nn.Conv2d) -> Tensor:
    """Return the bias of a convolution; those of the U-Nets all have one."""
    assert conv.bias is not None
    return conv.bias


def fused_norm(
    norm: nn.GroupNorm,
    x: Tensor,
    *,
    silu: bool,
    bias: Tensor | None = None,
    before: Tensor | None = None,
    beside: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return act(norm([x, beside] + bias + before)) by one kernel, and x and beside again; `bias` [C], `before` [B, C].

    Use the returned x and beside downstream; the backward kernel then accumulates both gradients.
    """
    from cm_core.networks.kernels import norm_act

    affine = {"scale": norm.weight, "shift": norm.bias}
    return norm_act(
        x, groups=norm.num_groups, eps=norm.eps, silu=silu, bias=bias, before=before, beside=beside, **affine
    )


def plain_norm(norm: nn.GroupNorm, x: Tensor, *, silu: bool) -> Tensor:
    """Return silu(norm(x)), or norm(x): in forward mode on a GPU by one kernel, and its derivative by another."""
    if modes.fuses_forward_mode(x):
        from cm_core.networks.kernels import norm_act_forward_mode

        affine = {"scale": norm.weight, "shift": norm.bias}
        return norm_act_forward_mode(x, groups=norm.num_groups, eps=norm.eps, silu=silu, **affine)
    return F.silu(norm(x)) if silu else norm(x)


def with_channels(x: Tensor, beside: Tensor | None) -> Tensor:
    """Return x and beside concatenated over channels."""
    return x if beside is None else torch.cat([x, beside], dim=1)


def check_image_shape(image_shape: Sequence[int], *, levels: int, kind: str) -> None:
    """Raise ValueError unless an image [C, H, W] can be halved between consecutive ones of `levels` resolutions."""
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"{kind}: image_shape is {tuple(image_shape)}; allowed: (channels, height, width), all >= 1")
    _, height, width = image_shape
    factor = 2 ** (levels - 1)
    if height % factor or width % factor:
        raise ValueError(
            f"{kind}: {levels} entries in channel_mult halve the image {levels - 1} times, but {height}x{width} "
            f"is not divisible by {factor}; allowed: fewer entries, or images whose sides are multiples of {factor}"
        )


def positional_frequencies(num: int, *, endpoint: bool) -> Tensor:
    """Return geometric angular frequencies [num] from 1 down to 1 / MAX_PERIOD, which `endpoint` includes."""
    # Numbers, not tensors: tensor arithmetic on the device "meta", where recipes are checked, imports the compiler.
    return torch.tensor([MAX_PERIOD ** -(i / (num - endpoint)) for i in range(num)])


def one_hot(class_labels: Tensor | None, num_classes: int, like: Tensor) -> Tensor:
    """Return [B, num_classes] in the dtype of `like` [B]; no label, or label -1, gives zeros."""
    if class_labels is None or num_classes == 0:
        return like.new_zeros(like.shape[0], num_classes)
    # Not F.one_hot, which looks at values, where there may be none; not len(), which exports as a constant.
    rows = like.new_zeros(like.shape[0], num_classes + 1)
    return rows.scatter_(1, class_labels[:, None] + 1, 1.0)[:, 1:]  # raises if a label is too large


def add_augment(emb: Tensor, layer: nn.Linear | None, augment_labels: Tensor | None) -> Tensor:
    """Add the projected augmentation labels to `emb`; None means that no transform was drawn."""
    if augment_labels is None:
        return emb
    if layer is None:
        raise ValueError("augment_labels given to a network built with augment_dim=0, which would let transforms leak")
    return emb + layer(augment_labels)


def group_norm(channels: int, *, eps: float, groups: int | None = None) -> nn.GroupNorm:
    """Normalise over `groups`, by default min(32, channels / 4) or the next smaller number that divides `channels`."""
    groups = groups or next(n for n in range(min(32, channels // 4), 0, -1) if channels % n == 0)
    return GroupNorm(groups, channels, eps=eps)


class GroupNorm(nn.GroupNorm):
    """In fp32 under autocast on every device: on the CPU its forward-mode derivative is fp32 beside a bf16 value."""

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.dtype.itemsize >= 4 else x.float()
        if not torch.compiler.is_compiling() and modes.is_plain():
            x = x.contiguous()  # the forward-mode derivative's formula takes views
        return super().forward(x)


class BoxDown(nn.Module):
    """Downsample by 2x2 averaging (DDPM++, ADM)."""

    def forward(self, x: Tensor) -> Tensor:
        if modes.fuses(x):
            from cm_core.networks.kernels import downsample

            return downsample(x, 1 / 4)
        return F.avg_pool2d(x, 2)


class BoxUp(nn.Module):
    """Upsample by repeating each pixel (DDPM++, ADM)."""

    def forward(self, x: Tensor) -> Tensor:
        if modes.fuses(x):
            from cm_core.networks.kernels import upsample

            return upsample(x, 1.0)
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


def pyramid_input(in_channels: int, out_channels: int, resample_filter: Filter) -> nn.Sequential:
    """Return the downsampling of the running image pyramid: convolution first, then the filter (NCSN++)."""
    fir = resample_filter == "fir"
    # All padding comes before the convolution, so that the filter meets no border of its own.
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=2 if fir else 1)
    return nn.Sequential(OrderedDict(conv=conv, down=FirDown(padding=0) if fir else BoxDown()))


@dataclass(frozen=True, kw_only=True)
class BlockStyle:
    """Settings common to all blocks of one network."""

    emb_channels: int
    dropout: float
    dropout_resolution: int | None  # the largest height with dropout
    eps: float  # of group norm
    skip_scale: float  # factor after each residual sum; sqrt(1/2) keeps the variance
    scale_shift: bool  # the embedding scales and shifts the second norm, rather than being added before it
    double_norm: bool = False  # scale and shift are themselves normalised over channels (sCM, section 4.1)
    channels_per_head: int | None  # None: one head
    resample_filter: Filter
    resample_proj: bool  # a resampling block has a 1x1 convolution on its skip path
    norm_groups: int | None = None  # of every norm; None: min(32, channels / 4)

    def num_heads(self, channels: int) -> int:
        """Return the heads of an attention over `channels`; raise ValueError if they do not divide evenly."""
        return 1 if self.channels_per_head is None else num_heads(channels, self.channels_per_head)


class Attention(nn.Module):
    """Self-attention over the pixels, added to the input. `qkv` channels are ordered (3, heads, channels per head)."""

    def __init__(self, channels: int, style: BlockStyle) -> None:
        super().__init__()
        self.num_heads, self.skip_scale = style.num_heads(channels), style.skip_scale
        self.norm = group_norm(channels, eps=style.eps, groups=style.norm_groups)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # x [B, C, H, W]
        if modes.fuses(x):
            return self._fused(x)
        h = plain_norm(self.norm, x, silu=False)
        return (x + self.proj(attend(self.qkv(h), self.num_heads))) * self.skip_scale

    def _fused(self, x: Tensor) -> Tensor:
        from cm_core.networks.kernels import residual_add

        h, x, _ = fused_norm(self.norm, x, silu=False)
        qkv = F.linear(h.permute(0, 2, 3, 1), self.qkv.weight.flatten(1), self.qkv.bias).permute(0, 3, 1, 2)
        h = conv_without_bias(self.proj, attend(qkv, self.num_heads))
        return residual_add(x, h, bias_of(self.proj), self.skip_scale)


class Block(ResidualBlock):
    """Residual block of two convolutions, conditioned on an embedding; may resample first, attend last."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style: BlockStyle,
        *,
        resample: Literal["down", "up"] | None = None,
        attention: bool = False,
    ) -> None:
        super().__init__(style.dropout, style.dropout_resolution)
        self.skip_scale, self.scale_shift, self.double_norm = style.skip_scale, style.scale_shift, style.double_norm
        fir = style.resample_filter == "fir"
        resamplers = {"down": FirDown if fir else BoxDown, "up": FirUp if fir else BoxUp, None: nn.Identity}
        self.resample = resamplers[resample]()
        self.norm0 = group_norm(in_channels, eps=style.eps, groups=style.norm_groups)
        self.conv0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.affine = nn.Linear(style.emb_channels, out_channels * (2 if style.scale_shift else 1))
        self.norm1 = group_norm(out_channels, eps=style.eps, groups=style.norm_groups)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        project = in_channels != out_channels or (resample is not None and style.resample_proj)
        self.skip: nn.Conv2d | nn.Identity = nn.Conv2d(in_channels, out_channels, 1) if project else nn.Identity()
        self.attention = Attention(out_channels, style) if attention else nn.Identity()

    def compute(self, x: Tensor, emb: Tensor, beside: Tensor | None) -> Tensor:
        """Return the output; `beside` is concatenated where a kernel does not read it apart."""
        if modes.fuses(x):
            return self._fused(x, emb, beside)
        x = with_channels(x, beside)
        h = self.conv0(self.resample(plain_norm(self.norm0, x, silu=True)))
        h = self.drop(self.modulate(h, emb))
        return self.attention((self.skip(self.resample(x)) + self.conv1(h)) * self.skip_scale)

    def modulate(self, h: Tensor, emb: Tensor) -> Tensor:
        params = self.affine(emb)
        if not self.scale_shift:
            return plain_norm(self.norm1, h + expand_like(params, h), silu=True)
        factor, shift = (expand_like(part, h) for part in self.factor_and_shift(params))
        return F.silu(torch.addcmul(shift, plain_norm(self.norm1, h, silu=False), factor))

    def factor_and_shift(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the second norm's output is multiplied by, and what is added, each [B, C]."""
        scale, shift = params.chunk(2, dim=1)
        return (unit_rms(1 + scale, 1), unit_rms(shift, 1)) if self.double_norm else (1 + scale, shift)

    def _fused(self, x: Tensor, emb: Tensor, beside: Tensor | None) -> Tensor:
        """The same, with the convolutions' biases added by the kernels that follow them."""
        h, x, beside = fused_norm(self.norm0, x, silu=True, beside=beside)
        h = conv_without_bias(self.conv0, self.resample(h))
        h = self.drop(self._fused_modulate(h, emb))
        return self.attention(self._fused_residual_add(x, beside, conv_without_bias(self.conv1, h)))

    def _fused_residual_add(self, x: Tensor, beside: Tensor | None, h: Tensor) -> Tensor:
        from cm_core.networks.kernels import project_residual_add, projects, residual_add

        bias = bias_of(self.conv1)
        if isinstance(self.skip, nn.Identity):
            return residual_add(self.resample(with_channels(x, beside)), h, bias, self.skip_scale)
        bias = bias + bias_of(self.skip)
        if beside is not None and projects(x, beside):
            return project_residual_add(x, beside, self.skip.weight.flatten(1), h, bias, self.skip_scale)
        skip = conv_without_bias(self.skip, self.resample(with_channels(x, beside)))
        return residual_add(skip, h, bias, self.skip_scale)

    def _fused_modulate(self, h: Tensor, emb: Tensor) -> Tensor:
        from cm_core.networks.kernels import norm_act

        if not self.scale_shift:
            bias = bias_of(self.conv0) + self.affine.bias
            return fused_norm(self.norm1, h, silu=True, bias=bias, before=F.linear(emb, self.affine.weight))[0]
        factor, shift = self.factor_and_shift(self.affine(emb).float())
        affine = {"scale": self.norm1.weight * factor, "shift": self.norm1.bias * factor + shift}
        norm = self.norm1
        return norm_act(h, groups=norm.num_groups, eps=norm.eps, silu=True, bias=self.conv0.bias, **affine)[0]


class UNet(nn.Module):
    """The U: an encoder whose every output is a skip, two middle blocks, a decoder that takes the skips back.

    `level` 0 is the full resolution. Names in the state dict: `encoder.level1_down`, `decoder.level0_block3` ...
    Raises ValueError if the image cannot be halved often enough, or channels do not divide into heads.
    """

    def __init__(
        self,
        params: "SongUNetParams | DhariwalUNetParams",
        image_shape: Sequence[int],  # [C, H, W]
        style: BlockStyle,
        *,
        decoder_attention: Literal["last", "every"],  # blocks of a decoder's level that attend
        pyramid: bool,
    ) -> None:
        super().__init__()
        check_image_shape(image_shape, levels=len(params.channel_mult), kind=params.kind)
        image_channels, height, _ = image_shape
        widths = [params.channels * mult for mult in params.channel_mult]
        attends = [height >> level in params.attn_resolutions for level in range(len(widths))]
        self.input = nn.Conv2d(image_channels, params.channels, 3, padding=1)

        self.encoder, width, skips = nn.ModuleDict(), params.channels, [params.channels]
        for level, out in enumerate(widths):
            if level > 0:
                self.encoder[f"level{level}_down"] = Block(width, width, style, resample="down")
                skips.append(width)
            for i in range(params.num_blocks):
                self.encoder[f"level{level}_block{i}"] = Block(width, out, style, attention=attends[level])
                skips.append(width := out)
        self.middle = nn.ModuleList(Block(width, width, style, attention=on) for on in (True, False))
        self.decoder = nn.ModuleDict()
        for level, out in reversed(list(enumerate(widths))):
            if level < len(widths) - 1:
                self.decoder[f"level{level}_up"] = Block(width, width, style, resample="up")
            for i in range(params.num_blocks + 1):
                on = attends[level] and (decoder_attention == "every" or i == params.num_blocks)
                self.decoder[f"level{level}_block{i}"] = Block(width + skips.pop(), out, style, attention=on)
                width = out

        self.pyramid = nn.ModuleDict()  # the input added after each `down` block; empty: no pyramid
        for level, pair in enumerate(pairwise([image_channels, *widths[:-1]]), start=1):
            if pyramid:
                self.pyramid[f"level{level}_down"] = pyramid_input(*pair, style.resample_filter)
        self.output_norm = group_norm(width, eps=style.eps, groups=style.norm_groups)
        self.output = nn.Conv2d(width, image_channels, 3, padding=1)
        for number, block in enumerate(self.blocks()):
            block.number = number

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # x [B, C, H, W], emb [B, E]
        x = decode(self.middle, self.decoder, self.encode(x, emb), emb)
        norm = self.output_norm
        h = fused_norm(norm, x, silu=True)[0] if modes.fuses(x) else plain_norm(norm, x, silu=True)
        return in_own_precision(self.output, h)

    def encode(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        """Return the outputs of the input layer and of the encoder's blocks, each [B, C', H', W']."""
        pyramid, x = x, in_own_precision(self.input, x)
        x = x.to(modes.half_precision(x.device) or x.dtype)
        outs = [x]
        for name, block in self.encoder.items():
            x = block(x, emb)
            if name in self.pyramid:
                x = pyramid = (x + self.pyramid[name](pyramid)) * math.sqrt(0.5)
            outs.append(x)
        return outs

    def blocks(self) -> Iterator[Block]:
        """Yield the blocks, encoder first."""
        return (module for module in self.modules() if isinstance(module, Block))

    def residual_ends(self) -> Iterator[nn.Conv2d]:
        """Yield the layers that start near zero: the last of every residual branch, and the output layer."""
        for module in self.modules():
            if isinstance(module, Block):
                yield module.conv1
            elif isinstance(module, Attention):
                yield module.proj
        yield self.output


class EmbeddedUNet(nn.Module):
    """F(x, noise_labels, class_labels, augment_labels) -> [B, C, H, W]; class label -1 means no label."""

    def __init__(self, embed: nn.Module, unet: "UNet | MPUNet") -> None:
        super().__init__()
        self.embed, self.unet = embed, unet
        keep_parts_float32(embedding=embed, input=unet.input, output=unet.output)

    def forward(self, x: Tensor, noise_labels: Tensor, *conditions: Tensor | None) -> Tensor:
        """Return [B, C, H, W] of x, and noise_labels [B].

        Conditions are class labels int64 [B], augmentation labels [B, augment_dim], a second time [B] and weights of
        guidance [B], if any.
        """
        return self.unet(x, in_own_precision(self.embed, noise_labels, *conditions))
