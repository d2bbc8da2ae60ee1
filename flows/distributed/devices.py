"""The GPUs of this machine: list them, count those a stage needs, lock them."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from flows.atomic import try_lock
from flows.errors import UserError
from flows.settings import Settings

DEVICES_VARIABLE = "CUDA_VISIBLE_DEVICES"
COUNT_VARIABLE = "CM_DEVICES"  # devices per machine of a shared stage
SHARED = ("teacher", "student", "sample")  # stages that several devices share
LOOK_EVERY = 1.0  # seconds between polls for a free device


def visible_devices() -> list[str]:
    """Return the GPUs that this process may use, in the form of CUDA_VISIBLE_DEVICES; none on a machine without."""
    given = os.environ.get(DEVICES_VARIABLE)
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    listing = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False).stdout
    return [str(number) for number, _ in enumerate(line for line in listing.splitlines() if line.startswith("GPU "))]


def devices_for(stage: str) -> int:
    """Return how many devices of this machine a stage uses: CM_DEVICES for trainings and samples, else one.

    Raises UserError if CM_DEVICES is not a number or exceeds the machine's GPUs.
    """
    if stage not in SHARED:
        return 1
    count = Settings.read().devices
    if count > 1 and (there := len(visible_devices())) and count > there:  # one device needs no query
        raise UserError(f"{COUNT_VARIABLE}={count}: there are {there} GPUs for this process")
    return count


@contextmanager
def hold_devices(
    folder: Path, devices: Sequence[str], count: int, on_wait: Callable[[], None], is_over: Callable[[], bool]
) -> Iterator[dict[str, str]]:
    """Lock `count` devices on this machine; yield the environment variables that restrict a process to them.

    The lock files lie in `folder`; the locks end with this process. Without devices nothing is locked. While too few
    are free, hold none, so that other runs can use them, and call `on_wait` once; when `is_over`, give up with none.
    """
    if devices:
        folder.mkdir(parents=True, exist_ok=True)
    has_waited = False
    while devices:
        held: list[str] = []
        with ExitStack() as files:
            for device in devices:
                if len(held) < count and try_lock(files.enter_context((folder / f"{device}.lock").open("a"))):
                    held.append(device)
            if len(held) == count:
                yield {DEVICES_VARIABLE: ",".join(held)}
                return
        if not has_waited:
            on_wait()
            has_waited = True
        if is_over():
            break
        time.sleep(LOOK_EVERY)
    yield {}
