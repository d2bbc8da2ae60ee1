"""The training loop: `run` yields metrics, `step` is one optimiser step; the caller logs, saves and stops."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cm_core.curricula import learning_rate_decay, linear_ramp
from cm_core.methods.base import Method, Models, StepContext
from cm_core.networks.dropout import seed_dropout
from cm_core.networks.magnitude import force_norm, forced_weights
from cm_core.noise import Noise
from cm_core.parallel import ranks, sharding
from cm_core.parallel.gradients import summed_gradients
from cm_core.parallel.rows import gathered_rows, own_rows
from cm_core.randomness import derive_seed, make_generator
from cm_core.training.batches import Batches
from cm_core.training.ema import update_target
from cm_core.training.learner import Learner
from cm_core.training.loss_scale import LEAST
from cm_core.training.state import LoggedStep, TrainState

LOSS_AT_SIGMA = "loss_at_sigma/"  # prefix of metrics


class LossScaleError(ArithmeticError):
    """fp16 cannot hold a training's gradients: at the least loss scale some overflow, and the others vanish."""


class NonFiniteLossError(ArithmeticError):
    """A loss was not finite, or too many were; the message names the step and the noise level."""


@dataclass
class Trainer:
    """The fixed inputs of a training; its state alone changes."""

    state: TrainState
    method: Method
    models: Models
    batches: Batches
    noise: Noise
    seed: int

    def __post_init__(self) -> None:
        self._forced = list(forced_weights(self.state.model))

    def run(
        self, *, on_step: Callable[[], None] = lambda: None, stop_requested: Callable[[], bool] = lambda: False
    ) -> Iterator[dict[str, float]]:
        """Train from `state.step` to `state.train.num_steps`, yielding metrics every `log_every` steps and at the end.

        After a step at which `stop_requested`, it yields no metrics in between, so that the caller can save and stop.
        Between yields nothing waits for the device. Raises NonFiniteLossError, naming step and sigma, or
        LossScaleError, before the caller could save the invalid state.
        """
        state, train = self.state, self.state.train
        for learner in state.learners:
            for module in learner.modules:
                module.train()
        for model in (self.models.target, self.models.base):
            if model is not None:
                model.train()  # their dropout must draw the student's mask
        while state.step < train.num_steps:
            if self.method.replaces_teacher_at(state.step, train.num_steps):
                state.replace_teacher()
            state.window.append(self.step())
            on_step()
            if state.step % train.log_every == 0 or state.step == train.num_steps:
                metrics = _summarise(state)
                state.window.clear()
                yield metrics
            elif stop_requested():
                _check_losses(state)
                yield {}

    def step(self) -> LoggedStep:
        """Take one optimiser step: of the student, its EMAs and target, or of the critic; return the logged values."""
        state, train, method, step = self.state, self.state.train, self.method, self.state.step
        for weight in self._forced:  # before anything reads them: no pass changes a weight
            force_norm(sharding.local(weight))

        # All randomness is a function of (seed, step), so that a resumed training draws the same numbers.
        device, num_steps = self.batches.device, train.num_steps
        seed_dropout(derive_seed(self.seed, "dropout", step), device)
        context = StepContext(step, num_steps, self.noise, make_generator(device, self.seed, "step", step))

        # Every rank sees the whole batch and averages the losses of its own rows over it.
        learner = state.take_turn()
        whole = [p for p in learner.parameters() if not sharding.is_sharded(p)]  # FSDP2 sums sharded gradients
        with ranks.exchange() if state.is_sharded else nullcontext():
            loss = method.loss(self.models, self.batches.at(step), context)
            mean = own_rows(loss.per_sample).sum() / len(loss.per_sample)
            with summed_gradients(whole):
                (mean if learner.loss_scale is None else mean * learner.loss_scale.scale).backward()
        # Detached: a live graph would keep the next pass from being captured as a CUDA graph (graphs.py).
        losses = gathered_rows(loss.per_sample.detach())
        grad_norm = self._unscale_and_clip(learner)

        rate = train.optimizer.learning_rate * linear_ramp(step, ramp_steps=train.ramp_steps)
        rate *= learning_rate_decay(train.schedule, step, num_steps=num_steps, start=train.schedule_start)
        for group in learner.optimizer.param_groups:
            group["lr"] = rate * method.learning_rate_factor(step, num_steps)
        self._step_unless_spoiled(learner, losses, grad_norm)
        learner.optimizer.zero_grad(set_to_none=True)

        if learner is state.student:
            for ema in state.emas:
                ema.update(state.model, step=step // state.cycle, batch_size=train.batch_size)
            if state.target is not None:
                update_target(state.target, state.model, decay=method.target_decay_at(step, num_steps))
        state.step = step + 1
        return LoggedStep(step, loss._replace(per_sample=losses), grad_norm)

    def _unscale_and_clip(self, learner: Learner) -> Tensor:
        """Clip the gradient to norm `clip_norm`; return its norm before clipping."""
        parameters, scale = learner.parameters(), learner.loss_scale
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = sharding.whole(nn.utils.get_total_norm(gradients))
        if scale is not None:
            norm = scale.unscale([sharding.local(gradient) for gradient in gradients], norm)
        if self.state.train.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.state.train.clip_norm, norm)
        return norm

    def _step_unless_spoiled(self, learner: Learner, losses: Tensor, grad_norm: Tensor) -> None:
        """Let the optimiser step unless it has to be skipped; fused optimisers decide that on the device.

        Under fp16 a gradient that overflows while the losses are finite is the loss scale's affair alone.
        """
        optimizer, scale, skip = learner.optimizer, learner.loss_scale, None
        if self.state.train.on_nonfinite == "skip":
            skip = ~losses.isfinite().all()
            if scale is None:
                skip |= ~grad_norm.isfinite()
            else:
                scale.overflow.masked_fill_(skip, 0)
            self.state.nonfinite += skip
        if scale is not None:
            skip = scale.overflow if skip is None else scale.overflow + skip
        if skip is not None and optimizer.defaults.get("fused"):
            optimizer.found_inf = skip.float()  # type: ignore[attr-defined]  # as PyTorch's own GradScaler does
            optimizer.step()
        elif skip is None or not skip:
            optimizer.step()
        if scale is not None:
            scale.update()


