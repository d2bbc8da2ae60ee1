"""Data parallelism by rows: a process computes its own rows of every pass; the others are zeros and get no gradient."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cm_core.parallel import ranks


def split_rows(module: nn.Module) -> None:
    """Let each process compute its own rows of what passes through `module`; the others are zeros, and get no gradient.

    Gradients, and forward-mode derivatives, of the parameters are then those of a process's own rows.
    """
    if ranks.world_size() == 1:
        return
    plain = module.forward

    def forward(*args: Tensor | None) -> Tensor:
        return _Place.apply(plain(*(None if arg is None else own_rows(arg) for arg in args)))

    module.forward = forward


def own_rows(whole: Tensor) -> Tensor:
    """Return the rows that this process computes, a view; raises ValueError where they do not come out even."""
    if len(whole) % ranks.world_size():
        raise ValueError(f"{len(whole)} rows cannot be divided among {ranks.world_size()} processes")
    size = len(whole) // ranks.world_size()
    return whole.narrow(0, ranks.rank() * size, size)


def gathered_rows(whole: Tensor) -> Tensor:
    """Return a tensor of which each process has put in its own rows."""
    if ranks.world_size() == 1:
        return whole
    rows = torch.empty_like(whole)
    with ranks.exchange():
        dist.all_gather(list(rows.chunk(ranks.world_size())), own_rows(whole).contiguous())
    return rows


class _Place(torch.autograd.Function):
    """Own rows in their places among zeros."""

    @staticmethod
    def forward(rows: Tensor) -> Tensor:
        whole = rows.new_zeros(ranks.world_size() * rows.shape[0], *rows.shape[1:])
        own_rows(whole).copy_(rows)
        return whole

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx, d_whole: Tensor) -> Tensor:
        return own_rows(d_whole)

    @staticmethod
    def jvp(ctx, d_rows: Tensor) -> Tensor:
        return _Place.forward(d_rows)
