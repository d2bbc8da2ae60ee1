"""Modes of the layers: PyTorch's own or this package's kernels, in float32 or in autocast's precision."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

# Parts of a U-Net that stay in float32 beside a half-precision body: "embedding", "input", "output".
FLOAT32_PARTS = frozenset({"embedding", "input", "output"})

_plain: ContextVar[bool] = ContextVar("plain", default=False)
_forward: ContextVar[bool] = ContextVar("forward", default=False)


@contextmanager
def plain_layers() -> Iterator[None]:
    """Use only PyTorch's own layers within this context, on a GPU too."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


@contextmanager
def forward_mode() -> Iterator[None]:
    """Use layers that have a forward-mode derivative: of the fused kernels the norms alone, and attention by matmul."""
    token = _forward.set(True)
    try:
        with plain_layers(), sdpa_kernel(SDPBackend.MATH), _WeightsWithoutTangents():
            yield
    finally:
        _forward.reset(token)


def derivative(
    function: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return a function's value and its derivative along `tangents`, by forward-mode differentiation.

    Without gradients not by torch.func, whose wrapped tensors cost the host more than the passes cost the GPU, and
    cannot be captured. With them by torch.func alone: of plain tensors, PyTorch's derivative of softmax overwrites what
    the backward pass needs.
    """
    with forward_mode():
        if torch.is_grad_enabled():
            found = torch.func.jvp(function, tuple(primals), tuple(tangents))
            return found[0], found[1]
        with dual_level():
            value, tangent = unpack_dual(function(*map(make_dual, primals, tangents)))
            return value, torch.zeros_like(value) if tangent is None else tangent


class _WeightsWithoutTangents(TorchFunctionMode):
    """Within this context, and where no gradients are wanted, only the input of a convolution has a tangent.

    PyTorch's own rule computes each a third time, with the zeros of the weights' tangent.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in LINEAR_IN_INPUT and not kwargs and not torch.is_grad_enabled():
            x, *rest = args  # detached: inside an autograd.Function PyTorch would record a graph of the weights
            return _LinearInInput.apply(func, x, *(arg.detach() if isinstance(arg, Tensor) else arg for arg in rest))
        return func(*args, **(kwargs or {}))


LINEAR_IN_INPUT = frozenset({F.conv2d, F.linear})


class _LinearInInput(torch.autograd.Function):
    """op(x, weight, bias, ...), whose tangent is op(tangent of x, weight, None, ...)."""

    @staticmethod
    def forward(op: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any) -> Tensor:
        return op(x, weight, bias, *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.op, _, weight, *options = inputs
        ctx.rest = options[1:]
        ctx.save_for_forward(weight)

    @staticmethod
    def jvp(ctx: Any, _op: None, tangent: Tensor, *_tangents: Any) -> Tensor:
        (weight,) = ctx.saved_tensors
        return ctx.op(tangent, weight, None, *ctx.rest)


def half_precision(device: torch.device) -> torch.dtype | None:
    """Return autocast's dtype if it is enabled on a device."""
    enabled = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else None


def is_plain() -> bool:
    """Whether `plain_layers` is in force."""
    return _plain.get()


def fuses_forward_mode(x: Tensor) -> bool:
    """Whether norms run `x` through this package's kernel of a forward-mode pass: on a GPU, without gradients."""
    return x.is_cuda and is_forward_mode() and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def is_forward_mode() -> bool:
    """Whether `forward_mode` is in force."""
    return _forward.get()


def fuses(x: Tensor) -> bool:
    """Whether layers run `x` through this package's kernels: on a GPU, except under torch.compile."""
    return x.is_cuda and not torch.compiler.is_compiling() and not is_plain()
