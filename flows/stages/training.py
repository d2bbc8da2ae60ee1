"""What teacher and student share: a training that resumes, logs and draws grids."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from cm_core.batches import Batches
from cm_core.checkpoint import list_states
from cm_core.loop import Train, TrainState, fit
from cm_core.methods.base import Method, Models
from cm_core.model import ModelSpec, save_model
from cm_core.precond import Precond
from flows.dataset import Dataset
from flows.errors import UserError
from flows.figures import save_grid
from flows.monitor import Monitor
from flows.stages.models import to_device

DrawImages = Callable[[Precond], np.ndarray]  # averaged model -> uint8 [N, H, W, C]


class StageStopped(Exception):
    """The run was cancelled; its training state is saved."""


def make_batches(dataset: Dataset, train: Train, *, conditional: bool, seed: int, device: torch.device) -> Batches:
    """Return the training batches. Raises UserError where the data set is too small or lacks labels."""
    if len(dataset.train_images) < train.batch_size:
        raise UserError(
            f"data {dataset.name}: {len(dataset.train_images)} training images are fewer than "
            f"train.batch_size={train.batch_size}; lower it or add images"
        )
    if conditional and (dataset.num_classes == 0 or (dataset.train_labels < 0).any()):
        raise UserError(f"data {dataset.name}: images without label; set conditional: false or label every image")
    labels = np.asarray(dataset.train_labels) if conditional else None
    return Batches(dataset.train_images, labels, batch_size=train.batch_size, seed=seed, device=device, flip=train.flip)


def run_training(
    state: TrainState,
    method: Method,
    models: Models,
    batches: Batches,
    *,
    spec: ModelSpec,
    seed: int,
    draw: DrawImages,
    out_dir: Path,
    state_dir: Path,
    monitor: Monitor,
) -> None:
    """Train to the end, from the last saved state if there is one, and write the artifact.

    Metrics and grids gather beside the states, so that a resumed training has all of them; they move to `out_dir`
    at the end. Raises StageStopped after saving when the monitor asks for it.
    """
    train = state.train
    _resume(state, state_dir, monitor)
    log = _TrainingLog(state_dir / "log", before=state.step)
    averaged = to_device(spec.build(autocast=train.autocast), batches.device).eval().requires_grad_(False)
    if train.compile:
        state.model.net.compile()
        if state.target is not None:
            state.target.net.compile()
    started, first = time.monotonic(), state.step
    for metrics in fit(state, method, models, batches, noise=spec.noise, seed=seed):
        step = state.step
        log.append(metrics)
        images_per_s = (step - first) * train.batch_size / (time.monotonic() - started)
        monitor.metrics({**metrics, "images_per_s": images_per_s}, step)
        monitor.progress(step, train.num_steps, "steps")
        if step % train.grid_every == 0 or step == train.num_steps:
            averaged.load_state_dict(state.averaged())
            save_grid(draw(averaged), log.grid(step), columns=8)
            monitor.image("samples", log.grid(step), step)
        if step % train.save_every == 0 or monitor.stop_requested():
            state.save(state_dir)
            monitor.state_saved(state_dir)
        if monitor.stop_requested() and step < train.num_steps:
            raise StageStopped(f"stopped after step {step}; the training state is saved")
    _write_artifact(state, spec, out_dir)
    log.move_to(out_dir)


def _resume(state: TrainState, state_dir: Path, monitor: Monitor) -> None:
    saved = list_states(state_dir)
    if saved:
        state.restore(saved[-1])
        monitor.remark(f"resuming from step {state.step}")


def _write_artifact(state: TrainState, spec: ModelSpec, out_dir: Path) -> None:
    for index in range(1, len(state.emas)):  # the first is the model's own weights file
        save_model(out_dir / f"ema{index}", spec, state.averaged(index))
    save_model(out_dir, spec, state.averaged())


class _TrainingLog:
    """metrics.jsonl and grids of a training in flight; whatever lies beyond the resumed step is dropped."""

    def __init__(self, folder: Path, *, before: int) -> None:
        self.folder, self.metrics = folder, folder / "metrics.jsonl"
        (folder / "grids").mkdir(parents=True, exist_ok=True)
        kept = [line for line in self._lines() if json.loads(line)["step"] <= before]
        self.metrics.write_text("".join(kept))

    def append(self, metrics: dict[str, float]) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps(metrics) + "\n")

    def grid(self, step: int) -> Path:
        return self.folder / "grids" / f"step_{step:06d}.png"

    def move_to(self, out_dir: Path) -> None:
        shutil.copy(self.metrics, out_dir / "metrics.jsonl")
        shutil.copytree(self.folder / "grids", out_dir / "grids")

    def _lines(self) -> list[str]:
        if not self.metrics.exists():
            return []
        # A line torn by a crash has no line end; the step it belongs to is trained again.
        return [line for line in self.metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
