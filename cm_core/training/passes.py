"""All wrappers of a network's passes in training, in one place.

From the inside out, with the reasons for this order:

1. *Blocks*, compiled or with activation checkpointing: they are parts of the network.
2. *Micro-batches* of rows (train.accumulate), each recomputed in the backward pass: one at a time has its activations
   in memory. The loss still sees the whole batch.
3. A *CUDA graph* of the whole pass, one launch instead of hundreds. Only around a bare network: recomputation runs
   Python in the backward pass, and torch.compile and FSDP2 launch their kernels themselves.
4. *This rank's rows*, outermost, so that everything inside has their shapes, and draws their dropout masks.

None of them changes a loss or a gradient beyond rounding.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cm_core.methods.base import Method, Models
from cm_core.networks.blocks import ResidualBlock
from cm_core.networks.dropout import of_these_rows, rows_from
from cm_core.networks.modes import is_plain
from cm_core.parallel import ranks
from cm_core.parallel.graphs import with_cuda_graphs
from cm_core.parallel.rows import by_rows
from cm_core.training.config import Train

KINDS_OF_BLOCKS = 64  # shapes, resamplings and modes of a network's blocks, each compiled once

Pass = Callable[..., Tensor]  # (x [B, C, H, W], noise labels [B], class labels, augmentation labels) -> [B, C, H, W]


def compose_passes(models: Models, method: Method, train: Train, *, graphs: bool) -> Models:
    """Return `models` with passes wrapped as `train` asks, and on every rank restricted to its own rows.

    `graphs`: whether CUDA graphs are allowed, which FSDP2 does not support.
    """
    every = (models.student, models.target, models.teacher, models.score, models.discriminator, models.base)
    for model in {id(m): m for m in every if m is not None}.values():
        model.network_pass = compose(model.net, train, graphs=graphs)
    # LPIPS: a rank needs only its own rows of its loss, unless derivatives are taken through it.
    if isinstance(models.distance, nn.Module) and not method.forward_mode and ranks.world_size() > 1:
        return replace(models, distance=by_rows(models.distance))
    return models


def compose(net: nn.Module, train: Train, *, graphs: bool) -> Pass:
    """Return the wrapped pass of a batch through `net`; the module docstring explains the order."""
    if train.compile:
        compile_blocks(net)
    for block in (module for module in net.modules() if isinstance(module, ResidualBlock)):
        block.checkpointed = train.checkpoint_activations
    network_pass: Pass = net.__call__  # no module, which would become a part of the model that is trained
    if train.accumulate > 1:
        network_pass = in_parts(net, train.accumulate)
    elif graphs and not train.compile and not train.checkpoint_activations:
        network_pass = with_cuda_graphs(net)
    return by_rows(network_pass) if ranks.world_size() > 1 else network_pass


def compile_blocks(net: nn.Module) -> None:
    """Compile the repeated blocks with torch.compile, once per kind, not the whole network."""
    blocks: list[nn.Module] = [module for module in net.modules() if isinstance(module, ResidualBlock)]
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, KINDS_OF_BLOCKS)
    for block in blocks or [net]:
        block.compile()


def in_parts(network_pass: Pass, parts: int) -> Pass:
    """Return a pass split into `parts` by rows, each recomputed in the backward pass (1604.06174)."""

    def pass_in_parts(*args: Tensor | None) -> Tensor:
        count = min(parts, len(next(arg for arg in args if arg is not None)))  # a teacher may see fewer rows
        columns = [[None] * count if arg is None else arg.tensor_split(count) for arg in args]
        outs, first = [], 0
        for part in zip(*columns, strict=True):
            with rows_from(first):
                outs.append(_recomputed(network_pass, part))
            first += len(outs[-1])
        return torch.cat(outs)

    return pass_in_parts


def _recomputed(network_pass: Pass, args: tuple[Tensor | None, ...]) -> Tensor:
    if not torch.is_grad_enabled() or is_plain():  # nothing is kept, or forward-mode differentiation
        return network_pass(*args)
    return checkpoint(of_these_rows(network_pass), *args, use_reentrant=False)
