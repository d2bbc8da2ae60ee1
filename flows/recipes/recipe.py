"""The recipe: one frozen model of every choice of a run, read from a YAML file and validated before any computation.

`params/recipes/NAME.yaml` holds the differences from the papers' defaults; `params/active.yaml` is the resolved active
recipe with every value, and the only params file that dvc.yaml reads.
"""

import copy
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
from cm_core.guidance import WeightRange
from cm_core.metrics.evaluation import NEEDED_FEATURES
from cm_core.networks import Network, SongUNetParams
from cm_core.noise import Noise
from cm_core.params import Params
from flows.atomic import replace_text
from flows.errors import UserError
from flows.recipes.files import RECIPES_DIR, find_file, names_in
from flows.recipes.latents import check_latents
from flows.recipes.paths import absolute_paths
from flows.recipes.starts import check_noise_levels, check_starts
from flows.stages.edit import Edit
from flows.stages.evaluate import Evaluate
from flows.stages.features import ClassifierFeatures, Features
from flows.stages.prepare import Data
from flows.stages.sample import Sample
from flows.stages.student import Student
from flows.stages.teacher import Teacher

ACTIVE_FILE = Path("params/active.yaml")
EDITED = "edited"  # the name of a recipe without a file


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
    base: Student | None = None
    """A training before the student's, whose model the student starts from; null: none."""
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
        check_starts(self.teacher, self.students())
        if self.evaluate.needs_features and getattr(self.features, "reference", None):
            raise ValueError(
                f"evaluate.beside_fid={list(self.evaluate.beside_fid)}: kid and precision_recall need {NEEDED_FEATURES}"
                " (features.reference); set evaluate.beside_fid to [is] or []"
            )
        self._measures_recall()
        check_latents(self)
        if (shape := self.data.input_shape()) is not None:
            self._fits(shape)
        self._divides_into_sets()
        if self.sample.emas is not None and max(self.sample.emas) >= (count := len(self.student.train.emas)):
            raise ValueError(f"sample.emas={list(self.sample.emas)}: student.train.emas has {count}, counted from 0")
        if self.sample.widths and self.student.train.snapshots is None:
            raise ValueError(f"sample.widths={list(self.sample.widths)} needs student.train.snapshots")
        check_noise_levels(self.noise, self.student, self.sample)
        self.sample.check_guidance(self.student.guidance_range, getattr(self.student.method, "guidance", 1.0))
        if self.teacher is not None:
            guided: dict[str, float | WeightRange] = {
                "sample.teacher_sampler.guidance": self.sample.label_guidance,
                "teacher.grid_sampler.guidance": self.teacher.grid_sampler.guidance,
            }
            for role, section in self.students().items():
                guided[f"{role}.method.guidance"] = getattr(section.method, "guidance", 1.0)
                guided[f"{role}.method.guidance_range"] = section.guidance_range or 1.0
            for key, weight in guided.items():
                self.teacher.check_guides(key, weight, conditional=self.conditional)
        return self

    def students(self) -> dict[str, Student]:
        """Return the sections that train as a student does, {name: section}."""
        return {"student": self.student} if self.base is None else {"base": self.base, "student": self.student}

    def _measures_recall(self) -> None:
        """Refuse FID alone where a method tends to draw few kinds of images, unless there are statistics alone."""
        if self.student.method.kind != "dmd" or getattr(self.features, "reference", None):
            return
        if "precision_recall" not in self.evaluate.beside_fid:
            raise ValueError(
                f"evaluate.beside_fid={list(self.evaluate.beside_fid)}: student.method.kind=dmd may draw few kinds of "
                "images, which FID hides; add precision_recall"
            )

    def _divides_into_sets(self) -> None:
        """Refuse rows of images that are not a whole number of sets."""
        repeats, counts = self.evaluate.repeats, {"num_images": self.sample.num_images}
        for name, count in (counts | {"teacher_images": self.sample.teacher_images or 0}).items():
            if count % repeats:
                raise ValueError(
                    f"sample.{name}={count} is no multiple of evaluate.repeats={repeats}, the sets that it is "
                    f"divided into; {repeats} sets of {count} images are sample.{name}={repeats * count}"
                )

    def _fits(self, shape: tuple[int, int, int]) -> None:
        """Refuse networks, distances and edits that do not fit this image shape."""
        if self.data.latents is None:
            self.edit.check(shape, self.noise)
        for role, section in self.students().items():
            if isinstance(getattr(section.method, "distance", None), Lpips):
                check_lpips_shape(shape)
            for name in ("dropout", "dropout_resolution"):
                value = getattr(section, name)
                if value is not None and name not in type(self.network).model_fields:
                    raise ValueError(f"{role}.{name}={value}, and network.kind={self.network.kind} has no dropout")
            with torch.device("meta"):  # shapes without weights
                section.method.check_network(self.network.build(shape, 0))


