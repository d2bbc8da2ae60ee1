"""Log lines as JSON objects, for CM_LOG=json."""

import json
import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from flows.settings import Settings


def json_wanted() -> bool:
    """Whether this process logs JSON; a stage below a flow does not: the flow logs its lines, with run and stage."""
    settings = Settings.read()
    return settings.log == "json" and settings.progress_file is None


def json_line(message: str, *, level: str = "INFO", at: datetime | None = None, **facts: Any) -> str:
    """Return a log line; facts that are None are left out."""
    known = {key: value for key, value in facts.items() if value is not None}
    at = at or datetime.now(UTC)
    return json.dumps({"time": at.isoformat(timespec="milliseconds"), "level": level, **known, "message": message})


class JsonFormatter(logging.Formatter):
    """Formatter of records as JSON; `context` adds facts such as run and stage."""

    def __init__(self, context: Callable[[], Mapping[str, Any]]) -> None:
        super().__init__()
        self._context = context

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC)
        error = self.formatException(record.exc_info) if record.exc_info else None
        facts = {"logger": record.name, **self._context(), "error": error}
        return json_line(record.getMessage(), level=record.levelname, at=at, **facts)
