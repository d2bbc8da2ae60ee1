"""A command in its own process group, followed line by line, and stopped with all its descendants.

Its standard input is a pipe that stays empty and closes when this process ends for any reason, SIGKILL included. A
stage then saves its state and exits; what is left of the group after that, such as a transfer of DVC that waits for a
silent server, is killed by a guard within the group.
"""

import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from flows.settings import Settings

GRACE = 10.0  # seconds between SIGTERM and SIGKILL by default, enough to save a training state
LEAVE = 5.0  # seconds for the group's own end after the grace period, before its guard kills it
TICK = 1.0  # seconds between calls of `on_tick`
# Runs "$@" beside a guard; a shell's background command would otherwise have an empty standard input.
GUARDED = """
exec 3<&0
(trap '' TERM INT; read -r nothing <&3; sleep "$0"; kill -KILL 0) >/dev/null 2>&1 &
exec "$@" 3<&-
"""


def grace() -> float:
    """Return the seconds between SIGTERM and SIGKILL: CM_GRACE, where a training state takes longer to save."""
    return Settings.read().grace or GRACE


def flow_grace() -> float:
    """Return the seconds that a flow run may take to stop its stages, which save their states, and to report."""
    return 3 * grace()


class Process:
    """A running command. Its output lasts until the last process of its group has closed it."""

    def __init__(self, command: Sequence[str], *, cwd: Path, env: Mapping[str, str]) -> None:
        self._popen = subprocess.Popen(
            ["/bin/sh", "-c", GUARDED, str(grace() + LEAVE), *command],
            cwd=cwd,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._output: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._ending = threading.Lock()
        self._asked = False  # to stop: once, because a stage that is saving its state ends at a second SIGTERM

    def lines(self, on_tick: Callable[[], None] = lambda: None) -> Iterator[str]:
        """Yield the output line by line until the command has ended; call `on_tick` about once a second."""
        ticked = time.monotonic()
        while not self._leader_ended() or self._reader_ends_within(GRACE):
            with suppress(queue.Empty):
                line = self._output.get(timeout=TICK)
                if line is None:
                    break
                yield line
            if time.monotonic() - ticked >= TICK:
                ticked = time.monotonic()
                on_tick()
        self._leader_ends_within(GRACE)

    def end(self) -> int:
        """Stop the rest of the group by SIGTERM, then SIGKILL after a grace period; return the exit code."""
        with self._ending:
            if self._popen.returncode is None:
                if self._reader.is_alive() or not self._leader_ended():
                    self._ask_to_stop()
                    self._reader_ends_within(grace())
                self._signal(signal.SIGKILL)
        return self._popen.wait()

    def terminate(self) -> None:
        """Send SIGTERM to the whole group, without waiting."""
        with self._ending:
            if self._popen.returncode is None:
                self._ask_to_stop()

    def _ask_to_stop(self) -> None:
        if not self._asked:
            self._asked = True
            self._signal(signal.SIGTERM)

    def _read(self) -> None:
        assert self._popen.stdout is not None, "a pipe, as it was asked to be"
        for line in self._popen.stdout:
            self._output.put(line.rstrip("\n"))
        self._output.put(None)

    def _signal(self, number: int) -> None:
        # The leader is not reaped before the end, so its process group id cannot have been reused.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, number)

    def _leader_ended(self) -> bool:
        """Whether the command itself has ended, checked without reaping it."""
        try:
            return os.waitid(os.P_PID, self._popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # another thread has stopped and reaped it
            return True

    def _leader_ends_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not (ended := self._leader_ended()) and time.monotonic() < deadline:
            time.sleep(0.01)
        return ended

    def _reader_ends_within(self, seconds: float) -> bool:
        self._reader.join(seconds)
        return not self._reader.is_alive()
