"""Feature networks of FID, KID, precision and recall, behind torch-fidelity's extractor interface.

`classifier` is trained on the data set's own labels: it needs no download and fits 8x8 scans, which mean nothing to
Inception. The others are pretrained, so their numbers compare with published ones.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cm_core.metrics.classifier import load_classifier
from cm_core.tensors import from_pixels


@dataclass(frozen=True)
class NetworkFacts:
    """Properties of an extractor that the metrics need."""

    layer: str  # compared by FID, KID, precision and recall
    logits_layer: str | None  # class scores for the Inception score; None: no such layer
    resize: str  # of images before the network, in words
    needs_rgb: bool = True


DINO_SIDE = 224  # pixels, of published FD-DINOv2
DINO = NetworkFacts("features", None, f"bicubic, Pillow's, to {DINO_SIDE} pixels")
NETWORKS = {
    "classifier": NetworkFacts("features", "logits", "none", needs_rgb=False),
    "inception-v3-compat": NetworkFacts("2048", "logits_unbiased", "bilinear, TensorFlow 1's, to 299 pixels"),
    "vgg16": NetworkFacts("fc2_relu", None, "bilinear, TensorFlow 1's, to 224 pixels"),
    **{f"dinov2_vit{size}14": DINO for size in "sbl"},
}


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
