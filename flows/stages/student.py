"""Stage `student`: train the consistency model, distilled from the teacher or in isolation."""

import copy
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn

from cm_core.distances import Distance, Lpips
from cm_core.methods.base import Method
from cm_core.methods.cd import CD
from cm_core.methods.cm_inf import CMInf
from cm_core.methods.ct import CT
from cm_core.methods.ect import ECT
from cm_core.methods.ict import ICT
from cm_core.methods.pd import PD
from cm_core.methods.scm import SCM
from cm_core.model import ModelSpec, load_model, load_spec
from cm_core.networks import Network
from cm_core.noise import Noise
from cm_core.params import Params
from cm_core.precond import Precond
from cm_core.randomness import derive_seed
from cm_core.sampling import ImageNoise
from cm_core.tensors import to_pixels
from cm_core.training.config import Train
from cm_core.training.state import TrainState
from cm_core.training.trainer import Trainer
from cm_core.types import Models
from flows.data.dataset import Dataset, load_dataset
from flows.errors import UserError
from flows.monitor import Monitor
from flows.stages.models import (
    ABSENT_FILE,
    GRID_IMAGES,
    few_steps,
    fixed_labels,
    initial_student,
    pick_device,
    write_origin,
)
from flows.stages.training import make_batches, place, run_training
from flows.storage.fetch import fetch

GRID_STEPS = 16  # at most, for progressive distillation: a grid interrupts the training
StudentMethod = CD | CT | ICT | ECT | SCM | PD | CMInf  # choices of student.method


class Student(Params):
    """Training settings of the consistency model."""

    method: StudentMethod = CD()
    """The training method, with its paper's hyperparameters."""
    init_from: Literal["teacher", "random"] | None = None
    """Initial weights; empty: as the method's paper does (ct and ict: random, the others: the teacher's)."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout of the student, the same mask in student and target; empty: the network's (CM: 0, iCT: 0.3)."""
    train: Train = Train()
    """Length, optimiser, EMAs, precision."""

    @property
    def initial_weights(self) -> str:
        """The source of the initial weights, resolved from the method's default."""
        return self.init_from or self.method.starts_from

    @property
    def uses_teacher(self) -> bool:
        """Whether training needs a trained teacher."""
        return self.method.needs_teacher or self.initial_weights == "teacher"


def student(
    seed: int,
    conditional: bool,
    noise: Noise,
    network: Network,
    student: Student,
    prepare_dir: Path,
    teacher_dir: Path,
    out_dir: Path,
    state_dir: Path,
    monitor: Monitor,
) -> None:
    """Train the student and write its EMA weights. Raises UserError if a needed teacher is absent."""
    dataset, device, seed = load_dataset(prepare_dir), pick_device(), derive_seed(seed, "student")
    batches = make_batches(dataset, student.train, conditional=conditional, seed=seed, device=device)
    teacher_spec = _teacher_spec(student, teacher_dir)
    if student.dropout is not None:
        network = network.model_copy(update={"dropout": student.dropout})
    spec = ModelSpec(
        form=student.method.form,
        network=network,
        noise=noise,
        image_shape=dataset.image_shape,
        num_classes=dataset.num_classes if conditional else 0,
        augment_dim=teacher_spec.augment_dim if teacher_spec else 0,
        euler_steps=student.method.euler_steps_at(student.train.num_steps, student.train.num_steps),
    )
    origin: dict[str, Any] = {"init_from": student.initial_weights, "seed": derive_seed(seed, "init")}
    monitor.remark(f"first weights: {origin['init_from']}")
    model = _first_weights(spec, student.train, origin, teacher_dir)
    target = place(copy.deepcopy(model), device) if student.method.keeps_target else None
    model, teacher = place(model, device), _load_teacher(student, teacher_dir, device)
    state = TrainState(
        model,
        student.train,
        target=target,
        teacher=teacher if student.method.replaces_teacher else None,
        weighting=build_weighting(student.method, seed, device),
    )
    models = Models(
        student=model,
        target=target or model,
        teacher=teacher,
        distance=_build_distance(student, dataset, state_dir, device, monitor),
        weighting=state.weighting,
    )
    out_dir.mkdir(parents=True, exist_ok=True)
    run_training(
        Trainer(state, student.method, models, batches, noise, seed),
        spec=spec,
        draw=partial(draw_samples, spec=spec, student=student, device=device),
        out_dir=out_dir,
        state_dir=state_dir,
        monitor=monitor,
    )
    write_origin(out_dir, **origin)


def _teacher_spec(student: Student, teacher_dir: Path) -> ModelSpec | None:
    if not student.uses_teacher:
        return None
    if (teacher_dir / ABSENT_FILE).exists():
        raise UserError(f"student.method.kind={student.method.kind} needs a teacher, and the recipe has teacher: null")
    return load_spec(teacher_dir)


def _load_teacher(student: Student, teacher_dir: Path, device: torch.device) -> Precond | None:
    """Return the teacher if the loss uses one; initial weights alone do not keep it in memory."""
    if not student.method.needs_teacher:
        return None
    return place(load_model(teacher_dir, autocast=student.train.autocast)[1], device)


def build_weighting(method: Method, seed: int, device: torch.device) -> nn.Module | None:
    """Return the learned part of the loss, with random features derived from `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "weighting"))
        weighting = method.build_weighting()
    return None if weighting is None else weighting.to(device)


def _first_weights(spec: ModelSpec, train: Train, origin: dict[str, Any], teacher_dir: Path) -> Precond:
    model = initial_student(spec, **origin, teacher_dir=teacher_dir)
    model.autocast = train.autocast
    return model


def _build_distance(
    student: Student, dataset: Dataset, state_dir: Path, device: torch.device, monitor: Monitor
) -> Distance | None:
    distance = getattr(student.method, "distance", None)
    if distance is None:
        return None
    if not isinstance(distance, Lpips):
        return distance.build(dataset.image_shape)
    vgg16 = None
    if distance.weights is not None:
        vgg16 = fetch(distance.weights, state_dir / "weights", sha256=distance.sha256, monitor=monitor)
    try:
        return distance.build(dataset.image_shape, vgg16).to(device)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"student.method.distance: {error}") from error


@torch.no_grad()
def draw_samples(model: Precond, step: int, *, spec: ModelSpec, student: Student, device: torch.device) -> np.ndarray:
    """Return one-step samples for a training grid, with fixed noise, uint8 [N, H, W, C].

    A student of form euler takes its current number of steps, GRID_STEPS at most.
    """
    steps = student.method.euler_steps_at(step, student.train.num_steps)
    spec, indices = spec.model_copy(update={"euler_steps": min(steps, GRID_STEPS)}), range(GRID_IMAGES)
    f = partial(model, labels=fixed_labels(spec, indices, device))
    noise = ImageNoise(0, indices, spec.image_shape, device)
    return to_pixels(few_steps(spec, f, noise)).cpu().numpy()
