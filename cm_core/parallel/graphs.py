"""Replay a network's passes as CUDA graphs: one launch for hundreds of kernels, where the host is the bottleneck."""

import functools
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import make_dual, unpack_dual

from cm_core.networks.modes import fuses, fuses_forward_mode, half_precision
from cm_core.parallel import ranks
from cm_core.parallel.gradients import GradientBuckets, exchanges

CUDA = torch.device("cuda")


def with_cuda_graphs(net: nn.Module) -> Callable[..., Tensor]:
    """Return passes through `net`: each kind is captured at its second call, then replayed.

    Passes are of one kind if shapes, mode and precision agree; grids and last batches of other sizes run eagerly.
    Parameters may change in place between passes. A pass that awaits its backward pass keeps its graph to itself, and
    gradients lie in the graph's memory: further passes, and passes that accumulate into existing gradients, run
    eagerly. With several ranks they raise RuntimeError, as captured gradients are sums over the ranks already
    (ranks.py). Only `backward` gives the gradients of a captured pass, not `torch.autograd.grad`. In forward mode
    without gradients, a pass is captured with its derivative.
    """
    seen: set[Hashable] = set()
    recorded: dict[Hashable, _Pass] = {}
    derived: dict[Hashable, _PassWithDerivative] = {}
    trained = [p for p in net.parameters() if p.requires_grad]  # now: in a step of another network's they need none
    cast_weights = functools.cache(functools.partial(_CastWeights, net, frozenset(trained)))
    anchor = torch.zeros((), requires_grad=True)  # gives a replay a backward pass

    def replayed(*args: Tensor | None) -> Tensor:
        if args[0] is not None and fuses_forward_mode(args[0]):
            duals = [_Dual(*unpack_dual(arg)) if arg is not None else _Dual(None, None) for arg in args]
            kind = _kind(net, [*(dual.primal for dual in duals), *(dual.tangent for dual in duals)])
            if kind not in seen:
                seen.add(kind)
                return net(*args)
            if kind not in derived:
                derived[kind] = _PassWithDerivative(net, duals, cast_weights(half_precision(CUDA)))
            return derived[kind](duals)
        if not _replayable(args):
            return net(*args)
        kind = _kind(net, args)
        if kind not in seen:  # the first run is eager: it compiles and selects kernels
            seen.add(kind)
            return net(*args)
        parameters = trained if torch.is_grad_enabled() else []
        if any(p.grad is not None for p in parameters) or (kind in recorded and recorded[kind].awaits_backward):
            if ranks.world_size() > 1:
                raise RuntimeError("of a network that several processes share, one pass at a time may have gradients")
            return net(*args)
        if kind not in recorded:
            recorded[kind] = _Pass(net, parameters, args, cast_weights(half_precision(CUDA)))
        return _Replay.apply(recorded[kind], args, anchor)

    return replayed


def _replayable(args: tuple[Tensor | None, ...]) -> bool:
    tensors = [arg for arg in args if arg is not None]
    return fuses(tensors[0]) and not any(arg.requires_grad for arg in tensors)


class _Dual(NamedTuple):
    """An argument and its tangent, if it has one."""

    primal: Tensor | None
    tangent: Tensor | None

    def made(self) -> Tensor | None:
        """Return the argument as a network takes it."""
        return self.primal if self.primal is None or self.tangent is None else make_dual(self.primal, self.tangent)


def _kind(net: nn.Module, args: Sequence[Tensor | None]) -> Hashable:
    shapes = tuple(None if arg is None else (arg.shape, arg.dtype) for arg in args)
    return torch.is_grad_enabled(), net.training, half_precision(CUDA), shapes


