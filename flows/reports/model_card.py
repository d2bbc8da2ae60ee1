"""The model card: front matter of the Hugging Face Hub, then all that a user of the weights should know."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from cm_core.model import ModelSpec, count_parameters
from cm_core.params import Params
from flows.reports.metrics_table import SHOWN, by_row, in_table

TEMPLATE = "templates/model_card.md"
PICTURE, RECIPE_FILE = "samples.png", "recipe.yaml"  # beside the card
HUB = "https://huggingface.co"
LICENCES = {"MIT": "mit", "CC BY-NC-SA 4.0": "cc-by-nc-sa-4.0"}  # of imported checkpoints -> the Hub's identifiers
UNKNOWN = "unknown"  # the Hub's identifier
TASK = "unconditional-image-generation"
LIBRARY = "consistency-pipeline"
WEIGHTS_FILE = "model.safetensors"
CALLS = {"euler": "a few network calls", "denoiser": "many network calls", "generator": "one network call"}  # by form


class Training(Params):
    """A training of the model or of its teacher."""

    steps: int
    batch_size: int
    minutes: float | None = None
    """Wall-clock time at the measured speed; empty: not known."""
    hardware: str = ""


class Card(Params):
    """The facts of a model card; those that are not known are empty."""

    name: str
    spec: ModelSpec
    method: str = ""
    recipe: str = ""
    data: dict[str, Any] = {}
    """dataset.json."""
    metrics: dict[str, dict[str, float]] = {}
    """metrics.json."""
    protocol: dict[str, Any] = {}
    """protocol.json."""
    trainings: dict[str, Training] = {}
    """By role: teacher, base, student."""
    origins: dict[str, dict[str, str]] = {}
    """By role, the imported checkpoints: weights, sha256, format, licence."""
    licence: str = ""
    """Of the weights, as an identifier of the Hub; empty: that of an imported checkpoint, else unknown."""

    @property
    def hub_licence(self) -> str:
        """The Hub's identifier of the weights' licence."""
        inherited = [LICENCES.get(origin.get("licence", "")) for origin in self.origins.values()]
        return self.licence or next(filter(None, inherited), UNKNOWN)


def render(card: Card, *, model: str) -> str:
    """Return the card of a model that MLflow has, in markdown; `model` is what commands take."""
    hint = f"`cm export {model} --to hub` makes a folder for the Hugging Face Hub of it."
    serve = f"mlflow models serve --model-uri {model} --env-manager local --port 5001"
    return _render(card, [f"cm sample --model {model} --n 16", serve], hint)


def render_hub(card: Card, *, repository: str, diffusers: str | None) -> str:
    """Return the README.md of a folder of the Hub: front matter, then the card.

    `diffusers` are the arguments with which its pipeline draws, None if it has no such model.
    """
    file = f"{HUB}/{repository}/resolve/main/{WEIGHTS_FILE}"
    commands = [f"cm import {file} --out {_slug(card.name)}", f"cm sample --model {_slug(card.name)} --n 16"]
    hint = "diffusers has no such model."
    if diffusers is not None:
        load = f'pipeline = DiffusionPipeline.from_pretrained("{repository}")'
        lines = ["from diffusers import DiffusionPipeline", "", load, f"image = pipeline({diffusers}).images[0]"]
        hint = "\n".join(["With diffusers:", "", "```python", *lines, "```"])
    matter = yaml.dump(front_matter(card, diffusers is not None), Dumper=_Dumper, sort_keys=False)
    return f"---\n{matter}---\n\n{_render(card, commands, hint)}"


def _render(card: Card, commands: list[str], hint: str) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    here = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=here, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    network, rows = by_row(card.metrics) if card.metrics else ("", {})
    columns = [key for key in SHOWN if any(key in row for row in rows.values())]
    return environment.get_template(TEMPLATE).render(
        card=card,
        calls=CALLS.get(card.spec.form, "one network call, or a few"),
        what=describe(card.spec),
        parameters=f"{count_parameters(card.spec):,}",
        network=network,
        columns=[SHOWN[key] for key in columns],
        rows=[_cells(name, row, columns, card.protocol["rows"].get(name, {})) for name, row in rows.items()],
        commands=commands,
        hint=hint,
        picture=PICTURE,
        recipe_file=RECIPE_FILE,
    )


def _cells(name: str, row: Mapping[str, float], columns: list[str], about: Mapping[str, Any]) -> list[str]:
    """Return a line of the table: name, network calls, metrics, number of images."""
    numbers = [in_table(key, row[key]) if key in row else "" for key in columns]
    return [f"`{name}`", str(about.get("nfe") or ""), *numbers, f"{about.get('num_images', 0):,}"]


def front_matter(card: Card, has_diffusers: bool) -> dict[str, Any]:
    """Return what the Hub reads of a card."""
    matter: dict[str, Any] = {
        "license": card.hub_licence,
        "library_name": "diffusers" if has_diffusers else LIBRARY,
        "tags": list(dict.fromkeys(filter(None, ["consistency-models", "image-generation", LIBRARY, card.method]))),
    }
    if not card.spec.num_classes:
        matter["pipeline_tag"] = TASK
    if card.data:
        matter["datasets"] = [_slug(card.data["name"])]
    if results := list(_results(card)):
        matter["metrics"] = sorted({result["type"] for result in results})
        dataset = {"name": card.data.get("name", UNKNOWN), "type": _slug(card.data.get("name", UNKNOWN))}
        result = {"task": {"type": TASK}, "dataset": dataset, "metrics": results}
        matter["model-index"] = [{"name": card.name, "results": [result]}]
    return matter


def _results(card: Card) -> Iterator[dict[str, Any]]:
    """Yield the metrics of the student's images, each with what it compares with no other."""
    rows = by_row(card.metrics)[1] if card.metrics else {}
    for name, row in rows.items():
        about = card.protocol["rows"].get(name, {})
        if about.get("model") != "student":
            continue
        network, images = card.protocol["network"], f"{about['num_images']:,} images"
        how = f"{network['name']}, {images}, network calls: {about['nfe']}"
        protocol = {"row": name, "network": network["name"], "network_sha256": network["sha256"]}
        protocol |= {key: about[key] for key in ("num_images", "nfe", "sigmas")}
        protocol |= {"reference": card.protocol["reference"]["images"]}
        for key, value in row.items():
            yield {"type": key, "value": value, "name": f"{key} ({how})", "args": protocol}


