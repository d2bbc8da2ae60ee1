"""The MLflow run of one stage, with the system metrics of its machine."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from flows.tracking.curves import TRAININGS, loss_key
from flows.tracking.gpu_usage import GpuUsage
from flows.tracking.tracker import Tracker, stage_title

EVERY = 1.0  # seconds between readings of the machine
USAGE_EVERY = 60.0  # seconds between records of the GPU-hours, of which a killed process loses the last
CURVE_EVERY = 10.0  # seconds between additions to the curve on the pipeline run, each one request
Action = Callable[[Tracker, str], None]  # an operation on the run with this id


@dataclass
class StageRun:
    """The MLflow run of one stage, written by a thread: neither MLflow's start nor its store slows a training step.

    If MLflow cannot be opened, the next report raises. Later failures are retried, and raised, when the stage has
    ended, so that they do not stop a training.
    """

    shared_root: Path
    stage: str
    parent_run_id: str | None
    make_tags: Callable[[], dict[str, str]]
    watch_machine: bool = False
    usage: GpuUsage = field(default_factory=lambda: GpuUsage([]))

    def __post_init__(self) -> None:
        self._booked = self._drawn = time.monotonic()
        self._losses: list[tuple[int, float]] = []  # not yet on the pipeline run
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._written: deque[tuple[Action, Future[None]]] = deque()

    def __enter__(self) -> "StageRun":
        self._opened = self._thread.submit(self._open)
        return self

    def _open(self) -> None:
        tracker = Tracker(self.shared_root)
        self.tags = {**self.make_tags(), "stage": self.stage}
        command, parent = f"cm stage {self.stage}", self.parent_run_id
        name = stage_title(self.tags.get("recipe", ""), self.stage)
        self._run_id = tracker.start_run(name, self.tags, command=command, parent_run_id=parent)
        self._tracker = tracker
        self._machine = SystemMetrics() if self.watch_machine else None

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._draw_losses()
        written = self._thread.submit(self._write_again) if error is None else self._opened
        closed = self._thread.submit(self._close, error)
        self._thread.shutdown()
        if error is None:
            for future in (self._opened, written, closed):
                future.result()

    def _close(self, error: BaseException | None) -> None:
        self._book_usage(self._tracker, self._run_id)
        self._tracker.end_run(self._run_id, error)

    def _write_again(self) -> None:
        """Retry failed operations in order: MLflow may have been unavailable for a while only."""
        for action, future in self._written:
            if future.exception():
                action(self._tracker, self._run_id)

    def submit(self, action: Action) -> None:
        """Queue `action`. Raises the error that kept MLflow from being opened."""
        if self._opened.done():
            self._opened.result()
        while self._written and (done := self._written[0][1]).done() and done.exception() is None:
            self._written.popleft()
        self._queue(action)

    def _queue(self, action: Action) -> None:
        self._written.append((action, self._thread.submit(lambda: action(self._tracker, self._run_id))))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers of a step, with the system metrics."""

        def log(tracker: Tracker, run_id: str) -> None:
            machine = self._machine.read() if self._machine else {}
            tracker.log_numbers(run_id, {**values, **machine}, step=step)
            if time.monotonic() - self._booked >= USAGE_EVERY:
                self._book_usage(tracker, run_id)

        self.submit(log)
        if self.parent_run_id and self.stage in TRAININGS and "loss" in values:
            self._losses.append((step, values["loss"]))
            if time.monotonic() - self._drawn >= CURVE_EVERY:
                self._draw_losses()

    def _draw_losses(self) -> None:
        """Continue the curve of the loss on the pipeline run, so that nobody need open the stage's run."""
        self._drawn, curve, self._losses = time.monotonic(), {loss_key(self.stage): self._losses}, []
        if curve[loss_key(self.stage)]:
            self._queue(lambda tracker, _: tracker.log_curves(str(self.parent_run_id), curve))

    def _book_usage(self, tracker: Tracker, run_id: str) -> None:
        self._booked = time.monotonic()
        if usage := self.usage.read():
            tracker.log_numbers(run_id, usage)

    def image(self, key: str, path: Path, step: int) -> None:
        """Log a picture of a step; MLflow shows those of one key with a slider, side by side for several runs."""
        from PIL import Image

        with Image.open(path) as picture:
            picture.load()  # now: the file may change before the thread reads it
        self.submit(lambda tracker, run_id: tracker.client.log_image(run_id, picture, key=key, step=step))


class SystemMetrics:
    """CPU, memory, and every GPU that NVML sees, by MLflow's collectors.

    MLflow's own monitor numbers its samples from 0 in every process; read at the logged steps, CPU and GPU share the
    axis of the loss and continue after a resume.
    """

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
