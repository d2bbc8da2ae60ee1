"""Stage `sample`: images from the student at one and more steps, the untrained student and the teacher."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from cm_core.guidance import WeightRange
from cm_core.latents import ToPixels
from cm_core.model import ModelSpec, load_model, load_spec
from cm_core.parallel import ranks
from cm_core.parallel.graphs import with_cuda_graphs
from cm_core.params import Params
from cm_core.precision import Precision, autocast_dtype, set_float32_products
from cm_core.precond import Precond
from cm_core.sampling import ImageNoise, TeacherSampler
from cm_core.tensors import to_inputs, to_pixels
from cm_core.training.posthoc import FOLDER, WIDEST, rebuild
from flows.data.dataset import Dataset, load_dataset
from flows.data.new_array import new_array
from flows.errors import UserError
from flows.monitor import Monitor
from flows.reports.figures import save_grid, save_rows
from flows.stages.models import (
    ORIGIN_FILE,
    class_counts,
    ema_suffix,
    few_step_sigmas,
    few_steps,
    fixed_labels,
    initial_student,
    pick_device,
    pixels_of,
    present,
    to_device,
)
from flows.stages.weak_teacher import WeakTeacher

GRID_IMAGES = 100
STRIP_SIGMAS = (0.2, 0.5, 1.0, 2.0, 5.0, 20.0, 80.0)  # from hardly visible to pure noise
STRIP_IMAGES = 8
STRIPS_FILE = "strips.png"
LABELS = {
    "data": "every class as often as among the training images, in a random order",
    "uniform": "every class equally often, in a random order",
}
LABELS_FILE = "labels.npy"  # int64 [N], the classes of every row's images, of a conditional model
ROUNDING = "uint8, x * 127.5 + 128, clipped"


class Sample(Params):
    """The images drawn for the evaluation."""

    num_images: int = Field(50_000, ge=1)
    """Images per row."""
    labels: Literal["data", "uniform"] = "data"
    """Classes of the images: as often as among the training images, or all equally often."""
    batch_size: int = Field(500, ge=1)
    """Images per batch; does not affect the images."""
    seed: int = Field(0, ge=0)
    """Image i is drawn from (seed, i), whatever the batch size."""
    mid_sigmas: tuple[tuple[float, ...], ...] = ((), (0.821,))
    """One row per entry: the noise levels after sigma_max; none is one-step sampling (iCT: 0.821 on CIFAR-10)."""
    emas: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(None, min_length=1)
    """EMAs of the weights that get rows, by their place in train.emas from 0; empty: every one. Names of rows of an EMA
    after the first end in _ema1, _ema2, ..."""
    widths: tuple[Annotated[float, Field(gt=0, lt=WIDEST)], ...] = ()
    """Relative widths of averages of the student's weights that get rows, too, rebuilt from student.train.snapshots;
    the report has a curve of FID over width. Names of their rows end in _width_0.08 and the like."""
    guidance: tuple[Annotated[float, Field(ge=0)], ...] = ()
    """Weights of guidance at which a student that takes one (student.method.guidance_range) gets rows beside those at
    its own; the report has a curve of FID over the weight. Names of their rows end in _guidance_3 and the like."""
    teacher_sampler: TeacherSampler = TeacherSampler()
    """Sampler of the teacher's row, if the recipe has a teacher."""
    weak_teacher: WeakTeacher = WeakTeacher()
    """A weaker teacher that guides it in place of the labels (autoguidance, 2406.02507)."""
    teacher_images: int | None = Field(None, ge=0)
    """Images of the teacher's row; empty: as many as the others, 0: no such row. FID grows as images get fewer: a row
    of another number has it in its name and is no point of the same curve."""
    precision: Precision = "fp32"
    """Arithmetic of the network's body."""

    @model_validator(mode="after")
    def _guides(self) -> "Sample":
        if self.weak_teacher.weights and self.teacher_sampler.guidance == 1:
            raise ValueError("weak_teacher has no effect with teacher_sampler.guidance=1, which is none")
        return self

    def check_guidance(self, allowed: WeightRange | None, own: float) -> None:
        """Raise ValueError unless `guidance` names weights that a student takes, each once and its own not again."""
        given = f"sample.guidance={list(self.guidance)}"
        if self.guidance and allowed is None:
            raise ValueError(f"{given} needs a student that takes such a weight: set student.method.guidance_range")
        if allowed is not None and any(not allowed[0] <= weight <= allowed[1] for weight in self.guidance):
            raise ValueError(f"{given} must lie in student.method.guidance_range={list(allowed)}")
        if len({*self.guidance, own}) <= len(self.guidance):
            raise ValueError(
                f"{given}: a weight is named twice, or is student.method.guidance={own:g}, which has rows anyway"
            )

    @property
    def label_guidance(self) -> float:
        """The teacher's guidance by labels, which a weaker teacher replaces; 1: none."""
        return 1.0 if self.weak_teacher.weights else self.teacher_sampler.guidance


