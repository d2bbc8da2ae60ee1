"""One self-contained HTML page: facts, a table of metrics, pictures as data: URIs. Same input, same bytes."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path


@dataclass(frozen=True)
class TableRow:
    """A row of the table: a name, what it is in a few words, numbers as text, and a bar beside the first number."""

    name: str
    note: str
    cells: Sequence[str]
    bar: float | None = None  # 0..1
    bound: bool = False  # a row that calibrates the others


@dataclass(frozen=True)
class Section:
    """PNG files side by side, each with its label, under a title and a sentence on what they show."""

    title: str
    caption: str
    pictures: Mapping[str, Path]


@dataclass(frozen=True)
class Report:
    """Everything the page shows, in its order."""

    title: str
    lead: str
    facts: Mapping[str, str]
    columns: Sequence[str]
    rows: Sequence[TableRow]
    table_note: str
    sections: Sequence[Section]
    protocol: Mapping[str, str]


def write_report(report: Report, path: Path) -> None:
    """Write the page; it needs no other file and no network."""
    body = "\n".join(
        [
            f"<header><h1>{escape(report.title)}</h1><p>{escape(report.lead)}</p></header>",
            _definitions(report.facts, "facts"),
            f"<section><h2>Metrics</h2>{_table(report)}<p class='note'>{escape(report.table_note)}</p></section>",
            *(_section(section) for section in report.sections),
            f"<section><h2>Protocol</h2>{_definitions(report.protocol, 'protocol')}</section>",
        ]
    )
    title = escape(report.title)
    path.write_text(
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _definitions(entries: Mapping[str, str], css_class: str) -> str:
    items = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in entries.items())
    return f"<dl class='{css_class}'>{items}</dl>"


def _table(report: Report) -> str:
    head = "".join(f"<th scope='col'>{escape(column)}</th>" for column in report.columns)
    rows = "\n".join(_table_row(row) for row in report.rows)
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"


def _table_row(row: TableRow) -> str:
    bar = "" if row.bar is None else f"<span class='bar'><i style='width:{100 * row.bar:.1f}%'></i></span>"
    first, *others = (_cell(cell) for cell in row.cells)
    cells = f"<td>{first}{bar}</td>" + "".join(f"<td>{cell}</td>" for cell in others)
    css_class = " class='bound'" if row.bound else ""
    name = f"<th scope='row'><b>{escape(row.name)}</b><small>{escape(row.note)}</small></th>"
    return f"<tr{css_class}>{name}{cells}</tr>"


def _cell(text: str) -> str:
    value, sign, spread = text.partition(" ± ")
    return f"{escape(value)}<small>{sign}{escape(spread)}</small>" if sign else escape(value)


def _section(section: Section) -> str:
    figures = "".join(_figure(label, path) for label, path in section.pictures.items())
    return (
        f"<section><h2>{escape(section.title)}</h2><p class='note'>{escape(section.caption)}</p>"
        f"<div class='{'picture' if len(section.pictures) == 1 else 'pictures'}'>{figures}</div></section>"
    )


def _figure(label: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    caption = f"<figcaption>{escape(label)}</figcaption>" if label else ""
    return f"<figure>{caption}<img alt='{escape(label or path.stem)}' src='data:image/png;base64,{data}'></figure>"


STYLE = """
:root { --ink: #1d2430; --soft: #5c6675; --line: #dfe3ea; --tint: #f5f7fa; --accent: #2f5fb3; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Liberation Sans",
  sans-serif; }
main { max-width: 1140px; margin: 0 auto; padding: 48px 28px 72px; }
h1 { margin: 0 0 6px; font-size: 32px; line-height: 1.2; letter-spacing: -0.01em; }
h2 { margin: 0 0 8px; font-size: 20px; }
header p { margin: 0 0 26px; max-width: 46em; color: var(--soft); font-size: 17px; }
section { margin-top: 44px; }
dl { display: grid; margin: 0; }
dt { color: var(--soft); font-size: 13px; }
dd { margin: 0; overflow-wrap: anywhere; }
.facts { grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 14px 24px; padding: 18px 22px;
  border: 1px solid var(--line); border-radius: 10px; background: var(--tint); }
.protocol { gap: 8px; font-size: 14px; }
.protocol div { display: grid; grid-template-columns: minmax(130px, 200px) 1fr; gap: 18px; padding-bottom: 8px;
  border-bottom: 1px solid var(--line); }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 10px 14px; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child { text-align: left; padding-left: 8px; }
thead th { color: var(--soft); font-size: 13px; font-weight: 600; white-space: nowrap; border-bottom: 2px solid
  var(--line); vertical-align: bottom; }
tbody th { font-weight: 400; }
tbody th b { display: block; font-weight: 600; }
tbody th small { display: block; color: var(--soft); font-size: 13px; line-height: 1.35; }
td { white-space: nowrap; }
td small { color: var(--soft); font-size: 13px; }
tr.bound { background: var(--tint); }
tr.bound .bar i { background: #98a2b3; }
.bar { display: block; width: 110px; height: 5px; margin: 7px 0 0 auto; border-radius: 3px; background: #e6eaf0; }
.bar i { display: block; height: 100%; min-width: 2px; border-radius: 3px; background: var(--accent); }
.note { margin: 0 0 14px; max-width: 60em; color: var(--soft); font-size: 14px; }
.scroll + .note { margin-top: 12px; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 342px), 1fr)); gap: 22px 20px; }
figure { margin: 0; min-width: 0; }
img { display: block; max-width: 100%; height: auto; }
figcaption { margin-bottom: 5px; font-size: 14px; font-weight: 600; }
@media print { main { padding: 0; } section { break-inside: avoid; } }
"""
