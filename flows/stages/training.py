"""Shared code of teacher and student: a training that resumes, logs and draws grids."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cm_core.checkpoint import LOG, list_states, save_tensors
from cm_core.guidance import WeightRange
from cm_core.methods.base import Method
from cm_core.model import ModelSpec, save_model
from cm_core.parallel import ranks, sharding
from cm_core.precision import set_float32_products
from cm_core.precond import Precond
from cm_core.randomness import derive_seed, seeded
from cm_core.training.batches import Batches
from cm_core.training.config import Train
from cm_core.training.cost import Speed, advice
from cm_core.training.passes import compose_passes
from cm_core.training.posthoc import FOLDER, Snapshot, write_index
from cm_core.training.profiling import profiled
from cm_core.training.state import TrainState
from cm_core.training.trainer import LossScaleError, NonFiniteLossError, Trainer
from flows.atomic import replace_text
from flows.data.dataset import Dataset
from flows.errors import UserError
from flows.monitor import PROFILE_VARIABLE, Monitor
from flows.reports.figures import save_grid
from flows.stages.models import EMAS_FILE, class_counts, ema_suffix, to_device

DrawImages = Callable[[Precond, int], np.ndarray]  # EMA model, training steps so far -> uint8 [N, H, W, C]
DrawSets = Callable[[Precond, int], dict[str, np.ndarray]]  # the same -> {row: images}


SETS = "sets"  # folder of images drawn during a training, for its curve of FID


class StageStopped(Exception):
    """The run was cancelled; its training state is saved."""


def make_batches(
    dataset: Dataset,
    train: Train,
    *,
    conditional: bool,
    seed: int,
    device: torch.device,
    guidance_range: WeightRange | None = None,
) -> Batches:
    """Return the training batches. Raises UserError if the data set is too small or lacks labels."""
    if len(dataset.train_images) < train.batch_size:
        raise UserError(
            f"data {dataset.name}: {len(dataset.train_images)} training images are fewer than "
            f"train.batch_size={train.batch_size}; lower it or add images"
        )
    if conditional and (dataset.num_classes == 0 or (dataset.train_labels < 0).any()):
        raise UserError(f"data {dataset.name}: images without label; set conditional: false or label every image")
    if conditional and len(empty := np.flatnonzero(class_counts(dataset) == 0)):
        names = ", ".join(dataset.class_names[label] for label in empty[:10])
        raise UserError(
            f"data {dataset.name}: {len(empty)} of {dataset.num_classes} classes have no training image ({names});"
            " raise data.max_images or lower data.heldout_fraction, or set conditional: false"
        )
    labels = np.asarray(dataset.train_labels) if conditional else None
    options: dict[str, Any] = {"batch_size": train.batch_size, "flip": train.flip, "guidance_range": guidance_range}
    return Batches(dataset.inputs("train"), labels, seed=seed, device=device, **options)


def build_weighting(method: Method, seed: int, device: torch.device) -> nn.Module | None:
    """Return the learned part of the loss, with random features derived from `seed` alone."""
    with seeded(derive_seed(seed, "weighting")):
        weighting = method.build_weighting()
    return None if weighting is None else weighting.to(device)


def place(model: Precond, device: torch.device) -> Precond:
    """Move a training's network, built on the CPU, to `device`: whole, or this process's shards."""
    if not sharding.is_wanted():
        return to_device(model, device)
    sharding.shard(model.net, device)
    return model


def run_training(
    trainer: Trainer,
    *,
    spec: ModelSpec,
    draw: DrawImages,
    out_dir: Path,
    state_dir: Path,
    monitor: Monitor,
    draw_sets: DrawSets | None = None,
    sets_every: int = 0,
) -> None:
    """Train to the end, from the last saved state if there is one, and write the artifact.

    Every `sets_every` steps and at the end, sets of images of each EMA are drawn, if that is not 0. Metrics, grids,
    sets and snapshots lie beside the states, so that they survive a resume; they move to `out_dir` at the end.
    Raises StageStopped after saving when the monitor asks to stop, UserError for a loss that is not finite or does
    not fit fp16.
    """
    state, train, device = trainer.state, trainer.state.train, trainer.batches.device
    set_float32_products(train.precision)
    _keep_compiled(state_dir.parent / "compiled", device)
    _resume(state, state_dir, monitor)
    trainer.models = compose_passes(trainer.models, trainer.method, train, graphs=not state.is_sharded)
    log = TrainingLog((state_dir if ranks.is_main() else out_dir) / LOG, before=state.step)
    averaged = spec.build(autocast=train.autocast).eval().requires_grad_(False)
    if ranks.is_main():  # only the main process draws
        averaged = to_device(averaged, device)
    speed = _checked_speed(state, trainer.method, spec, device, out_dir.name)
    profile_dir = _profile_folder(out_dir.name)

    def stop_requested() -> bool:
        return ranks.agree(monitor.stop_requested())

    with profiled(profile_dir) as on_step, _naming_the_way_out(out_dir.name):
        for metrics in trainer.run(on_step=on_step, stop_requested=stop_requested):
            step = state.step
            if metrics:
                log.append(metrics)
                measured = speed.measured(step)
                monitor.metrics({**metrics, **measured}, step)
                if profile_dir is not None:
                    _note_speed(profile_dir / "speed.txt", step, measured)
                monitor.progress(step, train.num_steps, "steps")
            if step % train.grid_every == 0 or step == train.num_steps:
                _draw_grid(state, averaged, draw, log.grid(step), monitor)
            if draw_sets and sets_every and (step % sets_every == 0 or step == train.num_steps):
                _write_sets(state, averaged, partial(draw_sets, averaged, step), log)
            if metrics and step in train.snapshot_steps:
                _write_snapshots(state, log.folder / FOLDER, out_dir.name)
            stopping = stop_requested()
            if step % train.save_every == 0 or stopping:
                state.save(state_dir)
                monitor.state_saved()
            if stopping and step < train.num_steps:
                raise StageStopped(f"stopped after step {step}; the training state is saved")
    _write_artifact(state, spec, out_dir)
    log.move_to(out_dir, _snapshots(train))


def _draw_grid(state: TrainState, averaged: Precond, draw: DrawImages, path: Path, monitor: Monitor) -> None:
    weights = state.averaged()
    if ranks.is_main():
        averaged.load_state_dict(weights)
        save_grid(draw(averaged, state.step), path, columns=8)
        monitor.image("samples", path, state.step)


def _write_sets(
    state: TrainState, averaged: Precond, draw: Callable[[], dict[str, np.ndarray]], log: "TrainingLog"
) -> None:
    for ema in range(len(state.emas)):
        weights = state.averaged(ema)
        if ranks.is_main():
            averaged.load_state_dict(weights)
            for row, images in draw().items():
                log.save_set(state.step, row + ema_suffix(ema), images)


def _snapshots(train: Train) -> list[Snapshot]:
    return [Snapshot(step, width) for step in train.snapshot_steps for width in train.snapshot_emas.values()]


def _write_snapshots(state: TrainState, folder: Path, section: str) -> None:
    """Write the power-function EMAs beside the states: each file once, and a resumed training writes the same again."""
    assert state.train.snapshots is not None
    dtype = torch.float16 if state.train.snapshots.precision == "fp16" else torch.float32
    for place, width in state.train.snapshot_emas.items():
        weights = sharding.gathered(state.emas[place].weights)
        if not ranks.is_main():
            continue
        tensors = {name: tensor.to(dtype) for name, tensor in weights.items()}
        if odd := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise UserError(f"{section}: fp16 does not hold {odd[0]}; set {section}.train.snapshots.precision=fp32")
        save_tensors(folder / Snapshot(state.step, width).file, tensors)


@contextmanager
def _naming_the_way_out(section: str) -> Iterator[None]:
    """Turn a training's arithmetic errors into one line for people: a resumed training meets the same step again."""
    try:
        yield
    except NonFiniteLossError as error:
        raise UserError(
            f"{section}: {error}; every resume repeats that step: set {section}.train.on_nonfinite=skip (or raise "
            "max_nonfinite) to go on from the last saved state without it, or lower the learning rate and train afresh"
        ) from error
    except LossScaleError as error:
        raise UserError(
            f"{section}: {error}: fp16 does not hold these gradients; set {section}.train.precision=bf16 (or tf32), or "
            "lower the learning rate, and train afresh"
        ) from error


