"""Stage `student`: train the consistency model, distilled from the teacher or in isolation."""

import copy
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from cm_core.augment import LABEL_DIM
from cm_core.distances import Distance, Lpips
from cm_core.latents import ToPixels
from cm_core.methods.base import Method, Models
from cm_core.methods.cd import CD
from cm_core.methods.cm_inf import CMInf
from cm_core.methods.ct import CT
from cm_core.methods.dmd import DMD
from cm_core.methods.ect import ECT
from cm_core.methods.ict import ICT
from cm_core.methods.meanflow import MeanFlow
from cm_core.methods.pd import PD
from cm_core.methods.scm import SCM
from cm_core.model import ModelSpec, load_model, load_spec
from cm_core.networks import Network
from cm_core.noise import Noise
from cm_core.precond import Precond
from cm_core.randomness import derive_seed, seeded
from cm_core.sampling import ImageNoise
from cm_core.training.config import Train
from cm_core.training.state import TrainState
from cm_core.training.trainer import Trainer
from flows.data.dataset import Dataset, load_dataset
from flows.errors import UserError
from flows.monitor import Monitor
from flows.stages.models import (
    ABSENT_FILE,
    GRID_IMAGES,
    class_counts,
    copy_decoder,
    few_step_sigmas,
    few_steps,
    fixed_labels,
    initial_student,
    pick_device,
    pixels_of,
    to_device,
    write_origin,
)
from flows.stages.training import build_weighting, make_batches, place, run_training
from flows.stages.weights import Weights, write_imported
from flows.storage.fetch import fetch

SET_BATCH = 250  # images at a time; does not affect them
GRID_STEPS = 16  # at most, for progressive distillation: a grid interrupts the training
StudentMethod = CD | CT | ICT | ECT | SCM | PD | CMInf | MeanFlow | DMD  # choices of student.method


