"""Non-leaking augmentation: random flips and affine maps, with their parameters as network input (EDM, App. F.2).

Conditioned on zeros when sampling, the network generates untransformed images. The affine part follows StyleGAN2-ADA
(arXiv:2006.06676, App. B.2): mirror, upsample by 2, sample bilinearly, downsample by 2.
Differs from EDM: mirrored borders without end; EDM's padding depends on the batch and may end in zeros.
"""

import math
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from cm_core.params import Params
from cm_core.tensors import expand_like

Transform = Literal["xflip", "yflip", "scale", "rotate", "aniso", "translate"]

LABEL_DIM = 9  # conditioning values per sample: 1, 1, 1, 2, 2 and 2 of them

SCALE_STD = 0.2  # of log2 of both scalings (EDM, App. F.2)
SHIFT_STD = 0.125  # of the translation, in image sizes (EDM, App. F.2)

# Low-pass taps of the sym6 wavelet (Daubechies, "Ten Lectures on Wavelets", table 6.3), orthonormal.
SYM6 = (
    *(0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633),
    *(0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252),
    *(-0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148),
)
MARGIN = len(SYM6) // 4  # pixels around the image that the downsampling filter reaches


class Draws(NamedTuple):
    """The transforms of a batch, each [B] and zero if not applied."""

    xflip: Tensor  # 0 or 1
    yflip: Tensor  # 0 or 1
    scale: Tensor  # in standard deviations of log2
    rotate: Tensor  # radians
    aniso: Tensor  # in standard deviations of log2
    aniso_axis: Tensor  # radians
    shift_x: Tensor  # in standard deviations
    shift_y: Tensor

    def labels(self) -> Tensor:
        """Return the conditioning of the network: [B, 9], zeros for an untouched image."""
        rotation = self.rotate.cos() - 1, self.rotate.sin()
        aniso = self.aniso * self.aniso_axis.cos(), self.aniso * self.aniso_axis.sin()
        return torch.stack([self.xflip, self.yflip, self.scale, *rotation, *aniso, self.shift_x, self.shift_y], dim=1)

    def inverse_map(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Return `linear` [B, 2, 2] and `shift` [B, 2]: output pixel p shows the input at linear @ (p - shift).

        Coordinates are (x, y) in pixels from the centre of the image.
        """
        shrink = torch.exp2(-SCALE_STD * self.scale)
        stretch = torch.exp2(SCALE_STD * self.aniso)
        aniso = _rotation(-self.aniso_axis) @ _diagonal(1 / stretch, stretch) @ _rotation(self.aniso_axis)
        linear = _diagonal(shrink, shrink) @ _rotation(self.rotate) @ aniso
        return linear, torch.stack([SHIFT_STD * width * self.shift_x, SHIFT_STD * height * self.shift_y], dim=1)


class Augment(Params):
    """Transform each image at random and return the parameters."""

    probability: float = Field(0.12, ge=0, le=1)
    """Probability of each transform, for each image (EDM: 0.12 CIFAR-10, 0.15 FFHQ and AFHQv2)."""
    transforms: tuple[Transform, ...] = get_args(Transform)
    """Which transforms may occur; xflip takes half of the images whatever the probability, unless that is 0."""

    def __call__(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the transformed images and their labels [B, 9] for `x` [B, C, H, W] on the generator's device."""
        if min(x.shape[2:]) <= MARGIN:
            raise ValueError(
                f"augment: images are {x.shape[2]}x{x.shape[3]}; allowed: at least {MARGIN + 1}x{MARGIN + 1}"
            )
        draws = self.draw(len(x), generator)
        x = torch.where(expand_like(draws.xflip, x) > 0, x.flip(3), x)
        x = torch.where(expand_like(draws.yflip, x) > 0, x.flip(2), x)
        if self.probability > 0 and not {"xflip", "yflip"}.issuperset(self.transforms):
            x = warp(x, *draws.inverse_map(*x.shape[2:]))
        return x, draws.labels()

    def draw(self, batch: int, generator: torch.Generator) -> Draws:
        """Draw the transforms of `batch` images; the random stream is the same for all settings."""

        def uniform() -> Tensor:
            return torch.rand(batch, generator=generator, device=generator.device)

        def normal() -> Tensor:
            return torch.randn(batch, generator=generator, device=generator.device)

        def applied(transform: Transform) -> Tensor:
            always = transform == "xflip" and self.probability > 0
            probability = 1.0 if always else self.probability
            return uniform() < (probability if transform in self.transforms else 0.0)

        translate = applied("translate")
        return Draws(
            xflip=applied("xflip") * (uniform() < 0.5).float(),
            yflip=applied("yflip") * (uniform() < 0.5).float(),
            scale=applied("scale") * normal(),
            rotate=applied("rotate") * math.pi * (2 * uniform() - 1),
            aniso=applied("aniso") * normal(),
            aniso_axis=(uniform() < 0.5) * math.pi * (2 * uniform() - 1),  # else along x
            shift_x=translate * normal(),
            shift_y=translate * normal(),
        )


def warp(x: Tensor, linear: Tensor, shift: Tensor) -> Tensor:
    """Return images [B, C, H, W] whose pixel p shows `x` at linear @ (p - shift), mirrored beyond its borders."""
    height, width = x.shape[2:]
    with torch.autocast(x.device.type, enabled=False):
        doubled = _doubling(height, x.dtype, x.device) @ x @ _doubling(width, x.dtype, x.device).T
        columns, rows = _doubled_positions(width, x), _doubled_positions(height, x)
        p = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)  # [H', W', 2]
        source_x, source_y = ((p - shift[:, None, None]) @ linear.mT[:, None]).unbind(-1)  # [B, H', W']
        # -1..1 spans the image and its two mirror images.
        grid = torch.stack([source_x / (1.5 * (width - 1)), source_y / (1.5 * (height - 1))], dim=-1)
        out = F.grid_sample(doubled, grid, mode="bilinear", padding_mode="reflection", align_corners=True)
        return _halving(height, x.dtype, x.device) @ out @ _halving(width, x.dtype, x.device).T


