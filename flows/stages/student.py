"""Stage `student`: train the consistency model, distilled or in isolation, from a base or not; `base` trains as it."""

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from cm_core.augment import LABEL_DIM
from cm_core.distances import Distance, Lpips
from cm_core.guidance import WeightRange
from cm_core.latents import ToPixels
from cm_core.methods.base import Method, Models
from cm_core.methods.cd import CD
from cm_core.methods.cm_inf import CMInf
from cm_core.methods.cmt import CMT
from cm_core.methods.ct import CT
from cm_core.methods.dmd import DMD
from cm_core.methods.ect import ECT
from cm_core.methods.ict import ICT
from cm_core.methods.meanflow import MeanFlow
from cm_core.methods.pd import PD
from cm_core.methods.scm import SCM
from cm_core.methods.tcm import TCM
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
    GRID_IMAGES,
    class_counts,
    copy_decoder,
    few_step_sigmas,
    few_steps,
    fixed_labels,
    initial_student,
    pick_device,
    pixels_of,
    present,
    to_device,
    write_origin,
)
from flows.stages.training import build_weighting, make_batches, place, run_training
from flows.stages.weights import Weights, write_imported
from flows.storage.fetch import fetch

SET_BATCH = 250  # images at a time; does not affect them
GRID_STEPS = 16  # at most, for progressive distillation: a grid interrupts the training
StudentMethod = CD | CT | ICT | ECT | SCM | PD | CMInf | MeanFlow | DMD | CMT | TCM  # choices of student.method


