"""A recipe's images, listed before anything is computed: names, splits and labels, without a pixel."""

import zipfile
from pathlib import Path

from flows.data.formats import PLUGINS, missing_plugins
from flows.data.latents import Encoding
from flows.data.sources import FileSource, Source
from flows.data.sources.image_files import Images
from flows.errors import UserError
from flows.monitor import Monitor
from flows.storage.fetch import is_local, local_path


def check_source(source: Source, root: Path) -> str:
    """Return a line on the images of a recipe; local folders and zips are listed as the stage `prepare` will.

    Raises UserError for what is not there, cannot be read, or is listed in a way that `prepare` would refuse.
    """
    if not isinstance(source, FileSource):
        return source.kind
    paths = {}
    for field in ("path", "heldout_path"):
        if (uri := getattr(source, field)) and is_local(uri):
            paths[field] = root / local_path(uri)
            if not paths[field].exists() and not (root / f"{uri}.dvc").is_file():
                raise UserError(f"data.source.{field}: {uri}: no such file or folder")
    places = [source.path] + ([source.heldout_path] if source.heldout_path else [])
    quick = len(paths) == len(places) and all(one.is_dir() or zipfile.is_zipfile(one) for one in paths.values())
    if not isinstance(source, Images) or not quick:
        return f"{source.origin()}, read by the first run"
    listed = source.model_copy(update={field: str(path) for field, path in paths.items()})
    contents = listed.read(Path("/nonexistent"), Monitor())  # nothing is unpacked
    images, classes = len(contents.train) + len(contents.heldout or ()), len(contents.class_names)
    return f"{source.origin()}: {images} images, {classes or 'no'} classes, {len(contents.ignored)} other files"


def check_latents(latents: Encoding | None, root: Path) -> None:
    """Raise UserError for an autoencoder that is not there or cannot be used, or lacks the package that it needs."""
    if latents is None or not is_local(latents.autoencoder):
        return
    folder = root / local_path(latents.autoencoder)
    if folder.is_dir():
        latents.model_copy(update={"autoencoder": str(folder)}).find(Path("/nonexistent"), Monitor())
    elif not (root / f"{latents.autoencoder}.dvc").is_file():
        raise UserError(f"data.latents.autoencoder: {latents.autoencoder}: no such folder")


def check_formats() -> str:
    """Return a line on the formats that need a package."""
    missing = missing_plugins()
    texts = []
    for name, (extensions, _, package) in PLUGINS.items():
        texts.append(f"{name}: " + (f"pip install {package}" if extensions[0] in missing else "read"))
    return ", ".join(texts)