@dataclass(frozen=True)
class Row:
    """One set of images and its settings; `draw` maps noise and labels to images."""

    name: str
    model: str
    ema: int
    width: float | None
    guidance: float | None  # of rows beside those at the model's own weight
    nfe: int
    sigmas: list[float]
    num_images: int
    sampler: dict[str, Any]  # its settings
    draw: Callable[[ImageNoise, Tensor | None], Tensor]


def sample(
    sample: Sample,
    prepare_dir: Path,
    teacher_dir: Path,
    base_dir: Path,
    student_dir: Path,
    out_dir: Path,
    monitor: Monitor,
) -> None:
    """Draw every row of images; write arrays, grids and denoising strips, and samples.json last."""
    device = pick_device()
    autocast = autocast_dtype(sample.precision)
    set_float32_products(sample.precision)
    spec, earlier = load_spec(student_dir), present(teacher=teacher_dir, base=base_dir)
    _check_levels(sample, spec)
    chosen = _chosen_emas(sample, student_dir).items()
    students = {ema: _load(folder, device, autocast)[1] for ema, folder in chosen}
    dataset, decode = load_dataset(prepare_dir), pixels_of(spec, student_dir, device)
    counts = class_counts(dataset) if spec.num_classes and sample.labels == "data" else None
    rows = [row for ema, f in students.items() for row in _student_rows(sample, spec, f, ema)]
    for width in sample.widths:
        f = _place(load_rebuilt(student_dir, width, autocast=autocast)[1], device)
        rows += _student_rows(sample, spec, f, 0, width)
    if "init_from" in (origin := json.loads((student_dir / ORIGIN_FILE).read_text())):  # trained here
        untrained = _untrained(spec, origin, earlier, device, autocast)
        rows.append(_student_row("untrained", "untrained", sample, spec, untrained))
    if "teacher" in earlier and sample.teacher_images != 0:
        weak = sample.weak_teacher.load(load_spec(teacher_dir), autocast, monitor)
        weak = weak and _place(weak, device)
        for ema, folder in _chosen_emas(sample, teacher_dir).items():
            rows.append(_teacher_row(sample, *_load(folder, device, autocast), ema, weak))
    out_dir.mkdir(parents=True, exist_ok=True)
    total, done = sum(row.num_images for row in rows), 0
    for row in rows:

        def draw(indices: range, row: Row = row) -> Tensor:
            noise = ImageNoise(sample.seed, indices, spec.image_shape, device)
            return row.draw(noise, fixed_labels(spec, indices, sample.seed, device, counts))

        def progress(drawn: int, before: int = done) -> None:
            monitor.progress(before + drawn, total, "images")

        path, grid = out_dir / f"{row.name}.npy", out_dir / f"{row.name}_grid.png"
        write_images(path, draw, row.num_images, spec, batch_size=sample.batch_size, decode=decode, progress=progress)
        done += row.num_images
        if ranks.is_main():
            save_grid(np.load(path, mmap_mode="r")[:GRID_IMAGES], grid)
            monitor.image(f"grid/{row.name}", grid, 0)
    if ranks.is_main():
        labels = fixed_labels(spec, range(sample.num_images), sample.seed, torch.device("cpu"), counts)
        if labels is not None:
            np.save(out_dir / LABELS_FILE, labels.numpy())
        if spec.form != "generator":  # which is trained at no other level
            _save_strips(spec, next(iter(students.values())), dataset, decode, device, out_dir / STRIPS_FILE)
        _write_index(sample, spec, rows, out_dir)


def _chosen_emas(sample: Sample, model_dir: Path) -> dict[int, Path]:
    """Return the folders of a model's EMAs that get rows, by place; a teacher may have fewer than the student."""
    written = {0: model_dir} | {int(path.name.removeprefix("ema")): path for path in model_dir.glob("ema[0-9]*")}
    return {ema: folder for ema, folder in sorted(written.items()) if sample.emas is None or ema in sample.emas}


