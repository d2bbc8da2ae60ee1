"""Data parallelism by rows: a rank computes its own rows of every pass; the others are zeros without gradient."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cm_core.networks.dropout import rows_from
from cm_core.parallel import ranks


def by_rows(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function of whole batches that computes this rank's rows; the other rows are zeros without gradient.

    Gradients, and forward-mode derivatives, of parameters are those of the own rows.
    """

    def pass_by_rows(first: Tensor, *others: Tensor | None) -> Tensor:
        with rows_from(ranks.rank() * _rows_each(first)):
            return _Place.apply(compute(own_rows(first), *(None if t is None else own_rows(t) for t in others)))

    return pass_by_rows


def own_rows(whole: Tensor) -> Tensor:
    """Return this rank's rows, a view; raise ValueError if the batch does not divide evenly."""
    size = _rows_each(whole)
    return whole.narrow(0, ranks.rank() * size, size)


def _rows_each(whole: Tensor) -> int:
    if len(whole) % ranks.world_size():
        raise ValueError(f"{len(whole)} rows cannot be divided among {ranks.world_size()} processes")
    return len(whole) // ranks.world_size()


def gathered_rows(whole: Tensor) -> Tensor:
    """Return the tensor assembled from every rank's own rows."""
    if ranks.world_size() == 1:
        return whole
    rows = torch.empty_like(whole)
    with ranks.exchange():
        dist.all_gather(list(rows.chunk(ranks.world_size())), own_rows(whole).contiguous())
    return rows


class _Place(torch.autograd.Function):
    """The own rows at their positions among zeros."""

    @staticmethod
    def forward(rows: Tensor) -> Tensor:
        whole = rows.new_zeros(ranks.world_size() * rows.shape[0], *rows.shape[1:])
        own_rows(whole).copy_(rows)
        return whole

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, d_whole: Tensor) -> Tensor:
        return own_rows(d_whole)

    @staticmethod
    def jvp(ctx: Any, d_rows: Tensor) -> Tensor:
        return _Place.forward(d_rows)
