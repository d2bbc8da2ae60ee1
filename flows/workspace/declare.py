"""Generate the derived parts of dvc.yaml: `python -m flows.workspace.declare`.

A stage's signature gives params and input artifacts, the static import closure gives the code files; outputs are
written by hand. Nothing is imported, so the code in the folder decides, not the installed one.
"""

import ast
from collections.abc import Sequence
from pathlib import Path

from flows.workspace.dvc_files import PARAMS_FILE, STAGES_FILE, files_in
from flows.workspace.import_closure import import_closure

NOT_DECLARED = ("out_dir", "state_dir", "monitor")  # arguments that do not affect a stage's results


def declare(root: Path, stage: str) -> dict[str, object]:
    """Return the `cmd`, `deps` and `params` of the function STAGE in flows/stages/STAGE.py as dvc.yaml writes them."""
    tree = ast.parse((root / "flows" / "stages" / f"{stage}.py").read_text())
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == stage)
    parameters = [argument.arg for argument in function.args.args + function.args.kwonlyargs]
    names = [name for name in parameters if name not in NOT_DECLARED]
    artifacts = [f"out/{name.removesuffix('_dir')}" for name in names if name.endswith("_dir")]
    sections = [name for name in names if not name.endswith("_dir")]
    return {
        "cmd": f"cm stage {stage}",
        "deps": artifacts + whole_folders(root, import_closure(root, f"flows.stages.{stage}")),
        "params": [{PARAMS_FILE: sections}],
    }


def whole_folders(root: Path, files: Sequence[str]) -> list[str]:
    """Replace files by their folder if `files` contains all of its files: shorter, and as exact."""
    known = set(files)
    found: dict[str, None] = {}
    for file in files:
        folders = [folder.as_posix() for folder in Path(file).parents][-2::-1]  # outermost first
        whole = (folder for folder in folders if {f"{folder}/{name}" for name in files_in(root / folder)} <= known)
        found[next(whole, file)] = None
    return list(found)


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


if __name__ == "__main__":
    changed = write_declarations(Path.cwd())
    print(f"{STAGES_FILE}: {'rewritten' if changed else 'up to date'}")