def recipe_names(root: Path) -> list[str]:
    """Return the names of the recipes under `root`, sorted."""
    return names_in(root / RECIPES_DIR)


def load_recipe(name: str, overrides: Sequence[str] = (), *, root: Path, base: Path | None = None) -> Recipe:
    """Read a recipe by name or path and apply `key=value` overrides; local paths become absolute from `base`.

    Raises UserError: one line with the file, the key, the value and what is allowed.
    """
    path = find_file(name, root / RECIPES_DIR)
    written, layers = read_yaml(path), [parse_override(override) for override in overrides]
    tree = absolute_paths(reduce(merge, layers, written), base)
    if not layers:
        return validate(tree, source=path)
    try:
        return _build(Recipe, tree, "")
    except _Refused as refused:
        validate(written, source=path)  # a file that is invalid by itself is named first
        raise UserError(f"--set {refused.place or ' '.join(overrides)}: {refused.reason}") from None


def vary(name: str, values: Iterable[Mapping[str, Any]], *, root: Path, source: str) -> Recipe:
    """Read a recipe, apply mappings {dotted key: value} in order, and make its local paths absolute.

    Raises UserError as `load_recipe` does, naming `source`.
    """
    layers = (nested(key, value) for layer in values for key, value in layer.items())
    tree = reduce(merge, layers, read_yaml(find_file(name, root / RECIPES_DIR)))
    return validate(absolute_paths(tree, root), source=source)


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


def recorded_name(root: Path) -> tuple[str, bool]:
    """Return the active recipe's name as `write_active` recorded it, and whether its values are still those."""
    header, _, body = (root / ACTIVE_FILE).read_text().partition("\n")
    found = re.match(r"# (.+) \((\w+)\): ", header)
    return (found[1], found[2] == _digest(body)) if found else (EDITED, False)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def explain(name: str, overrides: Sequence[str] = (), *, root: Path) -> list[tuple[str, Any, str]]:
    """Return every resolved value as (key, value, source: the file, --set, or the default)."""
    recipe, path = load_recipe(name, overrides, root=root), find_file(name, root / RECIPES_DIR)
    written, chosen = flatten(read_yaml(path)), {override.split("=", 1)[0] for override in overrides}
    return [
        (key, value, "--set" if _within(key, chosen) else str(path) if _within(key, written) else "default")
        for key, value in flatten(recipe.model_dump(mode="json")).items()
    ]


def _within(key: str, keys: Iterable[str]) -> bool:
    """Whether `key` is in `keys`, or is the kind of a section in `keys`: a bare word stands for a section's kind."""
    return any(key in (other, f"{other}.kind") for other in keys)


def validate(tree: Mapping[str, Any], *, source: Path | str) -> Recipe:
    """Build the recipe from nested plain values. Raises UserError: one line with source, key and reason."""
    try:
        return _build(Recipe, tree, "")
    except _Refused as refused:
        raise UserError(f"{source}: {refused.place or 'recipe'}: {refused.reason}") from None


class _Refused(Exception):
    """An invalid value of a section."""

    def __init__(self, key: str, reason: str, *value: Any) -> None:
        self.place, self.reason = key + (f"={yaml_text(value[0])}" if value else ""), reason


def _build(model: type[Params], tree: Mapping[str, Any], prefix: str) -> Any:
    """Validate a section after its subsections, so that an error names the class chosen by `kind`.

    Pydantic's own discriminator would write `oneOf` into the schema, which Prefect's form does not render.
    """
    values = {}
    for key, value in tree.items():
        field = model.model_fields.get(key)
        if field is None:
            close = difflib.get_close_matches(key, model.model_fields, 1)
            guess = f", did you mean {close[0]}?" if close else ""
            raise _Refused(f"{prefix}{key}", f"unknown key{guess}; allowed: {', '.join(model.model_fields)}")
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
    kinds = {kind: member for member in members for kind in get_args(member.model_fields["kind"].annotation)}
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


def yaml_text(value: Any) -> str:
    """Return a value in one line of YAML, as --set takes it."""
    return yaml.safe_dump(value, default_flow_style=True, width=float("inf")).splitlines()[0]


class _Loader(yaml.SafeLoader):
    """Loader that reads 1e-4 as a number, as YAML 1.2 and the papers do."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*[eE][-+]?\d+$"), list("-+0123456789")
)
