"""The recipe: one frozen model of every choice of a run, read from a YAML file and validated before any computation.

`params/recipes/NAME.yaml` holds the differences from the papers' defaults; `params/active.yaml` is the resolved active
recipe with every value, and the only params file that dvc.yaml reads.
"""

import difflib
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import torch
import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from cm_core.distances import Lpips, check_lpips_shape
from cm_core.networks import Network, SongUNetParams
from cm_core.noise import Noise
from cm_core.params import Params
from cm_core.sampling import check_levels
from flows.atomic import replace_text
from flows.errors import UserError
from flows.recipes.files import RECIPES_DIR
from flows.recipes.overrides import flatten, merge, nested, parse_override, read_yaml
from flows.stages.edit import Edit
from flows.stages.evaluate import Evaluate
from flows.stages.features import ClassifierFeatures, Features
from flows.stages.prepare import Data
from flows.stages.sample import Sample
from flows.stages.student import Student
from flows.stages.teacher import Teacher

ACTIVE_FILE = Path("params/active.yaml")
EDITED = "edited"  # the name of a recipe without a file
PATH_KEYS = (  # values that may name a local file or folder
    "data.source.path",
    "data.source.heldout_path",
    "data.source.urls",
    "features.weights",
    "student.method.distance.weights",
)


class Recipe(Params):
    """All choices of a run, in sections that belong to the stages."""

    seed: int = Field(0, ge=0)
    """Seed of weights, order, noise and dropout."""
    conditional: bool = False
    """Condition networks on the class labels."""
    data: Data = Data()
    """The images."""
    noise: Noise = Noise()
    """Range of noise levels and spread of the data, shared by teacher, student and samplers."""
    network: Network = SongUNetParams()
    """The network, shared by teacher and student."""
    features: Features = ClassifierFeatures()
    """The feature network of the metrics."""
    teacher: Teacher | None = Teacher()
    """Training of the diffusion model; null: none is trained."""
    student: Student = Student()
    """Training of the consistency model."""
    sample: Sample = Sample()
    """Images drawn for the evaluation."""
    edit: Edit = Edit()
    """The editing gallery."""
    evaluate: Evaluate = Evaluate()
    """Metrics and report."""

    @model_validator(mode="after")
    def _possible(self) -> "Recipe":
        kind = self.student.method.kind
        if self.teacher is None and self.student.method.needs_teacher:
            raise ValueError(f"student.method.kind={kind} distils a teacher, and teacher is null; train one or use ct")
        if self.teacher is None and self.student.initial_weights == "teacher":
            raise ValueError(
                f"the student's first weights are the teacher's (kind={kind}), and teacher is null; train one, or set "
                "student.init_from: random"
            )
        shape = self.data.image_shape()
        if shape is not None:
            self._fits(shape)
        for mid in self.sample.mid_sigmas:
            check_levels([self.noise.sigma_max, *mid], sigma_min=self.noise.sigma_min)
        if self.teacher is not None:
            self._can_guide("sample.teacher_sampler", self.sample.teacher_sampler.guidance, self.teacher)
            self._can_guide("teacher.grid_sampler", self.teacher.grid_sampler.guidance, self.teacher)
            self._can_guide("student.method", getattr(self.student.method, "guidance", 1.0), self.teacher)
        return self

    def _can_guide(self, key: str, guidance: float, teacher: Teacher) -> None:
        """Refuse guidance by a teacher that is not trained both with and without labels."""
        if guidance == 1:
            return
        if not self.conditional:
            raise ValueError(f"{key}.guidance={guidance:g} needs labels, and conditional is false")
        if teacher.method.label_dropout == 0:
            raise ValueError(
                f"{key}.guidance={guidance:g} needs a teacher that was trained without labels too, and "
                "teacher.method.label_dropout is 0; 0.1 is usual"
            )

    def _fits(self, shape: tuple[int, int, int]) -> None:
        """Refuse networks, distances and edits that do not fit this image shape."""
        if isinstance(getattr(self.student.method, "distance", None), Lpips):
            check_lpips_shape(shape)
        self.edit.check(shape, self.noise)
        if self.student.dropout is not None and "dropout" not in type(self.network).model_fields:
            raise ValueError(
                f"student.dropout={self.student.dropout}, and network.kind={self.network.kind} has no dropout"
            )
        with torch.device("meta"):  # shapes without weights
            self.network.build(shape, 0)


