"""Training: a state, one step, and `fit`, a generator that yields metrics; the caller logs, saves and stops."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from cm_core.curricula import linear_ramp
from cm_core.methods.base import Method
from cm_core.noise import Noise
from cm_core.parallel import ranks, sharding
from cm_core.parallel.gradients import summed_gradients
from cm_core.parallel.rows import gathered_rows, own_rows
from cm_core.params import Params
from cm_core.precond import Precond
from cm_core.randomness import derive_seed, make_generator
from cm_core.training.batches import Batches
from cm_core.training.checkpoint import load_state, save_state
from cm_core.training.ema import AnyEma, ConstantEma, Ema, update_target
from cm_core.training.optimizers import Adam, RAdam
from cm_core.types import Loss, Models, StepContext


class Train(Params):
    """How long, how fast and in which precision a network is trained."""

    num_steps: int = Field(400_000, ge=1)
    """Optimiser steps."""
    batch_size: int = Field(512, ge=1)
    """Images a step."""
    optimizer: Adam | RAdam = RAdam()
    """The optimiser and its step size."""
    ramp_steps: int = Field(0, ge=0)
    """Steps over which the learning rate grows linearly from zero; 0: none."""
    clip_norm: float | None = Field(None, gt=0)
    """Largest norm of the gradient; empty: no clipping."""
    emas: tuple[AnyEma, ...] = Field((ConstantEma(),), min_length=1)
    """Averages of the weights kept during training; the first is the one that is sampled."""
    flip: bool = False
    """Flip images left to right at random (CM and EDM on natural images)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the network's body; weights, preconditioning and loss stay fp32."""
    accumulate: int = Field(1, ge=1)
    """Parts in which a batch passes through the network, each computed again in the backward pass: less memory."""
    checkpoint_activations: bool = False
    """Compute each block again in the backward pass instead of keeping its activations: much less memory, slower."""
    compile: bool = False
    """Let torch.compile make the code of the blocks; on a GPU slower than the kernels of this package (docs/LOG.md)."""
    log_every: int = Field(100, ge=1)
    """Steps between two logged metrics; the host waits for the device only then."""
    save_every: int = Field(2_000, ge=1)
    """Steps between two saved training states; a multiple of log_every."""
    grid_every: int = Field(2_000, ge=1)
    """Steps between two sample grids; a multiple of log_every."""

    @model_validator(mode="after")
    def _multiples(self) -> "Train":
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate={self.accumulate} must divide batch_size={self.batch_size}")
        for name in ("save_every", "grid_every"):
            if getattr(self, name) % self.log_every:
                raise ValueError(f"{name}={getattr(self, name)} must be a multiple of log_every={self.log_every}")
        return self

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of the network's body, None for fp32."""
        return torch.bfloat16 if self.precision == "bf16" else None


def why_not_sharded(method: Method, train: Train) -> str | None:
    """Return the setting under which the weights cannot be divided among processes, and why; None where they can."""
    if method.forward_mode:
        return f"method.kind={method.kind} takes forward-mode derivatives, whose gradients FSDP2 gets wrong"
    if train.compile:
        return "train.compile=true is not tried with it"
    return None


class NonFiniteLossError(ArithmeticError):
    """A loss was not finite; the message names the step and the noise level."""


