"""Real services for tests: a workspace with a recipe of seconds, `cm up`, more workers, their REST API."""

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import httpx
import psutil
import pytest

from flows.distributed.devices import DEVICES_VARIABLE, visible_devices
from flows.operations import services
from flows.operations.service_environment import login
from miniature import REPOSITORY, commit, git
from processes import WAIT, wait_until
from servers import free_port

PORTS = ("--prefect-port", "0", "--mlflow-port", "0", "--metrics-port", "0")
TINY = """# A page for tests: eight by eight, seconds.
data: {source: digits, max_images: 64}
network: {kind: song_unet, channels: 8, channel_mult: [1], num_blocks: 1, attn_resolutions: []}
features: {kind: classifier, num_steps: 20, batch_size: 32}
teacher: {train: {num_steps: 4, batch_size: 8, log_every: 1, save_every: 2, grid_every: 2}}
student: {train: {num_steps: 600, batch_size: 8, log_every: 10, save_every: 50, grid_every: 200}}
sample: {num_images: 16, batch_size: 16, teacher_images: 8, teacher_sampler: {num_steps: 2}}
"""


def make_live_workspace(root: Path) -> Path:
    """Clone this repository to `root`, with the recipe `tiny` as its only one."""
    git(REPOSITORY, "clone", "--quiet", "--local", str(REPOSITORY), str(root))
    for page in (root / "params" / "recipes").glob("*.yaml"):
        page.unlink()
    (root / "params" / "recipes" / "tiny.yaml").write_text(TINY)
    git(root, "add", "--all")
    commit(root)
    return root


def give_gpus(root: Path, count: int) -> dict[str, str]:
    """Return the variables of workers whose machine has so many GPUs.

    Where there are none they are stand-ins: flows take slots for them and lock them, and the stages, whose commands are
    altered in the workspace `root` for it, compute on the CPU. Skips if the machine has GPUs, but fewer.
    """
    if devices := visible_devices():
        if len(devices) < count:
            pytest.skip(f"{len(devices)} of {count} GPUs")
        return {DEVICES_VARIABLE: ",".join(devices[:count])}
    stages = (root / "dvc.yaml").read_text()
    (root / "dvc.yaml").write_text(stages.replace("cmd: cm stage", f"cmd: {DEVICES_VARIABLE}= cm stage"))
    commit(root)
    return {DEVICES_VARIABLE: ",".join(map(str, range(count)))}


