"""Stage `teacher`: train the diffusion model that consistency distillation starts from."""

from functools import partial
from pathlib import Path

import numpy as np
import torch

from cm_core.augment import LABEL_DIM
from cm_core.guidance import WeightRange
from cm_core.latents import ToPixels
from cm_core.methods.base import Models
from cm_core.methods.edm import EDM
from cm_core.model import ModelSpec, build_seeded
from cm_core.networks import Network
from cm_core.noise import Noise
from cm_core.precond import Precond
from cm_core.randomness import derive_seed
from cm_core.sampling import ImageNoise, TeacherSampler
from cm_core.training.config import Train
from cm_core.training.optimizers import Optimizer
from cm_core.training.state import TrainState
from cm_core.training.trainer import Trainer
from flows.data.dataset import load_dataset
from flows.monitor import Monitor
from flows.stages.models import GRID_IMAGES, copy_decoder, fixed_labels, pick_device, pixels_of, write_absent
from flows.stages.training import build_weighting, make_batches, place, run_training
from flows.stages.weights import Weights, write_imported


class Teacher(Weights):
    """Training settings of the diffusion model, or a checkpoint in place of a training."""

    method: EDM = EDM()
    """The training method."""
    train: Train = Train(optimizer=Optimizer(kind="adam", learning_rate=1e-3))
    """Length, optimiser, EMAs, precision."""
    grid_sampler: TeacherSampler = TeacherSampler(num_steps=8)
    """Sampler of the grids drawn during training; few steps, because it interrupts the training."""

    def check_guides(self, key: str, weight: float | WeightRange, *, conditional: bool) -> None:
        """Raise ValueError if the recipe's value `key` asks for guidance by a teacher trained with labels alone."""
        if weight == 1:
            return
        given = f"{key}={weight:g}" if isinstance(weight, float) else f"{key}={list(weight)}"
        if not conditional:
            raise ValueError(f"{given} needs labels, and conditional is false")
        if self.method.label_dropout == 0:
            raise ValueError(
                f"{given} needs a teacher that was trained without labels too, and teacher.method.label_dropout is 0; "
                "0.1 is usual"
            )


def teacher(
    seed: int,
    conditional: bool,
    noise: Noise,
    network: Network,
    teacher: Teacher | None,
    prepare_dir: Path,
    out_dir: Path,
    state_dir: Path,
    monitor: Monitor,
) -> None:
    """Train or import the teacher and write its EMA weights; for a recipe without teacher write a marker file."""
    if teacher is None:
        write_absent(out_dir, "teacher", monitor)
        return
    out_dir.mkdir(parents=True, exist_ok=True)
    dataset, device, seed = load_dataset(prepare_dir), pick_device(), derive_seed(seed, "teacher")
    spec = ModelSpec(
        form=teacher.method.form,
        network=network,
        noise=noise,
        **dataset.facts(conditional),
        augment_dim=LABEL_DIM if teacher.method.augment else 0,
    )
    copy_decoder(spec, prepare_dir, out_dir)
    if teacher.is_imported:
        write_imported(teacher, "teacher", spec, out_dir, state_dir, monitor)
        return
    batches = make_batches(dataset, teacher.train, conditional=conditional, seed=seed, device=device)
    model = place(build_seeded(spec, derive_seed(seed, "init"), autocast=teacher.train.autocast), device)
    weighting = build_weighting(teacher.method, seed, device)
    state = TrainState(model, teacher.train, weighting=weighting)
    models = Models(student=model, target=model, weighting=weighting)
    decode = pixels_of(spec, prepare_dir, device)
    run_training(
        Trainer(state, teacher.method, models, batches, noise, seed),
        spec=spec,
        draw=partial(draw_samples, spec=spec, sampler=teacher.grid_sampler, device=device, decode=decode),
        out_dir=out_dir,
        state_dir=state_dir,
        monitor=monitor,
    )


@torch.no_grad()
def draw_samples(
    model: Precond, _step: int, *, spec: ModelSpec, sampler: TeacherSampler, device: torch.device, decode: ToPixels
) -> np.ndarray:
    """Return the images of a training grid, with fixed noise, uint8 [N, H, W, C]."""
    indices = range(GRID_IMAGES)
    noise = ImageNoise(0, indices, spec.image_shape, device)
    return decode(sampler.sample(model, noise, spec.noise, fixed_labels(spec, indices, 0, device))).cpu().numpy()