class Student(Weights):
    """Training settings of the consistency model, or a checkpoint in place of a training."""

    method: StudentMethod = CD()
    """The training method, with its paper's hyperparameters."""
    init_from: Literal["teacher", "random"] | None = None
    """Initial weights; empty: as the method's paper does (ct and ict: random, the others: the teacher's)."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout of the student, the same mask in student and target; empty: the network's (CM: 0, iCT: 0.3)."""
    dropout_resolution: int | None = Field(None, ge=1)
    """Largest image height, in pixels, at which the student drops; empty: the network's (ECT, sCM: 16)."""
    evaluate_every: int = Field(0, ge=0)
    """Steps between small sets of images of each EMA, one for each entry of evaluate_mid_sigmas, from which the
    evaluation makes the curve of FID over training; 0: none. A multiple of train.log_every. The training waits while
    they are drawn, and they stay in its artifact: 5,000 images of 32x32 are 15 MB."""
    evaluate_images: int = Field(5_000, ge=2)
    """Images of such a set; their noise is not that of the final evaluation."""
    evaluate_mid_sigmas: tuple[tuple[float, ...], ...] = ((), (0.821,))
    """Their noise levels after sigma_max, as in sample.mid_sigmas; none is one network call."""
    train: Train = Train()
    """Length, optimiser, EMAs, precision."""

    @model_validator(mode="after")
    def _possible(self) -> "Student":
        if self.method.form == "average_velocity" and self.initial_weights == "teacher":
            raise ValueError(f"init_from=teacher: kind={self.method.kind} trains a network of two times from scratch")
        if self.evaluate_every % self.train.log_every:
            raise ValueError(
                f"evaluate_every={self.evaluate_every} must be a multiple of train.log_every={self.train.log_every}"
            )
        if self.train.compile and self.method.cycle > 1:
            raise ValueError(
                f"train.compile=true: method.kind={self.method.kind} trains two networks in turn, which is not tried "
                "with it; set it to false"
            )
        return self

    def network(self, shared: Network) -> Network:
        """Return the student's network: the teacher's but for its dropout."""
        own = {"dropout": self.dropout, "dropout_resolution": self.dropout_resolution}
        return shared.model_copy(update={name: value for name, value in own.items() if value is not None})

    def sampling(self) -> dict[str, Any]:
        """Return what the method fixes of the student's sampling, as values of its ModelSpec."""
        steps = self.method.euler_steps_at(self.train.num_steps, self.train.num_steps)
        return {"euler_steps": steps, "generator_sigma": getattr(self.method, "generator_sigma", None)}

    @property
    def initial_weights(self) -> str:
        """The source of the initial weights, resolved from the method's default."""
        return self.init_from or self.method.starts_from

    @property
    def uses_teacher(self) -> bool:
        """Whether there is a training that needs a teacher."""
        return not self.is_imported and (self.method.needs_teacher or self.initial_weights == "teacher")


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
    """Train or import the student and write its EMA weights. Raises UserError if a needed teacher is absent."""
    dataset, device, seed = load_dataset(prepare_dir), pick_device(), derive_seed(seed, "student")
    teacher_spec = _teacher_spec(student, teacher_dir)
    spec = ModelSpec(
        form=student.method.form,
        network=student.network(network),
        noise=noise,
        **dataset.facts(conditional),
        augment_dim=_augment_dim(student.method, teacher_spec),
        noise_scale=teacher_spec.noise_scale if teacher_spec else 1.0,
        **student.sampling(),
    )
    copy_decoder(spec, prepare_dir, out_dir)
    if student.is_imported:
        write_imported(student, "student", spec, out_dir, state_dir, monitor)
        return
    batches = make_batches(dataset, student.train, conditional=conditional, seed=seed, device=device)
    origin: dict[str, Any] = {"init_from": student.initial_weights, "seed": derive_seed(seed, "init")}
    monitor.remark(f"first weights: {origin['init_from']}")
    model = _first_weights(spec, student.train, origin, teacher_dir)
    target = place(copy.deepcopy(model), device) if student.method.keeps_target else None
    model, teacher = place(model, device), _load_teacher(student, teacher_dir, device)
    score, discriminator = _build_critic(spec, student, origin, teacher, teacher_dir)
    state = TrainState(
        model,
        student.train,
        target=target,
        teacher=teacher if student.method.replaces_teacher else None,
        weighting=build_weighting(student.method, seed, device),
        score=score,
        discriminator=discriminator,
        cycle=student.method.cycle,
    )
    distance = _build_distance(student, dataset, state_dir, device, monitor)
    models = Models(model, target or model, teacher, distance, state.weighting, score, discriminator)
    out_dir.mkdir(parents=True, exist_ok=True)
    draw = partial(draw_samples, spec=spec, student=student, device=device, decode=pixels_of(spec, prepare_dir, device))
    run_training(
        Trainer(state, student.method, models, batches, noise, seed),
        spec=spec,
        draw=draw,
        out_dir=out_dir,
        state_dir=state_dir,
        monitor=monitor,
        draw_sets=partial(draw_sets, **draw.keywords, counts=class_counts(dataset)),
        sets_every=student.evaluate_every,
    )
    write_origin(out_dir, method=student.method.kind, **origin)


def _teacher_spec(student: Student, teacher_dir: Path) -> ModelSpec | None:
    if not student.uses_teacher:
        return None
    if (teacher_dir / ABSENT_FILE).exists():
        raise UserError(f"student.method.kind={student.method.kind} needs a teacher, and the recipe has teacher: null")
    return load_spec(teacher_dir)


def _augment_dim(method: Method, teacher_spec: ModelSpec | None) -> int:
    """Return the length of the augmentation vector: of the method's own augmentation, or the teacher's."""
    if getattr(method, "augment", None):
        return LABEL_DIM
    return teacher_spec.augment_dim if teacher_spec else 0


def _load_teacher(student: Student, teacher_dir: Path, device: torch.device) -> Precond | None:
    """Return the teacher if the loss uses one; initial weights alone do not keep it in memory."""
    if not student.method.needs_teacher:
        return None
    return place(load_model(teacher_dir, autocast=student.train.autocast)[1], device)


