"""DINOv2 vision transformer (Oquab et al., arXiv 2304.07193), inference only, for FD-DINOv2.

Parameter names are those of the published checkpoints. torch-fidelity's own extractor runs code fetched at run time
and takes no weights file; this one needs only the checkpoint.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 14  # pixels
PRETRAINED_GRID = 37  # patches a side: the checkpoints are trained at 518 pixels
NORM_EPS = 1e-6


class Size(NamedTuple):
    """Width, depth and attention heads of a published model."""

    dim: int
    depth: int
    num_heads: int


SIZES = {"s": Size(384, 12, 6), "b": Size(768, 12, 12), "l": Size(1024, 24, 16)}


class DinoV2(nn.Module):
    """Normalised RGB [B, 3, H, W], sides divisible by 14 -> class token [B, dim]."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.dim))
        self.mask_token = nn.Parameter(torch.zeros(1, size.dim))  # in the checkpoints, used in their training only
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + PRETRAINED_GRID**2, size.dim))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, size.dim, PATCH, stride=PATCH)})
        self.blocks = nn.ModuleList([Block(size.dim, size.num_heads) for _ in range(size.depth)])
        self.norm = nn.LayerNorm(size.dim, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:  # x [B, 3, H, W]
        patches = self.patch_embed["proj"](x)  # [B, dim, h, w]
        tokens = patches.flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], dim=1)
        tokens = tokens + self.position_at(*patches.shape[2:])
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)[:, 0]

    def position_at(self, height: int, width: int) -> Tensor:
        """Resample the position embedding to a grid of patches, as the published code does.

        The 0.1 once guarded against rounding; it shifts the sampling points slightly, so matching numbers need it.
        """
        grid = self.pos_embed[:, 1:].unflatten(1, (PRETRAINED_GRID, PRETRAINED_GRID)).permute(0, 3, 1, 2)
        scale = ((height + 0.1) / PRETRAINED_GRID, (width + 0.1) / PRETRAINED_GRID)
        if (height, width) != (PRETRAINED_GRID, PRETRAINED_GRID):
            grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


class Block(nn.Module):
    """Pre-norm attention and MLP, each scaled by a learned vector (LayerScale)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS), nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.mlp = Mlp(dim)
        self.ls1, self.ls2 = LayerScale(dim), LayerScale(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, dim]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, N, d]
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with a hidden width of four times `dim`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """Multiply each channel by a learned factor."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma
