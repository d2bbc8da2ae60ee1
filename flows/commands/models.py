"""`cm models`: the registered students, their metrics and aliases; promote one to champion."""

from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flows.commands.output import add_json_option, number, positive, print_json, print_table
from flows.commands.runs import SHORT, existing_tracker, tracker_of
from flows.workspace.locations import workspace_root

if TYPE_CHECKING:
    from flows.tracking.registry import Registered, Version


def add_parsers(commands: Any) -> None:
    """Declare the subcommands."""
    parser = commands.add_parser("models", help="list the registered students, newest first; promote one")
    add_json_option(parser)
    parser.set_defaults(command=models)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", parser_class=type(parser))

    parser = actions.add_parser("promote", help="make a version the champion")
    parser.add_argument("name", metavar="NAME", help="a registered model, such as cm-digits")
    parser.add_argument("version", metavar="VERSION", type=positive, help="the number of one of its versions")
    parser.add_argument(
        "--force", action="store_true", help="even if it is worse than the champion, or cannot be compared with it"
    )
    parser.set_defaults(command=promote)


def models(args: Namespace) -> None:
    """Print every version with its aliases and metrics."""
    from flows.tracking.registry import Registry

    registry = Registry(tracker) if (tracker := tracker_of(workspace_root())) else None
    found = [registry.read(name) for name in registry.names()] if registry else []
    rows = [describe(model, version) for model in found for version in reversed(model.versions.values())]
    if args.json:
        print_json(rows)
    elif not rows:
        print("No models yet; a run registers its student when it is measured")
    else:
        _print_versions(rows)


def promote(args: Namespace) -> None:
    """Move the alias `champion` to a version."""
    from flows.tracking.registry import Registry

    Registry(existing_tracker(workspace_root())).promote(args.name, args.version, force=args.force)
    print(f"{args.name}: the champion is version {args.version}; models:/{args.name}@champion names it")


def describe(model: "Registered", version: "Version") -> dict[str, Any]:
    """Return a version as plain values."""
    tags = version.tags or {}
    return {
        "name": model.name,
        "version": version.number,
        "aliases": sorted(alias for alias, number in model.aliases.items() if number == version.number),
        "recipe": tags.get("recipe"),
        "method": tags.get("method"),
        "metrics": dict(version.numbers),
        "data": version.data,
        "protocol": version.protocol,
        "run": tags.get("run_id"),
        "model_id": version.model_id,
    }


def _print_versions(rows: Sequence[dict[str, Any]]) -> None:
    scores = sorted({key for row in rows for key in row["metrics"] if key.endswith("/fid")})
    table = [
        [
            *(row["name"], str(row["version"]), ", ".join(row["aliases"]), row["recipe"] or "", row["method"] or ""),
            *((row["run"] or "")[:SHORT], row["data"][:SHORT], row["protocol"][:SHORT]),
            *(number(row["metrics"].get(key)) for key in scores),
        ]
        for row in rows
    ]
    columns = ("name", "version", "aliases", "recipe", "method", "run", "data", "protocol", *scores)
    print_table(columns, table, numbers=len(scores))
