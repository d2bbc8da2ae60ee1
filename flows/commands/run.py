"""`cm run`, `cm demo`, `cm stage`: run recipes through Prefect, or one stage as DVC runs it."""

import os
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.commands.output import (
    CHARTS,
    add_json_option,
    log_to_terminal,
    prepare_for_cancelling,
    print_json,
    print_metrics,
)
from flows.commands.recipes import add_recipe_arguments
from flows.monitor import PROFILE_VARIABLE
from flows.notification import send, told_of_failure
from flows.operations.checks import check_before_a_run
from flows.operations.services import use_running
from flows.recipes.files import run_name
from flows.reports.metrics_table import Metrics, Rows, by_row
from flows.settings import Settings
from flows.storage.s3 import public_text
from flows.workspace.locations import workspace_root

if TYPE_CHECKING:
    from flows.recipes.recipe import Recipe

DISTILLED, ISOLATED = "digits-cd", "digits-ct"  # the recipes of the demo


def add_parsers(commands: Any) -> None:
    """Declare the subcommands."""
    parser = commands.add_parser("demo", help="distil a teacher, train in isolation, compare; minutes on a laptop")
    parser.set_defaults(command=demo)

    parser = commands.add_parser("run", help="run the pipeline on a recipe; nothing is computed twice")
    add_recipe_arguments(parser)
    parser.add_argument(
        "--notify", metavar="ADDRESS", help="of apprise, such as ntfy://TOPIC, told how the run ends; default CM_NOTIFY"
    )
    parser.add_argument("--take-over", action="store_true", help="put recipe and results in force in this workspace")
    add_json_option(parser)
    _add_profile_option(parser)
    parser.set_defaults(command=run)

    parser = commands.add_parser("stage", help="run one stage on params/active.yaml; what dvc.yaml calls")
    parser.add_argument(
        "stage", metavar="STAGE", help="prepare, features, teacher, base, student, sample, edit or evaluate"
    )
    parser.add_argument("--inputs", action="store_true", help="only bring and read what it takes from elsewhere")
    _add_profile_option(parser)
    parser.set_defaults(command=stage, in_place=True)


def _add_profile_option(parser: Any) -> None:
    parser.add_argument(
        "--profile",
        metavar="FOLDER",
        type=Path,
        help="also write there, for each training: a trace of three steps, what took the time, images/s and memory",
    )


def _ask_for_profile(args: Namespace) -> None:
    if args.profile is not None:
        os.environ[PROFILE_VARIABLE] = str(args.profile.absolute())


def stage(args: Namespace) -> None:
    """Run one stage in this workspace."""
    _ask_for_profile(args)
    log_to_terminal(args.stage)
    from flows.stage_runner.run import bring_inputs, start_stage

    (bring_inputs if args.inputs else start_stage)(args.stage, workspace_root())


def run(args: Namespace) -> None:
    """Run the pipeline and print its results."""
    _ask_for_profile(args)
    from flows.recipes.recipe import load_recipe

    root, name = workspace_root(), run_name(args.recipe, args.overrides)
    recipe = load_recipe(args.recipe, args.overrides, root=root, base=Path.cwd())
    address = args.notify or Settings.read().notify
    with told_of_failure(address, public_text(name)):
        result = run_pipeline(recipe, root, name=name, keep=args.take_over)
    if address:
        send(address, f"{result['title']} finished", _in_words(result), failed=False)
    if args.json:
        print_json(result)
    else:
        network, rows = by_row(result["metrics"])
        print_metrics(rows, title=f"{result['title']}, measured by {network}")
        if result["report"]:
            print(f"{result['report']}: the report")
        print(f"{result['folder']}: the run's clone; `cm runs` compares the runs")


def _in_words(result: Mapping[str, Any]) -> str:
    network, rows = by_row(result["metrics"])
    lines = [f"{name}: FID {row['fid']:.4g}" for name, row in rows.items() if "fid" in row]
    return "\n".join([f"measured by {network}", *lines, result["report"] or result["folder"]])


def run_pipeline(recipe: "Recipe", root: Path, *, name: str, keep: bool) -> dict[str, Any]:
    """Run the flow in this process; with `keep`, update the workspace's recipe and results afterwards."""
    from flows.data.check import check_latents, check_source

    check_source(recipe.data.source, root)
    check_latents(recipe.data.latents, root)
    prepare_for_cancelling()
    use_running(root)
    check_before_a_run()  # imports Prefect, which reads its variables once
    from flows import pipeline  # after validation of the recipe: this import takes seconds

    return pipeline.run(recipe, root, name=name, keep=keep)


def demo(args: Namespace) -> None:
    """Run both recipes; print one table and the next steps."""
    from flows.recipes.recipe import load_recipe

    root, started = workspace_root(), time.monotonic()
    recipes = [load_recipe(name, root=root) for name in (DISTILLED, ISOLATED)]
    distilled = run_pipeline(recipes[0], root, name=DISTILLED, keep=True)
    isolated = run_pipeline(recipes[1], root, name=ISOLATED, keep=False)
    network, rows = demo_rows(distilled["metrics"], isolated["metrics"])
    print_metrics(rows, title=f"8x8 digits, measured by the network `{network}` ({time.monotonic() - started:.0f} s)")
    print(_where_to_look(distilled))


def demo_rows(distilled: Metrics, isolated: Metrics) -> tuple[str, Rows]:
    """Return the network and one table of both runs: data, untrained network, teacher, the students by NFE."""
    (network, cd), (_, ct) = by_row(distilled), by_row(isolated)
    students = {
        f"{method} {name}": row
        for method, rows in (("cd", cd), ("ct", ct))
        for name, row in rows.items()
        if name.startswith("nfe_")
    }
    teacher = {name: row for name, row in cd.items() if name.startswith("teacher_")}
    # Before training the distilled student equals the teacher; "untrained" is the isolated one's row.
    return network, {"real": cd["real"], "untrained": ct["untrained"], **teacher, **students}


def _where_to_look(distilled: Mapping[str, Any]) -> str:
    page = f"http://127.0.0.1:5000/#/experiments/{distilled['mlflow']['experiment_id']}/runs{CHARTS}"
    return f"""Look next, in a shell after `. .venv/bin/activate`:
  cm runs              all runs side by side
  cm sample --steps 2  more digits; the workspace holds the run of {DISTILLED}
  dvc repro            has nothing to do, for the same reason
  make ui              curves and pictures of both: {page}
  and open {distilled["report"]}"""
