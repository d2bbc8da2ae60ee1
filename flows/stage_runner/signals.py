"""Requests to stop a running stage: SIGINT, SIGTERM, or the death of its parent process."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flows.settings import Settings, variable
from flows.workspace.process import grace


class StageSignals:
    """Handler of SIGINT and SIGTERM: a stage that polls can save its state first; for others exit at once."""

    def __init__(self, *, deferred: bool) -> None:
        self._deferred, self._number = deferred, 0

    def __enter__(self) -> "StageSignals":
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def received(self) -> bool:
        """Whether the stage is asked to stop."""
        return self._number != 0

    @contextmanager
    def as_exit(self, stopped: type[Exception]) -> Iterator[None]:
        """Turn the exception with which a stage reacts to a signal, on any rank, into an exit code."""
        try:
            yield
        except stopped as error:
            raise SystemExit(128 + (self._number or signal.SIGTERM)) from error

    def _handle(self, number: int, _: object) -> None:
        """Only record the signal: it may have interrupted a print, or a thread that holds a lock.

        A second signal, or the first if the stage has nothing to save, ends the process.
        """
        if not self._deferred or self._number:
            raise SystemExit(128 + number)
        self._number = number


def end_with_caller(is_stopping: Callable[[], bool]) -> None:
    """Terminate this process, as SIGTERM does, when its standard input closes: the parent holds the other end.

    A process that is stopping already has the grace period to save its state: a second signal would end it at once.
    """

    def end() -> None:  # nobody reads our output now, and a failing write must not prevent saving
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
        if is_stopping():
            time.sleep(grace())
        os.kill(os.getpid(), signal.SIGTERM)

    _at_end_of(sys.stdin.fileno(), end)


def give_lifeline() -> None:
    """Let child processes started from now on `end_with_caller`: when this process or its parent ends."""
    reading, writing = os.pipe()  # children do not inherit the writing end
    if Settings.read().lifeline:
        _at_end_of(os.dup(sys.stdin.fileno()), lambda: os.close(writing))
    os.dup2(reading, sys.stdin.fileno())
    os.environ[variable("lifeline")] = "stdin"


def _at_end_of(pipe: int, action: Callable[[], None]) -> None:
    def wait() -> None:
        while os.read(pipe, 1024):
            pass
        action()

    threading.Thread(target=wait, daemon=True).start()