@dataclasses.dataclass
class TrainState:
    """Everything that training changes. Steps are counted from 0; `step` is the next one to take.

    The target begins as a copy of the model, and neither it nor a teacher gets gradients.
    """

    model: Precond
    train: Train
    target: Precond | None = None  # the model's average, for methods that keep one
    teacher: Precond | None = None  # for methods that replace theirs in the course of the training
    weighting: nn.Module | None = None  # the learned part of the loss
    step: int = 0
    optimizer: torch.optim.Optimizer = dataclasses.field(init=False)
    emas: list[Ema] = dataclasses.field(init=False)
    window: list[tuple[int, Loss, Tensor]] = dataclasses.field(default_factory=list)  # steps not yet summed up

    def __post_init__(self) -> None:
        if self.target is not None:
            self.target.load_state_dict(self.model.state_dict())
            self.target.requires_grad_(False)
        self.begin_afresh()

    def begin_afresh(self) -> None:
        """Forget what optimiser and averages gathered; they begin anew at the current weights."""
        self.optimizer = self.train.optimizer.build(self.parameters())
        self.emas = [Ema(rule, self.model) for rule in self.train.emas]

    def replace_teacher(self) -> None:
        """Let the model become its own teacher, as at the beginning of a halving (PD)."""
        self.teacher.load_state_dict(self.model.state_dict())
        self.begin_afresh()

    def parameters(self) -> list[nn.Parameter]:
        """Return what the optimiser changes."""
        return [p for module in (self.model, self.weighting) if module is not None for p in module.parameters()]

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the weights, moments and averages."""
        return sharding.is_sharded(next(self.model.parameters()))

    def save(self, folder: Path) -> None:
        """Write the state, whole, to `folder/step-<step>` atomically; all processes must call, the first one writes."""
        tensors = sharding.gathered({**self._tensors(), **self._window_tensors()})
        if ranks.is_main():
            save_state(folder, self.step, tensors, {})

    def restore(self, state: Path | None) -> None:
        """Continue from a saved state, bitwise; the models and optimiser must be built from the same recipe.

        Of several processes all must call. The first alone names the state, and all then hold it.
        """
        tensors = {}
        if ranks.is_main():
            tensors, values = load_state(state)
            tensors["step"] = torch.tensor(values["step"])
        self._take(ranks.broadcast_from_main(tensors), whence=str(state or "what the first process sent"))

    def share(self) -> None:
        """Let every process hold the first one's state, bitwise; all must call. A divided one all hold together."""
        if ranks.world_size() == 1 or self.is_sharded:
            return
        mine = {**self._tensors(), **self._window_tensors(), "step": torch.tensor(self.step)}
        tensors = dict(ranks.broadcast_from_main(mine))
        if not ranks.is_main():
            self._take(tensors.items(), whence="what the first process sent")

    def _take(self, whole: Iterable[tuple[str, Tensor]], *, whence: str) -> None:
        """Copy a state's tensors, one by one, into those that are here: whole, or the parts that this process holds."""
        own, moments, beside = self._weights(), {}, {}
        parameters = {f"optimizer/{index}": p for index, p in enumerate(self.parameters())}
        for name, tensor in whole:
            if name in own:
                sharding.put(own.pop(name), tensor)
            elif name.rpartition("/")[0] in parameters:
                moments[name] = _beside(parameters[name.rpartition("/")[0]], tensor)
            else:
                beside[name] = tensor
        step = int(beside.pop("step"))
        self._load_window(beside, step)
        if own or beside:
            odd = min([*own, *beside])
            raise ValueError(f"{whence} is the state of another training (only one of the two has {odd})")
        self._load_optimizer(moments)
        self.step = step

    def averaged(self, index: int = 0) -> dict[str, Tensor]:
        """Return the state dict of the model with the weights of average `index`.

        All processes must call; where the state is divided, the first alone gets the weights, on the CPU.
        """
        return sharding.gathered({**self.model.state_dict(), **self.emas[index].weights})

    def _tensors(self) -> dict[str, Tensor]:
        tensors = self._weights()
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{name}": t for name, t in values.items()}
        return tensors

    def _weights(self) -> dict[str, Tensor]:
        tensors = {}
        for role in ("model", "target", "teacher", "weighting"):
            module = getattr(self, role)
            if module is not None:
                tensors |= {f"{role}/{name}": t for name, t in module.state_dict().items()}
        for index, ema in enumerate(self.emas):
            tensors |= {f"ema{index}/{name}": t for name, t in ema.weights.items()}
        return tensors

    def _window_tensors(self) -> dict[str, Tensor]:
        """Return what `fit` still needs of the steps since it last yielded metrics; nothing right after a yield."""
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
        self.window = [(first + i, Loss(loss, sigma), norm) for i, (loss, sigma, norm) in enumerate(rows)]

    def _load_optimizer(self, moments: dict[str, Tensor]) -> None:
        state = {}
        for name, tensor in moments.items():
            _, index, key = name.split("/")
            state.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _beside(parameter: nn.Parameter, tensor: Tensor) -> Tensor:
    """Return what the optimiser keeps of a parameter; a moment is divided, and lies in memory, as that is and does."""
    if tensor.shape != parameter.shape:
        return tensor
    moment = torch.empty_like(parameter, requires_grad=False)
    sharding.put(moment, tensor)
    return moment


