"""The services of one machine, as children of `cm up`: Prefect server, MLflow server, a worker.

All they keep lies in the workspace: Prefect's database in .cm/prefect and MLflow's in mlflow.db, the same files that a
run without servers uses, so that each shows the other's runs; logs and this module's own notes in .cm/services.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.atomic import replace_text, try_lock
from flows.distributed.devices import visible_devices
from flows.errors import UserError
from flows.operations.deploy import HEARTBEAT_SECONDS, deploy, in_folder
from flows.workspace.dvc_files import GPU
from flows.workspace.process import GRACE

if TYPE_CHECKING:
    import psutil

HOST = "127.0.0.1"
PREFECT_PORT, MLFLOW_PORT = 4200, 5000
START_SECONDS = 180  # until a server answers; the first start makes its database
WORKER_SECONDS = 3 * GRACE  # for flow runs to end their stages, which save their states, and to say so
SETTLE_SECONDS = 5  # for the server to schedule again the flow runs that have just told it of their crash
LOOK_EVERY = 0.5  # seconds between two looks whether all is well
WORKER = f"worker-{GPU}"
LOG_LINES = 15  # of a service that ended, shown to the user
MLFLOW_SCHEMA = "mlflow"  # of PostgreSQL: both servers call a table alembic_version


class _StopFlag:
    """Whether SIGINT or SIGTERM came; no threading.Event, whose lock the interrupted thread may hold itself."""

    def __init__(self) -> None:
        self._set = False

    def set(self, *_: object) -> None:
        self._set = True

    def is_set(self) -> bool:
        return self._set

    def wait(self, seconds: float) -> bool:
        """Sleep for so many seconds, unless the flag is set already; return whether it is set by then."""
        if not self._set:
            time.sleep(seconds)
        return self._set


class ServiceEnded(RuntimeError):
    """A service has ended that should run; the message says which, and the end of its log."""


@dataclass(frozen=True)
class Options:
    """What `cm up` is asked for."""

    prefect_port: int = PREFECT_PORT
    mlflow_port: int = MLFLOW_PORT
    database: str | None = None
    """A PostgreSQL database for both servers; None: files in the workspace."""
    worker: bool = True
    """Whether a worker is started, or the servers alone."""


@dataclass(frozen=True)
class Services:
    """Where the services of a workspace are, or are to be."""

    prefect: str
    """Address of the Prefect server."""
    mlflow: str
    """Address of the MLflow server."""

    @property
    def prefect_api(self) -> str:
        """Address of Prefect's API."""
        return f"{self.prefect}/api"


def folder_of(root: Path) -> Path:
    """Return the folder of logs and notes."""
    return root / ".cm" / "services"


def client_variables(root: Path, services: Services) -> dict[str, str]:
    """Return the environment variables with which a process of this workspace uses the services."""
    return {
        "PREFECT_API_URL": services.prefect_api,
        "PREFECT_HOME": str(root / ".cm" / "prefect"),
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
        "MLFLOW_TRACKING_URI": services.mlflow,
        "DO_NOT_TRACK": "true",  # Prefect, MLflow
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DVC_NO_ANALYTICS": "1",
    }


def server_variables(root: Path, services: Services, database: str | None) -> dict[str, str]:
    """Return what the servers' environment says beyond that; passwords stand here, not in a command line."""
    port = services.prefect.rpartition(":")[2]
    prefect_database, mlflow_database = _database_urls(root, database)
    return {
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_API_HOST": HOST,
        "PREFECT_SERVER_API_PORT": port,  # --port alone would leave the browser asking 4200
        "PREFECT_SERVER_UI_API_URL": services.prefect_api,
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": prefect_database,
        # Kept in memory, as is Prefect's habit, a restart would lose whose the slots are and never free them.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "MLFLOW_BACKEND_STORE_URI": mlflow_database,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # 2 GB for jobs of language models
    }


