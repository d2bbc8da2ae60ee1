"""The command `cm`: its subcommands and exit codes.

Exit codes: 0 done; 1 a run failed, or something is broken; 2 bad input, reported in one line; 130 stopped by Ctrl-C.
"""

import argparse
import atexit
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from gc import freeze, get_threshold, set_threshold
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from flows.commands import (
    alerts,
    completion,
    data,
    doctor,
    edit,
    ema,
    export,
    gc,
    import_,
    lineage,
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
from flows.environment import adopt, is_utf8
from flows.errors import StageFailed, UserError, did_you_mean, is_disk_full
from flows.play import command as play
from flows.workspace.locations import workspace_root

GROUPS = {
    "Train": (run, sweep, plan),
    "Recipes and data": (recipes, data),
    "Use models": (sample, edit, play, search, ema, import_, export),
    "See results": (models, runs, why, lineage),
    "Run servers": (services, alerts),
    "Look after a workspace": (doctor, gc),
}
FAILED, BAD_INPUT, INTERRUPTED, PIPE_CLOSED = 1, 2, 130, 141
GARBAGE_EVERY = 20_000  # allocations between two collections; Python's default of 700 makes imports a seventh slower


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit code."""
    if not is_utf8() and argv is None:  # Python reads this variable only when it starts
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "PYTHONUTF8": "1"})
    adopt()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that does not show a letter ends no run
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
    except Exception as error:
        if not is_disk_full(error):
            raise
        return _complain(f"{' '.join(str(error).split())}; {_free_space()}; free some space and start again", BAD_INPUT)


def _free_space() -> str:
    """Say how much the file systems in use have left: libraries seldom say which one is full."""
    places = sorted({Path.cwd(), Path(tempfile.gettempdir())})
    return ", ".join(f"{place} has {shutil.disk_usage(place).free / 1e9:.2f} GB left" for place in places)


def _complain(reason: object, code: int) -> int:
    print(f"cm: {reason}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    """Parser that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"cm: {message}; see `{self.prog} --help`\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse an unknown choice with the most similar ones instead of a list of all."""
        if action.choices is not None and value not in action.choices:
            alike = did_you_mean(str(value), map(str, action.choices)) or f"; choose from {', '.join(action.choices)}"
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}{alike}")


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
    # Their list is in the epilog, by groups, which argparse does not know.
    commands = parser.add_subparsers(metavar="COMMAND", help=argparse.SUPPRESS, parser_class=_Parser, prog=parser.prog)
    parser.usage = "cm COMMAND ...\n       cm COMMAND --help"
    parser.set_defaults(command=lambda _: parser.print_help())
    listed = commands._choices_actions
    texts = []
    for title, group in GROUPS.items():
        before = len(listed)
        for module in group:
            module.add_parsers(commands)
        texts.append("\n".join([f"{title}:", *(f"  {one.dest:10} {one.help}" for one in listed[before:])]))
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, "\n\n".join(texts)
    return parser


if __name__ == "__main__":
    sys.exit(main())
