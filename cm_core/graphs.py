"""Replay a network's passes as CUDA graphs: one launch for hundreds of kernels, where the host would be slower."""

from typing import Any

import torch
from torch import Tensor, nn

from cm_core.networks.layers import fuses


def replay_passes(net: nn.Module) -> None:
    """Let `net` record each kind of pass when it comes for the second time, and replay it from then on.

    A pass is of one kind with another if shapes, mode and precision agree; grids and last batches of other sizes run as
    before. Parameters may change in place between passes. A pass whose backward pass is still to come keeps its graph
    to itself, and gradients are handed out where the graph writes them: further passes, and passes that add to
    gradients that are already there, run as before.
    """
    plain, seen, recorded = net.forward, set(), {}
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)  # a recording has a stream of its own
    trained = [p for p in net.parameters() if p.requires_grad]

    def forward(*args: Tensor | None) -> Tensor:
        if not _replayable(args):
            return plain(*args)
        kind = _kind(net, args)
        if kind not in seen:  # run at least once without a graph: kernels are compiled and chosen then
            seen.add(kind)
            return plain(*args)
        if kind not in recorded:
            recorded[kind] = _Pass(plain, trained if torch.is_grad_enabled() else [], args)
        found = recorded[kind]
        if found.is_taken():
            return plain(*args)
        return _Replay.apply(found, args, *found.parameters)

    net.forward = forward


def _replayable(args: tuple[Tensor | None, ...]) -> bool:
    tensors = [arg for arg in args if arg is not None]
    return fuses(tensors[0]) and not any(arg.requires_grad for arg in tensors)


def _kind(net: nn.Module, args: tuple[Tensor | None, ...]) -> tuple:
    precision = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    shapes = tuple(None if arg is None else (arg.shape, arg.dtype) for arg in args)
    return torch.is_grad_enabled(), net.training, precision, shapes


class _Pass:
    """A recorded forward pass and, where there are parameters to train, its backward pass."""

    def __init__(self, forward: Any, parameters: list[Tensor], args: tuple[Tensor | None, ...]) -> None:
        self.parameters, self._awaits_backward = parameters, False
        self.inputs = [None if arg is None else arg.detach().clone() for arg in args]
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._forward, capture_error_mode="thread_local"):
            self._out = forward(*self.inputs)
        if parameters:
            self._d_out = torch.empty_like(self._out)
            off = torch.autocast("cuda", enabled=False)
            with off, torch.cuda.graph(self._backward, self._forward.pool(), capture_error_mode="thread_local"):
                self._gradients = torch.autograd.grad(self._out, parameters, self._d_out, allow_unused=True)
        self._out = self._out.detach()

    def is_taken(self) -> bool:
        """Whether a replay would write over activations or gradients that are still needed."""
        return self._awaits_backward or any(p.grad is not None for p in self.parameters)

    def forward(self, args: tuple[Tensor | None, ...]) -> Tensor:
        self._awaits_backward = bool(self.parameters)
        for held, arg in zip(self.inputs, args, strict=True):
            if arg is not None:
                held.copy_(arg)
        self._forward.replay()
        return self._out.clone()

    def backward(self, d_out: Tensor) -> list[Tensor | None]:
        self._awaits_backward = False
        self._d_out.copy_(d_out)
        self._backward.replay()
        return [None if gradient is None else gradient.detach() for gradient in self._gradients]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recorded: _Pass, args: tuple[Tensor | None, ...], *parameters: Tensor) -> Tensor:
        ctx.recorded = recorded
        return recorded.forward(args)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple:
        return None, None, *ctx.recorded.backward(d_out)
