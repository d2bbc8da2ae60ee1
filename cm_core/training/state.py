"""The mutable state of a training: weights, EMAs, optimiser, step; saved and restored bitwise."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cm_core.checkpoint import load_state, save_state
from cm_core.methods.base import Loss
from cm_core.parallel import ranks, sharding
from cm_core.precond import Precond
from cm_core.training.config import Train
from cm_core.training.ema import Ema
from cm_core.training.learner import Learner, moment_like
from cm_core.training.loss_scale import LossScale


class LoggedStep(NamedTuple):
    """The logged values of a step."""

    step: int
    loss: Loss
    grad_norm: Tensor


@dataclasses.dataclass
class TrainState:
    """The mutable state of a training. Steps are counted from 0; `step` is the next one to take.

    The target begins as a copy of the model; neither it nor a teacher gets gradients. A critic, the score and perhaps a
    discriminator, has an optimiser of its own and is trained by all steps but the first of each `cycle`.
    """

    model: Precond
    train: Train
    target: Precond | None = None  # EMA of the model, for methods that keep one
    teacher: Precond | None = None  # for methods that replace their teacher during training
    weighting: nn.Module | None = None  # the learned part of the loss
    score: Precond | None = None  # the critic's denoiser, for methods that train one
    discriminator: Precond | None = None
    cycle: int = 1
    step: int = 0
    began: int = 0  # the step of the last optimiser reset
    student: Learner = dataclasses.field(init=False)
    critic: Learner | None = dataclasses.field(init=False)
    nonfinite: Tensor = dataclasses.field(init=False)  # steps skipped so far because a loss or gradient was not finite
    emas: list[Ema] = dataclasses.field(init=False)
    window: list[LoggedStep] = dataclasses.field(default_factory=list)  # steps not yet aggregated

    def __post_init__(self) -> None:
        if self.target is not None:
            self.target.load_state_dict(self.model.state_dict())
            self.target.requires_grad_(False)
        device = next(self.model.parameters()).device
        self.nonfinite = torch.zeros((), dtype=torch.int64, device=device)
        self.student = Learner((self.model, self.weighting), self.train)
        beside = (self.score, self.discriminator)
        self.critic = None if self.score is None else Learner(beside, self.train, prefix="critic/")
        self.begin_afresh()

    def begin_afresh(self) -> None:
        """Reset optimiser and EMAs at the current weights."""
        self.student.reset()
        self.emas = [Ema(rule, self.model) for rule in self.train.emas]
        self.began = self.step

    def replace_teacher(self) -> None:
        """Let the model become its own teacher, as at the beginning of a halving (PD)."""
        assert self.teacher is not None, "the caller gives a teacher to methods that replace it"
        self.teacher.load_state_dict(self.model.state_dict())
        self.begin_afresh()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The student's optimiser."""
        return self.student.optimizer

    @property
    def loss_scale(self) -> LossScale | None:
        """The student's loss scale, for fp16."""
        return self.student.loss_scale

    @property
    def learners(self) -> list[Learner]:
        """The student and, if there is one, the critic."""
        return [self.student] if self.critic is None else [self.student, self.critic]

    def learner_at(self, step: int) -> Learner:
        """Return the learner that `step` trains, as its method's `trains_student_at` says."""
        return self.student if self.critic is None or step % self.cycle == 0 else self.critic

    def take_turn(self) -> Learner:
        """Return the learner whose turn it is; no other gets gradients until the next turn."""
        turn = self.learner_at(self.step)
        if self.critic is not None:
            for learner in self.learners:
                learner.learn(learner is turn)
        return turn

    @property
    def is_sharded(self) -> bool:
        """Whether weights, moments and EMAs are sharded."""
        return sharding.is_sharded(next(self.model.parameters()))

    def save(self, folder: Path) -> None:
        """Write the state, unsharded, to `folder/step-<step>` atomically; a collective call, rank 0 writes."""
        tensors = sharding.gathered({**self._tensors(), **self._window_tensors()})
        if ranks.is_main():
            save_state(folder, self.step, tensors, {"began": self.began, "nonfinite": int(self.nonfinite)})

    def restore(self, state: Path | None) -> None:
        """Restore a saved state, bitwise; the models and optimiser must be built from the same recipe.

        A collective call: the main process names the state, and all ranks then hold it.
        """
        tensors: dict[str, Tensor] = {}
        if ranks.is_main():
            assert state is not None, "the first process names the state"
            tensors, values = load_state(state)
            tensors |= {name: torch.tensor(value) for name, value in values.items()}
        self._take(ranks.broadcast_from_main(tensors), source=str(state or "the state of rank 0"))

    def share(self) -> None:
        """Broadcast the main process's state, bitwise; a collective call. A sharded state is held jointly already."""
        if ranks.world_size() == 1 or self.is_sharded:
            return
        mine = {**self._tensors(), **self._window_tensors()}
        mine |= {"step": torch.tensor(self.step), "began": torch.tensor(self.began), "nonfinite": self.nonfinite}
        tensors = dict(ranks.broadcast_from_main(mine))
        if not ranks.is_main():
            self._take(tensors.items(), source="the state of rank 0")

    def _take(self, whole: Iterable[tuple[str, Tensor]], *, source: str) -> None:
        """Copy a state's tensors one by one into this state's: whole, or this rank's shards."""
        own, moments, beside = self._weights(), {}, {}
        parameters = {name: p for learner in self.learners for name, p in learner.places().items()}
        for name, tensor in whole:
            if name in own:
                sharding.put(own.pop(name), tensor)
            elif name.rpartition("/")[0] in parameters:
                moments[name] = moment_like(parameters[name.rpartition("/")[0]], tensor)
            else:
                beside[name] = tensor
        step, began = int(beside.pop("step")), beside.pop("began", None)  # absent from states of older versions
        self.nonfinite.fill_(int(beside.pop("nonfinite", 0)))
        self._load_window(beside, step)
        if own or beside:
            odd = min([*own, *beside])
            raise ValueError(f"{source} is the state of another training (only one of the two has {odd})")
        self.step = step
        for learner in self.learners:
            learner.load(moments)
        if began is not None:
            self.began = int(began)
            by_student = -(-(step - self.began) // self.cycle)
            for learner, taken in zip(self.learners, (by_student, step - by_student), strict=False):
                learner.set_taken(taken)

    def averaged(self, index: int = 0) -> dict[str, Tensor]:
        """Return the state dict of the model with the weights of EMA `index`.

        A collective call; a sharded state gives the weights to the main process only, on the CPU.
        """
        return sharding.gathered({**self.model.state_dict(), **self.emas[index].weights})

    def _tensors(self) -> dict[str, Tensor]:
        tensors = self._weights()
        for learner in self.learners:
            tensors |= learner.moments()
        return tensors

    def _weights(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for role in ("model", "target", "teacher", "weighting", "score", "discriminator"):
            module = getattr(self, role)
            if module is not None:
                tensors |= {f"{role}/{name}": t for name, t in module.state_dict().items()}
        for index, ema in enumerate(self.emas):
            tensors |= {f"ema{index}/{name}": t for name, t in ema.weights.items()}
        for learner in self.learners:
            tensors |= learner.scale_tensors()
        return tensors

    def _window_tensors(self) -> dict[str, Tensor]:
        """Return the logged values since the last yield of metrics; empty right after a yield."""
        if not self.window:
            return {}
        _, losses, norms = zip(*self.window, strict=True)
        return {
            "window/per_sample": torch.stack([loss.per_sample for loss in losses]),
            "window/sigma": torch.stack([loss.sigma for loss in losses]),
            "window/grad_norm": torch.stack(norms),
        }

    def _load_window(self, tensors: dict[str, Tensor], step: int) -> None:
        """Take the window out of a saved state's tensors."""
        device = next(self.model.parameters()).device
        names = [name for name in ("window/per_sample", "window/sigma", "window/grad_norm") if name in tensors]
        rows = list(zip(*(tensors.pop(name).to(device) for name in names), strict=True))
        first = step - len(rows)
        self.window = [LoggedStep(first + i, Loss(loss, sigma), norm) for i, (loss, sigma, norm) in enumerate(rows)]
