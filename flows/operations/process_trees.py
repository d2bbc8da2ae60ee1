"""Stop processes and all their descendants: SIGTERM, a grace period, SIGKILL."""

import signal
import time
from collections.abc import Sequence
from contextlib import suppress

import psutil

from flows.workspace.process import GRACE


def end_trees(pids: Sequence[int], seconds: float = GRACE) -> None:
    """Stop processes and their descendants: SIGTERM, then SIGKILL after `seconds`."""
    alive = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    everything = [process for top in alive for process in (top, *top.children(recursive=True))]
    _signal(everything, signal.SIGTERM)
    _kill_after(everything, seconds)


def end_worker(pid: int, seconds: float) -> bool:
    """Stop a worker and its flow runs, which stop their stages and report to the server; return whether there were any.

    A worker that gets SIGTERM kills its flow runs at once, and a running worker would restart them: so it is suspended
    (SIGSTOP) until they have ended.
    """
    with suppress(psutil.NoSuchProcess):
        worker = psutil.Process(pid)
        _signal([worker], signal.SIGSTOP)
        flow_runs, below = worker.children(), worker.children(recursive=True)
        _signal(flow_runs, signal.SIGTERM)
        _kill_after(below, seconds)
        _kill_after([worker], 0)
        return bool(flow_runs)
    return False


def still_runs(process: psutil.Process) -> bool:
    """Whether a process is still running; a zombie is not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _signal(processes: Sequence[psutil.Process], number: int) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _kill_after(processes: Sequence[psutil.Process], seconds: float) -> None:
    _signal(_wait(processes, seconds), signal.SIGKILL)
    _wait(processes, GRACE)


def _wait(processes: Sequence[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Wait until these processes have ended; return those that still run after `seconds`."""
    deadline = time.monotonic() + seconds
    while (left := [process for process in processes if still_runs(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left
