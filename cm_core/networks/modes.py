"""How layers compute: plainly or by the kernels of this package, in float32 or in the precision of autocast."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# Parts of a U-Net that compute in float32 beside a body in half precision: "embedding", "input", "output".
FLOAT32_PARTS = frozenset({"embedding", "input", "output"})

_plain: ContextVar[bool] = ContextVar("plain", default=False)


@contextmanager
def plain_layers() -> Iterator[None]:
    """Compute by PyTorch's own layers alone within this context, on a GPU too."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


@contextmanager
def forward_mode_attention() -> Iterator[None]:
    """Compute plainly, attention by matmul and softmax: fused kernels have no forward-mode derivative.

    >>> with forward_mode_attention():
    ...     out, tangent = torch.func.jvp(net, primals, tangents)
    """
    with plain_layers(), sdpa_kernel(SDPBackend.MATH):
        yield


def keep_parts_float32(**parts: nn.Module) -> None:
    """Let `in_own_precision` compute those of the named parts in float32 that FLOAT32_PARTS names."""
    for name in FLOAT32_PARTS & parts.keys():
        for module in parts[name].modules():
            module.keeps_float32 = True  # type: ignore[assignment]  # a mark, neither tensor nor module


def in_own_precision(module: nn.Module, *args: Tensor | None) -> Tensor:
    """Compute a part of a network; under autocast in float32 where it was told to keep that."""
    device = next(arg for arg in args if arg is not None).device
    if half_precision(device) is None or not getattr(module, "keeps_float32", False):
        return module(*args)
    args = tuple(arg.float() if arg is not None and arg.is_floating_point() else arg for arg in args)
    with torch.autocast(device.type, enabled=False):
        return module(*args)


def half_precision(device: torch.device) -> torch.dtype | None:
    """Return the dtype of autocast where it is in force on a device."""
    enabled = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else None


def is_plain() -> bool:
    """Whether `plain_layers` is in force."""
    return _plain.get()


def fuses(x: Tensor) -> bool:
    """Whether layers run `x` through the kernels of this package: on a GPU, unless torch.compile makes its own."""
    return x.is_cuda and not torch.compiler.is_compiling() and not is_plain()
