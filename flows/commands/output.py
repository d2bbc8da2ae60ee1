"""Output and argument types of the subcommands: tables for people, JSON for machines."""

import json
import logging
import signal
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flows

METRICS = ("fid", "is", "precision", "recall", "kid")
CHARTS = "?workflowType=machine_learning&compareRunsMode=CHART"  # opens MLflow's curves, not its LLM view
WIDE = 240  # columns of a table without a terminal


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


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "", numbers: int = 0) -> None:
    """Print rows of text, the last `numbers` columns flush right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for position, column in enumerate(columns):
        table.add_column(column, justify="right" if position >= len(columns) - numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # Text: square brackets in it are no markup
    Console(width=None if sys.stdout.isatty() else WIDE).print(table)


def print_metrics(rows: Mapping[str, Mapping[str, float]], *, title: str) -> None:
    """Print {name of images: {metric: value}} with four significant digits; a dash marks a missing value."""
    columns = [metric.upper() if len(metric) < 4 else metric for metric in METRICS]
    cells = [[f"{row[key]:#.4g}" if key in row else "-" for key in METRICS] for row in rows.values()]
    table = [[name, *values] for name, values in zip(rows, cells, strict=True)]
    print_table(("images", *columns), table, title=title, numbers=len(METRICS))


class _Terminal(logging.Handler):
    """Write log messages for people to stderr; stdout is for results."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr, flush=True)


def log_to_terminal() -> None:
    """Show our log lines on the terminal; in a flow Prefect's console and UI show them."""
    logger = logging.getLogger(flows.__name__)
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, _Terminal) for handler in logger.handlers):
        logger.addHandler(_Terminal())


def prepare_for_cancelling() -> None:
    """Let SIGTERM unwind this process: cancelling a flow sends it, and the default would orphan Prefect's server."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