class _CastWeights:
    """Copies of a network's weights in autocast's precision, shared by all its captured passes; none without autocast.

    One kernel makes all copies and one brings their gradients back; autocast has one for each weight and each pass.
    Autocast must be in force for all convolutions and linear layers, as it is throughout this package's networks.
    """

    def __init__(self, net: nn.Module, trained: Collection[nn.Parameter], precision: torch.dtype | None) -> None:
        layers = [layer for layer in net.modules() if precision and isinstance(layer, (nn.Conv2d, nn.Linear))]
        layers = [layer for layer in layers if not getattr(layer, "keeps_float32", False)]
        self._homes = [(layer, cast(nn.Parameter, layer.weight)) for layer in layers]
        self.half_weights = {
            weight: nn.Parameter(weight.detach().to(precision), weight in trained) for _, weight in self._homes
        }

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the layers compute with the copies."""
        for layer, weight in self._homes:
            layer.weight = self.half_weights[weight]
        try:
            yield
        finally:
            for layer, weight in self._homes:
                layer.weight = weight

    @torch.no_grad()
    def update(self) -> None:
        """Update the copies."""
        if self.half_weights:
            torch._foreach_copy_(list(self.half_weights.values()), list(self.half_weights))


class _Pass:
    """A captured forward pass and, if there are parameters to train, its backward pass.

    While `awaits_backward`, a replay would overwrite activations that are still needed.
    """

    def __init__(
        self, forward: Any, parameters: list[nn.Parameter], args: tuple[Tensor | None, ...], casting: _CastWeights
    ) -> None:
        self.parameters, self.awaits_backward = parameters, False
        self.inputs = [None if arg is None else arg.detach().clone() for arg in args]
        self._forward, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with casting.in_place():
            with torch.cuda.graph(self._forward, stream=stream, capture_error_mode="thread_local"):
                casting.update()
                self._out = forward(*self.inputs)
            if parameters:
                self._d_out = torch.empty_like(self._out)
                self._backward = _BackwardPass(
                    self._out, self._d_out, parameters, casting.half_weights, self._forward.pool(), stream
                )
        self._out = self._out.detach()

    def forward(self, args: tuple[Tensor | None, ...]) -> Tensor:
        self.awaits_backward = bool(self.parameters)
        for held, arg in zip(self.inputs, args, strict=True):
            if held is not None and arg is not None:
                held.copy_(arg)
        self._forward.replay()
        return self._out.clone()

    def backward(self, d_out: Tensor) -> None:
        self.awaits_backward = False
        self._d_out.copy_(d_out)
        self._backward.replay()
        for p, gradient in zip(self.parameters, self._backward.gradients, strict=True):
            if gradient is not None:
                p.grad = gradient.detach() if p.grad is None else p.grad + gradient


class _PassWithDerivative:
    """A captured pass in forward mode: the value and its derivative along the tangents of the arguments."""

    def __init__(self, forward: Any, args: Sequence[_Dual], casting: _CastWeights) -> None:
        self._inputs = [_Dual(*(None if t is None else t.detach().clone() for t in arg)) for arg in args]
        self._graph = torch.cuda.CUDAGraph()
        with casting.in_place(), torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            casting.update()
            value, along = unpack_dual(forward(*(arg.made() for arg in self._inputs)))
        assert along is not None, "an argument has a tangent"
        self._out = value, along

    def __call__(self, args: Sequence[_Dual]) -> Tensor:
        for held, arg in zip(self._inputs, args, strict=True):
            for mine, given in zip(held, arg, strict=True):
                if mine is not None and given is not None:
                    mine.copy_(given)
        self._graph.replay()
        return make_dual(*(t.clone() for t in self._out))


class _BackwardPass:
    """A captured backward pass; with several ranks one graph per gradient bucket, sent while the next graph runs.

    Exchanges stay outside the graphs: NCCL would not monitor them, and could not shut down while the graphs exist.
    """

    def __init__(
        self,
        out: Tensor,
        d_out: Tensor,
        parameters: list[nn.Parameter],
        half_weights: dict[nn.Parameter, nn.Parameter],
        pool: Any,
        stream: Any,
    ) -> None:
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._buckets: list[Tensor | None] = []
        self._pool = pool
        buckets = GradientBuckets(self._cut)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream), torch.autocast("cuda", enabled=False):
            self._begin()
            with buckets.taken_from(parameters, half_weights):
                out.backward(d_out, inputs=[half_weights.get(p, p) for p in parameters])
            self._end(buckets.rest())
        self.gradients = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None

    def replay(self) -> None:
        with exchanges() as begin:
            for graph, bucket in zip(self._graphs, self._buckets, strict=True):
                graph.replay()
                if bucket is not None:
                    begin(bucket)

    def _begin(self) -> None:
        self._graphs.append(torch.cuda.CUDAGraph())
        # Other modes require a graph's capture to end in the thread that began it; autograd, which cuts, has threads.
        self._graphs[-1].capture_begin(self._pool, capture_error_mode="relaxed")

    def _end(self, bucket: Tensor | None) -> None:
        self._graphs[-1].capture_end()
        self._buckets.append(bucket)

    def _cut(self, bucket: Tensor) -> None:
        self._end(bucket)
        self._begin()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recorded: _Pass, args: tuple[Tensor | None, ...], anchor: Tensor) -> Tensor:
        ctx.recorded = recorded
        return recorded.forward(args)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[None, None, None]:
        ctx.recorded.backward(d_out)
        return None, None, None
