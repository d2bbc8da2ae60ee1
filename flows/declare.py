"""What dvc.yaml and prefect.yaml say a second time: `python -m flows.declare` writes it from where it stands first.

dvc.yaml: a stage's signature gives params and input artifacts, the static import closure gives the code files;
outputs are written by hand. Nothing is imported for it, so that the code in a folder is judged, not the installed one.
prefect.yaml: one deployment a recipe, every value spelled out, because they fill the form.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flows.dvcfiles import GPU, PARAMS_FILE, STAGES_FILE

DEPLOYMENTS_FILE = "prefect.yaml"
WORK_POOL = GPU  # of a recipe: its heavy stages need one
PACKAGES = ("cm_core", "flows")
NOT_DECLARED = ("out_dir", "state_dir", "monitor")  # given to a stage, but no reason to run it again


def declare(root: Path, stage: str) -> dict[str, object]:
    """Return the `cmd`, `deps` and `params` of a stage as dvc.yaml writes them."""
    names = [name for name in read_signature(root, stage) if name not in NOT_DECLARED]
    artifacts = [f"out/{name.removesuffix('_dir')}" for name in names if name.endswith("_dir")]
    sections = [name for name in names if not name.endswith("_dir")]
    return {
        "cmd": f"cm stage {stage}",
        "deps": artifacts + import_closure(root, f"flows.stages.{stage}"),
        "params": [{PARAMS_FILE: sections}],
    }


def read_signature(root: Path, stage: str) -> list[str]:
    """Return the parameter names of the function STAGE in flows/stages/STAGE.py."""
    tree = ast.parse((root / "flows" / "stages" / f"{stage}.py").read_text())
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == stage)
    return [argument.arg for argument in function.args.args + function.args.kwonlyargs]


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


def write_declarations(root: Path) -> bool:
    """Rewrite cmd, deps and params of every stage in dvc.yaml, keeping all else; return whether it changed."""
    from dvc.utils.serialize import modify_yaml

    path = root / STAGES_FILE
    before = path.read_text()
    with modify_yaml(str(path)) as tree:
        for stage, entry in tree["stages"].items():
            entry.update(declare(root, stage))
            for key in [key for key in entry if key not in ("cmd", "deps", "params")]:
                entry.move_to_end(key)
    return path.read_text() != before


def deployment_entries(root: Path) -> list[dict[str, Any]]:
    """Return what prefect.yaml says of each deployment, one a recipe."""
    from flows.recipe import load_recipe, recipe_names

    return [
        {
            "name": name,
            "description": _first_comment(root / "params" / "recipes" / f"{name}.yaml"),
            "entrypoint": "flows/pipeline.py:consistency",
            "parameters": {"recipe": load_recipe(name, root=root).model_dump(mode="json"), "name": name},
            "work_pool": {"name": WORK_POOL},
        }
        for name in recipe_names(root)
    ]


def deployments(root: Path) -> str:
    """Return the text of prefect.yaml."""
    import yaml

    tree = {"name": "consistency", "deployments": deployment_entries(root)}
    head = "# One deployment a recipe; written by `python -m flows.declare` from params/recipes/, not by hand.\n"
    return head + yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)


def _first_comment(page: Path) -> str:
    return page.read_text().partition("\n")[0].removeprefix("#").strip()


if __name__ == "__main__":
    changed = write_declarations(Path.cwd())
    print(f"{STAGES_FILE}: {'rewritten' if changed else 'up to date'}")
    Path(DEPLOYMENTS_FILE).write_text(deployments(Path.cwd()))
    print(f"{DEPLOYMENTS_FILE}: written")
