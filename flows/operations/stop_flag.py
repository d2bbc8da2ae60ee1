"""SIGINT and SIGTERM as a flag that a loop looks at."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager


class StopFlag:
    """Flag set by SIGINT or SIGTERM; not a threading.Event, whose lock the interrupted thread may hold."""

    def __init__(self) -> None:
        self._set = False

    def set(self, *_: object) -> None:
        self._set = True

    def is_set(self) -> bool:
        return self._set

    def wait(self, seconds: float) -> bool:
        """Sleep for `seconds`, or until the flag is set; return whether it is set."""
        if not self._set:
            time.sleep(seconds)
        return self._set


@contextmanager
def stop_signal() -> Iterator[StopFlag]:
    """Yield a flag that SIGINT and SIGTERM set."""
    stop = StopFlag()
    before = {number: signal.signal(number, stop.set) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
