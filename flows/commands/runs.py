"""`cm runs`: pipeline runs side by side, from MLflow."""

import os
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.commands.output import add_json_option, positive, print_json, print_table
from flows.errors import UserError
from flows.workspace import home, origin

if TYPE_CHECKING:
    from mlflow.entities import Run

SHORT = 8  # characters of an id that are shown
SEARCHED = 1000  # runs among which a given id is looked for
PIPELINES = "tags.stage = 'pipeline'"


def add_parsers(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser("runs", help="list pipeline runs, newest first; given ids, how those differ")
    parser.add_argument("ids", metavar="ID", nargs="*", help="how a run's id begins")
    parser.add_argument("--max", metavar="N", type=positive, default=20, help="at most so many; default 20")
    add_json_option(parser)
    parser.set_defaults(command=runs)


def runs(args: Namespace) -> None:
    """Print the newest runs, or chosen ones and the params in which they differ."""
    found = [describe(run) for run in find_runs(home(), args.ids, args.max)]
    if args.json:
        print_json(found)
    elif not found:
        print("No runs yet; `cm run RECIPE` makes one")
    else:
        _print_runs(found)
        if args.ids:
            columns = ("param", *(run["id"][:SHORT] for run in found))
            print_table(columns, differing([run["params"] for run in found]))


def find_runs(root: Path, ids: Sequence[str], limit: int) -> "list[Run]":
    """Return the newest pipeline runs, or those whose ids begin as given; UserError where one does not exist."""
    if not os.environ.get("MLFLOW_TRACKING_URI") and not (origin(root) / "mlflow.db").exists():
        newest, where = [], origin(root) / "mlflow.db"
    else:
        from flows.tracking import Tracker

        tracker = Tracker(origin(root))
        where = tracker.uri
        newest = tracker.client.search_runs([tracker.experiment_id], PIPELINES, max_results=SEARCHED if ids else limit)
    return [_only(given, newest, str(where)) for given in ids] if ids else list(newest)


def _only(given: str, runs: "Sequence[Run]", where: str) -> "Run":
    matching = [run for run in runs if run.info.run_id.startswith(given)]
    if len(matching) != 1:
        raise UserError(f"run {given!r}: {len(matching) or 'no'} pipeline runs in {where} have an id that begins so")
    return matching[0]


def describe(run: "Run") -> dict[str, Any]:
    """Return what there is to know of a run, as plain values."""
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
    """Yield the name and the values of every param that is not the same in all runs."""
    for name in dict.fromkeys(name for run in params for name in run):
        values = [run.get(name, "-") for run in params]
        if len(set(values)) > 1:
            yield [name, *values]
