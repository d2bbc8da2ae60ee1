"""Time the commands that look back, in a workspace with a long history: 10,000 runs in MLflow, 200 recipes.

python -m benchmarks.history                       # --runs, --recipes, --versions for other lengths

Runs are inserted in bulk below MLflow's API, which would take an hour; they have the tags, params and metrics of real
ones. A fifth are pipeline runs, and each has the runs of four stages below it. Each line is the best of three; beside
it stands what the project promises for 10,000 runs and 200 recipes. A tiny flow is computed first, then timed cached.
"""

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import hardware, parser, report, told
from flows.atomic import reserve_port
from flows.operations.process_trees import end_trees
from flows.operations.services import HOST, Services, answering
from flows.recipes.naming import called
from flows.recipes.recipe import Recipe, flatten, load_recipe
from flows.tracking.sqlite_reads import data_versions
from flows.tracking.tracker import Tracker

ROOT = Path(__file__).parents[1]
CM = [sys.executable, "-m", "flows.cli"]
STAGES = ("features", "teacher", "base", "student")
REPEATS = 3
PROMISED = {"cm runs": 1.0, "cm runs, through a server": 1.0}  # seconds
TINY = ("run", str(ROOT / "infra" / "smoke-recipe.yaml"), "--set", "student.train.num_steps=4")  # 8 x 8, seconds
Row = tuple[Any, ...]


def fill(root: Path, count: int) -> list[str]:
    """Insert `count` runs into MLflow's database of a workspace; return the ids of the pipeline runs, oldest first."""
    experiment = Tracker(root).experiment_id
    params = {key: str(value) for key, value in flatten(Recipe().model_dump(mode="json")).items()}
    tables: dict[str, list[Row]] = {"runs": [], "tags": [], "params": [], "latest_metrics": []}
    pipelines = []
    for number in range(count // (1 + len(STAGES))):
        pipelines.append(parent := uuid.uuid4().hex)
        for stage in ("pipeline", *STAGES):
            run = parent if stage == "pipeline" else uuid.uuid4().hex
            own = {key: value for key, value in params.items() if stage in ("pipeline", key.partition(".")[0])}
            for table, rows in _run(run, stage, parent, number, experiment, own):
                tables[table] += rows
    with sqlite3.connect(root / "mlflow.db") as database:
        for table, rows in tables.items():
            database.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", rows)
    database.close()
    return pipelines


def _run(
    run: str, stage: str, parent: str, number: int, experiment: str, params: dict[str, str]
) -> Iterator[tuple[str, list[Row]]]:
    """Yield the rows of one run by table."""
    started = 1_700_000_000_000 + 100_000 * number
    name = f"recipe-{number} · cd heun N=18" if stage == "pipeline" else stage
    place = ("LOCAL", "consistency", "", "somebody", "FINISHED", started, started + 60_000)
    yield "runs", [(run, name, *place, "", "active", f"mlruns/{run}", experiment, None)]
    tags = {"stage": stage, "recipe": f"recipe-{number}", "git.revision": f"{number:040x}", "mlflow.runName": name}
    if stage == "pipeline":
        tags |= {f"dvc.out.{one}": uuid.uuid4().hex for one in STAGES}
    else:
        tags |= {"mlflow.parentRunId": parent, "dvc.out": uuid.uuid4().hex, "dvc.dep.prepare": uuid.uuid4().hex}
    yield "tags", [(key, value, run) for key, value in tags.items()]
    yield "params", [(key, value or "-", run) for key, value in params.items()]
    metrics = [f"nfe_{nfe}/fid" for nfe in (1, 2)] + [f"seconds/{one}" for one in range(20)]
    yield "latest_metrics", [(key, float(number), started, 0, False, run) for key in metrics]


def workspace(folder: Path, recipes: int) -> Path:
    """Return a clone of this repository with so many recipe files."""
    root = folder / "workspace"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(root)], check=True)
    for number in range(recipes - len(list((root / "params/recipes").glob("*.yaml")))):
        shutil.copy(root / "params/recipes/digits-cd.yaml", root / f"params/recipes/recipe-{number}.yaml")
    return root


