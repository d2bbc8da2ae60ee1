"""Layers of a recipe before validation: YAML files, --set options, and their merge."""

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from flows.errors import UserError


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings under dotted keys; lists are leaves."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping from a YAML file. Raises UserError if there is none."""
    try:
        tree = yaml.load(path.read_text(), _Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections such as data:, student:; got {type(tree).__name__}")
    return tree


def parse_override(override: str) -> dict[str, Any]:
    """Turn `a.b=value` into {"a": {"b": value}}, the value read as YAML. Raises UserError for other forms."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"--set {override}: expected key=value, such as student.method.solver=euler")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise UserError(f"--set {override}: {text!r} is not a YAML value") from None
    return nested(key, value)


def nested(key: str, value: Any) -> Any:
    """Turn the dotted key `a.b` and a value into {"a": {"b": value}}."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def merge(base: Any, layer: Any) -> Any:
    """Merge `layer` over `base`, mapping by mapping; a layer with another `kind` replaces the whole section.

    A bare word stands for {kind: word} where `base` has a mapping with a kind.
    """
    if isinstance(base, dict) and "kind" in base and isinstance(layer, str):
        layer = {"kind": layer}
    if isinstance(base, str) and isinstance(layer, dict) and layer and "kind" not in layer:
        base = {"kind": base}
    if not isinstance(base, dict) or not isinstance(layer, dict):
        return copy.deepcopy(layer)
    if "kind" in layer and "kind" in base and layer["kind"] != base["kind"]:
        return copy.deepcopy(layer)
    return {**base, **{key: merge(base[key], value) if key in base else value for key, value in layer.items()}}


class _Loader(yaml.SafeLoader):
    """Loader that reads 1e-4 as a number, as YAML 1.2 and the papers do."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*[eE][-+]?\d+$"), list("-+0123456789")
)
