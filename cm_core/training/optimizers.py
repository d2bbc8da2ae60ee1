"""The optimisers, and RAdam by Adam's fused kernel."""

import math
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field
from torch import nn

from cm_core.params import Params

UNRECTIFIED_EPSILON = 1e12  # beside it the second moment counts for nothing, in float32 to the bit


class _AdamLike(Params):
    """What Adam and its kin have in common, in the order of the forms."""

    kind: str
    learning_rate: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    """Decays of the gradient's first and second moment."""
    epsilon: float = Field(1e-8, gt=0)
    """Added to the denominator."""

    def _settings(self) -> dict[str, Any]:
        return {"lr": self.learning_rate, "betas": self.betas, "eps": self.epsilon}


class Adam(_AdamLike):
    """Adam without weight decay (EDM, Table 7)."""

    model_config = ConfigDict(title="adam")

    kind: Literal["adam"] = "adam"
    """Name of the optimiser."""
    learning_rate: float = Field(1e-3, gt=0)
    """Step size (EDM, Table 7: 1e-3 on CIFAR-10)."""

    def build(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimiser; one fused kernel on a GPU."""
        return torch.optim.Adam(parameters, fused=parameters[0].is_cuda, **self._settings())


class RAdam(_AdamLike):
    """Rectified Adam without weight decay (CM, Table 3)."""

    model_config = ConfigDict(title="radam")

    kind: Literal["radam"] = "radam"
    """Name of the optimiser."""
    learning_rate: float = Field(4e-4, gt=0)
    """Step size (CM, Table 3: 4e-4 on CIFAR-10)."""

    def build(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimiser; one fused kernel on a GPU."""
        if parameters[0].is_cuda:
            return FusedRAdam(parameters, **self._settings())
        return torch.optim.RAdam(parameters, foreach=True, **self._settings())


class FusedRAdam(torch.optim.Adam):
    """RAdam (1908.03265, Alg. 2) as PyTorch computes it: every step is one of Adam with another rate and epsilon.

    Where so few gradients were seen that nothing bounds the variance of the rate, steps are those of momentum alone.
    """

    def __init__(self, parameters: list[nn.Parameter], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(parameters, lr=lr, betas=betas, eps=eps, fused=True)
        self.taken: int | None = None  # steps so far, those included that an overflow skipped

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state of this class or of torch.optim.RAdam."""
        super().load_state_dict(state_dict)
        self.taken = None

    def step(self) -> None:  # type: ignore[override]  # takes no closure
        """Take a step with the gradients that are there."""
        if self.taken is None:  # read from the device once
            self.taken = next((int(values["step"]) for values in self.state.values()), 0)
        (group,) = self.param_groups
        rate, epsilon = group["lr"], group["eps"]
        rectification, rest = _rectification(self.taken + 1, group["betas"][1])
        if rectification is None:
            group["lr"], group["eps"] = rate * UNRECTIFIED_EPSILON, UNRECTIFIED_EPSILON
        else:  # PyTorch's RAdam adds epsilon before the second moment is corrected, its Adam afterwards
            group["lr"], group["eps"] = rate * rectification, epsilon / math.sqrt(rest)
        super().step()
        group["lr"], group["eps"] = rate, epsilon
        self.taken += 1


def _rectification(step: int, beta2: float) -> tuple[float | None, float]:
    """Return RAdam's factor on the rate at a step counted from 1, or None, and 1 - beta2^step."""
    rest = 1 - beta2**step
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * (1 - rest) / rest
    if length <= 5:
        return None, rest
    ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    return math.sqrt(ratio), rest
