"""Output and argument types of the subcommands: tables for people, JSON for machines."""

import json
import logging
import signal
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import flows
from flows.errors import DISK_FULL, UserError, is_disk_full, printable
from flows.json_log import JsonFormatter, json_wanted

METRICS = ("fid", "is", "precision", "recall", "kid")
# of MLflow's page of runs: charts of pipeline runs, without those of their stages
CHARTS = "?workflowType=machine_learning&compareRunsMode=CHART&searchFilter=tags.stage%20%3D%20%27pipeline%27"
WIDE = 240  # columns of a table without a terminal
GAP = 2  # between two columns
STATE_STYLES = {"finished": "green", "running": "cyan", "failed": "red", "killed": "yellow", "scheduled": "dim"}
STATE_STYLES |= {"answers": "green", "runs": "green", "no answer": "red", "ENDED": "red"}


def add_json_option(parser: ArgumentParser) -> None:
    """Let a subcommand print JSON."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def positive(text: str) -> int:
    """Read a whole number above zero from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    print(json.dumps(value, indent=2))


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str = "",
    numbers: int = 0,
    optional: Sequence[str] = (),
) -> None:
    """Print rows of text, the last `numbers` columns flush right.

    Where a terminal is too narrow, leave out `optional` columns, the first ones first, and say so.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else WIDE)
    rows = [[printable(cell) for cell in row] for row in rows]  # names of runs are anybody's who may write to MLflow
    shown, dropped = list(range(len(columns))), []
    widths = [max(map(len, (name, *(row[place] for row in rows)))) for place, name in enumerate(columns)]
    for name in optional:
        if sum(widths[place] + GAP for place in shown) > console.width:
            shown.remove(columns.index(name))
            dropped.append(name)
    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for place in shown:
        flush = "right" if place >= len(columns) - numbers else "left"
        table.add_column(columns[place], justify=flush, overflow="fold")  # type: ignore[arg-type]
    for row in rows:  # as Text: square brackets are no markup
        table.add_row(*(Text(row[place], STATE_STYLES.get(row[place], "")) for place in shown))
    console.print(table)
    if dropped:
        console.print(f"too narrow for {', '.join(dropped)}; --json has them", style="dim")


def number(value: float | None, sign: str = "") -> str:
    """Return a number with four significant digits, for a `sign` "+" with its sign; a dash for None."""
    return "-" if value is None else f"{value:{sign}#.4g}"


def print_metrics(rows: Mapping[str, Mapping[str, float]], *, title: str) -> None:
    """Print {name of images: {metric: value}} with four significant digits; a dash marks a missing value."""
    columns = [metric.upper() if len(metric) < 4 else metric for metric in METRICS]
    table = [[name, *(number(row.get(key)) for key in METRICS)] for name, row in rows.items()]
    print_table(("images", *columns), table, title=title, numbers=len(METRICS))


class _Terminal(logging.Handler):
    """Write log messages for people to stderr; stdout is for results."""

    def emit(self, record: logging.LogRecord) -> None:
        print(*map(printable, self.format(record).splitlines()), sep="\n", file=sys.stderr, flush=True)


def log_to_terminal(stage: str | None = None) -> None:
    """Show our log lines on the terminal; in a flow Prefect's console and UI show them."""
    logger = logging.getLogger(flows.__name__)
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, _Terminal) for handler in logger.handlers):
        logger.addHandler(_Terminal())
        context = {"stage": stage}
        logger.handlers[-1].setFormatter(JsonFormatter(lambda: context) if json_wanted() else None)


@contextmanager
def cannot_write(out: Path) -> Iterator[None]:
    """Make the folder of `--out`, and one line of what keeps it from being written, whichever library says so."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield
    except Exception as error:
        if not isinstance(error, OSError) and not is_disk_full(error):
            raise
        reason = DISK_FULL[0] if is_disk_full(error) else getattr(error, "strerror", None) or error
        raise UserError(f"--out {out}: cannot be written ({reason})") from error


def prepare_for_cancelling() -> None:
    """Let SIGTERM unwind this process: cancelling a flow sends it, and the default would orphan Prefect's server."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
