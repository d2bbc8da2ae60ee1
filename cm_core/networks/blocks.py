"""Shared by all U-Nets: blocks with a place, recomputation and dropout, attention over pixels, parts in float32."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cm_core.networks import modes
from cm_core.networks.dropout import dropout, of_these_rows


class ResidualBlock(nn.Module):
    """The repeated unit of a U-Net: trainings recompute it, compile it and shard its weights as a whole."""

    def __init__(self, rate: float, largest_height: int | None) -> None:
        super().__init__()
        self.dropout, self.dropout_resolution = rate, largest_height
        self.number = 0  # index among the blocks of its network
        self.checkpointed = False  # activation checkpointing (1604.06174)

    def forward(self, x: Tensor, emb: Tensor, beside: Tensor | None = None) -> Tensor:
        """Return [B, out, H, W] of x [B, C, H, W] and emb [B, E]; `beside` holds the last channels, if given."""
        if self.checkpointed and torch.is_grad_enabled() and not modes.is_plain():
            return checkpoint(of_these_rows(self.compute), x, emb, beside, use_reentrant=False)
        return self.compute(x, emb, beside)

    def compute(self, x: Tensor, emb: Tensor, beside: Tensor | None) -> Tensor:
        """Return the output of `forward`."""
        raise NotImplementedError

    def drop(self, h: Tensor) -> Tensor:
        """Drop activations in training, where the image is not too large for it."""
        if not self.training or self.dropout == 0 or h.shape[2] > (self.dropout_resolution or h.shape[2]):
            return h
        return dropout(h, self.dropout, layer=self.number)


def decode(middle: nn.ModuleList, decoder: nn.ModuleDict, skips: list[Tensor], emb: Tensor) -> Tensor:
    """Return the last block's output. `skips` are the encoder's; every block but those that enlarge takes one."""
    x = skips[-1]
    for block in middle:
        x = block(x, emb)
    for name, block in decoder.items():
        x = block(x, emb, None if name.endswith("_up") else skips.pop())
    return x


def attend(qkv: Tensor, num_heads: int, prepare: Callable[[Tensor], Tensor] = lambda heads: heads) -> Tensor:
    """Return attention over the pixels, [B, C, H, W], of qkv [B, 3 C, H, W], channels ordered (3, heads, C / heads).

    `prepare` maps queries, keys and values [B, H W, 3, heads, C / heads] to such.
    """
    batch, channels, height, width = qkv.shape
    heads = qkv.permute(0, 2, 3, 1)  # channels last, where each head is contiguous
    heads = prepare(heads.reshape(batch, height * width, 3, num_heads, channels // 3 // num_heads))
    q, k, v = heads.permute(2, 0, 3, 1, 4)  # [B, heads, H * W, C / heads]
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return out.reshape(batch, height, width, channels // 3).permute(0, 3, 1, 2)


def num_heads(channels: int, per_head: int) -> int:
    """Return the heads of an attention over `channels`; raise ValueError if they do not divide evenly."""
    if channels % per_head:
        raise ValueError(
            f"channels_per_head is {per_head}, which does not divide the {channels} channels "
            f"of a block with attention; allowed: a divisor of {channels}"
        )
    return channels // per_head


def keep_parts_float32(**parts: nn.Module) -> None:
    """Mark the parts named in modes.FLOAT32_PARTS, which `in_own_precision` then computes in float32."""
    for name in modes.FLOAT32_PARTS & parts.keys():
        for module in parts[name].modules():
            module.keeps_float32 = True  # type: ignore[assignment]  # a mark, neither tensor nor module


def in_own_precision(module: nn.Module, *args: Tensor | None) -> Tensor:
    """Compute a part of a network, under autocast in float32 if it is marked so."""
    device = next(arg for arg in args if arg is not None).device
    if modes.half_precision(device) is None or not getattr(module, "keeps_float32", False):
        return module(*args)
    args = tuple(arg.float() if arg is not None and arg.is_floating_point() else arg for arg in args)
    with torch.autocast(device.type, enabled=False):
        return module(*args)
