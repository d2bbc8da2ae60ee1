"""The base of all hyperparameters: frozen, closed, described.

One class serves YAML, the Prefect form, MLflow's params and the object that runs. The string under a field is its
description (unit, range, source), so a field is documented where it is defined.
"""

from typing import Any, get_args

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
        """Number the fields: without `position` a form on PostgreSQL sorts them by the length of their names.

        A choice of a union bears the name of its kind, or of both, unless its config gives it a title. Choices of one
        union must differ in their keys: by those alone Prefect's pages tell which one a value is.
        """
        schema = handler(core_schema)
        own = handler.resolve_ref_schema(schema)
        for position, field in enumerate(own.get("properties", {}).values()):
            field["position"] = position
        if "kind" in cls.model_fields and "title" not in cls.model_config:
            own["title"] = " or ".join(get_args(cls.model_fields["kind"].annotation))
        return schema