def _doubled_positions(size: int, like: Tensor) -> Tensor:
    """Return the sample positions of an upsampled axis with margins, in pixels from the centre of the image."""
    samples = torch.arange(2 * (size + 2 * MARGIN), dtype=like.dtype, device=like.device)
    return samples / 2 - MARGIN - (size - 1) / 2


@lru_cache  # cached: a copy from the host would make each step wait for the device
def _doubling(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the matrix [6 size - 5, size] that mirrors an axis at both ends and upsamples it by 2.

    Its samples span one mirror image's far end to the other's, where the signal mirrors itself again.
    """
    last = size - 1
    pixels = torch.arange(-last - MARGIN, 2 * last + MARGIN + 1)
    mirrored = last - (last - pixels % (2 * last)).abs()
    return _upsample(torch.eye(size)[:, mirrored])[:, 2 * MARGIN : -2 * MARGIN - 1].T.to(device, dtype)


@lru_cache
def _halving(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the matrix [size, 2 (size + 2 MARGIN)] that downsamples an axis by 2 and drops its margins."""
    # The filter is orthonormal: downsampling is the transpose of upsampling.
    return _upsample(torch.eye(size + 2 * MARGIN))[MARGIN:-MARGIN].to(device, dtype)


def _upsample(rows: Tensor) -> Tensor:
    """Upsample `rows` [N, L] by 2 with the sym6 filter."""
    taps = torch.tensor(SYM6)[None, None]
    return F.conv_transpose1d(rows[:, None], taps, stride=2, padding=len(SYM6) // 2 - 1)[:, 0]


def _rotation(angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))


def _diagonal(x: Tensor, y: Tensor) -> Tensor:
    return torch.diag_embed(torch.stack([x, y], dim=-1))
