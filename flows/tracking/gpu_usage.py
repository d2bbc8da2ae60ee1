"""GPU-hours and energy of a stage."""

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from flows.distributed.devices import visible_devices

GPU_HOURS, ENERGY = "cost/gpu_hours", "cost/energy_kwh"  # metrics of stage runs, and their sums of pipeline runs
NOT_MEASURED = "not measured"  # the energy of a machine without a GPU, or whose GPUs have no counter
MILLIJOULES = 3.6e9  # per kWh


class GpuUsage:
    """GPU-hours and kWh of devices since this object was made.

    Each card integrates its power by itself (NVML's energy counter), whichever process uses it. Without such a counter,
    as on cards before Volta and on parts of a card (MIG), and of further nodes, the energy is not measured.
    """

    def __init__(self, devices: Sequence[str], nodes: int = 1) -> None:
        self._devices, self._nodes, self._started = devices, nodes, time.monotonic()
        self._before = self._counters()

    @classmethod
    def of_stage(cls, needs_gpu: bool) -> "GpuUsage":
        """Start with the devices of this stage on this node: one, or one for each process of torchrun."""
        count = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return cls(visible_devices()[:count] if needs_gpu else [], int(os.environ.get("WORLD_SIZE", 1)) // count)

    def read(self) -> dict[str, float]:
        """Return GPU_HOURS and, where it is measured, ENERGY; nothing without devices."""
        if not self._devices:
            return {}
        hours = {GPU_HOURS: (time.monotonic() - self._started) / 3600 * len(self._devices) * self._nodes}
        now = self._counters()
        if self._before is None or now is None or self._nodes > 1:
            return hours
        return {**hours, ENERGY: (now - self._before) / MILLIJOULES}

    def _counters(self) -> int | None:
        """Return the energy of the devices since their driver was loaded, mJ."""
        if not self._devices:
            return None
        try:
            import pynvml
        except ImportError:
            return None
        try:
            pynvml.nvmlInit()
            return sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(_handle(device)) for device in self._devices)
        except pynvml.NVMLError:  # no driver, no counter, another user's card
            return None


def _handle(device: str) -> Any:
    """Return NVML's handle of a device of CUDA_VISIBLE_DEVICES: a number, or a UUID."""
    import pynvml

    by_number, by_uuid = pynvml.nvmlDeviceGetHandleByIndex, pynvml.nvmlDeviceGetHandleByUUID
    return by_number(int(device)) if device.isdigit() else by_uuid(device)


def summed(usages: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the sums of runs' metrics: GPU_HOURS if any has some, ENERGY if all of those have it."""
    used = [usage for usage in usages if GPU_HOURS in usage]
    keys = [key for key in (GPU_HOURS, ENERGY) if used and all(key in usage for usage in used)]
    return {key: sum(usage[key] for usage in used) for key in keys}


def in_words(usage: Mapping[str, float]) -> dict[str, str]:
    """Return GPU-hours and energy for people, {term: value}."""
    hours, energy = usage.get(GPU_HOURS), usage.get(ENERGY)
    return {
        "GPU-hours": "none" if hours is None else f"{hours:.3g}",
        "Energy": NOT_MEASURED if energy is None else f"{energy:.3g} kWh",
    }
