"""Shared code of the stages with networks: the device, absent models, initial weights, labels of samples."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cm_core.latents import ToPixels, find_decoder, load_decoder
from cm_core.model import WEIGHTS_FILE, ModelSpec, build_seeded, load_spec, load_weights
from cm_core.networks.guided import LAYER
from cm_core.parallel import ranks
from cm_core.precond import Precond
from cm_core.randomness import make_generator
from cm_core.sampling import ImageNoise, euler_steps, flow_map_steps, multistep
from cm_core.solvers import Denoiser
from cm_core.tensors import to_pixels
from flows.data.dataset import Dataset
from flows.errors import UserError
from flows.monitor import Monitor

ABSENT_FILE = "none.json"  # marks the folder of a teacher or base that the recipe has not
EMAS_FILE = "emas.json"  # the rules of a training's averages, in their order
ORIGIN_FILE = "origin.json"  # the source of a model: of its initial weights, or the checkpoint it was read from
GRID_IMAGES = 64  # images per training grid


def pick_device() -> torch.device:
    """Return the GPU when there is one, with cuDNN autotuning, else the CPU."""
    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark = True
        return torch.device("cuda")
    return torch.device("cpu")


def to_device(model: Precond, device: torch.device) -> Precond:
    """Move a model to `device`, in the memory format that its convolutions prefer there."""
    model = model.to(device)
    if device.type == "cuda":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not among torch's overloads
    return model


def pixels_of(spec: ModelSpec, folder: Path, device: torch.device) -> ToPixels:
    """Return what makes images, uint8 [B, H, W, C], of a model's output; of latents by the decoder in its folder.

    Raises UserError if a model of latents has no decoder there, another one, or lacks the package diffusers.
    """
    if spec.latents is None:
        return to_pixels
    try:
        return load_decoder(folder, spec.latents, device)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from error


def copy_decoder(spec: ModelSpec, source: Path, folder: Path) -> None:
    """Put the decoder of `source` beside a model of latents, which can then be moved; raise UserError without one."""
    if spec.latents is None or not ranks.is_main():
        return
    try:
        decoder = find_decoder(source)
    except FileNotFoundError as error:
        raise UserError(str(error)) from error
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(decoder, folder / decoder.name)


def write_origin(out_dir: Path, *, method: str, init_from: str, seed: int) -> None:
    """Record the student's method, and the source of its initial weights for `initial_student`."""
    origin = {"method": method, "init_from": init_from, "seed": seed}
    (out_dir / ORIGIN_FILE).write_text(json.dumps(origin, indent=2) + "\n")


def write_absent(out_dir: Path, role: str, monitor: Monitor) -> None:
    """Mark the artifact of a teacher or base that the recipe has not."""
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / ABSENT_FILE).write_text(json.dumps({role: None}) + "\n")
    monitor.remark(f"this recipe has no {role}")


def present(**folders: Path) -> dict[str, Path]:
    """Return those of the folders {role: artifact} that hold a model, by the recipe."""
    return {role: folder for role, folder in folders.items() if not (folder / ABSENT_FILE).exists()}


def initial_student(spec: ModelSpec, *, init_from: str, seed: int, earlier: Mapping[str, Path]) -> Precond:
    """Return the student before training, on the CPU: weights of an `earlier` model, or random ones from `seed`.

    A layer of guidance weights that the earlier model lacks starts at zero: the student computes the same function.
    """
    model = build_seeded(spec, seed)
    if init_from != "random":
        lacks = load_spec(earlier[init_from]).guidance_range is None
        added = frozenset(name for name in model.state_dict() if lacks and LAYER in name)
        load_weights(model, earlier[init_from] / WEIGHTS_FILE, added=added)
    return model


def few_step_sigmas(spec: ModelSpec, mid_sigmas: Sequence[float] = ()) -> list[float]:
    """Return the student's noise levels: sigma_max and the given ones, or those that its training fixed."""
    if spec.form == "generator":
        return [spec.generator_sigma or spec.noise.sigma_max]
    if spec.form == "euler":
        return spec.noise.grid(spec.euler_steps + 1)[:-1].tolist()
    return [spec.noise.sigma_max, *mid_sigmas]


def few_steps(spec: ModelSpec, f: Denoiser, noise: ImageNoise, mid_sigmas: Sequence[float] = ()) -> Tensor:
    """Return a student's images in -1..1, or latents, [B, C, H, W]; one network call for each of `few_step_sigmas`."""
    sigmas, clip = few_step_sigmas(spec, mid_sigmas), spec.latents is None
    if spec.form == "euler":
        return euler_steps(f, noise, [*sigmas, spec.noise.sigma_min], clip=clip)
    if spec.form == "average_velocity":
        return flow_map_steps(f, noise, sigmas, clip=clip)
    return multistep(f, noise, sigmas, sigma_min=spec.boundary, clip=clip)


def ema_suffix(ema: int) -> str:
    """Return the end of a row's name for an EMA by its place; none for the first."""
    return f"_ema{ema}" if ema else ""


def fixed_labels(
    spec: ModelSpec, indices: range, seed: int, device: torch.device, counts: Sequence[int] | np.ndarray | None = None
) -> torch.Tensor | None:
    """Return class labels for sample indices; None for unconditional models.

    `counts` are the images of each class in the data: labels are as frequent as those, without them all alike. Each run
    of num_classes indices holds evenly spaced quantiles of the classes, in an order drawn from (seed, run), so that
    neither a regular nor a random subset of the images prefers some classes. The quantiles of a run lie between those
    of earlier runs: of n images, each class gets its share of n but for a few.
    """
    number = spec.num_classes
    if number == 0:
        return None
    shares = np.ones(number, int) if counts is None else np.asarray(counts)
    edges = np.cumsum(shares) / shares.sum()
    labels = []
    for run in range(indices.start // number, -(-indices.stop // number)):
        places = (np.arange(number) + _between(run)) / number
        order = torch.randperm(number, generator=make_generator("cpu", seed, "labels", run))
        labels.append(torch.from_numpy(np.searchsorted(edges, places, side="right"))[order])
    return torch.cat(labels)[indices.start % number :][: len(indices)].to(device)


def _between(run: int) -> float:
    """Return term `run` of van der Corput's sequence from 1/2 on: 1/2, 1/4, 3/4, 1/8, 5/8, ..."""
    return float(int(f"{run + 1:b}"[::-1], 2)) / 2 ** (run + 1).bit_length()


def class_counts(dataset: Dataset) -> np.ndarray:
    """Return the number of training images of each class, int64 [num_classes]."""
    labels = dataset.train_labels
    return np.bincount(labels[labels >= 0], minlength=dataset.num_classes)
