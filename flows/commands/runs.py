"""`cm runs`, `cm runs compare`: pipeline runs side by side, from MLflow."""

import os
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.commands.output import add_json_option, number, positive, print_json, print_table
from flows.errors import UserError
from flows.operations.services import use_records
from flows.reports.metrics_table import STUDENT, network_of, renamed
from flows.storage.s3 import public_uri
from flows.tracking.gpu_usage import ENERGY, GPU_HOURS, NOT_MEASURED
from flows.tracking.person import USER
from flows.tracking.run_queries import FEATURES, PIPELINES, field_of, filter_of
from flows.tracking.sqlite_reads import database_file, newest_pipelines
from flows.tracking.tracker import experiment_name
from flows.workspace.locations import shared_root, workspace_root

if TYPE_CHECKING:
    from mlflow.entities import Run

    from flows.tracking.tracker import Tracker

SHORT = 8  # characters of an id that are shown
WHERE = "only runs for which this holds, such as user=ada, nfe_1/fid<3, started>2026-11-20; repeatable"
SUMMED = ("recipe", "user", "method", "status")
RUN = "how its id begins, its name or recipe (the newest finished), champion, candidate, or MODEL@ALIAS of the registry"


def add_parsers(commands: Any) -> None:
    """Declare the subcommands."""
    parser = commands.add_parser("runs", help="list pipeline runs, newest first; compare some")
    parser.add_argument("--max", metavar="N", type=positive, default=20, help="at most so many; default 20")
    parser.add_argument("--where", metavar="KEY=VALUE", action="append", default=[], help=WHERE)
    parser.add_argument("--sort", metavar="KEY", help="order by a key of --where, the smallest first")
    parser.add_argument("--descending", action="store_true", help="the largest first")
    parser.add_argument("--sum", metavar="KEY", choices=SUMMED, help=f"hours and energy by {', '.join(SUMMED)}")
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
    if args.sum:
        print_sums(tracker_of(workspace_root()), filter_of(args.where), args)
        return
    found = [describe(run) for run in select(shared_root(workspace_root()), args)]
    if args.json:
        print_json(found)
    elif not found:
        print("No such runs" if args.where else "No runs yet; `cm run RECIPE` makes one")
    else:
        _print_runs(found)


def select(shared: Path, args: Namespace) -> "Sequence[Run]":
    """Return the runs to list; the newest of a workspace's own database without MLflow, which is slow to import."""
    use_records(shared)
    if not (args.where or args.sort) and (file := database_file(shared)):
        return newest_pipelines(file, experiment_name(), args.max)
    query = filter_of(args.where)
    order = [f"{field_of(args.sort)} {'DESC' if args.descending else 'ASC'}"] if args.sort else []
    return find_pipelines(tracker, args.max, query, order) if (tracker := tracker_of(shared)) else []


def print_sums(tracker: "Tracker | None", query: str, args: Namespace) -> None:
    """Print runs, hours, GPU-hours and energy by recipe, user, ..."""
    from flows.tracking.tracker import all_pages

    every = all_pages(tracker.client.search_runs, [tracker.experiment_id], query) if tracker else ()
    by_key = sorted((describe(run) for run in every), key=lambda run: run[args.sum] or "")
    sums = [_sum(args.sum, value, list(group)) for value, group in groupby(by_key, key=lambda run: run[args.sum])]
    if args.json:
        print_json(sums)
        return
    rows = [
        (row[args.sum] or "-", str(row["runs"]), f"{row['hours']:.2f}", number(row["gpu_hours"]), _energy_of_many(row))
        for row in sums
    ]
    print_table((args.sum, "runs", "hours", "GPU-hours", "kWh"), rows, numbers=4)


