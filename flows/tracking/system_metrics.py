"""System metrics while a stage trains, by MLflow's collectors, at the training's steps.

MLflow's own monitor numbers its samples from 0 in every process; read at the logged steps, CPU and GPU share the axis
of the loss and continue after a resume.
"""

import time
from contextlib import suppress

EVERY = 1.0  # seconds between readings


class SystemMetrics:
    """CPU, memory, and every GPU that NVML sees."""

    def __init__(self) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

        self._monitors: list[CPUMonitor | GPUMonitor] = [CPUMonitor()]
        with suppress(ImportError, RuntimeError):  # no nvidia-ml-py, or no GPU
            self._monitors.append(GPUMonitor())
        self._collect()  # utilisation is measured from here
        self._last = time.monotonic() - EVERY

    def read(self) -> dict[str, float]:
        """Return {system/NAME: number} since the last reading; empty if that is less than EVERY ago."""
        if time.monotonic() - self._last < EVERY:
            return {}
        self._last = time.monotonic()
        return self._collect()

    def _collect(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            found |= {f"system/{name}": float(value) for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        return found