def environment(root: Path, **variables: str) -> dict[str, str]:
    """Return this process's environment for the code of the workspace `root`, without servers of the user's."""
    theirs = ("PREFECT_", "MLFLOW_", "CM_", "GIT_", "AWS_")
    own = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
    return {**own, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", **variables}


def cm(root: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """Run `cm` in the workspace."""
    command, env = [sys.executable, "-m", "flows.cli", *arguments], environment(root, **variables)
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)


class Api:
    """Requests to the Prefect server of a workspace.

    They are sent by Prefect's own client: a server on SQLite answers 503 to who loses a race for its one writer, and
    expects its clients to ask again.
    """

    def __init__(self, root: Path, note: dict) -> None:
        from prefect.client.base import PrefectHttpxSyncClient

        self.root, self.note = root, note
        self.login = login(root)
        url, auth = f"{note['prefect']}/api", tuple(self.login.split(":"))
        self.api = PrefectHttpxSyncClient(base_url=url, timeout=120, auth=auth, enable_csrf_support=True)

    def post(self, path: str, **body) -> object:
        answer = self.api.post(path, json=body)
        return answer.json() if answer.content else None

    def get(self, path: str) -> object:
        return self.api.get(path).json()

    def submit(self, *overrides: str) -> str:
        """Start a run of the deployment `tiny` with values changed, `key=value`; return its id."""
        from flows.recipes.recipe import Recipe, merge, parse_override

        deployment = self.get("/deployments/name/consistency/tiny")
        recipe = functools.reduce(merge, map(parse_override, overrides), deployment["parameters"]["recipe"])
        whole = Recipe.model_validate(recipe).model_dump(mode="json")  # the server asks for what its form shows
        asked = {"parameters": {"recipe": whole, "name": "tiny"}, "idempotency_key": str(uuid.uuid4())}
        return self.post(f"/deployments/{deployment['id']}/create_flow_run", **asked)["id"]

    def flow_run(self, run_id: str) -> dict:
        return self.get(f"/flow_runs/{run_id}")

    def task_ends(self, run_id: str) -> set[tuple[str, str]]:
        """Return the tasks of a run with their states; a run that was started twice has every task twice."""
        runs = self.post("/task_runs/filter", flow_runs={"id": {"any_": [run_id]}})
        return {(run["name"], run["state_name"]) for run in runs}

    def said(self, run_id: str) -> list[str]:
        """Return what a run has logged."""
        found = self.post("/logs/filter", logs={"flow_run_id": {"any_": [run_id]}}, sort="TIMESTAMP_ASC", limit=200)
        return [entry["message"] for entry in found]

    def artifacts(self, run_id: str) -> dict[str, dict]:
        """Return a run's artifacts by key, of each key the newest."""
        chosen = {"flow_run_id": {"any_": [run_id]}}
        found = self.post("/artifacts/filter", artifacts=chosen, sort="CREATED_DESC", limit=200)
        return {artifact["key"]: artifact for artifact in reversed(found)}

    def wait_in(self, run_id: str, condition: Callable[[], object], every: float = 0.1) -> object:
        """Wait until a condition holds, as long as the run goes on: how long a whole flow takes is up to the load."""
        return wait_until(condition, every=every, sign=lambda: (self.states(run_id), self.said(run_id)))

    def wait_for(self, run_id: str, name: str) -> None:
        """Wait until a run is in this state."""
        self.wait_in(run_id, lambda: self.flow_run(run_id)["state_name"] in (name, "Failed"), every=1)
        state = self.flow_run(run_id)["state"]
        assert state["name"] == name, (state, self.said(run_id)[-20:])

    def states(self, run_id: str) -> list[str]:
        """Return the names of a run's states, the first one first."""
        found = self.get(f"/flow_run_states/?flow_run_id={run_id}")
        return [state["name"] for state in sorted(found, key=lambda state: state["timestamp"])]


class Up(Api):
    """A `cm up` in a workspace, ready to use."""

    def __init__(self, root: Path, *options: str) -> None:
        command = [sys.executable, "-m", "flows.cli", "up", *PORTS, *options]
        self._errors = tempfile.TemporaryFile("w+")  # a pipe that nobody reads would stop what writes much
        self.process = subprocess.Popen(
            command, cwd=root, env=environment(root), stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self.welcome = ""
        for line in self.process.stdout:
            self.welcome += line
            if line.startswith("Ctrl-C"):
                break
        else:
            self.process.wait()
            pytest.fail(self.errors())
        super().__init__(root, json.loads((root / ".cm" / "services" / "services.json").read_text()))
        self.children = psutil.Process(self.process.pid).children(recursive=True)

    def errors(self) -> str:
        """Return what it has written to its standard error."""
        self._errors.seek(0)
        return self._errors.read()

    def stop(self) -> int:
        """Stop it as Ctrl-C does; return its exit code."""
        self.process.send_signal(signal.SIGINT)
        self.api.close()
        return self.process.wait(WAIT)


def log_in(page, up: Api) -> None:
    """Give a browser the password of `up`, as a person does who opens its pages for the first time."""
    page.goto(f"{up.note['prefect']}/v2/deployments")
    page.locator("form input").fill(up.login)
    page.locator("form").get_by_role("button").click()
    page.wait_for_url("**/deployments?*")  # which the page completes


class Servers(Api):
    """Prefect's and MLflow's server on a PostgreSQL database, each ended and started at will, as supervisors do.

    MLflow's files lie in the workspace, or at `artifacts`, which its server then hands in and out.
    """

    def __init__(self, root: Path, database: str, *, artifacts: str | None = None, **variables: str) -> None:
        at = services.Services(*(f"http://{services.HOST}:{free_port()}" for _ in range(2)))
        services.prepare_database(database)
        self._at, self._commands = at, services._server_commands(root, at)
        if artifacts:
            place = self._commands["mlflow"].index("--no-serve-artifacts")
            self._commands["mlflow"][place:] = ["--artifacts-destination", artifacts]
        self.client_variables = services.client_variables(root, at)
        own = services.server_variables(root, at, database)
        self._env = environment(root, **self.client_variables, **own, **variables)
        self._running: dict[str, subprocess.Popen] = {}
        super().__init__(root, asdict(at))

    def start(self, *names: str) -> None:
        """Start servers and wait until they answer."""
        for name in names:
            with (self.root / ".cm" / f"{name}.log").open("ab") as log:
                command = [sys.executable, "-m", *self._commands[name]]
                self._running[name] = subprocess.Popen(command, cwd=self.root, env=self._env, stdout=log, stderr=log)
        wait_until(lambda: all(services.answering(self._at)[name] for name in names))

    def end(self, name: str, number: int = signal.SIGKILL) -> None:
        """End a server with a signal, and what it has started."""
        popen = self._running.pop(name)
        tree = psutil.Process(popen.pid).children(recursive=True)
        popen.send_signal(number)
        popen.wait(WAIT)
        for child in tree:
            end_tree(child)

    def end_all(self) -> None:
        self.api.close()
        for name in list(self._running):
            self.end(name)

    def ask_mlflow(self, path: str, **body) -> dict:
        answer = httpx.post(f"{self.note['mlflow']}/api/2.0/mlflow/{path}", json=body, timeout=WAIT)
        answer.raise_for_status()
        return answer.json()

    def stage_runs(self, stage: str, *run_ids: str) -> list[dict]:
        """Return the MLflow runs of a stage that belong to flow runs, the oldest first."""
        experiments = self.ask_mlflow("experiments/search", max_results=100)["experiments"]
        body = {"experiment_ids": [one["experiment_id"] for one in experiments], "filter": f"tags.stage = '{stage}'"}
        runs = self.ask_mlflow("runs/search", **body, order_by=["attributes.start_time ASC"]).get("runs", [])
        tags = [{tag["key"]: tag["value"] for tag in run["data"]["tags"]} for run in runs]
        return [run for run, own in zip(runs, tags, strict=True) if own.get("prefect.flow_run_id") in run_ids]

    def logged_steps(self, mlflow_run: dict) -> list[int]:
        """Return the steps whose loss an MLflow run has; what it could not take at once came late."""
        url = f"{self.note['mlflow']}/api/2.0/mlflow/metrics/get-history"
        chosen = {"run_id": mlflow_run["info"]["run_id"], "metric_key": "loss", "max_results": 5000}
        found = httpx.get(url, params=chosen, timeout=WAIT).json().get("metrics", [])
        return sorted(int(entry["step"]) for entry in found)

    def trained_steps(self, *run_ids: str) -> list[list[int]]:
        """Return the steps that each process logged which trained a student for these flow runs."""
        return [self.logged_steps(run) for run in self.stage_runs("student", *run_ids)]


@contextmanager
def worker(
    up: Api, name: str, folder: Path | None = None, *, entry: tuple[str, ...] = (), **variables: str
) -> Iterator[psutil.Process]:
    """Run one more worker of the pool `gpu`, as another machine would; in this folder, else in the workspace.

    `entry` is a module that starts it, as in containers.
    """
    theirs = services.client_variables(folder or up.root, services.Services(up.note["prefect"], up.note["mlflow"]))
    command = [sys.executable, "-m", *entry, "prefect", "worker", "start", "--pool", "gpu", "--name", name]
    options = ["--type", "process", "--limit", "1", "--install-policy", "never"]
    theirs |= {"PREFECT_API_AUTH_STRING": up.login, **variables}
    with running(up.root, name, [*command, *options], folder or up.root, theirs) as process:
        yield process


@contextmanager
def running(
    root: Path, name: str, command: list[str], folder: Path, variables: dict[str, str]
) -> Iterator[psutil.Process]:
    """Run a command in a folder for the workspace, with a log named so; at the end kill it and all it has started."""
    with (root / ".cm" / f"{name}.log").open("wb") as log:
        started = subprocess.Popen(command, cwd=folder, env=environment(root, **variables), stdout=log, stderr=log)
    process = psutil.Process(started.pid)
    try:
        yield process
    finally:
        end_tree(process)
        started.wait()


def trainings(root: Path) -> list[psutil.Process]:
    """Return the processes that train students of this workspace."""
    found = {
        process.pid: process
        for process in psutil.process_iter(["cmdline", "environ", "ppid"])
        if (process.info["cmdline"] or ())[-2:] == ["stage", "student"]
        if (process.info["environ"] or {}).get("CM_HOME") == str(root)
    }
    # A child between fork and exec looks like its parent.
    return [process for process in found.values() if process.info["ppid"] not in found]


def end_tree(process: psutil.Process) -> None:
    """Kill a process and all it has started, at once."""
    try:
        tree = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for one in tree:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            pass
