"""The GPUs of this machine: which there are, and one of them for one stage alone."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flows.locks import try_lock

DEVICES_VARIABLE = "CUDA_VISIBLE_DEVICES"
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


@contextmanager
def hold_device(
    folder: Path, devices: Sequence[str], on_wait: Callable[[], None], is_over: Callable[[], bool]
) -> Iterator[dict[str, str]]:
    """Hold one device, ours alone on this machine; yield the environment variables that show a process only that one.

    The lock files stand in `folder`; the locks end with this process. Without devices nothing is held. While all
    are busy, `on_wait` is called once; the wait ends early, with none held, when `is_over`.
    """
    if not devices:
        yield {}
        return
    folder.mkdir(parents=True, exist_ok=True)
    files = {device: (folder / f"{device}.lock").open("a") for device in devices}
    try:
        device = next((name for name, file in files.items() if try_lock(file)), None)
        if device is None:
            on_wait()
        while device is None and not is_over():
            time.sleep(LOOK_EVERY)
            device = next((name for name, file in files.items() if try_lock(file)), None)
        yield {DEVICES_VARIABLE: device} if device else {}
    finally:
        for file in files.values():
            file.close()
