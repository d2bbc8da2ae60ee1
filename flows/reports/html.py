"""One self-contained HTML page: facts, a table of metrics, pictures as data: URIs; deterministic bytes."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TEMPLATE = "templates/report.html"


@dataclass(frozen=True)
class TableRow:
    """A row of the table: name, note, numbers as text, and a bar beside the first number."""

    name: str
    note: str
    cells: Sequence[str]
    bar: float | None = None  # 0..1
    bound: bool = False  # a row that calibrates the others


@dataclass(frozen=True)
class Section:
    """PNG files side by side, each with its label, under a title; the template holds each title's caption."""

    title: str
    pictures: Mapping[str, Path]


@dataclass(frozen=True)
class Report:
    """Contents of the page, in order."""

    title: str
    facts: Mapping[str, str]
    columns: Sequence[str]
    rows: Sequence[TableRow]
    sections: Sequence[Section]
    protocol: Mapping[str, str]


def write_report(report: Report, path: Path) -> None:
    """Write the page, which needs no other file and no network."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    here = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=here, autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    environment.filters["base64"] = lambda file: base64.b64encode(file.read_bytes()).decode()
    path.write_text(environment.get_template(TEMPLATE).render(vars(report)) + "\n")
