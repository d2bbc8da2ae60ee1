"""`cm sweep`: run the pipeline at every point of a sweep file; compare the points in one table."""

from argparse import Namespace
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flows.commands.output import add_json_option, prepare_for_cancelling, print_json, print_metrics, print_table
from flows.commands.recipes import add_override_option
from flows.operations.services import use_running
from flows.workspace.locations import workspace_root

if TYPE_CHECKING:
    from flows.sweeps.page import Sweep


def add_parsers(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser("sweep", help="run the pipeline at every point of a sweep file, compare")
    parser.add_argument("name", metavar="SWEEP", help="a sweep in params/sweeps, or a path to a .yaml file")
    add_override_option(parser, "a value of the recipe that all points start from")
    parser.add_argument("--dry-run", action="store_true", help="check and print the points, run nothing")
    add_json_option(parser)
    parser.set_defaults(command=sweep)


def sweep(args: Namespace) -> None:
    """Run a sweep and print its table."""
    from flows.sweeps.page import load_sweep

    planned = load_sweep(args.name, args.overrides, root=workspace_root())  # errors surface before Prefect starts
    if args.dry_run:
        _print_points(planned, as_json=args.json)
        return
    prepare_for_cancelling()
    use_running(workspace_root())
    from flows.sweep import SweepFailed, run_sweep

    try:
        results = run_sweep(args.name, args.overrides, workspace_root())
    except SweepFailed as failure:
        _print_results(failure.results, as_json=args.json)
        raise
    _print_results(results, as_json=args.json)


def _print_points(planned: "Sweep", *, as_json: bool) -> None:
    from flows.sweeps.page import value_text

    if as_json:
        print_json([{"name": point.name, "values": dict(point.values)} for point in planned.points])
        return
    keys = list(dict.fromkeys(key for point in planned.points for key in point.values))
    rows = [
        [point.name, *(value_text(point.values[key]) if key in point.values else "" for key in keys)]
        for point in planned.points
    ]
    print(f"{planned.name}: {len(rows)} points on the recipe {planned.recipe}")
    print_table(("point", *keys), rows)


def _print_results(results: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(results)
        return
    if results["rows"]:
        print_metrics(results["rows"], title=f"{results['name']}, measured by {results['network']}")
    for path in results["files"]:
        print(path)
