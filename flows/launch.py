"""Several processes for one stage, a device each. This process is the first: it alone tracks, saves and writes.

`CM_DEVICES=2` asks for them. It is a fact of the machine and no part of a recipe: results differ by rounding alone, and
a training goes on with another number of devices.
"""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cm_core import ranks
from flows.devices import devices_for
from flows.workspace import StageFailed

GRACE = 30.0  # seconds for an exchange with a lost process to fail by itself, and for the others to end


@contextmanager
def several_processes(stage: str, section: Any, root: Path, state_dir: Path | None = None) -> Iterator[None]:
    """Run a stage in as many processes as CM_DEVICES says; alone where the recipe's `section` for it is empty.

    Raises:
        UserError: CM_DEVICES is no number that fits the batch and the machine.
        StageFailed: one of the processes was lost; the last saved state is whole.
    """
    train = getattr(section, "train", None)
    count = 1 if section is None else devices_for(stage, train and train.batch_size)
    if count == 1:
        yield
        return
    port = free_port()
    others = [_start(stage, root, state_dir, rank, count, port) for rank in range(1, count)]
    over = threading.Event()
    threading.Thread(target=_watch, args=(stage, others, over), daemon=True).start()
    try:
        with ranks.joined(0, count, port):
            yield
    except RuntimeError as error:
        lost = None if isinstance(error, torch.OutOfMemoryError) else _lost(others, wait=1.0)
        if lost is None:
            raise
        raise StageFailed(_explain(stage, lost)) from error
    finally:
        over.set()
        _end(others)


def _start(stage: str, root: Path, state_dir: Path | None, rank: int, count: int, port: int) -> subprocess.Popen:
    arguments = map(str, (stage, state_dir or root, rank, count, port))
    command = [sys.executable, "-m", "flows.share_stage", *arguments]
    return subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE)  # the pipe ends when this process does


def free_port() -> int:
    """Return a port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _watch(stage: str, others: Sequence[subprocess.Popen], over: threading.Event) -> None:
    """End this process when another was lost and the exchange with it does not fail: a GPU may wait for it in vain."""
    while not over.wait(1.0):
        lost = _lost(others)
        if lost is not None and not over.wait(GRACE):
            print(f"cm: {_explain(stage, lost)}", file=sys.stderr, flush=True)
            os._exit(1)


def _lost(others: Sequence[subprocess.Popen], wait: float = 0.0) -> str | None:
    """Return which process ended without success, and how; None where all are well. At most `wait` seconds for each."""
    for rank, process in enumerate(others, start=1):
        try:
            code = process.wait(wait)
        except subprocess.TimeoutExpired:
            continue
        if code:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            return f"process {rank} of 0..{len(others)} {how}"
    return None


def _explain(stage: str, lost: str) -> str:
    return f"{stage}: {lost}; started again, a training goes on from its last saved state"


def _end(others: Sequence[subprocess.Popen]) -> None:
    """Let the others end, which they do as soon as this one's pipe closes, and wait for them."""
    for process in others:
        process.stdin.close()
    for process in others:
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