def recipe_names(root: Path) -> list[str]:
    """Return the names of the recipes under `root`, sorted."""
    return sorted(path.stem for path in (root / RECIPES_DIR).glob("*.yaml"))


def load_recipe(name: str, overrides: Sequence[str] = (), *, root: Path, base: Path | None = None) -> Recipe:
    """Read a recipe by name or path and apply `key=value` overrides; local paths become absolute from `base`.

    Raises UserError: one line with the file, the key, the value and what is allowed.
    """
    path, layers = _recipe_path(name, root), map(parse_override, overrides)
    tree = _absolute_paths(reduce(merge, layers, read_yaml(path)), base)
    return validate(tree, source=path, origins=[override.split("=", 1)[0] for override in overrides])


def vary(name: str, values: Iterable[Mapping[str, Any]], *, root: Path, source: str) -> Recipe:
    """Read a recipe, apply mappings {dotted key: value} in order, and make its local paths absolute.

    Raises UserError as `load_recipe` does, naming `source`.
    """
    layers = (nested(key, value) for layer in values for key, value in layer.items())
    return validate(_absolute_paths(reduce(merge, layers, read_yaml(_recipe_path(name, root))), root), source=source)


def _absolute_paths(tree: dict[str, Any], base: Path | None) -> dict[str, Any]:
    """Make local paths absolute and expand `~`: a flow run works in a clone, far from `base`.

    A path with a .dvc file beside it stays: every clone can restore that file. Malformed values are left to `validate`.
    """
    for key in PATH_KEYS:
        *sections, name = key.split(".")
        section: Any = tree
        for part in sections:
            section = section.get(part) if isinstance(section, dict) else None
        if base and isinstance(section, dict) and section.get(name):
            section[name] = _absolute(section[name], base)
    return tree


def _absolute(path: Any, base: Path) -> Any:
    if isinstance(path, list):
        return [_absolute(one, base) for one in path]
    if not isinstance(path, str) or "://" in path or (base / f"{path}.dvc").is_file():
        return path
    return str(base / Path(path).expanduser())


def load_active(root: Path) -> Recipe:
    """Read the active recipe, `params/active.yaml`. Raises UserError as `load_recipe` does."""
    return validate(read_yaml(root / ACTIVE_FILE), source=root / ACTIVE_FILE)


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML, with every value, in the order of the model."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=100)


def write_active(recipe: Recipe, root: Path, name: str = EDITED) -> Path:
    """Make a recipe active under its name: write `params/active.yaml` only if it changes, and return its path."""
    path, body = root / ACTIVE_FILE, dump_recipe(recipe)
    header = f"# {' '.join(name.split())} ({_digest(body)}): the resolved recipe in force, for dvc.yaml; may be edited."
    text = f"{header}\n{body}"
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)
    return path


def active_name(root: Path) -> str:
    """Return the active recipe's name as `write_active` recorded it; EDITED if its values have changed since."""
    header, _, body = (root / ACTIVE_FILE).read_text().partition("\n")
    found = re.match(r"# (.+) \((\w+)\): ", header)
    return found[1] if found and found[2] == _digest(body) else EDITED


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def explain(name: str, overrides: Sequence[str] = (), *, root: Path) -> list[tuple[str, Any, str]]:
    """Return every resolved value as (key, value, source: the file, --set, or the default)."""
    recipe = load_recipe(name, overrides, root=root)
    path = _recipe_path(name, root)
    written, chosen = flatten(read_yaml(path)), {override.split("=", 1)[0] for override in overrides}
    return [
        (key, value, "--set" if _within(key, chosen) else str(path) if _within(key, written) else "default")
        for key, value in flatten(recipe.model_dump(mode="json")).items()
    ]


