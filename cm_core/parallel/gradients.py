"""Gradients summed over ranks in buckets, overlapping the backward pass."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cm_core.parallel import ranks

BUCKET_BYTES = 64 * 2**20  # minimum bytes of gradients per all-reduce


@contextmanager
def summed_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """All-reduce the gradients that one backward pass within this context computes, in buckets while it runs.

    The passes are split by rows over the ranks. There must be no gradients before.
    """
    with exchanges() as begin:
        buckets = GradientBuckets(begin)
        with buckets.taken_from(parameters):
            yield
        rest = buckets.rest()
        if rest is not None:  # None: a single rank, or a CUDA graph that exchanges its gradients itself (graphs.py)
            begin(rest)


@contextmanager
def exchanges() -> Iterator[Callable[[Tensor], None]]:
    """Yield a function that starts an in-place all-reduce of a tensor; on exit all that were started are complete.

    On a GPU they complete before the work launched next.
    """
    under_way = []

    def begin(bucket: Tensor) -> None:
        with ranks.exchange():
            under_way.append(dist.all_reduce(bucket, async_op=True))

    yield begin
    with ranks.exchange():
        for work in under_way:
            work.wait()


class GradientBuckets:
    """Collects gradients into contiguous buckets for the exchange; the gradients become views of their bucket."""

    def __init__(self, on_full: Callable[[Tensor], None]) -> None:
        self._on_full, self._bytes = on_full, 0
        self._waiting: list[tuple[nn.Parameter, nn.Parameter]] = []

    @contextmanager
    def taken_from(
        self, parameters: Iterable[nn.Parameter], half_weights: Mapping[nn.Parameter, nn.Parameter] | None = None
    ) -> Iterator[None]:
        """Collect the gradients of one backward pass within this context, as it computes them.

        Their order is that of the pass, the same on every rank. `half_weights` are copies in another precision, with
        which the pass was computed: their gradients become those of the parameters, even with one rank.
        """
        half_weights = half_weights or {}
        taken = [p for p in (parameters if ranks.world_size() > 1 else half_weights) if p.requires_grad]
        leaves = [half_weights.get(p, p) for p in taken]
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
        """Collect a parameter's gradient; first hand on the current bucket if it is large enough to exchange."""
        if self._bytes >= BUCKET_BYTES and ranks.world_size() > 1:
            self._on_full(self._flushed())
        self._waiting.append((p, leaf))
        self._bytes += p.nbytes

    def rest(self) -> Tensor | None:
        """Return the last bucket; None with one rank, or if no gradient came."""
        last = self._flushed() if self._waiting else None
        return last if ranks.world_size() > 1 else None

    def _flushed(self) -> Tensor:
        taken, self._waiting, self._bytes = self._waiting, [], 0
        sizes = [p.numel() for p, _ in taken]
        flat = taken[0][0].new_empty(sum(sizes))
        parts = flat.split(sizes)
        gradients = [_in_memory(leaf) for _, leaf in taken]
        for dtype in {gradient.dtype for gradient in gradients}:  # one kernel per dtype
            places, found = zip(
                *((a, b) for a, b in zip(parts, gradients, strict=True) if b.dtype == dtype), strict=True
            )
            torch._foreach_copy_(places, found)
        for (p, leaf), part in zip(taken, parts, strict=True):
            leaf.grad = None
            p.grad = part.as_strided(p.shape, p.stride())
        return flat


def _in_memory(leaf: nn.Parameter) -> Tensor:
    """Return a gradient's numbers in memory order; autograd gives it the layout of its parameter."""
    gradient = leaf.grad
    assert gradient is not None, "only a leaf whose gradient came is waiting"
    return gradient.as_strided((gradient.numel(),), (1,))
