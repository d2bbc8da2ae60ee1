"""The process group of a stage: several processes, a device each, as torch.distributed.elastic has started them.

All see the whole batch and draw the same randomness; each computes its own rows (rows.py) and they exchange the
gradients once a step (gradients.py). No method knows that it is not alone.
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

TIMEOUT = timedelta(minutes=5)  # of one exchange; rank 0 draws grids and saves states while the others wait
POLL = 0.5  # seconds between two looks into the store
ROLL_CALL = 3.0  # seconds for the processes to show that they are there, after an exchange has failed
GRACE = 25.0  # seconds for an exchange with a lost process to fail by itself
EXIT_PEER_LOST = 75  # exit code of a process that another's loss has ended


def world_size() -> int:
    """Return how many processes share this stage."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return which of them this process is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the process that logs, draws and saves for all."""
    return rank() == 0


def local_rank() -> int:
    """Return which process of its node this is, from 0; also which GPU it uses."""
    return int(os.environ.get("LOCAL_RANK", 0))


class ProcessLost(RuntimeError):
    """An exchange failed because processes are gone; the message names them."""


@contextmanager
def process_group(is_over: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Join the process group that torchrun's environment variables describe; without them this process is alone.

    Ranks other than 0 wait as long as it takes rank 0 to come, unless `is_over`: it may have to wait for a lease.
    Raises ProcessLost where processes are gone.
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
    except RuntimeError as error:  # on a GPU an exchange can fail later, where its result is asked for
        if missing := _call_roll(size):
            raise ProcessLost(f"lost {', '.join(missing)}") from error
        raise
    else:
        store.set(f"here/{own}", "")
        dist.destroy_process_group()  # not after an error: it may wait for a process that is gone
    finally:
        left.set()


def _store(timeout: timedelta = TIMEOUT) -> dist.TCPStore:
    """Connect to the key-value store of the launcher on rank 0's node."""
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
    """Return the processes that do not answer, each with its host; all others learn that an exchange has failed."""
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
    """Answer when the roll is called, even while the main thread waits in an exchange; end it where that stays so."""
    with suppress(RuntimeError):  # the store is gone, and the node of rank 0 with it
        while not store.check(["roll"]):
            if left.wait(POLL):
                return
        store.set(f"here/{own}", "")
    if not left.wait(GRACE):
        os._exit(EXIT_PEER_LOST)  # a GPU may wait for a lost process in vain, and the main thread for the GPU


@contextmanager
def exchange() -> Iterator[None]:
    """Tell errors of an exchange from all others, as ProcessLost."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ProcessLost(str(error)) from error


def all_gather(value: Any) -> list[Any]:
    """Return what each process gives, by rank; all must call. Any value that can be pickled."""
    values = [value] * world_size()
    if world_size() > 1:
        with exchange():
            dist.all_gather_object(values, value)
    return values


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
    """Yield rank 0's tensors by name, to the bit, on devices of its kind; those of the others do not count.

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
    """Fill rank 0's `rows` with those of process `owner`; both must call, others may."""
    with exchange():
        if is_main() and owner:
            dist.recv(rows, owner)
        elif owner == rank() != 0:
            dist.send(rows, 0)
