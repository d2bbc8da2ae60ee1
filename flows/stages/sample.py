"""Stage `sample`: images from the student at one and more steps, the untrained student and the teacher."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from cm_core.model import ModelSpec, load_model
from cm_core.parallel import ranks
from cm_core.parallel.graphs import with_cuda_graphs
from cm_core.params import Params
from cm_core.precision import Precision, autocast_dtype, set_float32_products
from cm_core.precond import Precond
from cm_core.sampling import ImageNoise, TeacherSampler, check_levels
from cm_core.tensors import from_pixels, to_pixels
from flows.data.dataset import Dataset, load_dataset
from flows.errors import UserError
from flows.monitor import Monitor
from flows.reports.figures import save_grid, save_rows
from flows.stages.models import (
    ABSENT_FILE,
    few_step_sigmas,
    few_steps,
    fixed_labels,
    initial_student,
    pick_device,
    to_device,
)

GRID_IMAGES = 100
STRIP_SIGMAS = (0.2, 0.5, 1.0, 2.0, 5.0, 20.0, 80.0)  # from hardly visible to pure noise
STRIP_IMAGES = 8
ROUNDING = "uint8, x * 127.5 + 128, clipped"


class Sample(Params):
    """The images drawn for the evaluation."""

    num_images: int = Field(50_000, ge=1)
    """Images per row."""
    batch_size: int = Field(500, ge=1)
    """Images per batch; does not affect the images."""
    seed: int = Field(0, ge=0)
    """Image i is drawn from (seed, i), whatever the batch size."""
    mid_sigmas: tuple[tuple[float, ...], ...] = ((), (0.821,))
    """One row per entry: the noise levels after sigma_max; none is one-step sampling (iCT: 0.821 on CIFAR-10)."""
    teacher_sampler: TeacherSampler = TeacherSampler()
    """Sampler of the teacher's row, if the recipe has a teacher."""
    teacher_images: int | None = Field(None, ge=0)
    """Images of the teacher's row; empty: as many as the others, 0: no such row."""
    precision: Precision = "fp32"
    """Arithmetic of the network's body."""


@dataclass(frozen=True)
class Row:
    """One set of images and its settings; `draw` maps noise and labels to images."""

    name: str
    model: str
    nfe: int
    sigmas: list[float]
    num_images: int
    draw: Callable[[ImageNoise, Tensor | None], Tensor]


def sample(
    sample: Sample, prepare_dir: Path, teacher_dir: Path, student_dir: Path, out_dir: Path, monitor: Monitor
) -> None:
    """Draw every row of images; write arrays, grids and denoising strips, and samples.json last."""
    device = pick_device()
    autocast = autocast_dtype(sample.precision)
    set_float32_products(sample.precision)
    spec, f = _load(student_dir, device, autocast)
    _check_levels(sample, spec)
    untrained = _untrained(spec, student_dir, teacher_dir, device, autocast)
    rows = [*_student_rows(sample, spec, f), _student_row("untrained", "untrained", sample, spec, untrained)]
    if not (teacher_dir / ABSENT_FILE).exists() and sample.teacher_images != 0:
        rows.append(_teacher_row(sample, teacher_dir, device, autocast))
    out_dir.mkdir(parents=True, exist_ok=True)
    total, done = sum(row.num_images for row in rows), 0
    for row in rows:

        def draw(indices: range, row: Row = row) -> Tensor:
            noise = ImageNoise(sample.seed, indices, spec.image_shape, device)
            return row.draw(noise, fixed_labels(spec, indices, device))

        def progress(drawn: int, before: int = done) -> None:
            monitor.progress(before + drawn, total, "images")

        path, grid = out_dir / f"{row.name}.npy", out_dir / f"{row.name}_grid.png"
        write_images(path, draw, row.num_images, spec, batch_size=sample.batch_size, progress=progress)
        done += row.num_images
        if ranks.is_main():
            save_grid(np.load(path, mmap_mode="r")[:GRID_IMAGES], grid)
            monitor.image(f"grid/{row.name}", grid, 0)
    if ranks.is_main():
        _save_strips(spec, f, load_dataset(prepare_dir), device, out_dir / "strips.png")
        _write_index(sample, spec, rows, out_dir)


def _load(folder: Path, device: torch.device, autocast: torch.dtype | None) -> tuple[ModelSpec, Precond]:
    spec, model = load_model(folder, autocast=autocast)
    model = to_device(model, device)
    model.network_pass = with_cuda_graphs(model.net)
    return spec, model


def _check_levels(sample: Sample, spec: ModelSpec) -> None:
    for mid in sample.mid_sigmas:
        try:
            check_levels([spec.noise.sigma_max, *mid], sigma_min=spec.noise.sigma_min)
        except ValueError as error:
            raise UserError(f"sample.mid_sigmas: {error}") from error


