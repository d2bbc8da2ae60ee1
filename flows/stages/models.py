"""Shared code of the stages with networks: the device, the student's initial weights, labels of samples."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cm_core.model import ModelSpec, build_seeded, load_weights
from cm_core.precond import Precond
from cm_core.sampling import ImageNoise, euler_steps, multistep
from cm_core.solvers import Denoiser

ABSENT_FILE = "none.json"  # marks the teacher's folder of a recipe without teacher
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


def write_origin(out_dir: Path, *, init_from: str, seed: int) -> None:
    """Record the source of the student's initial weights, for `initial_student`."""
    (out_dir / "origin.json").write_text(json.dumps({"init_from": init_from, "seed": seed}, indent=2) + "\n")


def initial_student(spec: ModelSpec, *, init_from: str, seed: int, teacher_dir: Path) -> Precond:
    """Return the student before training, on the CPU: the teacher's weights, or random ones from `seed`."""
    model = build_seeded(spec, seed)
    if init_from == "teacher":
        load_weights(model, teacher_dir / "ema.safetensors")
    return model


def few_step_sigmas(spec: ModelSpec, mid_sigmas: Sequence[float] = ()) -> list[float]:
    """Return the student's noise levels: sigma_max and the given ones, or those of PD's Euler steps."""
    if spec.form == "euler":
        return spec.noise.grid(spec.euler_steps + 1)[:-1].tolist()
    return [spec.noise.sigma_max, *mid_sigmas]


def few_steps(spec: ModelSpec, f: Denoiser, noise: ImageNoise, mid_sigmas: Sequence[float] = ()) -> Tensor:
    """Return a student's images, [B, C, H, W] in -1..1, one network call for each of `few_step_sigmas`."""
    sigmas = few_step_sigmas(spec, mid_sigmas)
    if spec.form == "euler":
        return euler_steps(f, noise, [*sigmas, spec.noise.sigma_min])
    return multistep(f, noise, sigmas, sigma_min=spec.boundary)


def fixed_labels(spec: ModelSpec, indices: range, device: torch.device) -> torch.Tensor | None:
    """Return class labels for sample indices, balanced over the classes; None for unconditional models."""
    if spec.num_classes == 0:
        return None
    return torch.tensor(indices, device=device) % spec.num_classes
