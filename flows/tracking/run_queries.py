"""Searches of pipeline runs by the names that people see, in MLflow's language: the server filters and sorts."""

import re
from datetime import datetime

from flows.errors import UserError
from flows.tracking.gpu_usage import ENERGY, GPU_HOURS
from flows.tracking.person import USER

PIPELINES = "tags.stage = 'pipeline'"
RESULT, FEATURES = "result", "features"  # tags: FID in words, the network by whose features a run was measured
FIELDS = {
    "recipe": "tags.recipe",
    "user": f"tags.`{USER}`",
    "title": "attributes.run_name",
    "features": f"tags.{FEATURES}",
    "status": "attributes.status",
    "started": "attributes.start_time",
    "method": "params.`student.method.kind`",
    "gpu_hours": f"metrics.`{GPU_HOURS}`",
    "energy_kwh": f"metrics.`{ENERGY}`",
}
KEYS = f"{', '.join(FIELDS)}, a metric such as nfe_1/fid, or a value of recipes such as student.method.s0"
CONDITION = re.compile(r"\s*([\w./-]+?)\s*(<=|>=|!=|=|<|>)\s*(.+?)\s*")


def field_of(key: str) -> str:
    """Return MLflow's name of a key: one of FIELDS, a metric if it has a slash, else a param."""
    if not re.fullmatch(r"[\w./-]+", key):
        raise UserError(f"{key!r} is no key of runs; there are {KEYS}")
    return FIELDS.get(key) or (f"metrics.`{key}`" if "/" in key else f"params.`{key}`")


def filter_of(conditions: list[str]) -> str:
    """Return the filter of pipeline runs that meet all of `conditions`, KEY=VALUE. Raises UserError for others."""
    return " and ".join([PIPELINES, *map(_condition, conditions)])


def _condition(text: str) -> str:
    found = CONDITION.fullmatch(text)
    if not found:
        raise UserError(f"--where {text!r}: expected KEY=VALUE, or !=, <, <=, >, >=; a KEY is {KEYS}")
    key, operator, value = found.groups()
    name = field_of(key)
    try:
        if name.startswith("metrics."):
            return f"{name} {operator} {float(value)!r}"
        if key == "started":
            return f"{name} {operator} {datetime.fromisoformat(value).timestamp() * 1000:.0f}"
    except ValueError:
        wanted = "a date such as 2026-11-20" if key == "started" else "a number"
        raise UserError(f"--where {text!r}: {value!r} is not {wanted}") from None
    if operator not in ("=", "!=") or "'" in value:
        raise UserError(f"--where {text!r}: {key} is a text without quotes, compared by = or !=")
    return f"{name} {operator} '{value.upper() if key == 'status' else value}'"
