"""The training loop: `run` yields metrics, `step` is one optimiser step; the caller logs, saves and stops."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cm_core.curricula import linear_ramp
from cm_core.methods.base import Method
from cm_core.networks.dropout import seed_dropout
from cm_core.noise import Noise
from cm_core.parallel import ranks, sharding
from cm_core.parallel.gradients import summed_gradients
from cm_core.parallel.rows import gathered_rows, own_rows
from cm_core.randomness import derive_seed, make_generator
from cm_core.training.batches import Batches
from cm_core.training.ema import update_target
from cm_core.training.loss_scale import LossScale
from cm_core.training.state import LoggedStep, TrainState
from cm_core.types import Models, StepContext


class NonFiniteLossError(ArithmeticError):
    """A loss was not finite; the message names the step and the noise level."""


@dataclass
class Trainer:
    """The fixed inputs of a training; its state alone changes."""

    state: TrainState
    method: Method
    models: Models
    batches: Batches
    noise: Noise
    seed: int

    def run(
        self, *, on_step: Callable[[], None] = lambda: None, stop_requested: Callable[[], bool] = lambda: False
    ) -> Iterator[dict[str, float]]:
        """Train from `state.step` to `state.train.num_steps`, yielding metrics every `log_every` steps and at the end.

        After a step at which `stop_requested`, it yields no metrics in between, so that the caller can save and stop.
        Between yields nothing waits for the device. Raises NonFiniteLossError, naming step and sigma, before the caller
        could save the invalid state.
        """
        state, train = self.state, self.state.train
        state.model.train()
        self.models.target.train()  # the target's dropout must draw the student's mask
        while state.step < train.num_steps:
            if self.method.replaces_teacher_at(state.step, train.num_steps):
                state.replace_teacher()
            state.window.append(self.step())
            on_step()
            if state.step % train.log_every == 0 or state.step == train.num_steps:
                metrics = _summarise(state.window, state.loss_scale)
                state.window.clear()
                yield metrics
            elif stop_requested():
                _finite_losses(state.window)
                yield {}

    def step(self) -> LoggedStep:
        """Take one optimiser step, update the EMAs and the target; return the logged values."""
        state, train, method, step = self.state, self.state.train, self.method, self.state.step

        # All randomness is a function of (seed, step), so that a resumed training draws the same numbers.
        device, num_steps = self.batches.device, train.num_steps
        seed_dropout(derive_seed(self.seed, "dropout", step), device)
        context = StepContext(step, num_steps, self.noise, make_generator(device, self.seed, "step", step))

        # Every rank sees the whole batch and averages the losses of its own rows over it.
        whole = [p for p in state.parameters() if not sharding.is_sharded(p)]  # FSDP2 sums sharded gradients
        with ranks.exchange() if state.is_sharded else nullcontext():
            loss = method.loss(self.models, self.batches.at(step), context)
            mean = own_rows(loss.per_sample).sum() / len(loss.per_sample)
            with summed_gradients(whole):
                (mean if state.loss_scale is None else mean * state.loss_scale.scale).backward()
        grad_norm = self._unscale_and_clip()

        rate = train.optimizer.learning_rate * linear_ramp(step, ramp_steps=train.ramp_steps)
        for group in state.optimizer.param_groups:
            group["lr"] = rate * method.learning_rate_factor(step, num_steps)
        self._step_unless_overflow()
        state.optimizer.zero_grad(set_to_none=True)

        for ema in state.emas:
            ema.update(state.model, step=step, batch_size=train.batch_size)
        if state.target is not None:
            update_target(state.target, state.model, decay=method.target_decay_at(step, num_steps))
        state.step = step + 1
        # Detached: a live graph would keep the next pass from being captured as a CUDA graph (graphs.py).
        return LoggedStep(step, loss._replace(per_sample=gathered_rows(loss.per_sample.detach())), grad_norm)

    def _unscale_and_clip(self) -> Tensor:
        """Clip the gradient to norm `clip_norm`; return its norm before clipping."""
        parameters, scale = self.state.parameters(), self.state.loss_scale
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = sharding.whole(nn.utils.get_total_norm(gradients))
        if scale is not None:
            norm = scale.unscale([sharding.local(gradient) for gradient in gradients], norm)
        if self.state.train.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.state.train.clip_norm, norm)
        return norm

    def _step_unless_overflow(self) -> None:
        """Let the optimiser step unless gradients overflowed; fused optimisers decide that on the device."""
        optimizer, scale = self.state.optimizer, self.state.loss_scale
        if scale is None:
            optimizer.step()
            return
        if optimizer.defaults.get("fused"):
            optimizer.found_inf = scale.overflow  # type: ignore[attr-defined]  # as PyTorch's own GradScaler does
            optimizer.step()
        elif not scale.overflow:
            optimizer.step()
        scale.update()


def _finite_losses(window: list[LoggedStep]) -> Tensor:
    """Return the losses [steps, B] on the CPU. Raises NonFiniteLossError."""
    losses = torch.stack([logged.loss.per_sample for logged in window]).cpu()  # [steps, B]; here the host waits
    if not losses.isfinite().all():
        row, column = (~losses.isfinite()).nonzero()[0].tolist()
        step, loss, _ = window[row]
        raise NonFiniteLossError(
            f"the loss became {losses[row, column]} at step {step}, sigma {loss.sigma[column].item():.4g}"
        )
    return losses


def _summarise(window: list[LoggedStep], scale: LossScale | None) -> dict[str, float]:
    losses, last = _finite_losses(window), window[-1]
    norms = torch.stack([logged.grad_norm for logged in window])
    scaling = {}
    if scale is not None:
        norms = norms[norms.isfinite()]  # skipped steps have none, and are counted
        scaling = {"loss_scale": scale.scale.item(), "skipped_steps": scale.skipped.item()}
    return {
        "step": last.step + 1,
        "loss": losses.mean().item(),
        **({"grad_norm": norms.mean().item()} if len(norms) else {}),
        **{name: float(value) for name, value in last.loss.scalars.items()},
        **scaling,
    }
