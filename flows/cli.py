"""The command `cm`: its subcommands and exit codes.

Exit codes: 0 done; 1 a run failed, or something is broken; 2 bad input, reported in one line; 130 stopped by Ctrl-C.
"""

import argparse
import atexit
import os
import sys
from collections.abc import Sequence
from gc import freeze, get_threshold, set_threshold
from importlib.metadata import version
from typing import NoReturn

from flows.commands import (
    completion,
    data,
    doctor,
    edit,
    gc,
    models,
    plan,
    recipes,
    run,
    runs,
    sample,
    search,
    services,
    sweep,
    why,
)
from flows.errors import StageFailed, UserError
from flows.workspace.locations import workspace_root

GROUPS = (run, sweep, recipes, data, plan, sample, edit, search, models, runs, why, services, doctor, gc)
FAILED, BAD_INPUT, INTERRUPTED, PIPE_CLOSED = 1, 2, 130, 141
GARBAGE_EVERY = 20_000  # allocations between two collections; Python's default of 700 makes imports a seventh slower


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit code."""
    set_threshold(GARBAGE_EVERY, *get_threshold()[1:])
    args = build_parser().parse_args(argv)
    atexit.register(freeze)  # otherwise Python's final collection walks all imported modules, for a second
    try:
        code = args.command(args) or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        return _complain(error, BAD_INPUT)
    except StageFailed as error:
        kept = f"\nIts clone is kept in {workspace_root() / '.cm' / 'runs'}; run again, a training resumes"
        return _complain(f"{error}{'' if 'in_place' in args else kept}", FAILED)
    except KeyboardInterrupt:
        return _complain("stopped", INTERRUPTED)
    except BrokenPipeError:  # as in `cm show NAME | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at exit
        return PIPE_CLOSED


def _complain(reason: object, code: int) -> int:
    print(f"cm: {reason}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    """Parser that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"cm: {message}; see `{self.prog} --help`\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, without heavy imports."""
    parser = _Parser(prog="cm", description="Consistency models as a pipeline: images in, a one-step generator out.")
    parser.add_argument("--version", action="version", version=f"cm {version('consistency-pipeline')}")
    parser.add_argument(
        "--print-completion",
        action=completion.PrintCompletion,
        choices=completion.SHELLS,
        help="print the completion script of a shell and exit",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    for group in GROUPS:
        group.add_parsers(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
