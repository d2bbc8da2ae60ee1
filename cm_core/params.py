"""The base of all hyperparameters: frozen, closed, described.

One class serves YAML, the Prefect form, MLflow's params and the object that runs. The string under a field is its
description (unit, range, source), so a field is documented where it is defined.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict


class Params(BaseModel):
    """A frozen section of a recipe that rejects unknown keys."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        """Number the fields: without `position` a form on PostgreSQL sorts them by the length of their names."""
        schema = handler(core_schema)
        for position, field in enumerate(handler.resolve_ref_schema(schema).get("properties", {}).values()):
            field["position"] = position
        return schema
