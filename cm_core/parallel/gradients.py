"""Gradients summed over processes, in buckets, while the backward pass goes on."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cm_core.parallel import ranks

BUCKET_BYTES = 64 * 2**20  # bytes of gradients that are exchanged at a time, at least


@contextmanager
def summed_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Sum over the processes the gradients that one backward pass within this context computes of divided passes.

    They are exchanged in pieces while it goes on. There must be none before.
    """
    with exchanges() as begin:
        pieces = GradientBuckets(begin)
        with pieces.taken_from(parameters):
            yield
        rest = pieces.rest()
        if rest is not None:  # else there are no others, or the pass was recorded and exchanges by itself (graphs.py)
            begin(rest)


@contextmanager
def exchanges() -> Iterator[Callable[[Tensor], None]]:
    """Yield what begins to sum a tensor over the processes in its place; afterwards all that was begun is done.

    On a GPU it will be done before what is launched next.
    """
    under_way = []

    def begin(piece: Tensor) -> None:
        with ranks.exchange():
            under_way.append(dist.all_reduce(piece, async_op=True))

    yield begin
    with ranks.exchange():
        for work in under_way:
            work.wait()


class GradientBuckets:
    """Brings gradients together in pieces of memory, to be exchanged; they are parts of these from then on."""

    def __init__(self, on_full: Callable[[Tensor], None]) -> None:
        self._on_full, self._bytes = on_full, 0
        self._waiting: list[tuple[nn.Parameter, nn.Parameter]] = []

    @contextmanager
    def taken_from(
        self, parameters: Iterable[nn.Parameter], stand_ins: Mapping[nn.Parameter, nn.Parameter] | None = None
    ) -> Iterator[None]:
        """Take the gradients of one backward pass within this context, as it computes them.

        The order is that of the pass, the same in every process. `stand_ins` are copies in another precision, with
        which the pass was computed: their gradients become those of the parameters, also in a process that is alone.
        """
        stand_ins = stand_ins or {}
        taken = [p for p in (parameters if ranks.world_size() > 1 else stand_ins) if p.requires_grad]
        leaves = [stand_ins.get(p, p) for p in taken]
        hooks = [
            leaf.register_post_accumulate_grad_hook(functools.partial(self._take, p))
            for p, leaf in zip(taken, leaves, strict=True)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _take(self, p: nn.Parameter, leaf: nn.Parameter) -> None:
        """Take a parameter's gradient; what was there before is handed on if it is large enough to be exchanged."""
        if self._bytes >= BUCKET_BYTES and ranks.world_size() > 1:
            self._on_full(self._brought_together())
        self._waiting.append((p, leaf))
        self._bytes += p.nbytes

    def rest(self) -> Tensor | None:
        """Return the last piece; None where there is nobody to exchange it with, or no gradient came."""
        last = self._brought_together() if self._waiting else None
        return last if ranks.world_size() > 1 else None

    def _brought_together(self) -> Tensor:
        taken, self._waiting, self._bytes = self._waiting, [], 0
        sizes = [p.numel() for p, _ in taken]
        together = taken[0][0].new_empty(sum(sizes))
        parts = together.split(sizes)
        gradients = [_in_memory(leaf) for _, leaf in taken]
        for dtype in {gradient.dtype for gradient in gradients}:  # one kernel each
            places, found = zip(
                *((a, b) for a, b in zip(parts, gradients, strict=True) if b.dtype == dtype), strict=True
            )
            torch._foreach_copy_(places, found)
        for (p, leaf), part in zip(taken, parts, strict=True):
            leaf.grad = None
            p.grad = part.as_strided(p.shape, p.stride())
        return together


def _in_memory(leaf: nn.Parameter) -> Tensor:
    """Return a gradient's numbers as they lie in memory, where autograd lays them out as their parameter's."""
    gradient = leaf.grad
    assert gradient is not None, "only a leaf whose gradient came is waiting"
    return gradient.as_strided((gradient.numel(),), (1,))
