"""Feature networks of FID, KID, precision and recall, behind torch-fidelity's extractor interface.

`classifier` is trained on the data set's own labels: it needs no download and fits 8x8 scans, which mean nothing to
Inception. The others are pretrained, so their numbers compare with published ones.
"""

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class NetworkFacts:
    """Properties of an extractor that the metrics need."""

    short_name: str  # in names of metrics: fid_<short name>
    layer: str  # compared by FID, KID, precision and recall
    logits_layer: str | None  # class scores for the Inception score; None: no such layer
    needs_rgb: bool = True


NETWORKS = {
    "classifier": NetworkFacts("classifier", "features", "logits", needs_rgb=False),
    "inception-v3-compat": NetworkFacts("inception", "2048", "logits_unbiased"),
    "vgg16": NetworkFacts("vgg16", "fc2_relu", None),
    "dinov2_vits14": NetworkFacts("dinov2", "features", None),
    "dinov2_vitb14": NetworkFacts("dinov2", "features", None),
    "dinov2_vitl14": NetworkFacts("dinov2", "features", None),
}


DINO_SIDE = 224  # pixels, of published FD-DINOv2


class ClassifierFeatures(Params):
    """A small network trained on the data set's labels: any images, no download."""

    kind: Literal["classifier"] = "classifier"
    """Name of the feature network."""
    width: int = Field(16, ge=8, multiple_of=8)
    """Channels of the first of three levels, doubled at each; features have four times as many dimensions."""
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


class Classifier(nn.Module):
    """Three levels of two convolutions; float [B, C, H, W] in -1..1 -> logits [B, num_classes]."""

    def __init__(self, image_shape: tuple[int, int, int], *, num_classes: int, width: int) -> None:
        super().__init__()
        self.hyperparameters = {"image_shape": list(image_shape), "num_classes": num_classes, "width": width}
        self.levels = nn.Sequential(
            *_convolution(image_shape[0], width, stride=1),
            *_convolution(width, width, stride=1),
            *_convolution(width, 2 * width, stride=2),
            *_convolution(2 * width, 2 * width, stride=1),
            *_convolution(2 * width, 4 * width, stride=2),
            *_convolution(4 * width, 4 * width, stride=1),
        )
        self.head = nn.Linear(4 * width, num_classes)

    def features(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, 4 width]
        """Return the last level's averages over the image."""
        return self.levels(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def _convolution(in_channels: int, out_channels: int, *, stride: int) -> Iterator[nn.Module]:
    yield nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1)
    yield nn.GroupNorm(out_channels // 4, out_channels)
    yield nn.SiLU()


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
    net = _initialised((channels, height, width), num_classes, params.width, seed).to(device)
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


def _initialised(image_shape: tuple[int, int, int], num_classes: int, width: int, seed: int) -> Classifier:
    with seeded(derive_seed(seed, "classifier", "weights")):
        return Classifier(image_shape, num_classes=num_classes, width=width)


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


@functools.cache
def register_extractors() -> None:
    """Register `classifier` and the DINOv2 models with torch-fidelity, once per process."""
    from cm_core.metrics.torchvision_shim import ensure_torchvision

    ensure_torchvision()
    import torch_fidelity

    class Extractor(torch_fidelity.FeatureExtractorBase):  # type: ignore[misc]  # a library without types
        """Network of this package, built from a weights file; uint8 [B, C, H, W] -> the requested layers."""

        def __init__(
            self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **_: object
        ) -> None:
            super().__init__(name, features_list)
            if feature_extractor_weights_path is None:
                raise ValueError(f"feature extractor {name!r} needs feature_extractor_weights_path")
            self.read = _READERS[name](Path(feature_extractor_weights_path))

        def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
            layers = self.read(pixels)
            return tuple(layers[name] for name in self.features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return "features", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits" if metric == "isc" else "features"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

    for name in _READERS:
        torch_fidelity.register_feature_extractor(name, Extractor)


class _ClassifierReader(nn.Module):
    """uint8 [B, C, H, W] -> features and logits of a classifier."""

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self.net = load_classifier(weights)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        features = self.net.features(from_pixels(pixels.permute(0, 2, 3, 1)))
        return {"features": features, "logits": self.net.head(features)}


class _DinoReader(nn.Module):
    """uint8 [B, 3, H, W] -> class token; resized and normalised as for published FD-DINOv2 (2306.04675, dgm-eval)."""

    mean: Tensor
    std: Tensor

    def __init__(self, weights: Path, size: str) -> None:
        from cm_core.metrics.dinov2 import SIZES, DinoV2

        super().__init__()
        self.net = DinoV2(SIZES[size])
        self.net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        for name, values in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):  # ImageNet's
            self.register_buffer(name, 255 * torch.tensor(values)[:, None, None])

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"features": self.net((resize_like_pillow(pixels, DINO_SIDE) - self.mean) / self.std)}