def _first_weights(spec: ModelSpec, train: Train, origin: dict[str, Any], teacher_dir: Path) -> Precond:
    model = initial_student(spec, **origin, teacher_dir=teacher_dir)
    model.autocast = train.autocast
    return model


def _build_critic(
    spec: ModelSpec, student: Student, origin: dict[str, Any], teacher: Precond | None, teacher_dir: Path
) -> tuple[Precond | None, Precond | None]:
    """Return the score, with the teacher's weights, and the discriminator, if the method trains them."""
    if student.method.cycle == 1 or teacher is None:
        return None, None
    device = next(teacher.parameters()).device
    denoiser = spec.model_copy(update={"form": "denoiser"})
    score = place(_first_weights(denoiser, student.train, origin | {"init_from": "teacher"}, teacher_dir), device)
    return score, build_discriminator(student.method, teacher, spec.image_shape, origin["seed"])


def build_discriminator(method: Method, teacher: Precond, image_shape: tuple[int, ...], seed: int) -> Precond | None:
    """Return the critic's discriminator, its weights derived from `seed` alone."""
    device = next(teacher.parameters()).device
    with seeded(derive_seed(seed, "discriminator")):
        discriminator = method.build_discriminator(teacher, image_shape)
    return None if discriminator is None else to_device(discriminator, device)


def _build_distance(
    student: Student, dataset: Dataset, state_dir: Path, device: torch.device, monitor: Monitor
) -> Distance | None:
    distance = getattr(student.method, "distance", None)
    if distance is None:
        return None
    if not isinstance(distance, Lpips):
        return distance.build(dataset.input_shape)
    vgg16 = None
    if distance.weights is not None:
        vgg16 = fetch(distance.weights, state_dir / "weights", sha256=distance.sha256, monitor=monitor)
    try:
        return distance.build(dataset.input_shape, vgg16).to(device)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"student.method.distance: {error}") from error


@torch.no_grad()
def draw_samples(
    model: Precond, step: int, *, spec: ModelSpec, student: Student, device: torch.device, decode: ToPixels
) -> np.ndarray:
    """Return one-step samples for a training grid, with fixed noise, uint8 [N, H, W, C].

    A student of form euler takes its current number of steps, GRID_STEPS at most.
    """
    spec, indices = _spec_at(step, spec, student), range(GRID_IMAGES)
    f = partial(model, labels=fixed_labels(spec, indices, 0, device))
    noise = ImageNoise(0, indices, spec.image_shape, device)
    return decode(few_steps(spec, f, noise)).cpu().numpy()


def _spec_at(step: int, spec: ModelSpec, student: Student) -> ModelSpec:
    steps = student.method.euler_steps_at(step, student.train.num_steps)
    return spec.model_copy(update={"euler_steps": min(steps, GRID_STEPS)})


@torch.no_grad()
def draw_sets(
    model: Precond,
    step: int,
    *,
    spec: ModelSpec,
    student: Student,
    device: torch.device,
    decode: ToPixels,
    counts: np.ndarray,
) -> dict[str, np.ndarray]:
    """Return {nfe_N: images, uint8 [N, H, W, C]} for the curve of FID over training, always from the same noise.

    Classes are as frequent as among the training images, `counts` of each.
    """
    spec, seed, found = _spec_at(step, spec, student), derive_seed(0, "during training"), {}
    for mid in [()] if spec.fixed_steps else student.evaluate_mid_sigmas:
        batches = []
        for start in range(0, student.evaluate_images, SET_BATCH):
            indices = range(start, min(start + SET_BATCH, student.evaluate_images))
            f = partial(model, labels=fixed_labels(spec, indices, seed, device, counts))
            images = few_steps(spec, f, ImageNoise(seed, indices, spec.image_shape, device), mid)
            batches.append(decode(images).cpu().numpy())
        found[f"nfe_{len(few_step_sigmas(spec, mid))}"] = np.concatenate(batches)
    return found
