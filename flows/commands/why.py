"""`cm why`: explain which input, param or line of code makes a stage run again."""

import json
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flows.commands.output import add_json_option, print_json
from flows.errors import UserError
from flows.workspace.dvc_files import PARAMS_FILE, dvc, load_yaml, read_lock, read_stages, upstream
from flows.workspace.locations import workspace_root

STATES = {"modified": "changed", "new": "is new", "deleted": "is missing"}  # DVC's words, and ours
NOT_GIVEN = "(not given)"


def add_parsers(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser("why", help="say why `dvc repro` will run a stage again")
    parser.add_argument("stage", metavar="STAGE", nargs="?", help="only this stage; default: all of them")
    add_json_option(parser)
    parser.set_defaults(command=why)


def why(args: Namespace) -> None:
    """Print the reasons of every outdated stage, then the stages that depend on them."""
    root = workspace_root()
    stages = read_stages(root)
    if args.stage not in (None, *stages):
        raise UserError(f"no stage {args.stage!r}; there are {', '.join(stages)}")
    if not (root / PARAMS_FILE).exists():
        raise UserError(f"{root / PARAMS_FILE}: no such file; `cm use RECIPE` writes it")
    found = {name: story for name, story in explain(root).items() if args.stage in (None, name)}
    if args.json:
        print_json(found)
    elif not found:
        print(f"{args.stage or 'Every stage'} is up to date with {PARAMS_FILE}, code and inputs.")
    for name, story in found.items() if not args.json else ():
        for line in _sentences(name, **story):
            print(line)


def _sentences(stage: str, reasons: list[str], follows: list[str]) -> Iterator[str]:
    if reasons:
        yield f"{stage} runs again because"
        yield from (f"  {reason}" for reason in reasons)
    else:
        yield f"{stage} runs again if {' or '.join(follows)} makes something new"


def explain(root: Path) -> dict[str, dict[str, list[str]]]:
    """Return every stage that may run again, in order, with its own reasons and the outdated stages upstream."""
    changes, lock = json.loads(dvc(root, "status", "--json")), read_lock(root)
    active = load_yaml(root / PARAMS_FILE)
    stages, found = read_stages(root), {}
    for name, stage in stages.items():
        follows = [earlier.name for earlier in upstream(stage, stages) if earlier.name in found]
        reasons = ["it has never run here"] if name not in lock else []
        if not reasons:
            reasons = list(_reasons(changes.get(name, []), lock[name].get("params", {}).get(PARAMS_FILE, {}), active))
        if reasons or follows:
            found[name] = {"reasons": reasons, "follows": follows}
    return found


def _reasons(changes: list[Any], locked: Mapping[str, Any], active: Mapping[str, Any]) -> Iterator[str]:
    """Turn a stage's part of DVC's status into sentences; `locked` holds the params of its last run."""
    for change in changes:
        if isinstance(change, str):  # "changed command", "changed checksum"
            yield change.replace("changed ", "") + " changed"
            continue
        for path, state in [item for paths in change.values() for item in paths.items()]:
            if path == PARAMS_FILE:
                for section in state:
                    yield from differences(locked.get(section, NOT_GIVEN), active.get(section, NOT_GIVEN), section)
            else:
                yield f"{path} {STATES.get(state, f'is {state}')}"


def differences(before: Any, after: Any, key: str) -> Iterator[str]:
    """Yield `key: before -> after` for every changed value; a change of kind stands for its whole section."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        same_kind = before.get("kind") == after.get("kind")
        for name in {**before, **after} if same_kind else ("kind",):
            yield from differences(before.get(name, NOT_GIVEN), after.get(name, NOT_GIVEN), f"{key}.{name}")
    elif before != after:
        yield f"{key}: {_short(before)} -> {_short(after)}"


def _short(value: Any) -> str:
    """Return a value as YAML; a section by its kind or as {...}."""
    if isinstance(value, Mapping):
        return str(value.get("kind", "{...}"))
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
