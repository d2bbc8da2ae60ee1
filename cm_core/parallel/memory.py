"""Train in less memory: blocks that compute their activations again, batches that pass through the network in parts.

Both change nothing but rounding: the loss sees the whole batch, with the randomness it has always had.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cm_core.networks.layers import Block, is_plain


def checkpoint_blocks(net: nn.Module) -> None:
    """Keep only the inputs of a U-Net's blocks, and compute the rest again in the backward pass (1604.06174)."""
    for module in net.modules():
        if isinstance(module, Block):
            _recompute(module)


def _recompute(module: nn.Module) -> None:
    plain = module.forward

    def forward(*args: Tensor | None) -> Tensor:
        if not torch.is_grad_enabled() or is_plain():
            return plain(*args)
        return checkpoint(plain, *args, use_reentrant=False)

    module.forward = forward


def split_passes(net: nn.Module, parts: int) -> None:
    """Let a batch pass through `net` in parts; the activations of one part at a time are in memory."""
    _recompute(net)
    plain = net.forward

    def forward(*args: Tensor | None) -> Tensor:
        if is_plain():
            return plain(*args)
        columns = [[None] * parts if arg is None else arg.tensor_split(parts) for arg in args]
        return torch.cat([plain(*part) for part in zip(*columns, strict=True)])

    net.forward = forward