def _load(folder: Path, device: torch.device, autocast: torch.dtype | None) -> tuple[ModelSpec, Precond]:
    spec, model = load_model(folder, autocast=autocast)
    return spec, _place(model, device)


def load_rebuilt(
    folder: Path, width: float, *, autocast: torch.dtype | None = None
) -> tuple[ModelSpec, Precond, float]:
    """Return a model with the average of its weights of relative width `width`, in eval mode, and the profile's error.

    Raises UserError if the model has no snapshots, or they do not give such an average.
    """
    spec, model = load_model(folder, autocast=autocast)
    try:
        weights, error = rebuild(folder / FOLDER, width)
    except FileNotFoundError as missing:
        raise UserError(
            f"{folder}: no snapshots of its weights ({missing.filename}); train it with train.snapshots"
        ) from missing
    except ValueError as refused:
        raise UserError(f"{folder}: {refused}") from refused
    model.load_state_dict(model.state_dict() | weights)
    return spec, model, error


def _place(model: Precond, device: torch.device) -> Precond:
    model = to_device(model, device)
    model.network_pass = with_cuda_graphs(model.net)
    return model


def _check_levels(sample: Sample, spec: ModelSpec) -> None:
    for mid in sample.mid_sigmas:
        try:
            spec.check_levels([spec.noise.sigma_max, *mid])
        except ValueError as error:
            raise UserError(f"sample.mid_sigmas: {error}") from error


def _student_rows(sample: Sample, spec: ModelSpec, f: Precond, ema: int, width: float | None = None) -> list[Row]:
    rows: list[Row] = []
    suffix = ema_suffix(ema) if width is None else f"_width_{width:g}"
    for mid in [()] if spec.fixed_steps else sample.mid_sigmas:
        name = f"nfe_{len(few_step_sigmas(spec, mid))}"
        if any(row.nfe == len(mid) + 1 for row in rows):
            name += "_at_" + "_".join(f"{sigma:g}" for sigma in mid)
        rows.append(_student_row(name + suffix, "student", sample, spec, f, mid, ema, width))
        for weight in sample.guidance:
            named = f"{name}{suffix}_guidance_{weight:g}"
            rows.append(_student_row(named, "student", sample, spec, f, mid, ema, width, weight))
    return rows


def _student_row(
    name: str,
    model: str,
    sample: Sample,
    spec: ModelSpec,
    f: Precond,
    mid_sigmas: Sequence[float] = (),
    ema: int = 0,
    width: float | None = None,
    guidance: float | None = None,
) -> Row:
    weight = spec.guidance if guidance is None else guidance
    told = {} if weight is None else {"guidance": weight}

    def draw(noise: ImageNoise, labels: Tensor | None) -> Tensor:
        return few_steps(spec, partial(f, labels=labels, **told), noise, mid_sigmas)

    sigmas = few_step_sigmas(spec, mid_sigmas)
    kind = {"euler": "euler", "average_velocity": "flow_map"}.get(spec.form, "multistep")
    settings = {"kind": kind, **told}
    return Row(name, model, ema, width, guidance, len(sigmas), sigmas, sample.num_images, settings, draw)


def _untrained(
    spec: ModelSpec,
    origin: dict[str, Any],
    earlier: Mapping[str, Path],
    device: torch.device,
    autocast: torch.dtype | None,
) -> Precond:
    first = initial_student(spec, init_from=origin["init_from"], seed=origin["seed"], earlier=earlier)
    first.autocast = autocast
    return _place(first.eval().requires_grad_(False), device)


def _teacher_row(sample: Sample, spec: ModelSpec, denoiser: Precond, ema: int, weak: Precond | None) -> Row:
    sampler = sample.teacher_sampler
    num_images = sample.num_images if sample.teacher_images is None else sample.teacher_images

    def draw(noise: ImageNoise, labels: Tensor | None) -> Tensor:
        return sampler.sample(denoiser, noise, spec.noise, labels, weak=weak)

    sigmas = [*spec.noise.grid(sampler.num_steps).tolist(), 0.0]
    apart = "" if num_images == sample.num_images else f"_of_{num_images}"  # FID depends on the number of images
    name = f"teacher_nfe_{sampler.nfe}{apart}{ema_suffix(ema)}"
    settings = sampler.model_dump(mode="json") | ({"weak_teacher": sample.weak_teacher.sha256} if weak else {})
    return Row(name, "teacher", ema, None, None, sampler.nfe, sigmas, num_images, settings, draw)


