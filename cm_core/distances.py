"""Distances d(a, b) between images, one number per sample: [B, ...] x [B, ...] -> [B]."""

import math
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cm_core.params import Params

Distance = Callable[[Tensor, Tensor], Tensor]


class Pixelwise(Params):
    """Mean over the sample of absolute or squared differences (CM, section 5, as the code computes l1 and l2)."""

    kind: Literal["l2", "l1"] = "l2"
    """Name of the distance: l1 absolute, l2 squared differences."""

    def build(self, image_shape: tuple[int, ...]) -> Distance:
        """Return the function; any image shape."""
        size = Tensor.abs if self.kind == "l1" else Tensor.square
        return lambda a, b: size(a - b).flatten(1).mean(1)


class PseudoHuber(Params):
    """sqrt(|a - b|^2 + c^2) - c with the norm over the whole sample (iCT, eq. 7), never element-wise."""

    kind: Literal["pseudo_huber"] = "pseudo_huber"
    """Name of the distance."""
    c_per_sqrt_dim: float = Field(0.00054, ge=0)
    """c / sqrt(D), D the number of values a sample has (iCT, section 3.3)."""

    def build(self, image_shape: tuple[int, ...]) -> Distance:
        """Return the function for samples of `image_shape`, which sets c."""
        c = self.c_per_sqrt_dim * math.sqrt(math.prod(image_shape))
        return lambda a, b: pseudo_huber(a, b, c=c)


class Lpips(Params):
    """Learned perceptual distance on VGG16 features (CM, section 5); weights from a download or a path."""

    kind: Literal["lpips"] = "lpips"
    """Name of the distance."""
    pooling: Literal["max", "avg"] = "max"
    """VGG's pooling: max as trained (CM on CIFAR-10), avg as the paper's ImageNet-64 and LSUN runs."""
    resize_below: int = Field(256, ge=32)
    """Images with a side below this many pixels are resized to 224 x 224 first, bilinearly."""
    weights: str | None = None
    """VGG16 state dict (torchvision's layout): path or s3:// URI; empty: torchvision's own download."""
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    """SHA-256 of the weights file; checked before use."""

    def build(self, image_shape: tuple[int, ...], vgg16: Path | None = None) -> "LpipsDistance":
        """Return the frozen fp32 module. Raises ValueError for unfit images, FileNotFoundError for missing weights."""
        check_lpips_shape(image_shape)
        return LpipsDistance(pooling=self.pooling, resize_below=self.resize_below, vgg16=vgg16)


AnyDistance = Pixelwise | PseudoHuber | Lpips


def pseudo_huber(a: Tensor, b: Tensor, *, c: float) -> Tensor:
    """Return sqrt(|a - b|^2 + c^2) - c over each sample, [B]."""
    return ((a - b).flatten(1).square().sum(1) + c**2).sqrt() - c


def check_lpips_shape(image_shape: tuple[int, ...]) -> None:
    """Raise ValueError if LPIPS is undefined: not RGB, or below 16 x 16 pixels."""
    channels, height, width = image_shape
    if channels != 3 or min(height, width) < 16:
        raise ValueError(
            f"distance lpips needs RGB images of at least 16x16, got {channels}x{height}x{width}; "
            "use l1, l2 or pseudo_huber"
        )


class LpipsDistance(nn.Module):
    """LPIPS with VGG16, frozen, in fp32; gradients pass to its inputs only (LPIPS, 1801.03924; CM, section 5)."""

    def __init__(self, *, pooling: str, resize_below: int, vgg16: Path | None) -> None:
        super().__init__()
        self.resize_below = resize_below
        self.lpips = _load_lpips(vgg16).eval().requires_grad_(False)
        if pooling == "avg":
            for number in (2, 3, 4, 5):
                stage = self.lpips.get_submodule(f"net.slice{number}")
                for name, module in stage.named_children():
                    if isinstance(module, nn.MaxPool2d):
                        setattr(stage, name, nn.AvgPool2d(2))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:  # [B, 3, H, W] in -1..1 nominally -> [B]
        with torch.autocast(a.device.type, enabled=False):
            a, b = a.float(), b.float()
            if min(a.shape[-2:]) < self.resize_below:
                a = F.interpolate(a, size=(224, 224), mode="bilinear", align_corners=False)
                b = F.interpolate(b, size=(224, 224), mode="bilinear", align_corners=False)
            return self.lpips(a, b).flatten()


def _load_lpips(vgg16: Path | None) -> nn.Module:
    from cm_core.metrics.torchvision_shim import ensure_torchvision

    ensure_torchvision()
    import lpips

    if vgg16 is None:
        try:
            return lpips.LPIPS(net="vgg", verbose=False)
        except (urllib.error.URLError, OSError) as error:
            raise FileNotFoundError(
                f"LPIPS needs torchvision's VGG16 weights vgg16-397923af.pth and their download failed ({error}): "
                "set distance.weights to a path or s3:// URI, or use l1, l2 or pseudo_huber"
            ) from error
    model = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    state = torch.load(vgg16, map_location="cpu", weights_only=True)
    # torchvision numbers VGG16's layers in one sequence; lpips cuts it into slices but keeps the numbers
    for name in ("slice1", "slice2", "slice3", "slice4", "slice5"):
        stage = getattr(model.net, name)
        own = {k: state[f"features.{k}"] for k in stage.state_dict()}
        stage.load_state_dict(own)
    return model