def _database_urls(root: Path, database: str | None) -> tuple[str, str]:
    """Return Prefect's and MLflow's database."""
    if database is None:
        return f"sqlite+aiosqlite:///{root / '.cm' / 'prefect' / 'prefect.db'}", f"sqlite:///{root / 'mlflow.db'}"
    from sqlalchemy import make_url

    url = make_url(database)
    schema = {"options": f"-csearch_path={MLFLOW_SCHEMA}"}
    urls = url.set(drivername="postgresql+asyncpg"), url.set(drivername="postgresql+psycopg2", query=schema)
    return urls[0].render_as_string(hide_password=False), urls[1].render_as_string(hide_password=False)


def prepare_database(database: str) -> None:
    """Make MLflow's schema in a PostgreSQL database. Raises UserError where it cannot be reached or is none."""
    import psycopg2
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(database)
    except ArgumentError:
        raise UserError("--database: not an address; expected postgresql://user:password@host:port/name") from None
    shown = url.render_as_string(hide_password=True)
    if url.drivername != "postgresql" or not url.database or url.query:
        raise UserError(f"--database {shown}: expected postgresql://user:password@host:port/name")
    try:
        connection = psycopg2.connect(url.render_as_string(hide_password=False))
    except psycopg2.OperationalError as error:
        raise UserError(f"--database {shown}: {' '.join(str(error).split())}") from None
    with connection, connection.cursor() as cursor:
        cursor.execute(f"create schema if not exists {MLFLOW_SCHEMA}")
    connection.close()