@torch.no_grad()
def write_images(
    path: Path,
    draw: Callable[[range], Tensor],  # indices of images -> float [B, C, H, W] in -1..1, or latents
    num_images: int,
    spec: ModelSpec,
    *,
    batch_size: int,
    decode: ToPixels = to_pixels,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Draw images into one array, uint8 [N, H, W, C]; write a batch while the next is computed.

    Ranks take the batches in turn and return once the array is complete. Images do not depend on the world size.
    """
    channels, height, width = spec.pixel_shape
    shape = (num_images, height, width, channels)
    if ranks.is_main():
        new_array(path, shape)
    ranks.wait_for_all()
    apart = ranks.agree(not path.exists())  # ranks of another node write their own files
    if not path.exists():
        new_array(path, shape)
    images = np.lib.format.open_memmap(path, mode="r+")
    pending: tuple[range, Tensor, torch.cuda.Event | None] | None = None
    for start in range(0, num_images, batch_size)[ranks.rank() :: ranks.world_size()]:
        indices = range(start, min(start + batch_size, num_images))
        ready = indices, *_to_host(decode(draw(indices)))
        if pending:
            _write_batch(images, *pending, progress)
        pending = ready
    if pending:
        _write_batch(images, *pending, progress)
    if apart:
        _hand_over(images, batch_size)
    images.flush()
    ranks.wait_for_all()
    if ranks.world_size() > 1:  # another rank may have had the last batch
        progress(num_images)


def _hand_over(images: np.ndarray, batch_size: int) -> None:
    """Copy the batches of all ranks into the array of rank 0."""
    for number, start in enumerate(range(0, len(images), batch_size)):
        ranks.send_to_main(torch.from_numpy(images[start : start + batch_size]), number % ranks.world_size())


def _to_host(pixels: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Copy to the host asynchronously; the copy is complete after the event, if there is one."""
    if not pixels.is_cuda:
        return pixels, None
    copy = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True).copy_(pixels, non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    return copy, done


def _write_batch(
    images: np.ndarray, indices: range, pixels: Tensor, done: torch.cuda.Event | None, progress: Callable[[int], None]
) -> None:
    if done is not None:
        done.synchronize()
    images[indices.start : indices.stop] = pixels.numpy()
    progress(indices.stop)


@torch.no_grad()
def _save_strips(
    spec: ModelSpec, f: Precond, dataset: Dataset, decode: ToPixels, device: torch.device, path: Path
) -> None:
    """Held-out images (training images if none are held out) at increasing noise, and f of each."""
    split = "heldout" if len(dataset.heldout_images) else "train"
    images, classes = getattr(dataset, f"{split}_images"), getattr(dataset, f"{split}_labels")
    x0 = to_inputs(torch.from_numpy(np.array(dataset.inputs(split)[:STRIP_IMAGES])).to(device))
    eps = ImageNoise(0, range(len(x0)), spec.image_shape, device).draw()
    labels = None
    if spec.num_classes:
        labels = torch.from_numpy(np.array(classes[:STRIP_IMAGES])).to(device)
    rows = {split: np.array(images[:STRIP_IMAGES])}
    for sigma in (sigma for sigma in STRIP_SIGMAS if sigma >= (spec.truncated_at or 0)):
        x_t = x0 + sigma * eps
        rows[f"noised, σ = {sigma:g}"] = decode(x_t / max(1.0, sigma)).cpu().numpy()
        x0_hat = f(x_t, torch.full((len(x0),), sigma, device=device), labels)
        rows[f"denoised, σ = {sigma:g}"] = decode(x0_hat).cpu().numpy()
    save_rows(rows, path)


def _write_index(sample: Sample, spec: ModelSpec, rows: list[Row], out_dir: Path) -> None:
    facts = ("name", "model", "ema", "width", "guidance", "nfe", "sigmas", "num_images", "sampler")
    index = {
        "rows": [{key: getattr(row, key) for key in facts} | {"file": f"{row.name}.npy"} for row in rows],
        "seed": sample.seed,
        "rounding": ROUNDING,
        "precision": sample.precision,
        "labels": LABELS[sample.labels] if spec.num_classes else "none",
        "grids": {row.name: f"{row.name}_grid.png" for row in rows},
        **({} if spec.guidance is None else {"guidance": spec.guidance}),
        **({} if spec.form == "generator" else {"strips": STRIPS_FILE}),
        **({"labels_file": LABELS_FILE} if spec.num_classes else {}),
    }
    (out_dir / "samples.json").write_text(json.dumps(index, indent=2) + "\n")
