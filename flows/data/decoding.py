"""Many images decoded by threads, whose faults are collected and told together."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from flows.data.images import convert
from flows.data.sources import Item
from flows.errors import UserError
from flows.monitor import Monitor

CHUNK = 64  # images per worker task
NAMED = 20  # faults told by name
T = TypeVar("T")


def map_images(work: Callable[[int], T], count: int, monitor: Monitor, unit: str) -> Iterator[T | UserError]:
    """Yield work(0), ..., work(count - 1), or the UserError that one raised; threads: the decoders release the GIL."""
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    done = 0

    def attempt(index: int) -> T | UserError:
        try:
            return work(index)
        except UserError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for results in pool.map(lambda chunk: [attempt(index) for index in chunk], chunks):
            done += len(results)
            monitor.progress(done, count, unit)
            yield from results


def find_faults(items: Sequence[Item], monitor: Monitor) -> list[UserError]:
    """Decode images whose shape does not matter; return the fault of each that cannot be used."""

    def decode(index: int) -> None:
        with items[index].open() as image:
            convert(image, items[index].where, channels=3, resize="none", resolution=None, background="white")

    return [fault for fault in map_images(decode, len(items), monitor, "images") if fault]


def list_faults(faults: Sequence[UserError], count: int, remedy: str) -> UserError:
    """Return one error that names the first faults of `count` images and says how many there are."""
    if len(faults) == 1:
        return UserError(f"{faults[0]}; {remedy}")
    more = f"; and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
    named = "; ".join(map(str, faults[:NAMED]))
    return UserError(f"{len(faults)} of {count} images cannot be used: {named}{more}; {remedy}")