def _within(key: str, keys: Iterable[str]) -> bool:
    """Whether `key` is in `keys`, or is the kind of a section in `keys`: a bare word stands for a section's kind."""
    return any(key in (other, f"{other}.kind") for other in keys)


def validate(tree: Mapping[str, Any], *, source: Path | str, origins: Sequence[str] = ()) -> Recipe:
    """Build the recipe from nested plain values; `origins` are the keys that came from --set.

    Raises UserError: one line naming file, key, value and what is allowed.
    """
    try:
        return _build(Recipe, tree, "")
    except _Refused as refused:
        given = _within(refused.key, origins) or refused.key.startswith(tuple(f"{key}." for key in origins))
        place = f"--set {refused.key}" if given else f"{source}: {refused.key or 'recipe'}"
        raise UserError(f"{place}{refused.value}: {refused.reason}") from None


class _Refused(Exception):
    """An invalid value of a section."""

    def __init__(self, key: str, reason: str, *value: Any) -> None:
        self.key, self.reason = key, reason
        self.value = f"={yaml.safe_dump(value[0], default_flow_style=True).splitlines()[0]}" if value else ""


def _build(model: type[Params], tree: Mapping[str, Any], prefix: str) -> Any:
    """Validate a section after its subsections, so that an error names the class chosen by `kind`.

    Pydantic's own discriminator would write `oneOf` into the schema, which Prefect's form does not render.
    """
    values = {}
    for key, value in tree.items():
        field = model.model_fields.get(key)
        if field is None:
            raise _Refused(
                f"{prefix}{key}", f"unknown key{_nearest(key, model)}; allowed: {', '.join(model.model_fields)}"
            )
        values[key] = _build_value(
            field.annotation, value, f"{prefix}{key}", field.get_default(call_default_factory=True)
        )
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = prefix + ".".join(map(str, first["loc"]))
        reason = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        own = () if first["type"] in ("value_error", "missing") else (first["input"],)
        raise _Refused(key.rstrip("."), reason, *own) from None


def _build_value(annotation: Any, value: Any, key: str, default: Any = None) -> Any:
    if isinstance(value, list) and get_origin(annotation) is tuple:
        return [_build_value(get_args(annotation)[0], item, f"{key}.{i}") for i, item in enumerate(value)]
    members = _sections(annotation)
    if not members or value is None or isinstance(value, BaseModel):
        return value
    if len(members) == 1 and "kind" not in members[0].model_fields:
        if not isinstance(value, Mapping):
            raise _Refused(key, f"must be a section with keys {', '.join(members[0].model_fields)}", value)
        return _build(members[0], value, f"{key}.")
    return _build_kind(members, value, key, default)


def _build_kind(members: list[type[Params]], value: Any, key: str, default: Any) -> Any:
    kinds = {get_args(member.model_fields["kind"].annotation)[0]: member for member in members}
    if isinstance(value, str):
        value = {"kind": value}
    if not isinstance(value, Mapping):
        raise _Refused(key, f"must be one of {', '.join(kinds)}, or a section with such a kind", value)
    kind = value.get("kind", getattr(default, "kind", next(iter(kinds))))
    if kind not in kinds:
        raise _Refused(f"{key}.kind", f"must be one of {', '.join(kinds)}", kind)
    return _build(kinds[kind], {"kind": kind, **value}, f"{key}.")


def _sections(annotation: Any) -> list[type[Params]]:
    """Return the Params classes of an annotation such as `A | B | None`."""
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return [option for option in options if isinstance(option, type) and issubclass(option, Params)]


def _nearest(key: str, model: type[Params]) -> str:
    close = difflib.get_close_matches(key, model.model_fields, 1)
    return f", did you mean {close[0]}?" if close else ""


def _recipe_path(name: str, root: Path) -> Path:
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    path = root / RECIPES_DIR / f"{name}.yaml"
    if not path.exists():
        raise UserError(
            f"no recipe {name!r}; there are {', '.join(recipe_names(root))}, or give a path to a .yaml file"
        )
    return path
