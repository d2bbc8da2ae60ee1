"""Import torchvision when its compiled operators cannot be loaded, e.g. the CUDA wheel beside CPU PyTorch.

lpips and torch-fidelity use only its Python parts. The import fails because torchvision registers two operators
without checking that they exist; declaring their names is enough.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

UNGUARDED_OPERATORS = ("nms", "qnms")
_declarations: list[torch.library.Library] = []  # the declarations last as long as these objects


def ensure_torchvision() -> bool:
    """Import torchvision; return whether its operators had to be declared without code.

    Call it before the first import of torchvision, lpips or torch_fidelity. Raises ModuleNotFoundError without it.
    """
    if "torchvision" not in sys.modules:
        if not _load_compiled_operators():
            _declarations.append(_declare_operators())
        with _without_compiler():
            importlib.import_module("torchvision")
    return bool(_declarations)


def _load_compiled_operators() -> bool:
    spec = importlib.util.find_spec("torchvision")  # finds without importing
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("torchvision is not installed; lpips and torch-fidelity need it")
    for library in Path(spec.submodule_search_locations[0]).glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))
        except OSError:  # built for an absent CUDA or another PyTorch
            continue
    return hasattr(torch.ops.torchvision, "nms")


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Defer the import of PyTorch's compiler by torchvision's `roi_align`: it takes longer than all the rest."""
    package, module = "torch._dynamo", "torch._dynamo.utils"
    if package in sys.modules:
        yield
        return
    utils = ModuleType(module)
    vars(utils)["is_compile_supported"] = lambda kind: importlib.import_module(module).is_compile_supported(kind)
    sys.modules |= {package: ModuleType(package), module: utils}
    try:
        yield
    finally:
        del sys.modules[package], sys.modules[module]


def _declare_operators() -> torch.library.Library:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in UNGUARDED_OPERATORS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
