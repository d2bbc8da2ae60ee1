"""Stage `edit`: a gallery of zero-shot edits of held-out images by a student."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from cm_core import editing
from cm_core.editing import Draws, Operator, falling_sigmas, filling_sigmas
from cm_core.model import ModelSpec, load_model
from cm_core.noise import Noise
from cm_core.params import Params
from cm_core.precond import Precond
from cm_core.randomness import derive_seed, make_generator
from cm_core.sampling import ImageNoise
from cm_core.solvers import Denoiser
from cm_core.tensors import from_pixels, to_pixels
from flows.data.dataset import Dataset, load_dataset
from flows.errors import UserError
from flows.monitor import Monitor
from flows.reports.figures import save_rows
from flows.stages.models import pick_device, to_device

STROKE_STEPS, STROKE_SHADES = 2, 4  # levels (CM, App. D); shades of a made-up stroke painting
MOST_RESULTS = 8  # per image
PAIRS, FRAMES = 4, 8  # of the interpolations
TaskName = Literal["inpaint", "colorize", "superres", "stroke", "denoise", "interpolate"]


class Edit(Params):
    """The editing gallery: the edits and their images."""

    tasks: tuple[TaskName, ...] = ("inpaint", "colorize", "superres", "stroke", "denoise", "interpolate")
    """Pictures of the gallery; colorize is left out where the images are grey."""
    num_images: int = Field(8, ge=1, le=32)
    """Held-out images that every task edits, the first ones."""
    num_results: int = Field(3, ge=1, le=MOST_RESULTS)
    """Results per image, with different noise; images times results form one batch."""
    num_steps: int = Field(39, ge=1)
    """Network calls of inpaint, colorize and superres (CM, App. D: 40 levels, the last of which needs none)."""
    mask: Literal["square", "right", "pixels"] = "square"
    """The part that inpaint fills: the central square of half the side, the right half, or half of the pixels."""
    factor: int = Field(2, ge=2)
    """Side of the patches of which superres knows the means alone (CM, App. D: 8 for 256 pixels)."""
    stroke_sigma: float = Field(5.38, gt=0)
    """Noise level from which stroke repaints a rough image; lower keeps more of it (CM, App. D: 5.38)."""
    denoise_sigma: float = Field(0.5, gt=0)
    """Noise that denoise has to remove, in units of the data, whose pixels reach from -1 to 1."""
    seed: int = Field(0, ge=0)
    """Seed of all noise."""

    def check(self, image_shape: tuple[int, int, int], noise: Noise) -> None:
        """Raise ValueError unless patches and noise levels fit the images."""
        _, height, width = image_shape
        if {"superres", "stroke"} & set(self.tasks) and (height % self.factor or width % self.factor):
            raise ValueError(f"edit.factor={self.factor} does not divide images of {width}x{height} pixels")
        for key, num_steps in (("stroke_sigma", STROKE_STEPS), ("denoise_sigma", 1)):
            try:
                falling_sigmas(noise, getattr(self, key), num_steps)
            except ValueError as error:
                raise ValueError(f"edit.{key}={getattr(self, key):g}: {error}") from error


@dataclass(frozen=True)
class Originals:
    """The images to edit."""

    split: str
    pixels: Tensor  # uint8 [N, H, W, C]
    labels: Tensor  # [N]


@dataclass(frozen=True)
class Task:
    """One kind of edit, of images [B, C, H, W] in -1..1."""

    sigmas: list[float]  # one network call per level
    spoil: Callable[[Tensor], Tensor]  # image -> the input of the edit
    restore: Callable[[Denoiser, Draws, Tensor], Tensor]
    operator: Operator | None = None  # keeps its known coefficients
    num_results: int | None = None  # 1 for edits that noise does not change


def edit(edit: Edit, prepare_dir: Path, student_dir: Path, out_dir: Path, monitor: Monitor) -> None:
    """Write one picture per task, with rows of original, degraded and restored images, and edit.json last.

    Raises UserError if patches or noise levels do not fit the student.
    """
    device = pick_device()
    spec, f = load_model(student_dir, device=device)
    f, names = to_device(f, device), _possible(edit, spec, monitor)
    try:
        if spec.latents is None:
            edit.check(spec.image_shape, spec.noise)
    except ValueError as error:
        raise UserError(str(error)) from error
    images = _some_images(load_dataset(prepare_dir), edit.num_images, device)
    tasks = {} if spec.latents else _tasks(edit, spec, device)
    out_dir.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    for done, name in enumerate(names):
        path = out_dir / f"{name}.png"
        if name == "interpolate":
            found[name] = _interpolate(edit, spec, f, device, path)
        else:
            found[name] = _gallery(tasks[name], edit, spec, f, images, path)
        monitor.image(f"edit/{name}", path, 0)
        monitor.progress(done + 1, len(names), "tasks")
    monitor.metrics({f"rmse/{name}": facts["rmse"] for name, facts in found.items() if "rmse" in facts}, 0)
    index = {"seed": edit.seed, "split": images.split, "num_images": len(images.pixels), "tasks": found}
    (out_dir / "edit.json").write_text(json.dumps(index, indent=2, allow_nan=False) + "\n")


def _possible(edit: Edit, spec: ModelSpec, monitor: Monitor) -> list[str]:
    if not spec.edits:
        monitor.remark("no gallery: the student is no consistency model of all noise levels")
        return []
    if spec.latents:
        monitor.remark("no gallery: edits are made to pixels, and the student draws latents")
        return []
    if "colorize" in edit.tasks and spec.image_shape[0] != 3:
        monitor.remark("colorize is left out: the images are grey")
        return [name for name in edit.tasks if name != "colorize"]
    return list(edit.tasks)


def _some_images(dataset: Dataset, count: int, device: torch.device) -> Originals:
    """Return the first held-out images, or training images if none are held out."""
    split = "heldout" if len(dataset.heldout_images) else "train"
    arrays = [np.array(getattr(dataset, f"{split}_{part}")[:count]) for part in ("images", "labels")]
    return Originals(split, *(torch.from_numpy(array).to(device) for array in arrays))


def _tasks(edit: Edit, spec: ModelSpec, device: torch.device) -> dict[str, Task]:
    sigma_min = spec.boundary
    filling = filling_sigmas(spec.noise, edit.num_steps)
    strokes = falling_sigmas(spec.noise, edit.stroke_sigma, STROKE_STEPS)
    operators = {
        "inpaint": editing.inpaint(_make_mask(edit, spec).to(device)),
        "colorize": editing.colorize(device=device),
        "superres": editing.superres(edit.factor, device=device),
    }
    filled = {
        name: Task(
            filling,
            editing.to_grey if name == "colorize" else operator.given,
            partial(editing.fill_in, operator=operator, sigmas=filling, sigma_min=sigma_min),
            operator,
        )
        for name, operator in operators.items()
    }
    return filled | {
        "stroke": Task(
            strokes,
            partial(_roughen, factor=edit.factor),
            partial(editing.repaint, sigmas=strokes, sigma_min=sigma_min),
        ),
        "denoise": Task(
            [edit.denoise_sigma],
            partial(_add_noise, edit=edit),
            partial(editing.denoise, sigmas=[edit.denoise_sigma], sigma_min=sigma_min),
            num_results=1,
        ),
    }


def _make_mask(edit: Edit, spec: ModelSpec) -> Tensor:
    """Return the mask of pixels to invent, bool [H, W]."""
    _, height, width = spec.image_shape
    mask = torch.zeros(height, width, dtype=torch.bool)
    if edit.mask == "square":
        mask[height // 4 : height - height // 4, width // 4 : width - width // 4] = True
    elif edit.mask == "right":
        mask[:, width // 2 :] = True
    else:
        mask = torch.rand(height, width, generator=make_generator("cpu", edit.seed, "mask")) < 0.5
    return mask


def _roughen(x0: Tensor, *, factor: int) -> Tensor:
    """Imitate a stroke painting: patches of one shade, and few shades."""
    steps = (STROKE_SHADES - 1) / 2
    return ((editing.superres(factor, device=x0.device).given(x0) + 1) * steps).round() / steps - 1


def _add_noise(x0: Tensor, *, edit: Edit) -> Tensor:
    seed = derive_seed(edit.seed, "to remove")
    return x0 + edit.denoise_sigma * ImageNoise(seed, range(len(x0)), x0.shape[1:], x0.device).draw()


@torch.no_grad()
def _gallery(task: Task, edit: Edit, spec: ModelSpec, f: Precond, images: Originals, path: Path) -> dict[str, Any]:
    """Draw the rows of one task and return its entry of edit.json."""
    pixels, count = images.pixels, task.num_results or edit.num_results
    given = task.spoil(from_pixels(pixels))
    labels = images.labels.repeat(count) if spec.num_classes else None
    indices = [MOST_RESULTS * image + result for result in range(count) for image in range(len(pixels))]
    noise = ImageNoise(derive_seed(edit.seed, "results"), indices, spec.image_shape, pixels.device)
    results = to_pixels(task.restore(partial(f, labels=labels), noise, given.repeat(count, 1, 1, 1)))
    rows = {images.split: pixels, "given": to_pixels(given)}
    rows |= {f"result {number + 1}": row for number, row in enumerate(results.split(len(pixels)))}
    save_rows({name: row.cpu().numpy() for name, row in rows.items()}, path)
    originals = pixels.repeat(count, 1, 1, 1)
    facts = {
        "picture": path.name,
        "nfe": len(task.sigmas),
        "sigmas": task.sigmas,
        "rmse": _rmse(results, originals),
        "rmse_given": _rmse(to_pixels(given), pixels),
    }
    return facts if task.operator is None else facts | {"known_error": _known_error(task.operator, results, originals)}


def _rmse(a: Tensor, b: Tensor) -> float:
    """Return the root mean squared difference of uint8 images, in grey levels."""
    return (a.double() - b.double()).square().mean().sqrt().item()


def _known_error(operator: Operator, results: Tensor, originals: Tensor) -> float:
    """Return the largest change of a known coefficient by rounding to pixels, in grey levels."""
    change = operator.forward(from_pixels(results)) - operator.forward(from_pixels(originals))
    return 127.5 * change.abs().masked_fill(operator.unknown, 0).max().item()


@torch.no_grad()
def _interpolate(edit: Edit, spec: ModelSpec, f: Precond, device: torch.device, path: Path) -> dict[str, Any]:
    """Draw one-step samples that interpolate between two noises, one row per pair."""
    sigmas, rows = [spec.noise.sigma_max], {}
    weights = torch.linspace(0, 1, FRAMES, device=device)
    for pair in range(PAIRS):
        indices = (2 * pair, 2 * pair + 1)
        a, b = (ImageNoise(edit.seed, [index], spec.image_shape, device) for index in indices)
        labels = torch.full((FRAMES,), pair % spec.num_classes, device=device) if spec.num_classes else None
        labelled = partial(f, labels=labels)
        drawn = editing.interpolate_samples(labelled, a, b, weights, sigmas, sigma_min=spec.boundary)
        rows["sample {} to {}".format(*indices)] = to_pixels(drawn).cpu().numpy()
    save_rows(rows, path)
    return {"picture": path.name, "nfe": len(sigmas), "sigmas": sigmas}
