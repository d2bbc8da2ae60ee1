"""The GPUs of this machine: which there are, how many a stage wants, and those for it alone."""

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
COUNT_VARIABLE = "CM_DEVICES"  # how many devices of a machine such a stage uses
SHARED = ("teacher", "student", "sample")  # stages that several devices share
LOOK_EVERY = 1.0  # seconds between two looks for a free device


def visible_devices() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; none on a machine without."""
    given = os.environ.get(DEVICES_VARIABLE)
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    listing = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False).stdout
    return [str(number) for number, _ in enumerate(line for line in listing.splitlines() if line.startswith("GPU "))]


def devices_for(stage: str) -> int:
    """Return how many devices of this machine a stage uses: CM_DEVICES for trainings and samples, else one.

    Raises UserError where that is no number, or more than the machine's GPUs.
    """
    if stage not in SHARED:
        return 1
    count = Settings.read().devices
    if count > 1 and (there := len(visible_devices())) and count > there:  # for one, nobody has to be asked
        raise UserError(f"{COUNT_VARIABLE}={count}: there are {there} GPUs for this process")
    return count


@contextmanager
def hold_devices(
    folder: Path, devices: Sequence[str], count: int, on_wait: Callable[[], None], is_over: Callable[[], bool]
) -> Iterator[dict[str, str]]:
    """Hold `count` devices, ours alone on this machine; yield the environment variables that show a process only them.

    The lock files stand in `folder`; the locks end with this process. Without devices nothing is held. While too many
    are busy none is, so that others can have those that are free; `on_wait` is called once. The wait ends early, with
    none held, when `is_over`.
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
