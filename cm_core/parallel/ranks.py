"""Several processes at one training, a device each: every pass through a network is divided by rows.

Each sees the whole batch, with the randomness it has always had, and computes the rows of its own; in the rows of
others there are zeros where a network's output should be, and what a method makes of them is dropped. So passes wait
for nobody, gradients and losses are exchanged once a step, and no method knows that it is not alone.
"""

import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

LOCAL = "127.0.0.1"
TIMEOUT = timedelta(minutes=5)  # of one exchange; the first process draws grids and saves states while the others wait


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
