"""A consistency model with its sampler as one graph, for servers without this package: torch.export and ONNX."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cm_core.checkpoint import whole_file
from cm_core.model import ModelSpec
from cm_core.networks.modes import plain_layers
from cm_core.precond import Precond
from cm_core.tensors import to_pixels

OUTPUT = "images"


class SamplerGraph(nn.Module):
    """noise [B, steps, C, H, W], of unit variance, and labels [B] of a conditional model -> pixels uint8 [B, H, W, C].

    The sampler is `cm_core.sampling.multistep`. Raises ValueError for a model that is no consistency function.
    """

    def __init__(self, spec: ModelSpec, model: Precond, sigmas: Sequence[float]) -> None:
        super().__init__()
        if not spec.is_consistency_function:
            raise ValueError(f"the model is of form {spec.form}; a sampler within a graph needs a consistency function")
        spec.check_levels(sigmas)
        self.spec, self.model, self.sigmas = spec, model.eval(), list(sigmas)

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        x = torch.zeros_like(noise[:, 0])
        for position, sigma in enumerate(self.sigmas):
            std = sigma if position == 0 else math.sqrt(sigma**2 - self.spec.boundary**2)
            level = torch.full_like(noise[:, 0, 0, 0, 0], sigma)
            x = self.model(x + std * noise[:, position], level, labels).clamp(-1, 1)
        return to_pixels(x)

    def example(self, batch: int = 2) -> tuple[Tensor, ...]:
        """Return inputs of the right shapes."""
        noise = torch.randn(batch, len(self.sigmas), *self.spec.image_shape, generator=torch.Generator().manual_seed(0))
        labels = torch.arange(batch) % max(self.spec.num_classes, 1)
        return (noise, labels) if self.spec.num_classes else (noise,)

    def names(self) -> list[str]:
        """Return the names of the inputs."""
        return ["noise", "labels"][: len(self.example())]


def write_program(graph: SamplerGraph, path: Path) -> None:
    """Write a torch.export program, any number of images; `torch.export.load(path).module()` draws."""
    written = io.BytesIO()  # PyTorch's own writer ends the process where the disk is full
    torch.export.save(_program(graph), written)
    with whole_file(path) as partial:
        partial.write_bytes(written.getbuffer())


def write_onnx(graph: SamplerGraph, path: Path) -> int:
    """Write an ONNX model, any number of images; return the largest difference of pixels that onnxruntime makes.

    Needs the packages onnx, onnxscript and onnxruntime.
    """
    import onnxruntime

    program = torch.onnx.export(
        _program(graph), input_names=graph.names(), output_names=[OUTPUT], dynamo=True, verbose=False
    )
    assert program is not None, "dynamo=True returns one"
    program.save(str(path))
    inputs = graph.example(batch=3)
    with torch.no_grad():
        ours = graph(*inputs)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {name: value.numpy() for name, value in zip(graph.names(), inputs, strict=True)}
    theirs = torch.from_numpy(session.run([OUTPUT], feeds)[0])
    return int((theirs.int() - ours.int()).abs().max())


def _program(graph: SamplerGraph) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    with plain_layers(), torch.no_grad():
        shapes = tuple({0: batch} for _ in graph.example())
        return torch.export.export(graph, graph.example(), dynamic_shapes=shapes)