def _profile_folder(section: str) -> Path | None:
    """Return the folder for this training's profile, if requested; only the main process writes one."""
    given = os.environ.get(PROFILE_VARIABLE)
    return Path(given) / section if given and ranks.is_main() else None


def _note_speed(table: Path, step: int, measured: Mapping[str, float]) -> None:
    """Add a line to the table of speed, below its header."""
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("a") as file:
        if file.tell() == 0:
            file.write("\t".join(["step", *measured]) + "\n")
        file.write("\t".join([str(step), *(f"{value:.4g}" for value in measured.values())]) + "\n")


def _checked_speed(state: TrainState, method: Method, spec: ModelSpec, device: torch.device, section: str) -> Speed:
    """Return this training's throughput meter; raise UserError if its GPU has too little memory."""
    train, speed = state.train, Speed(method, spec, state.train, device, first=state.step)
    if speed.cost is not None:
        memory = torch.cuda.get_device_properties(device).total_memory
        problem = advice(speed.cost, method, train, memory, section, ranks.world_size(), sharded=state.is_sharded)
        if problem:
            raise UserError(f"{torch.cuda.get_device_name(device)}: {problem}")
    return speed


def _keep_compiled(folder: Path, device: torch.device) -> None:
    """Keep compiled kernels beside the training states: files named by content, valid on any GPU of the kind."""
    if device.type == "cuda":
        for variable, compiler in (("TRITON_CACHE_DIR", "triton"), ("TORCHINDUCTOR_CACHE_DIR", "inductor")):
            os.environ.setdefault(variable, str(folder / compiler))


