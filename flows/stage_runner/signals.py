"""How a running stage is asked to end: by SIGINT or SIGTERM, or because the process that started it is gone."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flows.settings import Settings, variable


class StageSignals:
    """SIGINT and SIGTERM while a stage runs: noted once for a stage that looks for them, else an exit at once."""

    def __init__(self, *, deferred: bool) -> None:
        self._deferred, self._number = deferred, 0

    def __enter__(self) -> "StageSignals":
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def received(self) -> bool:
        """Whether the stage is asked to end."""
        return self._number != 0

    @contextmanager
    def as_exit(self, stopped: type[Exception]) -> Iterator[None]:
        """Turn the error with which a stage answers to a signal, here or at another rank, into an exit code."""
        try:
            yield
        except stopped as error:
            raise SystemExit(128 + (self._number or signal.SIGTERM)) from error

    def _handle(self, number: int, _: object) -> None:
        """Note the signal, and nothing else: it may have interrupted this thread in a print, or while it held a lock.

        A second signal, or the first where nothing has to be saved, ends the process.
        """
        if not self._deferred or self._number:
            raise SystemExit(128 + number)
        self._number = number


def end_with_caller() -> None:
    """Ask this process to end, as SIGTERM does, when its standard input ends: the pipe's other end is the caller's."""

    def end() -> None:  # nobody reads our output now, and a line that cannot be written must not keep us from saving
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
        os.kill(os.getpid(), signal.SIGTERM)

    _at_end_of(sys.stdin.fileno(), end)


def give_lifeline() -> None:
    """Let processes that are started from now on `end_with_caller`: when this one ends, or this one's caller."""
    reading, writing = os.pipe()  # the writing end is this process's alone: children do not inherit it
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
