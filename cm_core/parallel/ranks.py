"""The process group of a stage: one rank per device, started by torch.distributed.elastic.

All ranks see the whole batch and draw the same randomness; each computes its own rows (rows.py), and they exchange
gradients once a step (gradients.py). No method depends on the world size.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(minutes=5)  # per exchange; rank 0 draws grids and saves states while the others wait
POLL = 0.5  # seconds between polls of the store
ROLL_CALL = 3.0  # seconds for the ranks to answer a roll call after an exchange has failed
GRACE = 25.0  # seconds for an exchange with a lost rank to fail by itself
EXIT_PEER_LOST = 75  # exit code of a process that stops because a peer is lost


def world_size() -> int:
    """Return the number of processes that share this stage."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the main process, rank 0, which logs, draws and saves."""
    return rank() == 0


def local_rank() -> int:
    """Return this process's rank on its node, which is also its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


class ProcessLost(RuntimeError):
    """An exchange failed because ranks are gone; the message names them."""


@contextmanager
def process_group(is_over: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Join the process group of torchrun's environment variables; without them this process is alone.

    Other ranks wait for rank 0, which may wait for a lease, without a time limit unless `is_over`. Raises ProcessLost
    if ranks are gone.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    size, own, left = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]), threading.Event()
    try:
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank())
            backend = "cpu:gloo,cuda:nccl"
        with exchange():
            store = _store()
            _wait_for_main(store, own, is_over)
            threading.Thread(target=_answer_roll_call, args=(_store(), own, left), daemon=True).start()
            dist.init_process_group(backend, store=store, rank=own, world_size=size, timeout=TIMEOUT)
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # on a GPU an exchange can fail later, when its result is used
        if missing := _call_roll(size):
            raise ProcessLost(f"lost {', '.join(missing)}") from error
        raise
    else:
        store.set(f"here/{own}", "")
        dist.destroy_process_group()  # not after an error: it may wait for a lost rank
    finally:
        left.set()


def _store(timeout: timedelta = TIMEOUT) -> dist.TCPStore:
    """Connect to the launcher's key-value store on rank 0's node."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)


def _wait_for_main(store: dist.TCPStore, own: int, is_over: Callable[[], bool]) -> None:
    store.set(f"host/{own}", socket.gethostname())
    if own == 0:
        store.set("main", "")
    while not store.check(["main"]):
        if is_over():
            raise ProcessLost("asked to end before rank 0 had come")
        time.sleep(POLL)


def _call_roll(size: int) -> list[str]:
    """Return the ranks that do not answer, each with its host; inform all others that an exchange has failed."""
    try:
        store = _store(timedelta(seconds=ROLL_CALL))
        store.set("roll", "")
        time.sleep(ROLL_CALL)
        missing = [other for other in range(size) if not store.check([f"here/{other}"])]
        hosts = {other: store.get(f"host/{other}").decode() for other in missing if store.check([f"host/{other}"])}
        return [f"rank {other} ({hosts.get(other, 'which never came')})" for other in missing]
    except RuntimeError:
        return [f"the launcher of rank 0 ({os.environ['MASTER_ADDR']})"]


def _answer_roll_call(store: dist.TCPStore, own: int, left: threading.Event) -> None:
    """Answer roll calls even while the main thread waits in an exchange; exit if the wait does not end."""
    with suppress(RuntimeError):  # the store is gone together with rank 0's node
        while not store.check(["roll"]):
            if left.wait(POLL):
                return
        store.set(f"here/{own}", "")
    if not left.wait(GRACE):
        os._exit(EXIT_PEER_LOST)  # a GPU may wait for a lost rank forever, and the main thread for the GPU


@contextmanager
def exchange() -> Iterator[None]:
    """Turn errors of an exchange, and no others, into ProcessLost."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ProcessLost(str(error)) from error


def all_gather(value: Any) -> list[Any]:
    """Return every rank's value (picklable), by rank; a collective call."""
    values = [value] * world_size()
    if world_size() > 1:
        with exchange():
            dist.all_gather_object(values, value)
    return values


def agree(flag: bool) -> bool:
    """Return whether any rank says so; a collective call."""
    if world_size() == 1:
        return flag
    said = torch.tensor(int(flag))
    with exchange():
        dist.all_reduce(said, dist.ReduceOp.MAX)
    return bool(said)


def wait_for_all() -> None:
    """Barrier: return when every rank has called it."""
    agree(False)


def broadcast_from_main(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield rank 0's tensors by name, bitwise, on devices of its kind; the other ranks' values are ignored.

    A collective call that must be exhausted. Tensors come one at a time, so that no rank needs memory for all.
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
    """Fill rank 0's `rows` with those of rank `owner`; both must call, others may."""
    with exchange():
        if is_main() and owner:
            dist.recv(rows, owner)
        elif owner == rank() != 0:
            dist.send(rows, 0)