def _check_losses(state: TrainState) -> tuple[Tensor, Tensor, Tensor]:
    """Return the window's losses and noise levels, each [steps, B], and which steps' are finite, [steps], on the CPU.

    Raises NonFiniteLossError.
    """
    window, train = state.window, state.train
    losses = torch.stack([logged.loss.per_sample for logged in window]).cpu()  # [steps, B]; here the host waits
    sigmas = torch.stack([logged.loss.sigma for logged in window]).cpu()
    skipped = int(state.nonfinite)
    if train.on_nonfinite == "skip" and skipped <= train.max_nonfinite:
        return losses, sigmas, losses.isfinite().all(1)
    if not losses.isfinite().all():
        row, column = (~losses.isfinite()).nonzero()[0].tolist()
        step, loss, _ = window[row]
        where = f"the loss became {losses[row, column]} at step {step}, sigma {loss.sigma[column].item():.4g}"
        raise NonFiniteLossError(where + (f"; {skipped} steps were skipped before it stopped" if skipped else ""))
    if skipped > train.max_nonfinite:
        raise NonFiniteLossError(f"{skipped} steps had gradients that are not finite, the last before {state.step}")
    return losses, sigmas, torch.ones(len(losses), dtype=torch.bool)


def loss_by_sigma(losses: Tensor, sigmas: Tensor) -> dict[str, float]:
    """Return the mean loss of each octave of noise levels that occurs, under its middle."""
    octaves = sigmas.log2().floor()
    return {
        LOSS_AT_SIGMA + f"{2 ** (octave + 0.5):.3g}".replace("+", ""): losses[octaves == octave].mean().item()
        for octave in octaves.unique().tolist()  # MLflow refuses a name with a plus, as in 1.45e+03
    }


def _summarise(state: TrainState) -> dict[str, float]:
    losses, sigmas, finite = _check_losses(state)
    window, skips = state.window, state.train.on_nonfinite == "skip"
    norms = torch.stack([logged.grad_norm for logged in window]).cpu()
    metrics = {"step": window[-1].step + 1, **({"nonfinite_steps": state.nonfinite.item()} if skips else {})}
    for learner in state.learners:
        steps = torch.tensor([state.learner_at(logged.step) is learner for logged in window])
        scale, prefix = learner.loss_scale, "" if learner is state.student else "critic_"
        counts, own = {}, steps & finite
        if scale is not None:
            counts = {"loss_scale": scale.scale.item(), "skipped_steps": scale.skipped.item()}
            if counts["loss_scale"] <= LEAST:
                raise LossScaleError(
                    f"{counts['skipped_steps']:.0f} steps overflowed, down to a loss scale of {LEAST:g}"
                )
        if skips or scale is not None:
            steps = steps & norms.isfinite()  # skipped steps have no norm, and are counted
        found = {
            **({"loss": losses[own].mean().item()} if own.any() else {}),
            **({"grad_norm": norms[steps].mean().item()} if steps.any() else {}),
            **counts,
            **loss_by_sigma(losses[own], sigmas[own]),
        }
        metrics |= {prefix + name: value for name, value in found.items()}
    return metrics | {name: float(value) for name, value in window[-1].loss.scalars.items()}
