"""Metrics for Prometheus: of the queue, stages, trainings, GPUs, leases and disks.

Each request asks Prefect, MLflow, the bucket of training states and this machine anew. Histograms and counters begin
with the process; Prometheus expects that. To it a counter that first appears with 1 is no increase, so counters begin
at 0 where their labels are known: of the workspace's recipes, and of each run that is seen while it runs.
"""

import logging
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from flows.errors import UserError
from flows.recipes.recipe import recipe_names
from flows.storage.s3 import public_text
from flows.tracking.gpu_usage import ENERGY, GPU_HOURS
from flows.tracking.person import USER
from flows.tracking.run_queries import PIPELINES
from flows.workspace.dvc_files import GPU

if TYPE_CHECKING:
    from mlflow.entities import Run
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.events import Event
    from prefect.events.filters import EventFilter

    from flows.tracking.tracker import Tracker

logger = logging.getLogger(__name__)
OVERLAP = timedelta(minutes=2)  # between two readings: a record may arrive later than its time
HEARTBEAT = "prefect.flow-run.heartbeat"
PAGE, EVENTS = 200, 50  # flow runs or events a request, the most that Prefect answers
ENDS = ("finished", "failed", "killed")  # of a run of MLflow
KNOWN_SUCCESSES = 1000  # newest finished runs that are searched for recipes at the start
SECONDS = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 24 * 3600, 72 * 3600)  # buckets


