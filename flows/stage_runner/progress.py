"""Progress of a stage or a command: a bar or lines, a progress file, metrics and pictures in MLflow."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from flows.atomic import replace_text
from flows.json_log import json_line, json_wanted
from flows.monitor import Monitor
from flows.settings import Settings

if TYPE_CHECKING:
    from rich.progress import Progress

    from flows.checkpoints.store import Checkpoint
    from flows.tracking.stage_run import StageRun

LINE_EVERY, FILE_EVERY = 5.0, 0.5  # seconds between progress lines, between writes of the progress file


class Bar(Monitor):
    """Progress bar on the terminal while entered; if stderr is no terminal, `lines` or nothing."""

    def __init__(self, title: str, *, lines: bool = False) -> None:
        self._title, self._lines, self._loss = title, lines, ""
        self._last = time.monotonic()
        self._phase: tuple[int, str] | None = None
        self._json = json_wanted()
        self._bar = _rich_bar(transient=not lines) if sys.stderr.isatty() and not self._json else None
        self._task = self._bar.add_task(title, total=None, count="") if self._bar else None

    def __enter__(self) -> "Bar":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def progress(self, done: int, total: int, unit: str = "images") -> None:
        count = f"{done:,} of {total:,} {unit}{self._loss}"
        if self._bar and self._task is not None:
            if self._phase != (total, unit):
                self._phase = (total, unit)
                self._bar.reset(self._task, total=total, completed=done, count=count)  # a resumed training begins here
            self._bar.update(self._task, completed=done, count=count)
        elif done >= total or time.monotonic() - self._last >= LINE_EVERY:
            self._last = time.monotonic()
            self.remark(count)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self._loss = f", loss {values['loss']:.4g}" if "loss" in values else ""

    def remark(self, text: str) -> None:
        if self._bar:
            self._bar.console.print(f"{self._title}: {text}", markup=False, highlight=False, soft_wrap=True)
        elif self._lines:
            print(json_line(text, stage=self._title) if self._json else f"{self._title}: {text}", flush=True)


def _rich_bar(*, transient: bool) -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[count]}", markup=False),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(stderr=True),
        transient=transient,
        redirect_stdout=sys.stdout.isatty(),
    )


class StageMonitor(Monitor):
    """The monitor of `cm stage`: shows progress, writes the progress file, logs to MLflow, uploads checkpoints."""

    def __init__(
        self, display: Bar, run: "StageRun", stop_requested: Callable[[], bool], checkpoint: "Checkpoint | None" = None
    ) -> None:
        self._display, self._run, self._stop_requested, self._checkpoint = display, run, stop_requested, checkpoint
        self._stop_announced = False
        self._file, self._written = Settings.read().progress_file, -FILE_EVERY  # for the parent process; when

    def progress(self, done: int, total: int, unit: str) -> None:
        self._display.progress(done, total, unit)
        if self._file and (done >= total or time.monotonic() - self._written >= FILE_EVERY):
            self._written = time.monotonic()
            replace_text(self._file, json.dumps({"done": done, "total": total, "unit": unit}))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self._display.metrics(values, step)
        self._run.metrics({key: value for key, value in values.items() if key != "step"}, step)

    def image(self, key: str, path: Path, step: int) -> None:
        self._run.image(key, path, step)

    def remark(self, text: str) -> None:
        self._display.remark(text)

    def state_saved(self) -> None:
        if self._checkpoint:
            self._checkpoint.publish()

    def stop_requested(self) -> bool:
        requested = self._stop_requested()
        if requested and not self._stop_announced:  # reported here, because a signal handler must not print
            self._stop_announced = True
            self.remark("stopping after this step, the training state is saved; press Ctrl-C again to stop immediately")
        return requested
