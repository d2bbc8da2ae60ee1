"""`cm gc`: list unreferenced objects; with --apply remove them."""

from argparse import ArgumentTypeError, Namespace
from datetime import timedelta
from typing import Any

from flows.commands.output import add_json_option, print_json, print_table
from flows.operations.services import use_records
from flows.workspace.locations import workspace_root

SHOWN = 20  # lines per kind


def add_parsers(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser("gc", help="list objects that nothing refers to any more; with --apply remove them")
    parser.add_argument("--apply", "--yes", action="store_true", help="remove them; without, they are only listed")
    parser.add_argument(
        "--older-than", metavar="DAYS", type=_days, default=1.0, help="younger objects stay, needed or not; default 1"
    )
    parser.add_argument(
        "--remote", action="store_true", help="the DVC remote too, into a quarantine; `git fetch --all` first"
    )
    parser.add_argument("--undo", action="store_true", help="bring back what is in the quarantine of the DVC remote")
    add_json_option(parser)
    parser.set_defaults(command=gc)


def gc(args: Namespace) -> None:
    """Print the garbage; with --apply remove it."""
    from flows.operations.garbage import QUARANTINED, bring_back, find_garbage

    root = workspace_root()
    if args.undo:
        print(f"{bring_back(root)} objects brought back")
        return
    use_records(root)
    found = list(find_garbage(root, older_than=timedelta(days=args.older_than), with_remote=args.remote))
    for one in found if args.apply else ():
        one.remove()
    if args.json:
        rows = [{"kind": one.kind, "what": one.what, "bytes": one.size} for one in found]
        print_json({"removed": args.apply, "garbage": rows})
        return
    for kind in dict.fromkeys(one.kind for one in found):
        cells = [(one.kind, one.what, f"{one.size / 1e6:,.2f}") for one in found if one.kind == kind]
        more = [("", f"and {len(cells) - SHOWN} more", "")] if len(cells) > SHOWN else []
        print_table(("kind", "what", "MB"), [*cells[:SHOWN], *more], numbers=1)
    total = f"{len(found)} things, {sum(one.size for one in found) / 1e6:,.2f} MB"
    if args.remote:
        print(
            f"objects of the remote stay in a quarantine for {QUARANTINED.days} days; `cm gc --undo` brings them back"
        )
    print(f"{total} removed" if args.apply else f"{total}; nothing was removed, `cm gc --apply` does so")


def _days(text: str) -> float:
    try:
        days = float(text)
    except ValueError:
        days = -1.0
    if not 0 <= days < 1e6:
        raise ArgumentTypeError(f"{text!r} is not a number of days")
    return days