class Metrics:
    """The metrics of one machine, and of the servers that it uses."""

    def __init__(self, root: Path, *, prefect: bool, tracker: "Tracker | None") -> None:
        self._root, self._tracker, self._reading = root, tracker, threading.Lock()
        self._sources: dict[str, Callable[[datetime], None]] = {"machine": self._read_machine}
        if prefect:
            self._sources["prefect"] = self._read_prefect
        if tracker:
            self._sources["mlflow"] = self._read_mlflow
        self._sources["states"] = self._read_leases
        self._since = datetime.now(UTC)
        self._seen: dict[Any, datetime] = {}  # records that are counted, with the time of the reading
        self._heartbeats: dict[str, datetime] = {}
        self._make_metrics()
        if tracker:
            for recipe in recipe_names(root):
                self._show_ends(recipe)
            finished = f"{PIPELINES} and attributes.status = 'FINISHED'"
            order = ["attributes.end_time DESC"]
            newest = tracker.client.search_runs(
                [tracker.experiment_id], finished, max_results=KNOWN_SUCCESSES, order_by=order
            )
            for run in reversed(newest):
                self._note_success(run)

    def _make_metrics(self) -> None:
        self.registry = CollectorRegistry()

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"cm_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(f"cm_{name}", text, labels, buckets=SECONDS, registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"cm_{name}", text, labels, registry=self.registry)

        self.source_up = gauge("source_up", "1 if this source of metrics answered, else 0.", "source")
        self.queue_wait = histogram("queue_wait_seconds", "Waits that ended: for a worker, for a GPU slot.", "queue")
        self.waiting = gauge("runs_waiting", "Flow runs past their start time that no worker has taken.")
        self.oldest_wait = gauge("oldest_wait_seconds", "The longest wait of those.")
        self.running = gauge("runs_running", "Flow runs that run.")
        self.slots = gauge("gpu_slots", "Slots of the limit `gpu`.", "state")
        self.stage_seconds = histogram("stage_seconds", "Stages that ran and ended.", "stage", "recipe", "status")
        self.runs = counter("runs", "Pipeline runs that ended.", "recipe", "status")
        self.gpu_hours = counter("gpu_hours", "GPU-hours of pipeline runs that ended.", "recipe", "user")
        self.energy = counter("energy_kwh", "Energy of pipeline runs that ended, where measured.", "recipe", "user")
        self.speed = gauge("images_per_second", "Newest speed of each running training.", "stage", "recipe", "run")
        self.success = gauge("last_success_timestamp_seconds", "When a recipe's newest run finished.", "recipe")
        self.lease_age = gauge("lease_age_seconds", "Since a run or training has last shown life.", "kind", "name")
        self.gpu_use = gauge("gpu_utilization_ratio", "Share of time in which the GPU computed.", "gpu")
        self.gpu_memory_used = gauge("gpu_memory_used_bytes", "Memory in use.", "gpu")
        self.gpu_memory = gauge("gpu_memory_bytes", "Memory of the GPU.", "gpu")
        self.gpu_power = gauge("gpu_power_watts", "Power.", "gpu")
        self.disk_free = gauge("disk_free_bytes", "Free space.", "place")
        self.disk = gauge("disk_bytes", "Size of the file system.", "place")

    def _show_ends(self, recipe: str) -> None:
        for status in ENDS:
            self.runs.labels(recipe, status)  # a label set exists, with 0, from when it is first named

    def text(self) -> bytes:
        """Read all sources and return the metrics in Prometheus's format; a silent source has `cm_source_up` 0."""
        from httpx import HTTPError
        from mlflow.exceptions import MlflowException
        from prefect.exceptions import PrefectException

        with self._reading:
            now = datetime.now(UTC)
            for gauge in (self.speed, self.lease_age):  # what has ended must go
                gauge.clear()
            for name, read in self._sources.items():
                try:
                    read(now)
                    self.source_up.labels(name).set(1)
                except (UserError, OSError, HTTPError, MlflowException, PrefectException) as error:
                    said = public_text(" ".join(str(error).split()))[:300]
                    logger.warning("metrics: no answer from %s: %s", name, said)
                    self.source_up.labels(name).set(0)
            self._since = now
            self._seen = {key: at for key, at in self._seen.items() if at > now - 2 * OVERLAP}
            return generate_latest(self.registry)

    def _is_new(self, key: Any, now: datetime) -> bool:
        """Whether a record is read for the first time."""
        new, self._seen[key] = key not in self._seen, now
        return new

    def _read_machine(self, now: datetime) -> None:
        for name, place in places(self._root).items():
            space = shutil.disk_usage(place)
            self.disk_free.labels(name).set(space.free)
            self.disk.labels(name).set(space.total)
        gauges = (self.gpu_use, self.gpu_memory_used, self.gpu_memory, self.gpu_power)
        for number, values in enumerate(read_gpus()):
            for gauge, value in zip(gauges, values, strict=True):
                if value is not None:
                    gauge.labels(number).set(value)

    def _read_prefect(self, now: datetime) -> None:
        from prefect.client.orchestration import get_client
        from prefect.client.schemas import filters
        from prefect.client.schemas.objects import StateType
        from prefect.events.filters import EventFilter, EventNameFilter, EventOccurredFilter

        from flows.orchestration.gpu_slots import SLOT_TAKEN

        def in_state(state: StateType, **more: Any) -> filters.FlowRunFilter:
            wanted = filters.FlowRunFilterState(type=filters.FlowRunFilterStateType(any_=[state]))
            return filters.FlowRunFilter(state=wanted, **more)

        due = in_state(StateType.SCHEDULED, expected_start_time=filters.FlowRunFilterExpectedStartTime(before_=now))
        # Without is_null_ runs that wait are among them, with the time at which they should have begun.
        begun_since = filters.FlowRunFilterStartTime(after_=self._since - OVERLAP, is_null_=False)
        named, recent = EventNameFilter(name=[HEARTBEAT, SLOT_TAKEN]), EventOccurredFilter(since=self._since - OVERLAP)
        with get_client(sync_client=True) as client:
            waiting = client.read_flow_runs(flow_run_filter=due, limit=PAGE)
            running = client.read_flow_runs(flow_run_filter=in_state(StateType.RUNNING), limit=PAGE)
            begun = client.read_flow_runs(flow_run_filter=filters.FlowRunFilter(start_time=begun_since), limit=PAGE)
            limit = client.read_global_concurrency_limit_by_name(GPU)
            events = list(_events(client, EventFilter(event=named, occurred=recent)))
        self.waiting.set(len(waiting))
        since = [run.expected_start_time for run in waiting if run.expected_start_time]
        self.oldest_wait.set((now - min(since)).total_seconds() if since else 0)
        self.running.set(len(running))
        self.slots.labels("all").set(limit.limit)
        self.slots.labels("taken").set(limit.active_slots)
        for run in begun:
            if self._is_new(run.id, now):
                self.queue_wait.labels("worker").observe(run.estimated_start_time_delta.total_seconds())
        for event in events:
            if event.event == SLOT_TAKEN and self._is_new(event.id, now):
                self.queue_wait.labels("gpu").observe(event.payload["waited_seconds"])
            if event.event == HEARTBEAT:
                run_id = event.resource.id.rpartition(".")[2]
                self._heartbeats[run_id] = max(event.occurred, self._heartbeats.get(run_id, event.occurred))
        names = {str(run.id): run.name for run in running}
        self._heartbeats = {run_id: seen for run_id, seen in self._heartbeats.items() if run_id in names}
        for run_id, seen in self._heartbeats.items():
            self.lease_age.labels("run", names[run_id]).set((now - seen).total_seconds())

    def _read_mlflow(self, now: datetime) -> None:
        assert self._tracker, "a source only with it"
        from flows.tracking.tracker import all_pages

        search, experiments = self._tracker.client.search_runs, [self._tracker.experiment_id]
        for run in all_pages(search, experiments, "attributes.status = 'RUNNING'"):
            if "stage" in run.data.tags and "images_per_s" in run.data.metrics:
                speed = self.speed.labels(run.data.tags["stage"], recipe_of(run), run.info.run_id[:8])
                speed.set(run.data.metrics["images_per_s"])
            if run.data.tags.get("stage") == "pipeline":
                self._show_ends(recipe_of(run))
                for counter in (self.gpu_hours, self.energy):
                    counter.labels(*_used_by(run))
        ended = f"attributes.end_time >= {(self._since - OVERLAP).timestamp() * 1000:.0f}"
        for run in all_pages(search, experiments, ended):
            if "stage" in run.data.tags and self._is_new(run.info.run_id, now):  # anybody may log here
                self._count(run)

    def _count(self, run: "Run") -> None:
        """Count a run of MLflow that has ended: of a pipeline or of a stage."""
        stage, status, recipe = run.data.tags["stage"], run.info.status.lower(), recipe_of(run)
        if stage != "pipeline":
            seconds = (run.info.end_time - run.info.start_time) / 1000
            self.stage_seconds.labels(stage, recipe, status).observe(seconds)
            return
        self.runs.labels(recipe, status).inc()
        for counter, key in ((self.gpu_hours, GPU_HOURS), (self.energy, ENERGY)):
            if key in run.data.metrics:
                counter.labels(*_used_by(run)).inc(run.data.metrics[key])
        if status == "finished":
            self._note_success(run)

    def _note_success(self, run: "Run") -> None:
        self.success.labels(recipe_of(run)).set(run.info.end_time / 1000)

    def _read_leases(self, now: datetime) -> None:
        """Read the leases of trainings whose states lie in a bucket; a folder's lock ends with its process."""
        from flows.checkpoints.s3_store import leases
        from flows.checkpoints.store import states_bucket

        if bucket := states_bucket():
            for training, age in leases(bucket).items():
                self.lease_age.labels("training", training).set(age)