def resize_like_pillow(pixels: Tensor, side: int) -> Tensor:
    """Return uint8 images [B, C, H, W] at `side` pixels, float32 of whole numbers: Pillow's bicubic to a grey level.

    Pillow rounds and clips after each of its passes, along rows first; one pass differs at edges by 20 levels.
    """
    x = pixels.float()
    for size in ((x.shape[2], side), (side, side)):
        x = F.interpolate(x, size, mode="bicubic", antialias=True).add(0.5).floor().clamp(0, 255)
    return x


_READERS: dict[str, Callable[[Path], nn.Module]] = {
    "classifier": _ClassifierReader,
    **{f"dinov2_vit{size}14": functools.partial(_DinoReader, size=size) for size in "sbl"},
}


def build_extractor(name: str, weights: Path, device: torch.device) -> nn.Module:
    """Return torch-fidelity's extractor `name` with its weights from a file, on `device`.

    Raises ValueError for an unknown extractor or a file with other weights.
    """
    if name not in NETWORKS:
        raise ValueError(f"feature extractor {name!r} is unknown; allowed: {', '.join(NETWORKS)}")
    register_extractors()
    from torch_fidelity.utils import create_feature_extractor

    if weights.suffix != ".safetensors":
        _require_plain_tensors(weights)
    layers = [layer for layer in (NETWORKS[name].layer, NETWORKS[name].logits_layer) if layer]
    try:
        extractor = create_feature_extractor(
            name, layers, cuda=False, feature_extractor_weights_path=str(weights), verbose=False
        )
    except RuntimeError as error:  # load_state_dict: missing, unexpected or misshapen tensors
        raise ValueError(f"{weights}: not the weights of {name} ({str(error).splitlines()[-1].strip()})") from error
    return extractor.to(device)


def _require_plain_tensors(weights: Path) -> None:
    """Refuse a pickle that would run code: torch-fidelity unpickles without restriction."""
    import pickle

    try:
        torch.load(weights, map_location="cpu", weights_only=True, mmap=False)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{weights}: not a state dict of plain tensors ({type(error).__name__})") from error


@dataclass(frozen=True)
class ImageFeatures:
    """An extractor's outputs for N images."""

    features: Tensor  # float32 [N, D]
    logits: Tensor | None  # float32 [N, K]


def extract_features(
    images: np.ndarray,  # uint8 [N, H, W, C]
    extractor: nn.Module,
    *,
    batch_size: int,
    device: torch.device,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> ImageFeatures:
    """Run images through an extractor; raises as `feature_batches` does."""
    batches = feature_batches(images, extractor, batch_size=batch_size, device=device, on_batch=on_batch)
    columns = [torch.cat(column) for column in zip(*([x.cpu() for x in batch] for batch in batches), strict=True)]
    return ImageFeatures(columns[0], columns[1] if len(columns) > 1 else None)


@torch.no_grad()
def feature_batches(
    images: np.ndarray,  # uint8 [N, H, W, C]
    extractor: nn.Module,
    *,
    batch_size: int,
    device: torch.device,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[list[Tensor]]:
    """Yield an extractor's outputs batch by batch, on the device; grey is repeated for networks that take colour.

    Raises ValueError for images that are not uint8 [N, H, W, C].
    """
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
        raise ValueError(f"images must be uint8 [N, H, W, C] with N > 0, got {images.dtype} {list(images.shape)}")
    repeats = 3 if NETWORKS[str(extractor.name)].needs_rgb and images.shape[-1] == 1 else 1
    for start in range(0, len(images), batch_size):
        pixels = torch.from_numpy(np.array(images[start : start + batch_size])).permute(0, 3, 1, 2)  # [B, C, H, W]
        outputs = extractor(pixels.repeat(1, repeats, 1, 1).to(device))
        yield [output.float() for output in outputs]
        on_batch(min(start + batch_size, len(images)), len(images))
