"""The feature network `classifier`: trained on the labels of the data set, for images that mean nothing to ImageNet.

Two architectures of equal width: an FID by both is not the taste of one.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cm_core.params import Params
from cm_core.randomness import derive_seed, make_generator, seeded
from cm_core.tensors import from_pixels

Architecture = Literal["convnet", "convmixer"]
MIXER_BLOCKS, MIXER_KERNEL, MIXER_PATCH = 8, 5, 2  # ConvMixer-256/8 of the paper at width 64


class ClassifierFeatures(Params):
    """A small network trained on the data set's labels: any images, no download."""

    kind: Literal["classifier"] = "classifier"
    """Name of the feature network."""
    architecture: Architecture = "convnet"
    """convnet: three levels of two convolutions; convmixer: a ConvMixer (Trockman and Kolter, 2022) of eight blocks on
    patches of 2 x 2, a second opinion. Their metrics are called ..._classifier and ..._convmixer."""
    width: int = Field(16, ge=8, multiple_of=8)
    """A quarter of the dimensions of features; channels of the convnet's first level, doubled at each of three."""
    num_steps: int = Field(300, ge=10)
    """Optimiser steps."""
    batch_size: int = Field(128, ge=2)
    """Images per training step, and per inference batch afterwards."""
    learning_rate: float = Field(3e-3, gt=0)
    """Peak of the one-cycle learning rate of AdamW."""
    max_shift: int = Field(1, ge=0)
    """Training images are shifted by up to this many pixels each way."""
    flip: bool = False
    """Mirror training images at random; not for digits or letters."""

    @property
    def short_name(self) -> str:
        """The network in names of metrics: fid_<short name>."""
        return "classifier" if self.architecture == "convnet" else self.architecture