def _events(client: "SyncPrefectClient", wanted: "EventFilter") -> "Iterator[Event]":
    page = client.read_events(wanted, limit=EVENTS)
    yield from page.events
    while page.next_page:
        page = client.read_events_page(str(page.next_page))
        yield from page.events


def recipe_of(run: "Run") -> str:
    """Return the recipe's name without what was changed of it: each label of Prometheus must have few values."""
    return next(iter(run.data.tags.get("recipe", "").split()), "")


def _used_by(run: "Run") -> tuple[str, str]:
    return recipe_of(run), run.data.tags.get(USER, "")


def places(root: Path) -> Mapping[str, Path]:
    """Return the folders whose disks must not get full."""
    from flows.checkpoints.store import states_folder
    from flows.workspace.locations import cache_of

    wanted = {"workspace": root, "cache": cache_of(root).folder, "states": states_folder(root)}
    return {name: next(place for place in (path, *path.parents) if place.exists()) for name, path in wanted.items()}


def read_gpus() -> Iterator[tuple[float | None, ...]]:
    """Yield for each GPU that NVML sees: share of time in use, memory used and of all, bytes, power, W.

    None stands for what a card does not measure, as a part of one (MIG).
    """
    try:
        import pynvml
    except ImportError:
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver
        return

    def value(read: Callable[[Any], Any], handle: Any) -> float | None:
        try:
            return read(handle)
        except pynvml.NVMLError:
            return None

    for number in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(number)
        yield (
            value(lambda card: pynvml.nvmlDeviceGetUtilizationRates(card).gpu / 100, handle),
            value(lambda card: pynvml.nvmlDeviceGetMemoryInfo(card).used, handle),
            value(lambda card: pynvml.nvmlDeviceGetMemoryInfo(card).total, handle),
            value(lambda card: pynvml.nvmlDeviceGetPowerUsage(card) / 1000, handle),
        )