def _student_rows(sample: Sample, spec: ModelSpec, f: Precond) -> list[Row]:
    rows: list[Row] = []
    for mid in [()] if spec.form == "euler" else sample.mid_sigmas:  # training fixes PD's steps
        name = f"nfe_{len(few_step_sigmas(spec, mid))}"
        if any(row.name == name for row in rows):
            name += "_at_" + "_".join(f"{sigma:g}" for sigma in mid)
        rows.append(_student_row(name, "student", sample, spec, f, mid))
    return rows


def _student_row(
    name: str, model: str, sample: Sample, spec: ModelSpec, f: Precond, mid_sigmas: Sequence[float] = ()
) -> Row:
    def draw(noise: ImageNoise, labels: Tensor | None) -> Tensor:
        return few_steps(spec, partial(f, labels=labels), noise, mid_sigmas)

    sigmas = few_step_sigmas(spec, mid_sigmas)
    return Row(name, model, len(sigmas), sigmas, sample.num_images, draw)


def _untrained(
    spec: ModelSpec, student_dir: Path, teacher_dir: Path, device: torch.device, autocast: torch.dtype | None
) -> Precond:
    origin = json.loads((student_dir / "origin.json").read_text())
    f = to_device(initial_student(spec, **origin, teacher_dir=teacher_dir), device).eval().requires_grad_(False)
    f.autocast = autocast
    f.network_pass = with_cuda_graphs(f.net)
    return f


def _teacher_row(sample: Sample, teacher_dir: Path, device: torch.device, autocast: torch.dtype | None) -> Row:
    spec, denoiser = _load(teacher_dir, device, autocast)
    sampler = sample.teacher_sampler
    num_images = sample.num_images if sample.teacher_images is None else sample.teacher_images

    def draw(noise: ImageNoise, labels: Tensor | None) -> Tensor:
        return sampler.sample(denoiser, noise, spec.noise, labels)

    sigmas = [*spec.noise.grid(sampler.num_steps).tolist(), 0.0]
    return Row(f"teacher_nfe_{sampler.nfe}", "teacher", sampler.nfe, sigmas, num_images, draw)


@torch.no_grad()
def write_images(
    path: Path,
    draw: Callable[[range], Tensor],  # indices of images -> float [B, C, H, W] in -1..1
    num_images: int,
    spec: ModelSpec,
    *,
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Draw images into one array, uint8 [N, H, W, C]; write a batch while the next is computed.

    Ranks take the batches in turn and return once the array is complete. Images do not depend on the world size.
    """
    channels, height, width = spec.image_shape
    shape = (num_images, height, width, channels)
    if ranks.is_main():
        np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    ranks.wait_for_all()
    apart = ranks.agree(not path.exists())  # ranks of another node write their own files
    if not path.exists():
        np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    images = np.lib.format.open_memmap(path, mode="r+")
    pending: tuple[range, Tensor, torch.cuda.Event | None] | None = None
    for start in range(0, num_images, batch_size)[ranks.rank() :: ranks.world_size()]:
        indices = range(start, min(start + batch_size, num_images))
        ready = indices, *_to_host(to_pixels(draw(indices)))
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
def _save_strips(spec: ModelSpec, f: Precond, dataset: Dataset, device: torch.device, path: Path) -> None:
    """Held-out images (training images if none are held out) at increasing noise, and f of each."""
    split = "heldout" if len(dataset.heldout_images) else "train"
    images, classes = getattr(dataset, f"{split}_images"), getattr(dataset, f"{split}_labels")
    pixels = torch.from_numpy(np.array(images[:STRIP_IMAGES])).to(device)
    x0 = from_pixels(pixels)
    eps = ImageNoise(0, range(len(x0)), spec.image_shape, device).draw()
    labels = None
    if spec.num_classes:
        labels = torch.from_numpy(np.array(classes[:STRIP_IMAGES])).to(device)
    rows = {split: pixels.cpu().numpy()}
    for sigma in STRIP_SIGMAS:
        x_t = x0 + sigma * eps
        rows[f"noised to {sigma:g}"] = to_pixels(x_t / max(1.0, sigma)).cpu().numpy()
        rows[f"f at {sigma:g}"] = to_pixels(f(x_t, torch.full((len(x0),), sigma, device=device), labels)).cpu().numpy()
    save_rows(rows, path)


def _write_index(sample: Sample, spec: ModelSpec, rows: list[Row], out_dir: Path) -> None:
    facts = ("name", "model", "nfe", "sigmas", "num_images")
    index = {
        "rows": [{key: getattr(row, key) for key in facts} | {"file": f"{row.name}.npy"} for row in rows],
        "seed": sample.seed,
        "rounding": ROUNDING,
        "precision": sample.precision,
        "labels": "every class equally often" if spec.num_classes else "none",
        "grids": {row.name: f"{row.name}_grid.png" for row in rows},
        "strips": "strips.png",
    }
    (out_dir / "samples.json").write_text(json.dumps(index, indent=2) + "\n")
