"""The services of one machine, as children of `cm up`: Prefect server, MLflow server, a worker.

All their state lies in the workspace: Prefect's database in .cm/prefect and MLflow's in mlflow.db, also used by runs
without servers, so that each shows the other's runs; logs and this module's state file in .cm/services.
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
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flows.atomic import replace_text, reserve_port, try_lock
from flows.distributed.devices import visible_devices
from flows.errors import UserError
from flows.operations.deploy import deploy, in_folder
from flows.operations.service_environment import (
    HOST,
    OF_MLFLOW,
    Services,
    client_variables,
    database_urls,
    prepare_database,
    server_variables,
)
from flows.operations.stop_flag import StopFlag, stop_signal
from flows.settings import variable
from flows.storage.s3 import public_uri
from flows.tracking.database import check_database, make_database
from flows.tracking.person import USER, person
from flows.workspace.dvc_files import GPU
from flows.workspace.process import flow_grace

PREFECT_PORT, MLFLOW_PORT, METRICS_PORT = 4200, 5000, 9464
START_SECONDS = 900  # until a server responds: its first start creates a database, at a load of 30 in over 3 minutes
SETTLE_SECONDS = 5  # for the server to reschedule the flow runs that have just reported a crash
LOOK_EVERY = 0.5  # seconds between health checks
# Settings of some other server, as of one in a container: those here have theirs from `cm up`.
OF_SERVERS = ("MLFLOW_", "_MLFLOW_", "PREFECT_SERVER_", "PREFECT_UI_", "PREFECT_API_DATABASE_")
WORKER = f"worker-{GPU}"
LOG_LINES = 15  # of a failed service, shown to the user


class ServiceEnded(RuntimeError):
    """A service exited unexpectedly; the message holds its name and the end of its log."""


def folder_of(root: Path) -> Path:
    """Return the folder of logs and the state file."""
    return root / ".cm" / "services"


def _reserve(port: int, option: str) -> socket.socket:
    """Return a socket that keeps this port, or any free one for 0. Raises UserError if it is taken."""
    try:
        return reserve_port(HOST, port)
    except OSError as error:
        raise UserError(f"{option} {port}: {error.strerror}; choose another, or 0 for a free one") from None


class Child:
    """A service: a process that writes to its own log."""

    def __init__(self, name: str, command: Sequence[str], *, cwd: Path, env: Mapping[str, str], logs: Path) -> None:
        self.name, self.log = name, logs / f"{name}.log"
        if self.log.exists():
            self.log.replace(logs / f"{name}.log.1")
        with self.log.open("wb") as file:
            # Its own session: Ctrl-C in the terminal reaches `cm up` alone, which stops its children in order.
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
        """Raise ServiceEnded if the process has exited."""
        code = self._popen.poll()
        if code is not None:
            last = self.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
            raise ServiceEnded(f"{self.name} ended with code {code}; the end of {self.log}:\n" + "\n".join(last))


def up(
    root: Path,
    *,
    prefect_port: int,
    mlflow_port: int,
    metrics_port: int,
    database: str | None,
    worker: bool,
    public: str | None = None,
    on_start: Callable[[str], None],
    on_ready: Callable[[Services], None],
) -> None:
    """Run the services until SIGINT or SIGTERM, then stop them; trainings save their state.

    Port 0 means any free one; `public` is the address of a reverse proxy (Services.public);
    `database` is a PostgreSQL database for both servers, None means files in the workspace.
    `on_start` gets each name as it starts, `on_ready` the addresses once all respond. Raises UserError if the services
    are running already or cannot start, ServiceEnded when one exits unexpectedly.
    """
    from flows.operations.metrics_server import observed

    ports = {"--prefect-port": prefect_port, "--mlflow-port": mlflow_port, "--metrics-port": metrics_port}
    with _hold(root), stop_signal() as stop, ExitStack() as stack:
        kept = [stack.enter_context(_reserve(port, option)) for option, port in ports.items()]
        prefect, mlflow, metrics = (f"http://{HOST}:{one.getsockname()[1]}" for one in kept)
        services = Services(prefect, mlflow, f"{metrics}/metrics", public, public_uri(database) if database else None)
        if database:
            prepare_database(database)
        mlflow_database = database_urls(root, database)[1]
        check_database(mlflow_database)
        make_database(mlflow_database)
        children = _Children(root, services, on_start)
        try:
            children.start_servers(database, stop)
            if not stop.is_set():
                _use(client_variables(root, services))
                gpus = len(visible_devices())
                deploy(root, pool_type="process", pull_steps=in_folder(root), gpus_found=max(1, gpus))
                crash_lost_runs()
                if worker:
                    children.start_worker(_worker_command(gpus))
                with observed(root, HOST, urlsplit(services.metrics).port or 0) as observe:
                    on_ready(services)
                    while not stop.wait(LOOK_EVERY):
                        children.check()
                        observe()
        finally:
            children.end()


def _use(variables: Mapping[str, str]) -> None:
    from prefect.context import refresh_global_settings_context

    os.environ.update(variables)
    refresh_global_settings_context()  # Prefect had read its variables when they were checked


class _Children:
    """The child processes of `cm up`."""

    def __init__(self, root: Path, services: Services, on_start: Callable[[str], None]) -> None:
        self._root, self._services, self._on_start = root, services, on_start
        self._env = {**os.environ, **client_variables(root, services)}
        self._servers: list[Child] = []
        self._worker: Child | None = None

    def start_servers(self, database: str | None, stop: StopFlag) -> None:
        """Start the servers and wait until they respond. Raises ServiceEnded if one does not."""
        mine = {name: value for name, value in os.environ.items() if not name.startswith(OF_SERVERS)}
        own = {**client_variables(self._root, self._services), **server_variables(self._root, self._services, database)}
        env = {**mine, **own}
        for name, command in _server_commands(self._root, self._services).items():
            self._servers.append(self._start(name, command, env))
        deadline = time.monotonic() + START_SECONDS
        while not all((answers := answering(self._services)).values()) and not stop.wait(LOOK_EVERY):
            self.check()
            if time.monotonic() > deadline:
                silent = ", ".join(name for name, answered in answers.items() if not answered)
                raise ServiceEnded(f"no answer from {silent} within {START_SECONDS} s; see its log")

    def start_worker(self, command: Sequence[str]) -> None:
        """Start a worker; the server must respond already."""
        # Who has this workspace's password is who started it.
        starter = {variable("user"): person(self._root)[USER]}
        self._worker = self._start(WORKER, command, {**self._env, **starter})

    def check(self) -> None:
        """Raise ServiceEnded if a service has exited."""
        for child in [*self._servers, *([self._worker] if self._worker else [])]:
            child.check()

    def end(self) -> None:
        """Stop the worker and its flow runs while they can report to the servers; then stop the servers."""
        from flows.operations.process_trees import end_trees, end_worker

        if self._worker and end_worker(self._worker.pid, flow_grace()):
            time.sleep(SETTLE_SECONDS)
        end_trees([child.pid for child in self._servers])

    def _start(self, name: str, command: Sequence[str], env: Mapping[str, str]) -> Child:
        self._on_start(name)
        logs = folder_of(self._root) / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        child = Child(name, command, cwd=self._root, env=env, logs=logs)
        _write_note(self._root, self._services, [*self._servers, child])
        return child


def crash_lost_runs() -> None:
    """Mark running flow runs without a process as crashed (e.g. after a reboot)."""
    import psutil
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
    from prefect.client.schemas.objects import StateType
    from prefect.states import Crashed

    under_way = FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING])
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=under_way))):
            number = (run.infrastructure_pid or "").rpartition(":")[2]  # workers run on this machine
            if number and not psutil.pid_exists(int(number)):
                client.set_flow_run_state(run.id, Crashed(message=f"Its process {number} is gone."), force=True)


def _server_commands(root: Path, services: Services) -> dict[str, list[str]]:
    artifacts = (root / "mlruns").as_uri()  # as without a server, so that both find every run's files
    return {
        "prefect": ["prefect", "server", "start"],
        "mlflow": [
            *("mlflow", "server", "--host", HOST, "--port", services.mlflow.rpartition(":")[2], "--workers", "1"),
            *("--no-serve-artifacts", "--default-artifact-root", artifacts),
        ],
    }


def _worker_command(gpus: int) -> list[str]:
    """Return the command of a worker; it runs one flow more than GPUs: CPU work overlaps other flows' trainings."""
    return [
        *("prefect", "worker", "start", "--pool", GPU, "--name", f"{GPU}@{socket.gethostname()}"),
        *("--type", "process", "--limit", str(gpus + 1), "--install-policy", "never"),
    ]


