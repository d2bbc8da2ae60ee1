"""Which of our files running a module may need, read from the import statements; nothing is imported for it."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("cm_core", "flows")


def import_closure(root: Path, module: str) -> list[str]:
    """Return the files under `root` that importing `module` may run, itself and its packages included, sorted."""
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        file = _find(root, name)
        if name in found or file is None:
            continue
        found[name] = file
        waiting += [*_parents(name), *_imports(ast.parse(file.read_text()), _package(name, file))]
    return sorted(file.relative_to(root).as_posix() for file in found.values())


def _find(root: Path, module: str) -> Path | None:
    """Return the file of one of our modules; None for other people's, and for names that are no modules."""
    if module.split(".")[0] not in PACKAGES:
        return None
    path = root.joinpath(*module.split("."))
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


def _package(module: str, file: Path) -> str:
    return module if file.name == "__init__.py" else module.rpartition(".")[0]


def _parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Yield what the code imports, functions included; `from a import b` may mean the module a.b, so both."""
    for node in _run_time_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, package)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk the tree, leaving out what stands under `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            node = ast.Module(node.orelse, [])
        yield node
        yield from _run_time_nodes(node)


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    return ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])