def _resume(state: TrainState, state_dir: Path, monitor: Monitor) -> None:
    """Resume from the last saved state; only the main process has one, which it broadcasts."""
    saved = list_states(state_dir) if ranks.is_main() else []
    if ranks.agree(bool(saved)):
        state.restore(saved[-1] if saved else None)
        if state.train.on_nonfinite == "stop" and state.nonfinite:
            raise UserError(
                f"{state_dir}: the saved state left out {int(state.nonfinite)} steps whose loss was not finite, and "
                "train.on_nonfinite is stop; set it to skip, or remove that folder to train afresh"
            )
        monitor.remark(f"resuming from step {state.step}")
    else:
        state.share()


def _write_artifact(state: TrainState, spec: ModelSpec, out_dir: Path) -> None:
    if ranks.is_main():
        rules = [rule.model_dump(mode="json") for rule in state.train.emas]
        (out_dir / EMAS_FILE).write_text(json.dumps(rules, indent=2) + "\n")
    for index in reversed(range(len(state.emas))):  # the first EMA is the model's own weights file
        weights = state.averaged(index)
        if ranks.is_main():
            save_model(out_dir / f"ema{index}" if index else out_dir, spec, weights)


class TrainingLog:
    """metrics.jsonl and grids of a training in flight; entries beyond the resumed step are dropped."""

    def __init__(self, folder: Path, *, before: int) -> None:
        self.folder, self.metrics = folder, folder / "metrics.jsonl"
        (folder / "grids").mkdir(parents=True, exist_ok=True)
        kept = [line for line in self._lines() if json.loads(line)["step"] <= before]
        replace_text(self.metrics, "".join(kept))

    def append(self, metrics: dict[str, float]) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps(metrics) + "\n")

    def grid(self, step: int) -> Path:
        return self.folder / "grids" / f"step_{step:06d}.png"

    def save_set(self, step: int, row: str, images: np.ndarray) -> None:
        (self.folder / SETS).mkdir(exist_ok=True)
        np.save(self.folder / SETS / f"step_{step:06d}-{row}.npy", images)

    def move_to(self, out_dir: Path, snapshots: Sequence[Snapshot]) -> None:
        shutil.copy(self.metrics, out_dir / "metrics.jsonl")
        if (self.folder / SETS).exists():
            shutil.copytree(self.folder / SETS, out_dir / SETS)
        shutil.copytree(self.folder / "grids", out_dir / "grids")
        if snapshots:
            (out_dir / FOLDER).mkdir()
            for one in snapshots:
                shutil.copy(self.folder / FOLDER / one.file, out_dir / FOLDER)
            write_index(out_dir / FOLDER, snapshots)

    def _lines(self) -> list[str]:
        if not self.metrics.exists():
            return []
        # A line torn by a crash has no line end; its step is trained again.
        return [line for line in self.metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
