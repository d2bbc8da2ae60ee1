"""Several processes at one training, a device each: every pass through a network is divided by rows.

Each sees the whole batch, with the randomness it has always had, and computes the rows of its own; in the rows of
others there are zeros where a network's output should be, and what a method makes of them is dropped. So passes wait
for nobody, gradients and losses are exchanged once a step, and no method knows that it is not alone.
"""

import functools
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

LOCAL = "127.0.0.1"
TIMEOUT = timedelta(minutes=5)  # of one exchange; the first process draws grids and saves states while the others wait
PIECE = 64 * 2**20  # bytes of gradients that are exchanged at a time, at least


def world_size() -> int:
    """Return how many processes share this training."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return which of them this process is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the process that logs, draws and saves for all."""
    return rank() == 0


class ProcessLost(RuntimeError):
    """An exchange failed, most likely because one of the processes is gone."""


def listen(host: str, port: int = 0) -> dist.TCPStore:
    """Open the place where the processes meet, at this address of this machine alone; port 0: any (`.port` says)."""
    listener = socket.create_server((host, port), family=socket.getaddrinfo(host, port)[0][0])
    port, descriptor = listener.getsockname()[1], listener.detach()
    return dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor)


def call(host: str, port: int) -> dist.TCPStore:
    """Find the place that the first process has opened, or will open soon."""
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=TIMEOUT)


@contextmanager
def joined(rank: int, count: int, port: int) -> Iterator[None]:
    """Be process `rank` of `count` on this machine; one that started them all listens at `port` of LOCAL for them.

    On a machine with GPUs, use GPU `rank`.
    """
    with member(call(LOCAL, port), rank, count, device=rank):
        yield


@contextmanager
def member(store: dist.TCPStore, rank: int, count: int, *, device: int) -> Iterator[None]:
    """Be process `rank` of `count`, which meet at `store`; on a machine with GPUs, use its GPU `device`."""
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    with exchange():
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)
    yield
    dist.destroy_process_group()  # not after an error: it may wait for a process that is gone


@contextmanager
def exchange() -> Iterator[None]:
    """Tell errors of an exchange from all others, as ProcessLost."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ProcessLost(str(error)) from error


def agree(flag: bool) -> bool:
    """Return whether any process says so; all must ask."""
    if world_size() == 1:
        return flag
    said = torch.tensor(int(flag))
    with exchange():
        dist.all_reduce(said, dist.ReduceOp.MAX)
    return bool(said)


def wait_for_all() -> None:
    """Return when every process has come here."""
    agree(False)


def broadcast_from_main(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the first process's tensors by name, to the bit, on devices of its kind; those of the others do not count.

    All must ask for all of them. They come one by one: nobody needs memory for all.
    """
    if world_size() == 1:
        yield from tensors.items()
        return
    listing = [{name: (tensor.shape, tensor.dtype, tensor.device.type) for name, tensor in tensors.items()}]
    with exchange():
        dist.broadcast_object_list(listing)
    for name, (shape, dtype, kind) in listing[0].items():
        tensor = tensors[name].contiguous() if is_main() else torch.empty(shape, dtype=dtype, device=kind)
        with exchange():
            dist.broadcast(tensor, 0)
        yield name, tensor


def send_to_main(rows: Tensor, owner: int) -> None:
    """Fill the first process's `rows` with those of process `owner`; both must call, others may."""
    with exchange():
        if is_main() and owner:
            dist.recv(rows, owner)
        elif owner == rank() != 0:
            dist.send(rows, 0)


def split_rows(module: nn.Module) -> None:
    """Let each process compute its own rows of what passes through `module`; the others are zeros, and get no gradient.

    Gradients, and forward-mode derivatives, of the parameters are then those of a process's own rows.
    """
    if world_size() == 1:
        return
    plain = module.forward

    def forward(*args: Tensor | None) -> Tensor:
        return _Place.apply(plain(*(None if arg is None else own_rows(arg) for arg in args)))

    module.forward = forward


def own_rows(whole: Tensor) -> Tensor:
    """Return the rows that this process computes, a view; raises ValueError where they do not come out even."""
    if len(whole) % world_size():
        raise ValueError(f"{len(whole)} rows cannot be divided among {world_size()} processes")
    size = len(whole) // world_size()
    return whole.narrow(0, rank() * size, size)


def gathered_rows(whole: Tensor) -> Tensor:
    """Return a tensor of which each process has put in its own rows."""
    if world_size() == 1:
        return whole
    rows = torch.empty_like(whole)
    with exchange():
        dist.all_gather(list(rows.chunk(world_size())), own_rows(whole).contiguous())
    return rows


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
        with exchange():
            under_way.append(dist.all_reduce(piece, async_op=True))

    yield begin
    with exchange():
        for work in under_way:
            work.wait()


class GradientBuckets:
    """Brings gradients together in pieces of memory, to be exchanged; they are parts of these from then on."""

    def __init__(self, on_full: Callable[[Tensor], None]) -> None:
        self._on_full, self._waiting, self._bytes = on_full, [], 0

    @contextmanager
    def taken_from(
        self, parameters: Iterable[nn.Parameter], stand_ins: Mapping[nn.Parameter, nn.Parameter] | None = None
    ) -> Iterator[None]:
        """Take the gradients of one backward pass within this context, as it computes them.

        The order is that of the pass, the same in every process. `stand_ins` are copies in another precision, with
        which the pass was computed: their gradients become those of the parameters, also in a process that is alone.
        """
        stand_ins = stand_ins or {}
        taken = [p for p in (parameters if world_size() > 1 else stand_ins) if p.requires_grad]
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
        if self._bytes >= PIECE and world_size() > 1:
            self._on_full(self._brought_together())
        self._waiting.append((p, leaf))
        self._bytes += p.nbytes

    def rest(self) -> Tensor | None:
        """Return the last piece; None where there is nobody to exchange it with, or no gradient came."""
        last = self._brought_together() if self._waiting else None
        return last if world_size() > 1 else None

    def _brought_together(self) -> Tensor:
        taken, self._waiting, self._bytes = self._waiting, [], 0
        sizes = [p.numel() for p, _ in taken]
        together = taken[0][0].new_empty(sum(sizes))
        parts = together.split(sizes)
        gradients = [_in_memory(leaf.grad) for _, leaf in taken]
        for dtype in {gradient.dtype for gradient in gradients}:  # one kernel each
            places, found = zip(
                *((a, b) for a, b in zip(parts, gradients, strict=True) if b.dtype == dtype), strict=True
            )
            torch._foreach_copy_(places, found)
        for (p, leaf), part in zip(taken, parts, strict=True):
            leaf.grad = None
            p.grad = part.as_strided(p.shape, p.stride())
        return together


def _in_memory(gradient: Tensor) -> Tensor:
    """Return a gradient's numbers as they lie in memory, where autograd lays them out as their parameter's."""
    return gradient.as_strided((gradient.numel(),), (1,))


class _Place(torch.autograd.Function):
    """Own rows in their places among zeros."""

    @staticmethod
    def forward(rows: Tensor) -> Tensor:
        whole = rows.new_zeros(world_size() * rows.shape[0], *rows.shape[1:])
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
