"""Several processes at one training, a device each: every pass through a network is divided by rows.

All else everybody does alike: the loss sees the whole batch in every process, with the randomness it has always had. So
losses, metrics and weights agree without being sent, and no method knows that it is not alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

TIMEOUT = timedelta(minutes=5)  # of one exchange; the first process draws grids and saves states while the others wait


def count() -> int:
    """Return how many processes share this training."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return which of them this process is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the process that logs, draws and saves for all."""
    return rank() == 0


@contextmanager
def joined(rank: int, count: int, port: int) -> Iterator[None]:
    """Be process `rank` of `count` on this machine, which meet at `port`; on a machine with GPUs, use GPU `rank`."""
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
        backend = "cpu:gloo,cuda:nccl"
    where = f"tcp://127.0.0.1:{port}"
    dist.init_process_group(backend, init_method=where, rank=rank, world_size=count, timeout=TIMEOUT)
    yield
    dist.destroy_process_group()  # not after an error: it may wait for a process that is gone


def agree(flag: bool) -> bool:
    """Return whether any process says so; all must ask."""
    if count() == 1:
        return flag
    said = torch.tensor(int(flag))
    dist.all_reduce(said, dist.ReduceOp.MAX)
    return bool(said)


def wait_for_all() -> None:
    """Return when every process has come here."""
    agree(False)


def divide_rows(module: nn.Module) -> None:
    """Let each process compute its rows of what passes through `module`, and hand all rows to everybody.

    Gradients, and forward-mode derivatives, of the parameters are then those of a process's own rows.
    """
    if count() == 1:
        return
    plain = module.forward

    def forward(*args: Tensor | None) -> Tensor:
        return _Gather.apply(plain(*(None if arg is None else _own_rows(arg) for arg in args)))

    module.forward = forward


def sum_gradients(model: nn.Module, weighting: nn.Module | None) -> None:
    """Sum the gradients of divided passes; those of `weighting`, which sees every row everywhere, are averaged."""
    if count() == 1:
        return
    _all_reduce([p.grad for p in model.parameters() if p.grad is not None])
    if weighting is not None:
        gradients = [p.grad for p in weighting.parameters() if p.grad is not None]
        _all_reduce(gradients)
        torch._foreach_div_(gradients, count())


def _all_reduce(tensors: list[Tensor]) -> None:
    """Sum tensors over the processes, in one exchange."""
    together = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(together)
    parts = together.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)])


def _own_rows(whole: Tensor) -> Tensor:
    if len(whole) % count():
        raise ValueError(f"{len(whole)} rows cannot be divided among {count()} processes")
    size = len(whole) // count()
    return whole.narrow(0, rank() * size, size)


def _gathered(rows: Tensor) -> Tensor:
    whole = rows.new_empty(count() * rows.shape[0], *rows.shape[1:])
    dist.all_gather(list(whole.chunk(count())), rows.contiguous())
    return whole


class _Gather(torch.autograd.Function):
    """All rows from everybody's; each takes back the gradient of its own."""

    @staticmethod
    def forward(rows: Tensor) -> Tensor:
        return _gathered(rows)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx, d_whole: Tensor) -> Tensor:
        return _own_rows(d_whole)

    @staticmethod
    def jvp(ctx, d_rows: Tensor) -> Tensor:
        return _gathered(d_rows)