class Student(Weights):
    """Training settings of the consistency model, or of its base, or a checkpoint in place of a training."""

    method: StudentMethod = CD()
    """The training method, with its paper's hyperparameters."""
    init_from: Literal["teacher", "random"] | None = None
    """Initial weights, where the recipe has no base, which is then the start; empty: as the method's paper does (ct and
    ict: random, the others: the teacher's)."""
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
        if self.method.form == "average_velocity" and self.init_from == "teacher":
            raise ValueError(f"init_from=teacher: kind={self.method.kind} trains a network of two times from scratch")
        if self.evaluate_every % self.train.log_every:
            raise ValueError(
                f"evaluate_every={self.evaluate_every} must be a multiple of train.log_every={self.train.log_every}"
            )
        if self.train.batch_size % (multiple := self.method.batch_multiple):
            raise ValueError(
                f"train.batch_size={self.train.batch_size} must be a multiple of method.num_steps={multiple}: the "
                "points of a trajectory are rows of one batch"
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
        fixed = {
            "euler_steps": steps,
            "generator_sigma": getattr(self.method, "generator_sigma", None),
            "truncated_at": getattr(self.method, "split", None),
        }
        if self.guidance_range is None:
            return fixed
        return fixed | {"guidance_range": self.guidance_range, "guidance": getattr(self.method, "guidance", None)}

    @property
    def guidance_range(self) -> WeightRange | None:
        """The range of the weights of guidance that the student takes as an input; None: it takes none."""
        return getattr(self.method, "guidance_range", None)

    def initial_weights(self, *, has_base: bool) -> str:
        """Return the source of the initial weights: the base if there is one, else as asked or by the method."""
        return "base" if has_base else self.init_from or self.method.starts_from

    def uses_teacher(self, *, has_base: bool) -> bool:
        """Whether there is a training that needs a teacher."""
        starts = self.initial_weights(has_base=has_base)
        return not self.is_imported and (self.method.needs_teacher or starts == "teacher")

    @property
    def needs_base(self) -> bool:
        """Whether there is a training that needs a base."""
        return not self.is_imported and self.method.needs_base


def student(
    seed: int,
    conditional: bool,
    noise: Noise,
    network: Network,
    student: Student,
    prepare_dir: Path,
    teacher_dir: Path,
    base_dir: Path,
    out_dir: Path,
    state_dir: Path,
    monitor: Monitor,
) -> None:
    """Train or import the student and write its EMA weights. Raises UserError if a needed teacher or base is absent."""
    shared, earlier = (seed, conditional, noise, network), present(teacher=teacher_dir, base=base_dir)
    train_student("student", *shared, student, prepare_dir, earlier, out_dir, state_dir, monitor)


def train_student(
    role: Literal["student", "base"],
    seed: int,
    conditional: bool,
    noise: Noise,
    network: Network,
    student: Student,
    prepare_dir: Path,
    earlier: Mapping[str, Path],
    out_dir: Path,
    state_dir: Path,
    monitor: Monitor,
) -> None:
    """Train or import the model of a section and write its EMA weights.

    `earlier` are the models at hand, {teacher or base: folder}. Raises UserError if a needed one is absent.
    """
    dataset, device, seed = load_dataset(prepare_dir), pick_device(), derive_seed(seed, role)
    starts_from = student.initial_weights(has_base="base" in earlier)
    spec = _spec(student, noise, network, dataset, conditional, _spec_of_start(role, student, starts_from, earlier))
    copy_decoder(spec, prepare_dir, out_dir)
    if student.is_imported:
        write_imported(student, role, spec, out_dir, state_dir, monitor)
        return
    options: dict[str, Any] = {"conditional": conditional, "guidance_range": student.guidance_range}
    batches = make_batches(dataset, student.train, seed=seed, device=device, **options)
    origin: dict[str, Any] = {"init_from": starts_from, "seed": derive_seed(seed, "init")}
    monitor.remark(f"initial weights: {origin['init_from']}")
    model = _first_weights(spec, student.train, origin, earlier)
    target = place(copy.deepcopy(model), device) if student.method.keeps_target else None
    base = place(copy.deepcopy(model).requires_grad_(False), device) if student.method.needs_base else None
    model, teacher = place(model, device), _load_teacher(spec, student, origin, earlier, device)
    score, discriminator = _build_critic(spec, student, origin, teacher, earlier)
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
    distance = _build_distance(role, student, dataset, state_dir, device, monitor)
    models = Models(model, target or model, teacher, distance, state.weighting, score, discriminator, base)
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


def _spec(
    student: Student, noise: Noise, network: Network, dataset: Dataset, conditional: bool, start: ModelSpec | None
) -> ModelSpec:
    """Return the spec of the model, by the conventions of the one that it starts from."""
    return ModelSpec(
        form=student.method.form,
        network=student.network(network),
        noise=noise,
        **dataset.facts(conditional),
        augment_dim=_augment_dim(student.method, start),
        noise_scale=start.noise_scale if start else 1.0,
        **student.sampling(),
    )


def _spec_of_start(role: str, student: Student, starts_from: str, earlier: Mapping[str, Path]) -> ModelSpec | None:
    """Return the spec of the model whose conventions hold: the start, else the teacher; None without either."""
    for needed, name in ((student.uses_teacher(has_base="base" in earlier), "teacher"), (student.needs_base, "base")):
        if needed and name not in earlier:
            kind = student.method.kind
            raise UserError(f"{role}.method.kind={kind} needs a {name}, and the recipe has {name}: null")
    if student.is_imported:
        return None
    if starts_from != "random":
        return load_spec(earlier[starts_from])
    return load_spec(earlier["teacher"]) if student.method.needs_teacher else None


def _augment_dim(method: Method, start: ModelSpec | None) -> int:
    """Return the length of the augmentation vector: of the method's own augmentation, or the start's."""
    if getattr(method, "augment", None):
        return LABEL_DIM
    return start.augment_dim if start else 0


def _load_teacher(
    spec: ModelSpec, student: Student, origin: dict[str, Any], earlier: Mapping[str, Path], device: torch.device
) -> Precond | None:
    """Return the teacher if the loss uses one; initial weights alone do not keep it in memory."""
    if not student.method.needs_teacher:
        return None
    if student.method.replaces_teacher and student.guidance_range is not None:  # its successors take weights
        return place(_denoiser(spec, student, origin, earlier).eval().requires_grad_(False), device)
    return place(load_model(earlier["teacher"], autocast=student.train.autocast)[1], device)


def _denoiser(spec: ModelSpec, student: Student, origin: dict[str, Any], earlier: Mapping[str, Path]) -> Precond:
    """Return a denoiser with the teacher's weights and the student's inputs."""
    denoiser = spec.model_copy(update={"form": "denoiser"})
    return _first_weights(denoiser, student.train, origin | {"init_from": "teacher"}, earlier)


def _first_weights(spec: ModelSpec, train: Train, origin: dict[str, Any], earlier: Mapping[str, Path]) -> Precond:
    model = initial_student(spec, **origin, earlier=earlier)
    model.autocast = train.autocast
    return model


def _build_critic(
    spec: ModelSpec, student: Student, origin: dict[str, Any], teacher: Precond | None, earlier: Mapping[str, Path]
) -> tuple[Precond | None, Precond | None]:
    """Return the score, with the teacher's weights, and the discriminator, if the method trains them."""
    if student.method.cycle == 1 or teacher is None:
        return None, None
    device = next(teacher.parameters()).device
    score = place(_denoiser(spec, student, origin, earlier), device)
    return score, build_discriminator(student.method, teacher, spec.image_shape, origin["seed"])


def build_discriminator(method: Method, teacher: Precond, image_shape: tuple[int, ...], seed: int) -> Precond | None:
    """Return the critic's discriminator, its weights derived from `seed` alone."""
    device = next(teacher.parameters()).device
    with seeded(derive_seed(seed, "discriminator")):
        discriminator = method.build_discriminator(teacher, image_shape)
    return None if discriminator is None else to_device(discriminator, device)


def _build_distance(
    role: str, student: Student, dataset: Dataset, state_dir: Path, device: torch.device, monitor: Monitor
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
        raise UserError(f"{role}.method.distance: {error}") from error


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