class _Dumper(yaml.SafeDumper):
    """A writer that repeats a value instead of referring to it, which readers of front matter may not follow."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or UNKNOWN


def describe(spec: ModelSpec) -> str:
    """Return what a model is, in words: form, network, images, classes, conventions."""
    others = {
        "denoiser": "denoiser (EDM)",
        "euler": f"denoiser for {spec.euler_steps} Euler steps",
        "average_velocity": "flow map by average velocity (MeanFlow)",
        "generator": "one-step generator",
    }
    kind = others.get(spec.form, f"consistency function {spec.form} with f(x, {spec.boundary:g}) = x")
    if spec.truncated_at is not None:
        kind = f"truncated consistency function {spec.form}, trained at noise levels from {spec.truncated_at:g} on"
    channels, height, width = spec.pixel_shape
    latents = ", by latents of {}x{}x{}".format(*spec.image_shape[::-1]) if spec.latents else ""
    classes = f"{spec.num_classes} classes" if spec.num_classes else "unconditional"
    inputs = f", {spec.augment_dim} augmentation labels" if spec.augment_dim else ""
    if spec.guidance_range is not None:
        low, high = spec.guidance_range
        inputs += f", guidance {low:g} to {high:g} as an input, {spec.guidance:g} unless told"
    return (
        f"{kind}, {spec.network.kind}, {width}x{height}x{channels}{latents}, {classes}{inputs}, "
        f"c_noise {spec.noise_scale:g} {'t, t - r' if spec.form == 'average_velocity' else 'ln(sigma) / 4'}"
    )
