"""Shared parts of the U-Nets: embeddings, attention, the residual block and the U itself.

The design follows EDM's re-implementations (arXiv:2206.00364, App. F.1) of DDPM++ and NCSN++ (arXiv:2011.13456) and of
ADM (arXiv:2105.05233): one block whose style selects the network.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cm_core.networks import modes
from cm_core.networks.dropout import dropout, of_these_rows
from cm_core.networks.resample import DOWN, UP, Filter, PyramidInput
from cm_core.tensors import expand_like

EMB_MULT = 4  # width of the embedding in base channels: all published configurations
KINDS_OF_BLOCKS = 64  # shapes, resamplings and modes of a network's blocks, each compiled once
MAX_PERIOD = 10_000  # longest period of the positional embedding (DDPM)


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
        return like.new_zeros(len(like), num_classes)
    return F.one_hot(class_labels + 1, num_classes + 1)[:, 1:].to(like.dtype)  # raises if a label is too large


def add_augment(emb: Tensor, layer: nn.Linear | None, augment_labels: Tensor | None) -> Tensor:
    """Add the projected augmentation labels to `emb`; None means that no transform was drawn."""
    if augment_labels is None:
        return emb
    if layer is None:
        raise ValueError("augment_labels given to a network built with augment_dim=0, which would let transforms leak")
    return emb + layer(augment_labels)


def group_norm(channels: int, *, eps: float) -> nn.GroupNorm:
    """Normalise over min(32, channels / 4) groups, or the next smaller number that divides `channels`."""
    groups = next(n for n in range(min(32, channels // 4), 0, -1) if channels % n == 0)
    return GroupNorm(groups, channels, eps=eps)


class GroupNorm(nn.GroupNorm):
    """In fp32 under autocast on every device: on the CPU its forward-mode derivative is fp32 beside a bf16 value."""

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.dtype.itemsize >= 4 else x.float()
        if not torch.compiler.is_compiling() and modes.is_plain():
            x = x.contiguous()  # the forward-mode derivative's formula takes views
        return super().forward(x)


@dataclass(frozen=True, kw_only=True)
class BlockStyle:
    """Settings common to all blocks of one network."""

    emb_channels: int
    dropout: float
    eps: float  # of group norm
    skip_scale: float  # factor after each residual sum; sqrt(1/2) keeps the variance
    scale_shift: bool  # the embedding scales and shifts the second norm, rather than being added before it
    channels_per_head: int | None  # None: one head
    resample_filter: Filter
    resample_proj: bool  # a resampling block has a 1x1 convolution on its skip path

    def num_heads(self, channels: int) -> int:
        """Return the heads of an attention over `channels`; raise ValueError if they do not divide evenly."""
        if self.channels_per_head is None:
            return 1
        if channels % self.channels_per_head:
            raise ValueError(
                f"channels_per_head is {self.channels_per_head}, which does not divide the {channels} channels "
                f"of a block with attention; allowed: a divisor of {channels}"
            )
        return channels // self.channels_per_head


class Attention(nn.Module):
    """Self-attention over the pixels, added to the input. `qkv` channels are ordered (3, heads, channels per head)."""

    def __init__(self, channels: int, style: BlockStyle) -> None:
        super().__init__()
        self.num_heads, self.skip_scale = style.num_heads(channels), style.skip_scale
        self.norm = group_norm(channels, eps=style.eps)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # x [B, C, H, W]
        if modes.fuses(x):
            return self._fused(x)
        return (x + self.proj(self.attend(self.qkv(self.norm(x))))) * self.skip_scale

    def attend(self, qkv: Tensor) -> Tensor:  # qkv [B, 3 C, H, W] -> [B, C, H, W]
        batch, channels, height, width = qkv.shape
        qkv = qkv.permute(0, 2, 3, 1)  # channels last, where each head is contiguous
        qkv = qkv.reshape(batch, height * width, 3, self.num_heads, channels // 3 // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, H * W, C / heads]
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return out.reshape(batch, height, width, channels // 3).permute(0, 3, 1, 2)

    def _fused(self, x: Tensor) -> Tensor:
        from cm_core.networks.kernels import residual_add

        h, x, _ = fused_norm(self.norm, x, silu=False)
        qkv = F.linear(h.permute(0, 2, 3, 1), self.qkv.weight.flatten(1), self.qkv.bias).permute(0, 3, 1, 2)
        return residual_add(x, conv_without_bias(self.proj, self.attend(qkv)), bias_of(self.proj), self.skip_scale)


class Block(nn.Module):
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
        super().__init__()
        self.dropout, self.skip_scale, self.scale_shift = style.dropout, style.skip_scale, style.scale_shift
        resamplers = {"down": DOWN[style.resample_filter], "up": UP[style.resample_filter], None: nn.Identity}
        self.resample = resamplers[resample]()
        self.norm0 = group_norm(in_channels, eps=style.eps)
        self.conv0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.affine = nn.Linear(style.emb_channels, out_channels * (2 if style.scale_shift else 1))
        self.norm1 = group_norm(out_channels, eps=style.eps)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        project = in_channels != out_channels or (resample is not None and style.resample_proj)
        self.skip: nn.Conv2d | nn.Identity = nn.Conv2d(in_channels, out_channels, 1) if project else nn.Identity()
        self.attention = Attention(out_channels, style) if attention else nn.Identity()
        self.number = 0  # index among the blocks of its network
        self.checkpointed = False  # activation checkpointing (1604.06174)

    def forward(self, x: Tensor, emb: Tensor, beside: Tensor | None = None) -> Tensor:
        """Return [B, out, H, W] of x [B, C, H, W] and emb [B, E]; `beside` holds the last channels, if given."""
        if self.checkpointed and torch.is_grad_enabled() and not modes.is_plain():
            return checkpoint(of_these_rows(self._compute), x, emb, beside, use_reentrant=False)
        return self._compute(x, emb, beside)

    def _compute(self, x: Tensor, emb: Tensor, beside: Tensor | None) -> Tensor:
        if modes.fuses(x):
            return self._fused(x, emb, beside)
        x = with_channels(x, beside)
        h = self.conv0(self.resample(F.silu(self.norm0(x))))
        h = self.drop(F.silu(self.modulate(h, emb)))
        return self.attention((self.skip(self.resample(x)) + self.conv1(h)) * self.skip_scale)

    def drop(self, h: Tensor) -> Tensor:
        return dropout(h, self.dropout, layer=self.number) if self.training and self.dropout > 0 else h

    def modulate(self, h: Tensor, emb: Tensor) -> Tensor:
        params = expand_like(self.affine(emb), h)
        if not self.scale_shift:
            return self.norm1(h + params)
        scale, shift = params.chunk(2, dim=1)
        return torch.addcmul(shift, self.norm1(h), 1 + scale)

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
        scale, shift = self.affine(emb).float().chunk(2, dim=1)
        h, _, _ = norm_act(
            h,
            groups=self.norm1.num_groups,
            eps=self.norm1.eps,
            scale=self.norm1.weight * (1 + scale),
            shift=self.norm1.bias * (1 + scale) + shift,
            silu=True,
            bias=self.conv0.bias,
        )
        return h


class UNet(nn.Module):
    """The U: an encoder whose every output is a skip, two middle blocks, a decoder that takes the skips back.

    `level` 0 is the full resolution. Names in the state dict: `encoder.level1_down`, `decoder.level0_block3` ...
    """

    def __init__(
        self,
        image_channels: int,
        channels: int,
        channel_mult: Sequence[int],
        style: BlockStyle,
        *,
        num_blocks: int,
        attn_levels: Collection[int],
        decoder_attention: Literal["last", "every"],
        pyramid: bool,
    ) -> None:
        super().__init__()
        widths = [channels * mult for mult in channel_mult]
        self.input = nn.Conv2d(image_channels, channels, 3, padding=1)
        self.encoder, skips = _encoder(channels, widths, style, num_blocks, attn_levels)
        self.middle = nn.ModuleList(Block(widths[-1], widths[-1], style, attention=on) for on in (True, False))
        every = decoder_attention == "every"
        self.decoder = _decoder(widths, skips, style, num_blocks, attn_levels, every)
        self.pyramid = nn.ModuleDict()  # the input added after each `down` block; empty: no pyramid
        for level, pair in enumerate(pairwise([image_channels, *widths[:-1]]), start=1):
            if pyramid:
                self.pyramid[f"level{level}_down"] = PyramidInput(*pair, style.resample_filter)
        self.output_norm = group_norm(widths[0], eps=style.eps)
        self.output = nn.Conv2d(widths[0], image_channels, 3, padding=1)
        for number, block in enumerate(self.blocks()):
            block.number = number

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # x [B, C, H, W], emb [B, E]
        pyramid, x = x, modes.in_own_precision(self.input, x)
        x = x.to(modes.half_precision(x.device) or x.dtype)
        skips = [x]
        for name, block in self.encoder.items():
            x = block(x, emb)
            if name in self.pyramid:
                x = pyramid = (x + self.pyramid[name](pyramid)) * math.sqrt(0.5)
            skips.append(x)
        for block in self.middle:
            x = block(x, emb)
        for name, block in self.decoder.items():
            x = block(x, emb, None if name.endswith("_up") else skips.pop())
        if modes.fuses(x):
            return modes.in_own_precision(self.output, fused_norm(self.output_norm, x, silu=True)[0])
        return modes.in_own_precision(self.output, F.silu(self.output_norm(x)))

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


def compile_blocks(net: nn.Module) -> None:
    """Compile the repeated blocks with torch.compile, once per kind, not the whole network."""
    blocks: list[nn.Module] = [module for module in net.modules() if isinstance(module, Block)]
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, KINDS_OF_BLOCKS)
    for block in blocks or [net]:
        block.compile()


def _encoder(
    width: int, widths: Sequence[int], style: BlockStyle, num_blocks: int, attn_levels: Collection[int]
) -> tuple[nn.ModuleDict, list[int]]:
    """Return the encoder's blocks and the channels of every skip, that of the input convolution included."""
    blocks, skips = nn.ModuleDict(), [width]
    for level, out in enumerate(widths):
        if level > 0:
            blocks[f"level{level}_down"] = Block(width, width, style, resample="down")
            skips.append(width)
        for i in range(num_blocks):
            blocks[f"level{level}_block{i}"] = Block(width, out, style, attention=level in attn_levels)
            width = out
            skips.append(width)
    return blocks, skips


def _decoder(
    widths: Sequence[int],
    skips: list[int],
    style: BlockStyle,
    num_blocks: int,
    attn_levels: Collection[int],
    every: bool,
) -> nn.ModuleDict:
    """Return the decoder's blocks; attention follows `every` block of its levels or only the last."""
    blocks, width = nn.ModuleDict(), widths[-1]
    for level, out in reversed(list(enumerate(widths))):
        if level < len(widths) - 1:
            blocks[f"level{level}_up"] = Block(width, width, style, resample="up")
        for i in range(num_blocks + 1):
            attention = level in attn_levels and (every or i == num_blocks)
            blocks[f"level{level}_block{i}"] = Block(width + skips.pop(), out, style, attention=attention)
            width = out
    return blocks
