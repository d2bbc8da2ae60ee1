"""Static import closure of a module: imported project files, and templates that the code names."""

import ast
from collections.abc import Iterator
from importlib.util import resolve_name
from itertools import accumulate
from pathlib import Path

PACKAGES = ("cm_core", "flows")


def import_closure(root: Path, module: str) -> list[str]:
    """Return the project files under `root` that `module` may load, itself and its packages included, sorted."""
    found: dict[str, Path] = {}
    templates: set[Path] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        file = _find(root, name)
        if name in found or file is None:
            continue
        found[name] = file
        tree, package = ast.parse(file.read_text()), name if file.name == "__init__.py" else name.rpartition(".")[0]
        waiting += [*accumulate(name.split("."), "{}.{}".format), *_imports(tree, package)]  # packages, imports
        templates |= set(_templates(tree, file.parent))
    return sorted(file.relative_to(root).as_posix() for file in {*found.values(), *templates})


def _find(root: Path, module: str) -> Path | None:
    """Return the file of a project module; None for other modules and for names that are no modules."""
    if module.split(".")[0] not in PACKAGES:
        return None
    path = root.joinpath(*module.split("."))
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


def _imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Yield the imports of the code, inside functions too; `from a import b` may mean module a.b, so yield both."""
    for node in _run_time_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk the tree without the code under `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            node = ast.Module(node.orelse, [])
        yield node
        yield from _run_time_nodes(node)


def _templates(tree: ast.AST, folder: Path) -> Iterator[Path]:
    """Yield the files in `templates` beside a module that its string constants name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("templates/"):
            yield from [path] if (path := folder / node.value).is_file() else ()