def choose_port(port: int, option: str) -> int:
    """Return a port that nobody listens on: this one, or for 0 any. Raises UserError where it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(f"{option} {port}: {error.strerror}; choose another, or 0 for a free one") from None
        return probe.getsockname()[1]


class Child:
    """A service: a process whose output goes to a log of its own."""

    def __init__(self, name: str, command: Sequence[str], *, cwd: Path, env: Mapping[str, str], logs: Path) -> None:
        self.name, self.log = name, logs / f"{name}.log"
        if self.log.exists():
            self.log.replace(logs / f"{name}.log.1")
        with self.log.open("wb") as file:
            # A session of its own: Ctrl-C in the terminal is for `cm up` alone, which ends its children in order.
            self._popen = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._popen.pid

    def check(self) -> None:
        """Raise ServiceEnded if it has."""
        code = self._popen.poll()
        if code is not None:
            last = self.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
            raise ServiceEnded(f"{self.name} ended with code {code}; the end of {self.log}:\n" + "\n".join(last))


def up(root: Path, options: Options, *, on_start: Callable[[str], None], on_ready: Callable[[Services], None]) -> None:
    """Run the services until SIGINT or SIGTERM, then end them, trainings with their state saved.

    `on_start` gets the name of each as it is started, `on_ready` the addresses once all answer. Raises UserError where
    they run already or cannot, ServiceEnded when one of them ends by itself.
    """
    with _hold(root), _stop_signal() as stop:
        services = Services(
            f"http://{HOST}:{choose_port(options.prefect_port, '--prefect-port')}",
            f"http://{HOST}:{choose_port(options.mlflow_port, '--mlflow-port')}",
        )
        if options.database:
            prepare_database(options.database)
        children = _Children(root, services, on_start)
        try:
            children.start_servers(options.database, stop)
            if not stop.is_set():
                os.environ.update(client_variables(root, services))
                gpus = max(1, len(visible_devices()))
                deploy(root, gpus=gpus, pool_type="process", pull_steps=in_folder(root))
                crash_lost_runs()
                if options.worker:
                    children.start_worker(_worker_command(gpus))
                on_ready(services)
            while not stop.wait(LOOK_EVERY):
                children.check()
        finally:
            children.end()


class _Children:
    """The processes that `cm up` has started."""

    def __init__(self, root: Path, services: Services, on_start: Callable[[str], None]) -> None:
        self._root, self._services, self._on_start = root, services, on_start
        self._env = {**os.environ, **client_variables(root, services)}
        self._servers: list[Child] = []
        self._workers: list[Child] = []

    def start_servers(self, database: str | None, stop: _StopFlag) -> None:
        """Start the servers and wait until they answer. Raises ServiceEnded where one does not."""
        env = {**self._env, **server_variables(self._root, self._services, database)}
        for name, command in _server_commands(self._root, self._services).items():
            self._servers.append(self._start(name, command, env))
        deadline = time.monotonic() + START_SECONDS
        while not all((answers := answering(self._services)).values()) and not stop.wait(LOOK_EVERY):
            self.check()
            if time.monotonic() > deadline:
                silent = ", ".join(name for name, answered in answers.items() if not answered)
                raise ServiceEnded(f"no answer from {silent} within {START_SECONDS} s; see its log")

    def start_worker(self, command: Sequence[str]) -> None:
        """Start a worker, which needs a server that answers."""
        self._workers.append(self._start(WORKER, command, self._env))

    def check(self) -> None:
        """Raise ServiceEnded if one of them has ended."""
        for child in self._servers + self._workers:
            child.check()

    def end(self) -> None:
        """End the workers and what runs on them, which then still has servers to report to; last the servers."""
        if _end_workers([child.pid for child in self._workers]):
            time.sleep(SETTLE_SECONDS)
        _end_all([child.pid for child in self._servers], GRACE)

    def _start(self, name: str, command: Sequence[str], env: Mapping[str, str]) -> Child:
        self._on_start(name)
        logs = folder_of(self._root) / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        child = Child(name, command, cwd=self._root, env=env, logs=logs)
        _write_note(self._root, self._services, [*self._servers, *self._workers, child])
        return child


def crash_lost_runs() -> None:
    """Say of flow runs under way whose process is gone, with all of this machine, say, that they have crashed."""
    import psutil
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
    from prefect.client.schemas.objects import StateType
    from prefect.states import Crashed

    under_way = FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING])
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=under_way))):
            number = (run.infrastructure_pid or "").rpartition(":")[2]  # of the worker's own machine: this one
            if number and not psutil.pid_exists(int(number)):
                client.set_flow_run_state(run.id, Crashed(message=f"Its process {number} is gone."), force=True)


def _server_commands(root: Path, services: Services) -> dict[str, list[str]]:
    artifacts = (root / "mlruns").as_uri()  # as without a server, so that every run's files are found by both
    return {
        "prefect": ["prefect", "server", "start"],
        "mlflow": [
            *("mlflow", "server", "--host", HOST, "--port", services.mlflow.rpartition(":")[2], "--workers", "1"),
            *("--no-serve-artifacts", "--default-artifact-root", artifacts),
        ],
    }


def _worker_command(gpus: int) -> list[str]:
    """Return the command of a worker; it takes one run more than GPUs: its other work overlaps their trainings."""
    return [
        *("prefect", "worker", "start", "--pool", GPU, "--name", f"{GPU}@{socket.gethostname()}"),
        *("--type", "process", "--limit", str(gpus + 1), "--install-policy", "never"),
    ]


def answering(services: Services) -> dict[str, bool]:
    """Return for each server whether it answers."""
    return {
        "prefect": _answers(f"{services.prefect_api}/health"),
        "mlflow": _answers(f"{services.mlflow}/health"),
    }


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


@contextmanager
def _stop_signal() -> Iterator[_StopFlag]:
    """Yield a flag that SIGINT and SIGTERM set."""
    stop = _StopFlag()
    before = {number: signal.signal(number, stop.set) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _hold(root: Path) -> Iterator[None]:
    """Be the one `cm up` of this workspace, after ending what a killed one has left."""
    folder = folder_of(root)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as lock:
        if not try_lock(lock):
            known = running(root)
            where = f"Prefect {known.prefect}, MLflow {known.mlflow}" if known else "they are just starting or ending"
            raise UserError(f"the services run already: {where}; `cm down` stops them")
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        _end_leftovers(root)
        try:
            yield
        finally:
            _note_file(root).unlink(missing_ok=True)


def is_running(root: Path) -> bool:
    """Whether a `cm up` of this workspace runs."""
    lock = folder_of(root) / "lock"
    if not lock.exists():
        return False
    with lock.open("a") as file:
        return not try_lock(file)


def running(root: Path) -> Services | None:
    """Return where the services of this workspace are, if they run."""
    if not is_running(root) or not _note_file(root).exists():
        return None
    note = read_note(root)
    return Services(note["prefect"], note["mlflow"])


def use_running(root: Path) -> None:
    """Make this process use the services of the workspace, if they run and the environment names no other server."""
    services = running(root)
    if services and "PREFECT_API_URL" not in os.environ and all(answering(services).values()):
        for name, value in client_variables(root, services).items():
            os.environ.setdefault(name, value)


def down(root: Path) -> bool:
    """Stop the `cm up` of this workspace and wait for its end; return whether there was one."""
    was_running = is_running(root)
    if was_running:
        os.kill(int((folder_of(root) / "lock").read_text()), signal.SIGTERM)
    while is_running(root):
        time.sleep(0.2)
    _end_leftovers(root)
    return was_running


def _note_file(root: Path) -> Path:
    return folder_of(root) / "services.json"


def read_note(root: Path) -> dict[str, Any]:
    """Return what the `cm up` of this workspace has noted: addresses, children with process id and log."""
    return json.loads(_note_file(root).read_text())


def _write_note(root: Path, services: Services, children: Sequence[Child]) -> None:
    import psutil

    known = {
        child.name: {"pid": child.pid, "created": psutil.Process(child.pid).create_time(), "log": str(child.log)}
        for child in children
    }
    replace_text(_note_file(root), json.dumps({**asdict(services), "children": known}))


def _end_leftovers(root: Path) -> None:
    """End the children that a killed `cm up` has left behind."""
    import psutil

    if not _note_file(root).exists():
        return
    for child in reversed(read_note(root)["children"].values()):
        if psutil.pid_exists(child["pid"]) and psutil.Process(child["pid"]).create_time() == child["created"]:
            _end_all([child["pid"]], GRACE)
    _note_file(root).unlink()


def _end_workers(pids: Sequence[int]) -> bool:
    """End workers and their flow runs, which end their stages and tell the server; return whether there were any.

    A worker that is asked to end kills its flow runs at once, and one that goes on would take them up again: it is
    held still until they have ended.
    """
    everything = _trees(pids)
    workers = [process for process in everything if process.pid in pids]
    flow_runs = [process for process in everything if process not in workers and _parent(process) in pids]
    for number, processes in ((signal.SIGSTOP, workers), (signal.SIGTERM, flow_runs)):
        for process in processes:
            _signal(process, number)
    _kill_after([process for process in everything if process not in workers], WORKER_SECONDS)
    _kill_after(workers, 0)
    return bool(flow_runs)


def _parent(process: "psutil.Process") -> int | None:
    import psutil

    try:
        return process.ppid()
    except psutil.NoSuchProcess:
        return None


def _end_all(pids: Sequence[int], seconds: float) -> None:
    """End processes and all they have started: SIGTERM, then SIGKILL."""
    everything = _trees(pids)
    for process in everything:
        _signal(process, signal.SIGTERM)
    _kill_after(everything, seconds)


def _trees(pids: Sequence[int]) -> "list[psutil.Process]":
    """Return these processes and all below them."""
    import psutil

    alive = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    return [process for top in alive for process in (top, *top.children(recursive=True))]


def _signal(process: "psutil.Process", number: int) -> None:
    import psutil

    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        pass


def _kill_after(processes: "Sequence[psutil.Process]", seconds: float) -> None:
    for process in _left_after(seconds, processes):
        _signal(process, signal.SIGKILL)
    _left_after(GRACE, processes)


def _left_after(seconds: float, processes: "Sequence[psutil.Process]") -> "list[psutil.Process]":
    """Wait until these processes have ended; return those that still run after so many seconds."""
    deadline = time.monotonic() + seconds
    while (left := [process for process in processes if still_runs(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def still_runs(process: "psutil.Process") -> bool:
    """Whether a process has not ended; one that nobody has reaped yet has."""
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
