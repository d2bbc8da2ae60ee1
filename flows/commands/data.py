"""`cm data`: add the user's own images as versioned data, and list the versions."""

import re
import shutil
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from flows.commands.output import add_json_option, print_json, print_table
from flows.errors import UserError
from flows.stage_runner.progress import Bar
from flows.workspace.dvc_files import dvc
from flows.workspace.git import git
from flows.workspace.locations import shared_remote, workspace_root

ARRAYS = (".npz", ".npy")
EPOCH = (1980, 1, 1, 0, 0, 0)  # timestamp of every archive entry: equal images make equal bytes


def add_parsers(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser("data", help="list versioned data; `cm data add PATH` makes some of your images")
    parser.add_argument("action", metavar="add", nargs="?", choices=["add"], help="version the images at PATH")
    parser.add_argument("path", metavar="PATH", nargs="?", help="a folder, zip or tar of images, or an .npz or .npy")
    parser.add_argument("--name", metavar="NAME", help="what the data are called; default: the name of PATH")
    parser.add_argument("--description", metavar="TEXT", default="", help="one line for people")
    parser.add_argument(
        "--damaged",
        choices=("refuse", "keep"),
        default="refuse",
        help="images that cannot be used: refuse them all, by name (default), or keep them for data.damaged=skip",
    )
    add_json_option(parser)
    parser.set_defaults(command=data)


def data(args: Namespace) -> None:
    """List versioned data, or add some."""
    if args.action and not args.path:
        raise UserError("cm data add: expected a PATH of images")
    if args.action:
        add(workspace_root(), Path(args.path).expanduser(), args.name, args.description, args.damaged)
    else:
        show(workspace_root(), as_json=args.json)


def add(root: Path, path: Path, name: str | None, description: str, damaged: str) -> None:
    """Copy or pack images into data/, version them, and print how a recipe names them."""
    from flows.workspace.data_versions import FOLDER, add_versioned

    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    name = name or (path.name if path.is_dir() else path.name.partition(".")[0])
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise UserError(f"--name {name!r}: letters, digits, dots, dashes and underscores make a name")
    suffix = ".zip" if path.is_dir() else "".join(path.suffixes)
    kind, facts = describe(path, damaged)
    target = FOLDER / f"{name}{suffix}"
    (root / FOLDER).mkdir(exist_ok=True)
    _copy(path, root / target)
    version = add_versioned(root, target, description or f"{facts['images']} images", facts)
    print(f"{target}: {', '.join(f'{value} {key}' for key, value in facts.items())}, version {version}")
    url = shared_remote(root)
    if url:
        dvc(root, "push", f"{target}.dvc")
    print(f"pushed to {url}" if url else "on this machine alone: no DVC remote is shared")
    print(f"keep the version: git add {target}.dvc {FOLDER}/.gitignore && git commit")
    skip = " --set data.damaged=skip" if facts["unusable"] else ""
    print(f"use it: cm run RECIPE --set 'data.source={{kind: {kind}, path: {target}, version: {version}}}'{skip}")


def describe(path: Path, damaged: str = "refuse") -> tuple[str, dict[str, int]]:
    """Return the kind of source and its contents, every image decoded, as the stage `prepare` will read it.

    Raises UserError likewise; it names all images that cannot be used, unless they are to be kept.
    """
    import tempfile

    from flows.data.decoding import find_faults, list_faults
    from flows.data.sources.array import ArrayFile
    from flows.data.sources.image_files import Images

    source = (ArrayFile if path.suffix in ARRAYS else Images)(path=str(path))
    with tempfile.TemporaryDirectory(prefix="cm-data-") as scratch, Bar(f"reading {path}") as bar:
        contents = source.read(Path(scratch), bar)
        items = contents.train + (contents.heldout or [])
        faults = find_faults(items, bar)
    if faults and damaged == "refuse":
        raise list_faults(faults, len(items), "mend or remove them, or version them all the same with --damaged keep")
    facts = {"images": len(items), "classes": len(contents.class_names), "ignored files": len(contents.ignored)}
    return source.kind, {**facts, "unusable": len(faults)}


def _copy(path: Path, target: Path) -> None:
    """Copy a file, or pack a folder into one archive (DVC is slow with many files); the target appears atomically."""
    partial = target.with_name(f".{target.name}.part")
    try:
        if path.is_dir():
            _pack(path, partial)
        else:
            shutil.copyfile(path, partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _pack(folder: Path, archive: Path) -> None:
    from flows.data.archives import contents, folder_files

    files = sorted(folder_files(folder).items())
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as packed, Bar(f"packing {folder}") as bar:
        for done, (name, read) in enumerate(files, 1):
            packed.writestr(zipfile.ZipInfo(name, EPOCH), contents(read))
            bar.progress(done, len(files))


def show(root: Path, *, as_json: bool) -> None:
    """Print the versioned data and the commits of each version."""
    from flows.workspace.data_versions import version_of, versions

    found = [
        {
            "path": str(path),
            "version": version_of(entry),
            "bytes": entry["outs"][0]["size"],
            "here": (root / path).exists(),
            "description": entry.get("desc", ""),
            "commits": git(root, "log", "--format=%h", "--", f"{path}.dvc").decode().split(),
        }
        for path, entry in versions(root).items()
    ]
    if as_json:
        print_json(found)
    elif not found:
        print("No versioned data yet; `cm data add PATH` makes some of your images")
    else:
        print_table(("data", "version", "MB", "here", "commits", "description"), map(_cells, found))


def _cells(one: dict[str, Any]) -> tuple[str, ...]:
    size, here = f"{one['bytes'] / 1e6:,.1f}", "yes" if one["here"] else "no"
    return one["path"], one["version"], size, here, " ".join(one["commits"]) or "not committed", one["description"]