def register(tracker: Tracker, pipelines: list[str], count: int) -> None:
    """Register `count` versions of a student, of the newest pipeline runs."""
    tracker.client.create_registered_model("digits-cd")
    for run in (pipelines * (1 + count // len(pipelines)))[-count:]:
        tags = {"nfe_1/fid": "3.5", "data": uuid.uuid4().hex, "protocol": "a", "run_id": run}
        tracker.client.create_model_version("digits-cd", f"mlruns/{run}", run, tags=tags, await_creation_for=0)


@contextmanager
def server(root: Path) -> Iterator[Mapping[str, str]]:
    """Run MLflow's server on a workspace's database; yield the variables of its clients."""
    with reserve_port(HOST) as kept:
        port = str(kept.getsockname()[1])
        command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", port, "--workers", "1"]
        options = ["--backend-store-uri", f"sqlite:///{root / 'mlflow.db'}", "--no-serve-artifacts"]
        own = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "DO_NOT_TRACK": "true"}
        process = subprocess.Popen(
            [*command, *options], cwd=root, env=own, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
        )
        try:
            address = f"http://{HOST}:{port}"
            while not answering(Services(address, address))["mlflow"]:
                if process.poll() is not None:
                    raise RuntimeError(f"mlflow server ended with {process.returncode}")
                time.sleep(0.2)
            yield {"MLFLOW_TRACKING_URI": address}
        finally:
            end_trees([process.pid])


def command(root: Path, *arguments: str, **variables: str) -> Callable[[], object]:
    """Return what runs `cm` in a workspace."""
    env, quiet = os.environ | variables, subprocess.DEVNULL
    return lambda: subprocess.run([*CM, *arguments], cwd=root, env=env, stdout=quiet, stderr=quiet, check=True)


def best(action: Callable[[], object]) -> dict[str, float]:
    """Return the shortest duration of several calls, and the least CPU time, which a busy machine does not lengthen."""

    def timed() -> tuple[float, float]:
        started, before = time.perf_counter(), os.times()
        action()
        return time.perf_counter() - started, sum(os.times()[:4]) - sum(before[:4])

    seconds, cpu_seconds = zip(*(timed() for _ in range(REPEATS)), strict=True)
    return {"seconds": min(seconds), "cpu_seconds": min(cpu_seconds)}


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    arguments = parser(__doc__)
    arguments.add_argument("--runs", type=int, default=10_000, help="runs in MLflow")
    arguments.add_argument("--recipes", type=int, default=200, help="recipe files")
    arguments.add_argument("--versions", type=int, default=500, help="registered students")
    args = arguments.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        root = workspace(Path(folder), args.recipes)
        pipelines = fill(root, args.runs)
        tracker, recipe = Tracker(root), load_recipe("digits-cd", ["seed=3"], root=root)
        register(tracker, pipelines, args.versions)
        command(root, *TINY)()
        measured = {
            "cm runs": command(root, "runs"),
            "cm runs compare, the newest two": command(root, "runs", "compare", *pipelines[-2:]),
            "cm runs compare, the oldest two": command(root, "runs", "compare", *pipelines[:2]),
            "cm runs compare, by recipe": command(root, "runs", "compare", "recipe-0", "recipe-1"),
            "cm models": command(root, "models"),
            "cm run, all cached": command(root, *TINY),
            "find the run of a stage's output": lambda: tracker.find_stage_run("student", uuid.uuid4().hex),
            "colour of a new pipeline run": tracker.free_colour,
            "all data versions, for cm gc": lambda: data_versions(root / "mlflow.db"),
            "name of an edited recipe": lambda: called(recipe, "digits-cd", root),
            "name of a recipe without a file": lambda: called(recipe, "edited", root),
        }
        with server(root) as variables:
            for name in ("runs", "models"):
                measured[f"cm {name}, through a server"] = command(root, name, **variables)
            rows = [told({"what": what, **best(action)}) for what, action in measured.items()]
    rows = [row | {"at most": PROMISED.get(row["what"])} for row in rows]
    lengths = {name: getattr(args, name) for name in ("runs", "recipes", "versions")}
    report(args, hardware() | {"load": round(os.getloadavg()[0]), **lengths}, rows)


if __name__ == "__main__":
    main()
