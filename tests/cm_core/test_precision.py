"""The precision of float32 products, as PyTorch reads it."""

import pytest
import torch

from cm_core.precision import set_float32_products


@pytest.mark.parametrize("precision", ["tf32", "fp32", "bf16"])
def test_products_use_tf32_only_where_asked_and_the_compiler_can_read_it(precision):
    """Before, torch.compile and torch.export failed in a process that had trained."""
    set_float32_products(precision)
    asked = precision == "tf32"
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == asked
    set_float32_products("fp32")
