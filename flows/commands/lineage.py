"""`cm lineage`: what a model is made of, with versions, and what of it is stale."""

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.commands.output import add_json_option, print_json, print_table
from flows.commands.runs import RUN, existing_tracker, resolve
from flows.commands.why import explain
from flows.reports.lineage import Node, code_of, lineage, mermaid
from flows.tracking.registry import model_name
from flows.workspace.dvc_files import locked_outs, read_lock, read_stages, upstream, version
from flows.workspace.git import describe_code
from flows.workspace.locations import workspace_root

if TYPE_CHECKING:
    from flows.tracking.tracker import Tracker

CODE = ("flows/", "cm_core/", "flows ", "cm_core ")  # how a reason of `cm why` begins that is one of code


def add_parsers(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser("lineage", help="what a model is made of, with versions, and what of it is stale")
    parser.add_argument("run", metavar="RUN", nargs="?", help=f"{RUN}; default: the results of this workspace")
    parser.add_argument("--mermaid", action="store_true", help="as a flowchart in Mermaid's language")
    add_json_option(parser)
    parser.set_defaults(command=show)


def show(args: Namespace) -> None:
    """Print the nodes as a table, as Mermaid or as JSON."""
    root = workspace_root()
    nodes = of_run(args.run, root) if args.run else of_workspace(root)
    if args.json:
        print_json([node._asdict() for node in nodes])
    elif args.mermaid:
        print(mermaid(nodes))
    else:
        word = "other here" if args.run else "stale"
        rows = [(node.name, node.version, ", ".join(node.after), word if node.stale else "") for node in nodes]
        print_table(("", "version", "made of", "state"), rows)


def of_workspace(root: Path) -> list[Node]:
    """Return the lineage of the workspace's results; stale is what `dvc repro` would make anew, and why."""
    from flows.recipes.naming import active_name
    from flows.recipes.recipe import load_active

    recipe = load_active(root)
    dataset, has_base = recipe.data.source.dataset_name(), recipe.base is not None
    outdated = explain(root)
    reasons = [reason for story in outdated.values() for reason in story["reasons"]]
    stale = set(outdated)
    stale |= {"code"} if any(reason.startswith(CODE) for reason in reasons) else set()
    stale |= {"recipe"} if any(" -> " in reason for reason in reasons) else set()
    sources = {"data": dataset, "code": code_of(describe_code(root)), "recipe": active_name(root)}
    model = model_name(dataset)
    return lineage(sources, _upstream(root), _versions(root), model=model, stale=stale, has_base=has_base)


def of_run(given: str, root: Path) -> list[Node]:
    """Return the lineage of a pipeline run; stale is what this workspace has otherwise. Raises UserError without it."""
    tracker = existing_tracker(root)
    run = resolve(given, tracker)
    made, here = tracker.read_lineage(run.info.run_id).get("versions", {}), _versions(root)
    dataset = run.data.params.get("data.source.kind", "unknown")
    sources = {"data": dataset, "code": code_of(run.data.tags), "recipe": run.data.tags.get("recipe", "unknown")}
    stale = {stage for stage, value in made.items() if here.get(stage) != value}
    stale |= {"code"} if sources["code"] != code_of(describe_code(root)) else set()
    model = _registered(made.get("student"), tracker)
    has_base = any(key.startswith("base.") for key in run.data.params)
    return lineage(sources, _upstream(root), made, model=model, stale=stale, has_base=has_base)


def _registered(student: str | None, tracker: "Tracker") -> str:
    """Return name and version of the registered student of this data version."""
    from flows.tracking.registry import Registry

    model, registry = tracker.find_student(student) if student else None, Registry(tracker)
    found = ((name, one) for name in registry.names() for one in registry.read(name).versions.values())
    return next((f"{name} {one.number}" for name, one in found if model and one.model_id == model), "not registered")


def _upstream(root: Path) -> dict[str, list[str]]:
    stages = read_stages(root)
    return {name: [one.name for one in upstream(stage, stages)] for name, stage in stages.items()}


def _versions(root: Path) -> dict[str, str]:
    return {stage: version(locked_outs(entry)) for stage, entry in read_lock(root).items()}
