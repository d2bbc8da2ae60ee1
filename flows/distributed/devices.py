"""The GPUs of this machine: list them, count those a stage needs, lock them."""

import itertools
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from flows.atomic import try_lock
from flows.errors import UserError
from flows.settings import Settings, variable

DEVICES_VARIABLE = "CUDA_VISIBLE_DEVICES"
SHARED = ("teacher", "base", "student", "sample")  # stages that several devices share
LOOK_EVERY = 1.0  # seconds between polls for a free device
GPU_LINE = re.compile(r"^GPU (\d+): .*\(UUID: ([^)]+)\)$", re.M)  # of `nvidia-smi --list-gpus`; so is a MIG's
MIG_LINE = re.compile(r"^ +MIG .*\(UUID: ([^)]+)\)$", re.M)


def visible_devices() -> list[str]:
    """Return the GPUs that this process may use, in the form of CUDA_VISIBLE_DEVICES; none on a machine without.

    Raises UserError for a value of it that CUDA would take for "no device" without a word.
    """
    given = os.environ.get(DEVICES_VARIABLE)
    if given == "":
        return []
    listing = ""
    if shutil.which("nvidia-smi"):
        listing = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False).stdout
    gpus, migs = GPU_LINE.findall(listing), MIG_LINE.findall(listing)
    numbers = [number for number, _ in gpus]
    return numbers if given is None else _chosen(given, numbers, [uuid for _, uuid in gpus] + migs)


def _chosen(given: str, numbers: Sequence[str], uuids: Sequence[str]) -> list[str]:
    """Return the devices that a value of CUDA_VISIBLE_DEVICES names; without a list of GPUs only check its form."""
    chosen: list[str] = []
    for name in (one.strip() for one in given.split(",")):
        if name == "-1":  # CUDA stops here, by its rule: hence "-1" alone means no device
            break
        known = name in numbers or name and any(uuid.startswith(name) for uuid in uuids)
        if numbers and not known or not re.fullmatch(r"\d+|(GPU|MIG)-[\w/-]+", name) or name in chosen:
            there = f"; there are {', '.join(numbers)} and {', '.join(uuids)}" if numbers else ""
            raise UserError(f"{DEVICES_VARIABLE}={given}: {name!r} is no GPU, or is named twice{there}")
        chosen.append(name)
    return chosen


def refuse_unusable_gpus() -> None:
    """Raise UserError if PyTorch cannot use the GPUs that this process may use: it would compute on the CPU instead."""
    import torch

    if torch.cuda.is_available() or not (names := visible_devices()):
        return
    try:
        torch.cuda.init()
        reason = "it finds none"
    except (AssertionError, RuntimeError) as error:
        reason = " ".join(str(error).split())
    raise UserError(
        f"GPU {', '.join(names)}: PyTorch {torch.__version__} cannot use it: {reason}; mend driver or PyTorch, "
        f"or set {DEVICES_VARIABLE}= to compute on the CPU"
    )


def devices_for(stage: str) -> int:
    """Return how many devices of this machine a stage uses: CM_DEVICES for trainings and samples, else one.

    Raises UserError if CM_DEVICES is not a number or exceeds the machine's GPUs.
    """
    if stage not in SHARED:
        return 1
    count = Settings.read().devices
    if count > 1 and (there := len(visible_devices())) and count > there:  # one device needs no query
        raise UserError(f"{variable('devices')}={count}: there are {there} GPUs for this process")
    return count


@contextmanager
def hold_devices(
    folder: Path, devices: Sequence[str], count: int, on_wait: Callable[[], None], is_over: Callable[[], bool]
) -> Iterator[dict[str, str]]:
    """Lock `count` devices on this machine; yield the environment variables that restrict a process to them.

    The lock files lie in `folder`; the locks end with this process. Without devices nothing is locked. While too few
    are free, hold none, so that other runs can use them, and call `on_wait` once; when `is_over`, give up with none.
    """
    for attempt in itertools.count() if devices else ():
        folder.mkdir(parents=True, exist_ok=True)
        held: list[str] = []
        with ExitStack() as files:
            for device in devices:
                if len(held) < count and try_lock(files.enter_context((folder / f"{device}.lock").open("a"))):
                    held.append(device)
            if len(held) == count:
                yield {DEVICES_VARIABLE: ",".join(held)}
                return
        if attempt == 0:
            on_wait()
        if is_over():
            break
        time.sleep(LOOK_EVERY)
    yield {}
