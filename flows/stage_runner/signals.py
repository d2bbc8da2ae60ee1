"""How a running stage is asked to end: by SIGINT or SIGTERM, or because the process that started it is gone."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


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
    def as_exit(self) -> Iterator[None]:
        """Turn the error with which a stage answers to a signal into the exit code of that signal."""
        try:
            yield
        except Exception as error:
            if not self._number:
                raise
            raise SystemExit(128 + self._number) from error

    def _handle(self, number: int, _: object) -> None:
        """Note the signal, and nothing else: it may have interrupted this thread in a print, or while it held a lock.

        A second signal, or the first where nothing has to be saved, ends the process.
        """
        if not self._deferred or self._number:
            raise SystemExit(128 + number)
        self._number = number


def end_with_caller() -> None:
    """Ask this process to end, as SIGTERM does, when its standard input ends: the pipe's other end is the caller's."""
    threading.Thread(target=_wait_and_end, daemon=True).start()


def _wait_and_end() -> None:
    """Wait for the end of standard input; then ask the stage to end.

    Nobody reads its output any more, and a line that cannot be written must not keep a training from being saved.
    """
    while os.read(sys.stdin.fileno(), 1024):
        pass
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
    os.kill(os.getpid(), signal.SIGTERM)
