"""`cm runs`, `cm runs compare`: pipeline runs side by side, from MLflow."""

import os
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.commands.output import add_json_option, positive, print_json, print_table
from flows.errors import UserError
from flows.workspace.locations import shared_root, workspace_root

if TYPE_CHECKING:
    from mlflow.entities import Run

    from flows.tracking.tracker import Tracker

SHORT = 8  # characters of an id that are shown
SEARCHED = 1000  # newest runs that a search covers
PIPELINES = "tags.stage = 'pipeline'"
RUN = "how its id begins, its name or recipe (the newest), champion, candidate, or MODEL@ALIAS of the registry"


def add_parsers(commands: Any) -> None:
    """Declare the subcommands."""
    parser = commands.add_parser("runs", help="list pipeline runs, newest first; compare some")
    parser.add_argument("--max", metavar="N", type=positive, default=20, help="at most so many; default 20")
    add_json_option(parser)
    parser.set_defaults(command=runs)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", parser_class=type(parser))

    parser = actions.add_parser("compare", help="the params in which runs differ, and their metrics side by side")
    parser.add_argument("first", metavar="RUN", help=RUN)
    parser.add_argument("others", metavar="RUN", nargs="+", help="another; its metrics are shown against the first's")
    add_json_option(parser)
    parser.set_defaults(command=compare)


def runs(args: Namespace) -> None:
    """Print the newest runs."""
    tracker = tracker_of(workspace_root())
    found = [describe(run) for run in find_pipelines(tracker, args.max)] if tracker else []
    if args.json:
        print_json(found)
    elif not found:
        print("No runs yet; `cm run RECIPE` makes one")
    else:
        _print_runs(found)


def compare(args: Namespace) -> None:
    """Print the params that differ, then every metric with its difference to the first run."""
    tracker = existing_tracker(workspace_root())
    newest = find_pipelines(tracker, SEARCHED)
    found = [describe(resolve(given, newest, tracker)) for given in (args.first, *args.others)]
    params = list(differing([run["params"] for run in found]))
    metrics = list(side_by_side([run["metrics"] for run in found]))
    if args.json:
        print_json({"runs": found, "params": {name: values for name, *values in params}, "metrics": metrics})
    else:
        _print_runs(found)
        _print_comparison([run["id"][:SHORT] for run in found], params, metrics)


def tracker_of(root: Path) -> "Tracker | None":
    """Return the MLflow connection; None before the first tracked run."""
    if os.environ.get("MLFLOW_TRACKING_URI") or (shared_root(root) / "mlflow.db").exists():
        from flows.tracking.tracker import Tracker

        return Tracker(shared_root(root))
    return None


def existing_tracker(root: Path) -> "Tracker":
    """Return the MLflow connection. Raises UserError before the first tracked run."""
    if (tracker := tracker_of(root)) is None:
        raise UserError(f"{shared_root(root) / 'mlflow.db'}: no runs yet; `cm run RECIPE` makes one")
    return tracker


def find_pipelines(tracker: "Tracker", limit: int) -> "list[Run]":
    """Return the newest pipeline runs."""
    return list(tracker.client.search_runs([tracker.experiment_id], PIPELINES, max_results=limit))


def resolve(given: str, newest: "Sequence[Run]", tracker: "Tracker") -> "Run":
    """Return the run that `given` names. Raises UserError if there is none, or the id prefix is ambiguous."""
    from flows.tracking.registry import CANDIDATE, CHAMPION

    name, at, alias = given.rpartition("@")
    if at or given in (CANDIDATE, CHAMPION):
        return tracker.client.get_run(_registered_run(name, alias, tracker))
    begins = [run for run in newest if run.info.run_id.startswith(given)]
    called = [run for run in newest if given in (run.info.run_name, run.data.tags.get("recipe"))]
    if len(begins) > 1 and not called:
        raise UserError(f"run {given!r}: {len(begins)} pipeline runs in {tracker.uri} have an id that begins so")
    if not begins and not called:
        raise UserError(f"run {given!r}: no pipeline run in {tracker.uri} has such an id, name or recipe")
    return (called or begins)[0]


def _registered_run(name: str, alias: str, tracker: "Tracker") -> str:
    """Return the id of the run that measured the version behind a registry alias."""
    from flows.tracking.registry import RUN_TAG, Registry

    registry = Registry(tracker)
    names = [name] if name else registry.names()
    if len(names) != 1:
        raise UserError(f"{alias}: there are registered models {', '.join(names) or 'none yet'}; say MODEL@{alias}")
    registered = registry.read(names[0])
    version = registered.versions.get(registered.aliases.get(alias, 0))
    if version is None:
        raise UserError(f"{names[0]}@{alias}: no version has this alias; there are {', '.join(registered.aliases)}")
    if RUN_TAG not in version.tags:
        raise UserError(f"{names[0]}@{alias}: version {version.number} was not registered by a pipeline run")
    return version.tags[RUN_TAG]


def describe(run: "Run") -> dict[str, Any]:
    """Return a run as plain values."""
    info, ended = run.info, run.info.end_time
    return {
        "id": info.run_id,
        "title": info.run_name,
        "recipe": run.data.tags.get("recipe"),
        "method": run.data.params.get("student.method.kind"),
        "status": info.status.lower(),
        "started": datetime.fromtimestamp(info.start_time / 1000).astimezone().isoformat(timespec="seconds"),
        "seconds": (ended - info.start_time) / 1000 if ended else None,
        "metrics": dict(run.data.metrics),
        "params": dict(run.data.params),
    }


def _print_runs(found: Sequence[Mapping[str, Any]]) -> None:
    names = {name for run in found for name in run["metrics"]}
    scores = sorted(name for name in names if name.startswith("fid_") and "/nfe_" in name)
    rows = [
        [
            *(run["id"][:SHORT], run["recipe"] or "", run["method"] or "", run["status"]),
            *(run["started"][:16].replace("T", " "), "" if run["seconds"] is None else f"{run['seconds']:.0f} s"),
            *(f"{run['metrics'][name]:#.4g}" if name in run["metrics"] else "-" for name in scores),
        ]
        for run in found
    ]
    columns = ("id", "recipe", "method", "status", "started", "took", *scores)
    print_table(columns, rows, numbers=1 + len(scores))


def differing(params: Sequence[Mapping[str, str]]) -> Iterator[list[str]]:
    """Yield name and values of every param that differs between runs."""
    for name in dict.fromkeys(name for run in params for name in run):
        values = [run.get(name, "-") for run in params]
        if len(set(values)) > 1:
            yield [name, *values]


def side_by_side(metrics: Sequence[Mapping[str, float]]) -> Iterator[dict[str, Any]]:
    """Yield every metric with the values of all runs and the differences to the first."""
    for name in sorted({name for run in metrics for name in run}):
        first, *others = values = [run.get(name) for run in metrics]
        differences = [None if first is None or other is None else other - first for other in others]
        yield {"metric": name, "values": values, "differences": differences}


def _print_comparison(
    ids: Sequence[str], params: Sequence[Sequence[str]], metrics: Sequence[Mapping[str, Any]]
) -> None:
    if params:
        print_table(("param", *ids), params)
    else:
        print("The runs have the same params\n")
    signed = [f"{one} - {ids[0]}" for one in ids[1:]]
    rows = [
        [
            row["metric"],
            *("-" if value is None else f"{value:#.4g}" for value in row["values"]),
            *("-" if value is None else f"{value:+#.4g}" for value in row["differences"]),
        ]
        for row in metrics
    ]
    print_table(("metric", *ids, *signed), rows, numbers=len(ids) + len(signed))
