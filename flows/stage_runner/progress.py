"""What a stage run by `cm stage` shows and reports: a bar or lines, a progress file, metrics and pictures in MLflow."""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from flows.atomic import replace_text
from flows.monitor import Monitor
from flows.tracking.stage_run import StageRun
from flows.workspace.clone import PROGRESS_VARIABLE

LINE_EVERY, FILE_EVERY = 5.0, 0.5  # seconds between two lines of progress, two writes of the progress file


class StageMonitor(Monitor):
    """Shows a bar on a terminal and lines elsewhere, writes the progress file, logs to MLflow."""

    def __init__(self, stage: str, run: StageRun, stop_requested: Callable[[], bool]) -> None:
        self._stage, self._run, self._stop_requested = stage, run, stop_requested
        self._stop_announced = False
        self._display = _Bar(stage) if sys.stderr.isatty() else _Lines(stage)
        self._file = _ProgressFile()
        self.on_state_saved: Callable[[], None] = lambda: None  # set once the state's place is held

    def progress(self, done: int, total: int, unit: str) -> None:
        self._display.progress(done, total, unit)
        self._file.write(done, total, unit)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self._display.loss = values.get("loss")
        self._run.metrics({key: value for key, value in values.items() if key != "step"}, step)

    def image(self, key: str, path: Path, step: int) -> None:
        self._run.image(key, path, step)

    def remark(self, text: str) -> None:
        self._display.write(f"{self._stage}: {text}")

    def state_saved(self, state_dir: Path) -> None:
        self.on_state_saved()

    def stop_requested(self) -> bool:
        requested = self._stop_requested()
        if requested and not self._stop_announced:  # said here, because a signal handler must not print
            self._stop_announced = True
            self.remark("stopping after this step, the training state is saved; a second signal stops immediately")
        return requested


class _Lines:
    """Progress as a line now and then, and one at the end."""

    loss: float | None = None

    def __init__(self, stage: str) -> None:
        self._stage, self._last = stage, time.monotonic()

    def progress(self, done: int, total: int, unit: str) -> None:
        if done >= total or time.monotonic() - self._last >= LINE_EVERY:
            self._last = time.monotonic()
            loss = "" if self.loss is None else f", loss {self.loss:.4g}"
            self.write(f"{self._stage}: {done:,} of {total:,} {unit}{loss}")

    def write(self, text: str) -> None:
        print(text, flush=True)


class _Bar:
    """Progress as a bar on the terminal."""

    loss: float | None = None

    def __init__(self, stage: str) -> None:
        self._stage, self._bar = stage, None

    def progress(self, done: int, total: int, unit: str) -> None:
        from tqdm import tqdm

        if self._bar is None or (self._bar.total, self._bar.unit) != (total, f" {unit}"):
            self._bar = tqdm(desc=self._stage, total=total, unit=f" {unit}", unit_scale=True, dynamic_ncols=True)
        if self.loss is not None:
            self._bar.set_postfix(loss=f"{self.loss:.4g}", refresh=False)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._bar.close()
            self._bar = None

    def write(self, text: str) -> None:
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr)


class _ProgressFile:
    """How far the stage is, for the process that started it: one JSON object, replaced whole."""

    def __init__(self) -> None:
        path = os.environ.get(PROGRESS_VARIABLE)
        self._path, self._last = Path(path) if path else None, -FILE_EVERY

    def write(self, done: int, total: int, unit: str) -> None:
        if self._path is None or (done < total and time.monotonic() - self._last < FILE_EVERY):
            return
        self._last = time.monotonic()
        replace_text(self._path, json.dumps({"done": done, "total": total, "unit": unit}))
