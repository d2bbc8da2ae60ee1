"""The optimisers, and RAdam by Adam's fused kernel."""

import math
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from cm_core.params import Params

UNRECTIFIED_EPSILON = 1e12  # dwarfs the second moment, in float32 bitwise


class Optimizer(Params):
    """Adam, with decoupled weight decay if asked for (AdamW), or rectified Adam."""

    kind: Literal["radam", "adam"] = "radam"
    """Name of the optimiser: radam as in CM, adam as in EDM."""
    learning_rate: float = Field(gt=0)
    """Step size (on CIFAR-10 4e-4 in CM, Table 3, with radam; 1e-3 in EDM, Table 7, with adam)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decays of the gradient's first and second moment."""
    epsilon: float = Field(1e-8, gt=0)
    """Added to the denominator."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay per step size, of adam alone (AdamW, 1711.05101; DMD2: 0.01)."""

    @model_validator(mode="after")
    def _decays(self) -> "Optimizer":
        if self.weight_decay > 0 and self.kind != "adam":
            raise ValueError(f"weight_decay={self.weight_decay:g} needs kind: adam, and kind is {self.kind}")
        return self

    def build(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimiser; one fused kernel on a GPU."""
        on_gpu = parameters[0].is_cuda
        settings: dict[str, Any] = {"lr": self.learning_rate, "betas": self.betas, "eps": self.epsilon}
        if self.kind == "adam":
            settings |= {"weight_decay": self.weight_decay, "decoupled_weight_decay": True}
            return torch.optim.Adam(parameters, fused=on_gpu, **settings)
        return FusedRAdam(parameters, **settings) if on_gpu else torch.optim.RAdam(parameters, foreach=True, **settings)


class FusedRAdam(torch.optim.Adam):
    """RAdam (1908.03265, Alg. 2) as PyTorch computes it: every step is one of Adam with another rate and epsilon.

    Early steps, while the rate's variance is unbounded, use momentum alone.
    """

    def __init__(self, parameters: list[nn.Parameter], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(parameters, lr=lr, betas=betas, eps=eps, fused=True)
        self.taken: int | None = None  # steps so far, including those that an overflow skipped

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state of this class or of torch.optim.RAdam."""
        super().load_state_dict(state_dict)
        self.taken = None

    def step(self) -> None:  # type: ignore[override]  # takes no closure
        """Take a step with the current gradients."""
        if self.taken is None:  # read once from the device
            self.taken = next((int(values["step"]) for values in self.state.values()), 0)
        (group,) = self.param_groups
        rate, epsilon = group["lr"], group["eps"]
        rectification, rest = _rectification(self.taken + 1, group["betas"][1])
        if rectification is None:
            group["lr"], group["eps"] = rate * UNRECTIFIED_EPSILON, UNRECTIFIED_EPSILON
        else:  # PyTorch's RAdam adds epsilon before bias correction, its Adam afterwards
            group["lr"], group["eps"] = rate * rectification, epsilon / math.sqrt(rest)
        super().step()
        group["lr"], group["eps"] = rate, epsilon
        self.taken += 1


def _rectification(step: int, beta2: float) -> tuple[float | None, float]:
    """Return RAdam's rectification (None while undefined) at a step counted from 1, and 1 - beta2^step."""
    rest = 1 - beta2**step
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * (1 - rest) / rest
    if length <= 5:
        return None, rest
    ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    return math.sqrt(ratio), rest
