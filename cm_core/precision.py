"""Precision of a network's body; weights, preconditioning, losses and EMAs are always float32."""

from typing import Literal

import torch

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
"""fp32: IEEE. tf32: fp32 with products of 10 bits of mantissa, on NVIDIA GPUs. bf16: 7 bits. fp16: 10, narrow range."""

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_dtype(precision: Precision) -> torch.dtype | None:
    """Return the autocast dtype of the body; None for float32."""
    return _HALF.get(precision)


def set_float32_products(precision: Precision) -> None:
    """Let this process's float32 matrix products and convolutions use TF32 if `precision` says so, else IEEE."""
    # Not by `fp32_precision`, the newer names: PyTorch's compiler reads these, and refuses to where both were used.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
