"""HTML pages of reports: self-contained, of deterministic bytes."""

import base64
from pathlib import Path
from typing import Any

from flows.atomic import replace_text

STYLE = "templates/style.css"  # of every page


def write_page(path: Path, template: str, **contents: Any) -> None:
    """Render a template with its contents into a page that needs no other file and no network."""
    replace_text(path, render(template, **contents) + "\n")


def render(template: str, **contents: Any) -> str:
    """Return a template with its contents as HTML; texts among these are escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    here = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=here, autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    environment.filters["base64"] = lambda file: _encoded(file.read_bytes())
    environment.filters["encoded"] = _encoded
    return environment.get_template(template).render(contents, style=STYLE)


def _encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()