class Classifier(nn.Module):
    """Convolutions and a linear layer; float [B, C, H, W] in -1..1 -> logits [B, num_classes]."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        *,
        num_classes: int,
        width: int,
        architecture: Architecture = "convnet",
    ) -> None:
        super().__init__()
        self.hyperparameters = {"image_shape": list(image_shape), "num_classes": num_classes, "width": width}
        if architecture != "convnet":  # files of this one say nothing
            self.hyperparameters["architecture"] = architecture
        self.levels = nn.Sequential(*ARCHITECTURES[architecture](image_shape[0], width))
        self.head = nn.Linear(4 * width, num_classes)

    def features(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, 4 width]
        """Return the last layer's averages over the image."""
        return self.levels(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def _convnet(channels: int, width: int) -> Iterator[nn.Module]:
    """Yield three levels of two convolutions."""
    yield from _convolution(channels, width, stride=1)
    yield from _convolution(width, width, stride=1)
    yield from _convolution(width, 2 * width, stride=2)
    yield from _convolution(2 * width, 2 * width, stride=1)
    yield from _convolution(2 * width, 4 * width, stride=2)
    yield from _convolution(4 * width, 4 * width, stride=1)


def _convolution(in_channels: int, out_channels: int, *, stride: int) -> Iterator[nn.Module]:
    yield nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1)
    yield nn.GroupNorm(out_channels // 4, out_channels)
    yield nn.SiLU()


def _convmixer(channels: int, width: int) -> Iterator[nn.Module]:
    """Yield patches, then blocks at one resolution that mix places and channels in turn (2201.09792)."""
    dim = 4 * width
    yield from _mixing(nn.Conv2d(channels, dim, MIXER_PATCH, stride=MIXER_PATCH))
    for _ in range(MIXER_BLOCKS):
        yield Residual(*_mixing(nn.Conv2d(dim, dim, MIXER_KERNEL, padding=MIXER_KERNEL // 2, groups=dim)))
        yield from _mixing(nn.Conv2d(dim, dim, 1))


def _mixing(convolution: nn.Conv2d) -> tuple[nn.Module, ...]:
    return convolution, nn.GELU(), nn.BatchNorm2d(convolution.out_channels)


class Residual(nn.Sequential):
    """Layers whose input is added to their output."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


ARCHITECTURES: dict[Architecture, Callable[[int, int], Iterator[nn.Module]]] = {
    "convnet": _convnet,
    "convmixer": _convmixer,
}


def train_classifier(
    images: np.ndarray,  # uint8 [N, H, W, C]
    labels: np.ndarray,  # int64 [N]; -1: without label, left out
    *,
    num_classes: int,
    params: ClassifierFeatures,
    seed: int,
    device: torch.device,
    on_step: Callable[[int, Tensor], None] = lambda step, loss: None,
) -> Classifier:
    """Train a classifier by cross-entropy; `on_step` gets the steps taken and the loss.

    Raises ValueError if fewer than two classes occur among the labels.
    """
    (labelled,) = np.nonzero(labels >= 0)
    if len(np.unique(labels[labelled])) < 2:
        raise ValueError("the classifier needs images of at least two classes; use a pretrained feature network")
    height, width, channels = images.shape[1:]
    with seeded(derive_seed(seed, "classifier", "weights")):
        net = Classifier(
            (channels, height, width), num_classes=num_classes, width=params.width, architecture=params.architecture
        )
    net.to(device)
    optimiser = torch.optim.AdamW(net.parameters(), lr=params.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, params.learning_rate, total_steps=params.num_steps)
    for step in range(params.num_steps):
        generator = make_generator("cpu", seed, "classifier", step)
        indices = labelled[torch.randint(len(labelled), (params.batch_size,), generator=generator).numpy()]
        x0 = from_pixels(torch.from_numpy(images[indices]).to(device))
        x0 = _augment(x0, max_shift=params.max_shift, flip=params.flip, generator=generator)
        loss = F.cross_entropy(net(x0), torch.from_numpy(labels[indices]).to(device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        on_step(step + 1, loss.detach())
    return net.eval().requires_grad_(False)


def _augment(x0: Tensor, *, max_shift: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Shift the batch by one random offset, repeating its border, and mirror a random half."""
    height, width = x0.shape[2:]
    top, left = torch.randint(2 * max_shift + 1, (2,), generator=generator).tolist()
    x0 = F.pad(x0, (max_shift,) * 4, mode="replicate")[:, :, top : top + height, left : left + width]
    if flip:
        mirrored = torch.rand(len(x0), generator=generator).to(x0.device) < 0.5
        x0 = torch.where(mirrored[:, None, None, None], x0.flip(3), x0)
    return x0


@torch.no_grad()
def accuracy(net: Classifier, images: np.ndarray, labels: np.ndarray, *, batch_size: int) -> float:
    """Return the share of labelled `images` [N, H, W, C] that `net` classifies correctly."""
    (labelled,) = np.nonzero(labels >= 0)
    if not len(labelled):
        raise ValueError("accuracy needs at least one labelled image")
    device = next(net.parameters()).device
    hits = 0
    for indices in np.split(labelled, range(batch_size, len(labelled), batch_size)):
        predicted = net(from_pixels(torch.from_numpy(images[indices]).to(device))).argmax(1)
        hits += int((predicted.cpu().numpy() == labels[indices]).sum())
    return hits / len(labelled)


def save_classifier(net: Classifier, path: Path) -> None:
    """Write weights and shape as safetensors."""
    from safetensors.torch import save_file

    tensors = {name: tensor.cpu().contiguous() for name, tensor in net.state_dict().items()}
    # One entry: safetensors orders several at random, and the bytes must be deterministic.
    save_file(tensors, path, metadata={"classifier": json.dumps(net.hyperparameters)})


def load_classifier(path: Path) -> Classifier:
    """Read the output of `save_classifier`; raise ValueError if the file holds no classifier."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        described = (file.metadata() or {}).get("classifier")
        if described is None:
            raise ValueError(f"{path}: not the weights of a classifier (its metadata names none)")
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    hyperparameters = json.loads(described)
    net = Classifier(tuple(hyperparameters.pop("image_shape")), **hyperparameters)
    net.load_state_dict(tensors)
    return net.eval().requires_grad_(False)
