"""What belongs to one optimiser, with its loss scale: the student, or the critic of methods that train one, too."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cm_core.parallel import sharding
from cm_core.training.config import Train
from cm_core.training.loss_scale import LossScale
from cm_core.training.optimizers import FusedRAdam


class Learner:
    """Modules, their optimiser and, for fp16, its loss scale. Names in a saved state begin with `prefix`."""

    def __init__(self, modules: Sequence[nn.Module | None], train: Train, *, prefix: str = "") -> None:
        self.modules = [module for module in modules if module is not None]
        self.train, self.prefix = train, prefix
        device = next(self.modules[0].parameters()).device
        self.loss_scale = LossScale(device) if train.precision == "fp16" else None
        self.reset()

    def reset(self) -> None:
        """Begin with a new optimiser at the current weights."""
        self.optimizer = self.train.optimizer.build(self.parameters())

    def parameters(self) -> list[nn.Parameter]:
        """Return the optimised parameters."""
        return [p for module in self.modules for p in module.parameters()]

    def learn(self, on: bool) -> None:
        """Let gradients reach the parameters, or pass through the modules to their inputs alone."""
        for p in self.parameters():
            p.requires_grad_(on)

    def scale_tensors(self) -> dict[str, Tensor]:
        """Return the loss scale's tensors, by name in a saved state."""
        tensors = {} if self.loss_scale is None else self.loss_scale.tensors()
        return {f"{self.prefix}loss_scale/{name}": tensor for name, tensor in tensors.items()}

    def moments(self) -> dict[str, Tensor]:
        """Return the optimiser's tensors, by name in a saved state."""
        state = self.optimizer.state_dict()["state"].items()
        return {f"{self.prefix}optimizer/{index}/{name}": t for index, values in state for name, t in values.items()}

    def places(self) -> dict[str, nn.Parameter]:
        """Return the parameters by the beginning of their moments' names in a saved state."""
        return {f"{self.prefix}optimizer/{index}": p for index, p in enumerate(self.parameters())}

    def load(self, moments: Mapping[str, Tensor]) -> None:
        """Restore the optimiser from named tensors, among which are its own."""
        state: dict[int, dict[str, Tensor]] = {}
        start = f"{self.prefix}optimizer/"
        for name in (name for name in moments if name.startswith(start)):
            index, key = name.removeprefix(start).split("/")
            state.setdefault(int(index), {})[key] = moments[name]
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def set_taken(self, steps: int) -> None:
        """Tell the optimiser how many steps it has taken, those included that an overflow skipped."""
        if isinstance(self.optimizer, FusedRAdam):
            self.optimizer.taken = steps


def moment_like(parameter: nn.Parameter, tensor: Tensor) -> Tensor:
    """Return a parameter's optimiser state; a moment is sharded, and laid out in memory, like its parameter."""
    if tensor.shape != parameter.shape:
        return tensor
    moment = torch.empty_like(parameter, requires_grad=False)
    sharding.put(moment, tensor)
    return moment