def _sum(key: str, value: str | None, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the sums of runs; None for what no run has measured."""
    gpu_hours = [run["gpu_hours"] for run in runs if run["gpu_hours"] is not None]
    energies = [run["energy_kwh"] for run in runs if run["energy_kwh"] is not None]
    return {
        key: value,
        "runs": len(runs),
        "hours": sum(run["seconds"] or 0 for run in runs) / 3600,
        "gpu_hours": sum(gpu_hours) if gpu_hours else None,
        "energy_kwh": sum(energies) if energies else None,
        "runs_on_gpus": len(gpu_hours),
        "runs_with_energy": len(energies),
    }


def _energy_of_many(row: Mapping[str, Any]) -> str:
    if row["energy_kwh"] is None:
        return NOT_MEASURED
    missing = row["runs_on_gpus"] - row["runs_with_energy"]
    return number(row["energy_kwh"]) + (f", {missing} runs {NOT_MEASURED}" if missing else "")


def compare(args: Namespace) -> None:
    """Print the params that differ, then every metric with its difference to the first run."""
    tracker = existing_tracker(workspace_root())
    found = [describe(resolve(given, tracker)) for given in (args.first, *args.others)]
    params = list(differing([run["params"] for run in found]))
    metrics = list(side_by_side([run["metrics"] for run in found]))
    if args.json:
        print_json({"runs": found, "params": {name: values for name, *values in params}, "metrics": metrics})
    else:
        _print_runs(found)
        _print_comparison([run["id"][:SHORT] for run in found], params, metrics)


def tracker_of(root: Path) -> "Tracker | None":
    """Return the MLflow connection; None before the first tracked run."""
    use_records(shared_root(root))
    if os.environ.get("MLFLOW_TRACKING_URI") or (shared_root(root) / "mlflow.db").exists():
        from flows.tracking.tracker import Tracker

        return Tracker(shared_root(root))
    return None


def existing_tracker(root: Path) -> "Tracker":
    """Return the MLflow connection. Raises UserError before the first tracked run."""
    if (tracker := tracker_of(root)) is None:
        raise UserError(f"{shared_root(root) / 'mlflow.db'}: no runs yet; `cm run RECIPE` makes one")
    return tracker


def find_pipelines(tracker: "Tracker", limit: int, query: str = PIPELINES, order: Sequence[str] = ()) -> "list[Run]":
    """Return the first pipeline runs of an order, by default the newest."""
    return list(tracker.client.search_runs([tracker.experiment_id], query, max_results=limit, order_by=list(order)))


def resolve(given: str, tracker: "Tracker") -> "Run":
    """Return the run that `given` names. Raises UserError if there is none, or the id prefix is ambiguous."""
    from flows.tracking.registry import CANDIDATE, CHAMPION

    name, at, alias = given.rpartition("@")
    if at or given in (CANDIDATE, CHAMPION):
        return tracker.client.get_run(_registered_run(name, alias, tracker))
    if called := _newest_called(given, tracker):
        return called
    place = public_uri(tracker.uri)
    query = f"{PIPELINES} and attributes.run_id LIKE '{given}%'"
    begins = find_pipelines(tracker, 2, query) if re.fullmatch("[0-9a-f]{1,32}", given) else []
    if len(begins) > 1:
        raise UserError(f"run {given!r}: several pipeline runs in {place} have an id that begins so")
    if not begins:
        raise UserError(f"run {given!r}: no pipeline run in {place} has such an id, name or recipe")
    return begins[0]


def _newest_called(given: str, tracker: "Tracker") -> "Run | None":
    """Return the newest finished run of this name or recipe; if none has finished, the newest."""
    if {"'", '"'} <= set(given):  # MLflow's language has no quotation of both
        return None
    quoted = f'"{given}"' if "'" in given else f"'{given}'"
    queries = [f"{PIPELINES} and {key} = {quoted}" for key in ("attributes.run_name", "tags.recipe")]
    for condition in (" and attributes.status = 'FINISHED'", ""):
        found = [run for query in queries for run in find_pipelines(tracker, 1, query + condition)]
        if found:
            return max(found, key=lambda run: run.info.start_time)
    return None


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
        "user": run.data.tags.get(USER),
        "features": run.data.tags.get(FEATURES) or network_of(run.data.metrics),
        "started": datetime.fromtimestamp(info.start_time / 1000).astimezone().isoformat(timespec="seconds"),
        "seconds": (ended - info.start_time) / 1000 if ended else None,
        "gpu_hours": run.data.metrics.get(GPU_HOURS),
        "energy_kwh": run.data.metrics.get(ENERGY),
        "metrics": renamed(run.data.metrics),
        "params": dict(run.data.params),
    }


def _print_runs(found: Sequence[Mapping[str, Any]]) -> None:
    names = {name for run in found for name in run["metrics"]}
    scores = sorted(name for name in names if name.startswith(STUDENT) and name.endswith("/fid"))
    rows = [
        [
            *(run["id"][:SHORT], run["recipe"] or "", run["method"] or "", run["status"]),
            *(run["started"][:16].replace("T", " "), run["user"] or "-"),
            *(run["features"] or "", "" if run["seconds"] is None else f"{run['seconds']:.0f} s"),
            *(number(run["gpu_hours"]), NOT_MEASURED if run["energy_kwh"] is None else number(run["energy_kwh"])),
            *(number(run["metrics"].get(name)) for name in scores),
        ]
        for run in found
    ]
    columns = ("id", "recipe", "method", "status", "started", "user", "features", "took", "GPU-hours", "kWh", *scores)
    print_table(
        columns, rows, numbers=3 + len(scores), optional=("user", "features", "kWh", "GPU-hours", "method", "started")
    )


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
        [row["metric"], *map(number, row["values"]), *(number(value, "+") for value in row["differences"])]
        for row in metrics
    ]
    print_table(("metric", *ids, *signed), rows, numbers=len(ids) + len(signed))