def answering(services: Services) -> dict[str, bool]:
    """Return for each server whether it responds."""
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
def _hold(root: Path) -> Iterator[None]:
    """Lock this workspace for one `cm up`, after stopping the children that a killed one has left."""
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
    """Whether a `cm up` of this workspace is running."""
    lock = folder_of(root) / "lock"
    if not lock.exists():
        return False
    with lock.open("a") as file:
        return not try_lock(file)


def running(root: Path) -> Services | None:
    """Return the addresses of this workspace's services, if they run."""
    if not is_running(root) or not _note_file(root).exists():
        return None
    note = read_note(root)
    return Services(**{one.name: note[one.name] for one in fields(Services)})


def use_running(root: Path) -> None:
    """Point this process at the workspace's services, if they run and the environment names no other server."""
    services = running(root)
    if services and "PREFECT_API_URL" not in os.environ and all(answering(services).values()):
        _set_default(client_variables(root, services))


def use_records(root: Path) -> None:
    """Point MLflow's client at the workspace's services, if they keep its records outside the workspace.

    What lies in the workspace is read faster without a server.
    """
    services = running(root)
    if services and services.records:
        variables = client_variables(root, services)
        _set_default({name: variables[name] for name in OF_MLFLOW})


def _set_default(variables: Mapping[str, str]) -> None:
    """Set what the environment lacks; where it names another MLflow, nothing of ours is true of that."""
    own_mlflow = "MLFLOW_TRACKING_URI" not in os.environ
    for name, value in variables.items():
        if own_mlflow or name not in OF_MLFLOW:
            os.environ.setdefault(name, value)


def down(root: Path) -> bool:
    """Stop the `cm up` of this workspace and wait for its end; return whether one was running."""
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
    """Return the state file of the workspace's `cm up`: addresses, children with process id and log."""
    return json.loads(_note_file(root).read_text())


def _write_note(root: Path, services: Services, children: Sequence[Child]) -> None:
    import psutil

    known = {
        child.name: {"pid": child.pid, "created": psutil.Process(child.pid).create_time(), "log": str(child.log)}
        for child in children
    }
    replace_text(_note_file(root), json.dumps({**asdict(services), "children": known}))


def _end_leftovers(root: Path) -> None:
    """Stop the children that a killed `cm up` has left behind."""
    import psutil

    from flows.operations.process_trees import end_trees

    if not _note_file(root).exists():
        return
    for child in reversed(read_note(root)["children"].values()):
        if psutil.pid_exists(child["pid"]) and psutil.Process(child["pid"]).create_time() == child["created"]:
            end_trees([child["pid"]])
    _note_file(root).unlink()