def train_step(
    state: TrainState, method: Method, models: Models, batches: Batches, context: StepContext
) -> tuple[Loss, Tensor]:
    """Take one optimiser step, move the averages and the target; return the losses and the gradient's norm."""
    train = state.train
    whole = [p for p in state.parameters() if not sharding.is_sharded(p)]  # else FSDP2 sums the gradients
    with ranks.exchange() if state.is_sharded else nullcontext():
        loss = method.loss(models, batches.at(context.step), context)
        with summed_gradients(whole):
            (own_rows(loss.per_sample).sum() / len(loss.per_sample)).backward()
    grad_norm = _clip(state.parameters(), train.clip_norm)
    factor = method.learning_rate_factor(context.step, context.num_steps)
    factor *= linear_ramp(context.step, ramp_steps=train.ramp_steps)
    for group in state.optimizer.param_groups:
        group["lr"] = train.optimizer.learning_rate * factor
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    for ema in state.emas:
        ema.update(state.model, step=context.step, batch_size=train.batch_size)
    if state.target is not None:
        update_target(state.target, state.model, decay=method.target_decay_at(context.step, context.num_steps))
    state.step = context.step + 1
    # Without its graph, which would outlive this step: the next pass could not be recorded (graphs.py) beside it.
    return loss._replace(per_sample=gathered_rows(loss.per_sample.detach())), grad_norm


def fit(
    state: TrainState,
    method: Method,
    models: Models,
    batches: Batches,
    *,
    noise: Noise,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Iterator[dict[str, float]]:
    """Train from `state.step` to `state.train.num_steps`, yielding metrics every `log_every` steps and at the end.

    In between, after a step by which `stop_requested`, it yields no metrics, so that the caller can save and stop.
    Between two yields nothing waits for the device. Raises NonFiniteLossError, naming step and sigma, before
    the caller could save the spoiled state.
    """
    train = state.train
    state.model.train()
    models.target.train()  # the target's dropout must draw the student's mask
    while state.step < train.num_steps:
        step = state.step
        if method.replaces_teacher_at(step, train.num_steps):
            state.replace_teacher()
        generator = make_generator(batches.device, seed, "step", step)
        others = [ranks.rank()] if ranks.rank() else []  # of whom each drops other activations
        dropout_seed = derive_seed(seed, "dropout", step, *others)
        context = StepContext(step, train.num_steps, noise, generator, dropout_seed)
        loss, grad_norm = train_step(state, method, models, batches, context)
        state.window.append((step, loss, grad_norm))
        on_step()
        if state.step % train.log_every == 0 or state.step == train.num_steps:
            metrics = _summarise(state.window)
            state.window.clear()
            yield metrics
        elif stop_requested():
            _finite_losses(state.window)
            yield {}


def _clip(parameters: list[nn.Parameter], largest: float | None) -> Tensor:
    """Return the gradient's norm, and shorten the gradient where it is longer than `largest`."""
    norm = sharding.whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if largest is not None:
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm


def _finite_losses(window: list[tuple[int, Loss, Tensor]]) -> Tensor:
    """Return the losses [steps, B] on the CPU. Raises NonFiniteLossError."""
    losses = torch.stack([loss.per_sample for _, loss, _ in window]).cpu()  # [steps, B]; here the host waits
    if not losses.isfinite().all():
        row, column = (~losses.isfinite()).nonzero()[0].tolist()
        step, loss, _ = window[row]
        raise NonFiniteLossError(
            f"the loss became {losses[row, column]} at step {step}, sigma {loss.sigma[column].item():.4g}"
        )
    return losses


def _summarise(window: list[tuple[int, Loss, Tensor]]) -> dict[str, float]:
    losses, last = _finite_losses(window), window[-1][1]
    norms = torch.stack([norm for _, _, norm in window])
    return {
        "step": window[-1][0] + 1,
        "loss": losses.mean().item(),
        "grad_norm": norms.mean().item(),
        **{name: float(value) for name, value in last.scalars.items()},
    }
