"""Descriptions of runs in MLflow's pages: results first, then where they come from."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from flows.reports.metrics_table import SHOWN, Metrics, by_row, in_table


def describe_run(tags: Mapping[str, str], results: str = "") -> str:
    """Return a run's description in markdown: its results, and links to its context."""
    lines = [results, *([""] if results else []), f"- recipe: `{tags['recipe']}`"]
    if "git.revision" in tags:
        edits = ", with uncommitted edits" if "git.edits" in tags else ""
        lines.append("- code: " + _linked(tags["git.revision"][:12], tags.get("git.url")) + edits)
    if "prefect.flow_run" in tags:
        lines.append("- Prefect: " + _linked(tags["prefect.flow_run"], tags.get("prefect.url")))
    return "\n".join(lines).lstrip()


def _linked(text: str, url: str | None) -> str:
    return f"[{text}]({url})" if url else f"`{text}`"


def results_in_markdown(metrics: Metrics, rows_protocol: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the metrics of every row of images as a table; `rows_protocol` is `rows` of protocol.json."""
    network, rows = by_row(metrics)
    columns = [key for key in SHOWN if any(key in row for row in rows.values())]
    lines = [f"| features of `{network}` | calls | " + " | ".join(SHOWN[key] for key in columns) + " |"]
    lines.append("| --- | ---: |" + " ---: |" * len(columns))
    for name, row in rows.items():
        calls = rows_protocol.get(name, {}).get("nfe") or ""
        numbers = [in_table(key, row[key]) if key in row else "" for key in columns]
        lines.append(f"| {name} | {calls} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def picture_of_run(run_id: str, path: str) -> str:
    """Return markdown of a picture among a run's artifacts; MLflow's pages, wherever they lie, load it from beside."""
    return f"![Samples](get-artifact?run_uuid={run_id}&path={quote(path)})"


def address_in_model(model_id: str, path: str) -> str:
    """Return the address, relative to MLflow's pages, of a file among a logged model's artifacts."""
    return f"ajax-api/2.0/mlflow/logged-models/{model_id}/artifacts/files?artifact_file_path={quote(path, safe='')}"
