"""Heavy libraries are imported where they are used. Which module may import which: the contracts in pyproject.toml."""

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("cm_core", "flows")
# Libraries that cost a second or more, and the modules that may import them when they are imported themselves.
HEAVY = {
    "torch": (
        "cm_core.*",
        "flows.stages.*",
        "flows.recipes.recipe",
        "flows.inference.generate",
        "flows.distributed.launch",
        "flows.stage_runner.worker",
    ),
    "prefect": (
        "flows.pipeline",
        "flows.orchestration.artifacts",
        "flows.orchestration.embedded",
        "flows.orchestration.gpu_slots",
        "flows.orchestration.recovery",
        "flows.orchestration.results",
        "flows.orchestration.starter",
        "flows.sweep",
    ),
    "mlflow": ("flows.inference.server",),  # MLflow itself runs it
    **dict.fromkeys(["dvc", "boto3", "sklearn", "scipy", "matplotlib", "torchvision", "lpips"], ()),
    **dict.fromkeys(["torch_fidelity", "rich"], ()),
}
ENGINES = {"prefect", "mlflow", "dvc"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


@cache
def imports(module: str, *, on_import: bool = False) -> frozenset[str]:
    """Return what a module imports, ours by module; with `on_import` only what runs when it is imported itself."""
    tree = ast.parse(MODULES[module].read_text())
    return frozenset(found for node in walk(tree, on_import) for found in imported(node))


def walk(tree: ast.AST, on_import: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        inside_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        only_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not (on_import and (inside_function or only_types)):
            yield node
            yield from walk(node, on_import)


def imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, "imports are absolute here"
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            yield inner if inner in MODULES else node.module


@pytest.mark.parametrize("module", MODULES)
def test_heavy_libraries_are_imported_where_they_are_used(module):
    heavy = {name.partition(".")[0] for name in imports(module, on_import=True)} & HEAVY.keys()
    assert not {name for name in heavy if not any(fnmatch(module, allowed) for allowed in HEAVY[name])}


def closure(module: str, *, on_import: bool) -> set[str]:
    found, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += imports(name, on_import=on_import) if name in MODULES else ()
    return {name.partition(".")[0] for name in found if name not in MODULES} | (found & MODULES.keys())


@pytest.mark.parametrize(
    "module", ["flows.cli", "flows.workspace.clone", "flows.storage.fetch", "flows.monitor", "flows.checkpoints.store"]
)
def test_what_starts_quickly_imports_no_torch(module):
    assert not closure(module, on_import=True) & ({"torch", "pydantic", "numpy", "yaml"} | ENGINES)
