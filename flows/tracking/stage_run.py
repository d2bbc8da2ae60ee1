"""The MLflow run of one stage."""

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from flows.tracking.system_metrics import SystemMetrics
from flows.tracking.tracker import Tracker, code_tags, error_tags, status_after

Action = Callable[[Tracker, str], None]  # an operation on the run with this id


class StageRun:
    """The MLflow run of one stage, written by a thread: neither MLflow's start nor its store slows a training step.

    If MLflow cannot be opened, the next report raises. Later failures are retried, and raised, when the stage has
    ended, so that they do not stop a training.
    """

    def __init__(
        self,
        shared_root: Path,
        stage: str,
        parent_run_id: str | None,
        tags: Callable[[], dict[str, str]],
        *,
        watch_machine: bool = False,
    ) -> None:
        self._shared_root, self._stage, self._parent_run_id, self._make_tags = shared_root, stage, parent_run_id, tags
        self._watch_machine = watch_machine
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._written: deque[tuple[Action, Future[None]]] = deque()

    def __enter__(self) -> "StageRun":
        self._opened = self._thread.submit(self._open)
        return self

    def _open(self) -> None:
        tracker = Tracker(self._shared_root)
        self.tags = {**self._make_tags(), "stage": self._stage}
        parent = {"mlflow.parentRunId": self._parent_run_id} if self._parent_run_id else {}
        tags = {**self.tags, **parent, **code_tags(self.tags, f"cm stage {self._stage}")}
        run = tracker.client.create_run(tracker.experiment_id, run_name=self._stage, tags=tags)
        self._tracker, self._run_id = tracker, run.info.run_id
        self._machine = SystemMetrics() if self._watch_machine else None

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        written = self._thread.submit(self._write_again) if error is None else self._opened
        closed = self._thread.submit(self._close, error)
        self._thread.shutdown()
        if error is None:
            for future in (self._opened, written, closed):
                future.result()

    def _write_again(self) -> None:
        """Retry failed operations in order: MLflow may have been unavailable for a while only."""
        for action, future in self._written:
            if future.exception():
                action(self._tracker, self._run_id)

    def _close(self, error: BaseException | None) -> None:
        self._tracker.set_tags(self._run_id, error_tags(error))
        self._tracker.client.set_terminated(self._run_id, status_after(error))

    def submit(self, action: Action) -> None:
        """Queue `action`. Raises the error that kept MLflow from being opened."""
        if self._opened.done():
            self._opened.result()
        while self._written and (done := self._written[0][1]).done() and done.exception() is None:
            self._written.popleft()
        self._written.append((action, self._thread.submit(lambda: action(self._tracker, self._run_id))))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers of a step, with the system metrics."""

        def log(tracker: Tracker, run_id: str) -> None:
            machine = self._machine.read() if self._machine else {}
            tracker.log_numbers(run_id, {**values, **machine}, step=step)

        self.submit(log)

    def image(self, key: str, path: Path, step: int) -> None:
        """Log a picture of a step; MLflow shows those of one key with a slider, side by side for several runs."""
        from PIL import Image

        with Image.open(path) as picture:
            picture.load()  # now: the file may change before the thread reads it
        self.submit(lambda tracker, run_id: tracker.client.log_image(run_id, picture, key=key, step=step))
