"""A sweep as one Prefect flow: every point is a pipeline run, and shared results are computed once."""

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect import flow

from flows.errors import StageFailed
from flows.orchestration.artifacts import links_to, show_result
from flows.orchestration.embedded import embedded_prefect, log_to_prefect
from flows.pipeline import consistency
from flows.reports.metrics_table import Rows, short_keys
from flows.storage.s3 import public_uri
from flows.sweeps.page import Point, Sweep, load_sweep
from flows.sweeps.report import Outcome, network_of, table, write_report
from flows.tracking.pipeline_run import PipelineRun
from flows.tracking.tracker import Tracker
from flows.workspace.git import describe_code
from flows.workspace.locations import shared_root, workspace_root

logger = logging.getLogger(__name__)
RESULTS = Path("out/sweeps")  # in the workspace: table and plots of each sweep, by name


class SweepFailed(StageFailed):
    """Points of a sweep failed; the others are in `results`."""

    def __init__(self, failed: Mapping[str, str], results: dict[str, Any]) -> None:
        total = len(results["points"]) + len(failed)
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in failed.items())
        super().__init__(f"{len(failed)} of {total} points failed:\n{reasons}")
        self.results = results


def run_sweep(name: str, overrides: Sequence[str], root: Path) -> dict[str, Any]:
    """Run a sweep, with Prefect embedded or with the server of PREFECT_API_URL; return the flow's results.

    Raises SweepFailed when all points have been tried and some failed.
    """
    with embedded_prefect(root):
        return sweep(name, list(overrides), root)


@flow(flow_run_name="{name}")
def sweep(name: str, overrides: list[str] | None = None, root: Path = Path()) -> dict[str, Any]:
    """Run the pipeline on every point of a sweep file, and compare them in one table.

    Args:
        name: A sweep in params/sweeps.
        overrides: Values over its recipe, such as student.train.num_steps=100.
        root: The workspace, or a folder in it.
    """
    log_to_prefect()
    root = workspace_root(root)
    planned = load_sweep(name, overrides or (), root=root)
    tags = {**describe_code(root), "recipe": planned.recipe, "sweep": planned.name}
    params = {"points": len(planned.points), "recipe": planned.recipe, "overrides": overrides or []}
    with PipelineRun(Tracker(shared_root(root)), planned.name, tags, params, stage="sweep") as parent:
        outcomes, failed = run_points(planned, parent, root)
        results = finish(planned, outcomes, parent, root)
        if failed:
            raise SweepFailed(failed, results)
        return results


def run_points(
    planned: Sweep, parent: PipelineRun, root: Path
) -> tuple[list[tuple[Outcome, dict[str, Any]]], dict[str, str]]:
    """Run all points in turn; return the results, and the errors of failed points by name."""
    outcomes, failed = [], {}
    for number, point in enumerate(planned.points, 1):
        logger.info("sweep: point %s of %s, %s", number, len(planned.points), point.name)
        try:
            with in_environment(parent.variables()):
                results = consistency(point.recipe, f"{planned.name} {point.name}", root)
        except Exception as error:  # one point's failure does not stop the others; the sweep reports it at the end
            failed[point.name] = next(iter(str(error).splitlines()[-1:]), type(error).__name__)
            logger.error("sweep: point %s failed, the others go on: %s", point.name, failed[point.name])
        else:
            outcomes.append((Outcome(point, results["metrics"]), results))
    return outcomes, failed


@contextmanager
def in_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables within the block: the flows in it, and their processes, read them."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def finish(
    planned: Sweep, runs: Sequence[tuple[Outcome, dict[str, Any]]], parent: PipelineRun, root: Path
) -> dict[str, Any]:
    """Write, log and show the table and plots of the measured points; return the results."""
    outcomes = [outcome for outcome, _ in runs]
    rows, files = {}, []
    if outcomes:
        rows, files = table(outcomes), write_report(planned, outcomes, root / RESULTS / planned.name)
        parent.log_results(short_keys(_tidy(rows, network_of(outcomes))), {path.name: path for path in files})
        said = f"{planned.name}: {len(outcomes)} of {len(planned.points)} points"
        pictures = {f"evaluate/{path.name}": path for path in files}
        links = links_to(parent.tracker.uri, parent.tracker.experiment_id, parent.run_id)
        show_result(said, _by_metric(rows, network_of(outcomes)), pictures, links)
    return {
        "name": planned.name,
        "network": network_of(outcomes) if outcomes else None,
        "rows": rows,
        "points": {outcome.point.name: _describe(outcome.point, results) for outcome, results in runs},
        "files": [str(path) for path in files],
        "mlflow": {"uri": public_uri(parent.tracker.uri), "run_id": parent.run_id},
    }


def _describe(point: Point, results: Mapping[str, Any]) -> dict[str, Any]:
    cached = [stage for stage, result in results["stages"].items() if result["cached"]]
    return {"values": dict(point.values), "cached": cached, "mlflow_run_id": results["mlflow"]["run_id"]}


def _by_metric(rows: Rows, network: str) -> dict[str, dict[str, float]]:
    metrics = dict.fromkeys(metric for row in rows.values() for metric in row)
    return {f"{key}_{network}": {name: row[key] for name, row in rows.items() if key in row} for key in metrics}


def _tidy(rows: Rows, network: str) -> dict[str, dict[str, float]]:
    """Return the table with names that MLflow accepts."""
    tidy = {re.sub(r"[^\w.\- /]+", " ", name.replace(", ", "/")): row for name, row in rows.items()}
    return _by_metric(tidy, network)
