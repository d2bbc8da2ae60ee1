"""Images as files: a folder, a zip, a tar, or the objects under an s3:// prefix."""

import json
import posixpath
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field

from flows.data.archives import Files, archive_files, contents, first_bytes, folder_files, plain_name
from flows.data.formats import EXTENSIONS, HEAD, extension_by_contents, remedy
from flows.data.images import open_image
from flows.data.sources import MAX_CLASSES, Contents, FileSource, Item, label_gaps
from flows.data.sources.splits import find_splits, refuse_splits_below_classes
from flows.errors import UserError
from flows.monitor import Monitor
from flows.storage.fetch import download_dir, fetch, fetch_prefix, is_local, local_path
from flows.storage.s3 import public_uri

LABEL_FILE = "dataset.json"
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")

Classes = dict[str, str] | dict[str, int]  # name of an image -> its folder, or its number in the label file


class Images(FileSource):
    """Images as files, with or without classes."""

    model_config = ConfigDict(title="Image files")

    kind: Literal["images"] = "images"
    """PNG, JPEG, WebP, GIF, BMP, TIFF, PNM, AVIF, JPEG 2000 and QOI files; HEIC and JPEG XL with their packages."""
    path: str = Field(min_length=1)
    """A folder, a zip or tar (path, file://, http(s):// or s3://), or a prefix s3://bucket/folder/."""
    heldout_path: str | None = None
    """A second such place, held out; null takes a folder `test` or `val` beside `train`, or else a part at random."""
    splits: Literal["auto", "none"] = "auto"
    """Whether top-level folders named like `train` and `test` are splits, or, with none, classes like any others."""
    labels: Literal["auto", "folders", "file", "none"] = "auto"
    """From the folders that hold the images, an EDM-style dataset.json, or none; auto: the file where there is one."""

    def read(self, scratch: Path, monitor: Monitor) -> Contents:
        """List the images, their classes and split, without decoding them."""
        places = [self._open_place(self.path, self.sha256, scratch / "train", monitor)]
        if self.heldout_path:
            places.append(self._open_place(self.heldout_path, None, scratch / "heldout", monitor))
        splits, unused = self._splits(places)
        classes = [split.classes(self.labels) for split in splits]
        class_names, gaps = _class_names(classes[0])
        items = [_items(*pair, class_names) for pair in zip(splits, classes, strict=True)]
        ignored = tuple(name for place in places for name in place.ignored)
        return Contents(items[0], items[1] if len(items) > 1 else None, class_names, ignored, unused, gaps)

    def _splits(self, places: "list[_Place]") -> "tuple[list[_Place], dict[str, int]]":
        """Return training and held-out images, if the latter have a place, and the images of unused splits."""
        top, place = {name.partition("/")[0] if "/" in name else "" for name in places[0].images}, places[0]
        nested = {name.partition("/")[0] for name in place.images if name.count("/") > 1}
        found = find_splits(place.where, top, nested) if self.splits == "auto" else None
        if found and self.heldout_path:
            raise UserError(
                f"{place.where}: holds {found.train} and {found.heldout} and data.source.heldout_path is set; name"
                f" {found.train} as data.source.path, or set data.source.splits=none if they are classes"
            )
        if not found:
            if self.splits == "auto" and not place.numbers and self.labels != "none":
                refuse_splits_below_classes(place.where, place.images)
            return places, {}
        unused = {folder: len(place.below(folder).images) for folder in found.unused}
        return [place.below(found.train), place.below(found.heldout)], unused

    def _open_place(self, uri: str, sha256: str | None, scratch: Path, monitor: Monitor) -> "_Place":
        where = public_uri(uri).rstrip("/")
        files = _list_files(uri, sha256, scratch, monitor)
        images, ignored = _find_images(where, files)
        if not images:
            raise UserError(f"{where}: no images among {len(files)} files; extensions read are {' '.join(EXTENSIONS)}")
        # A folder that holds everything is no class: `photos.zip` often has `photos/` at its top.
        root = posixpath.commonpath([posixpath.dirname(name) for name in images])
        plain = {posixpath.relpath(name, root or "."): read for name, read in images.items()}
        where = posixpath.join(where, root).rstrip("/")
        found = [file for file in (posixpath.join(root, LABEL_FILE), LABEL_FILE) if file in files]
        if not found or self.labels not in ("auto", "file"):
            return _Place(where, plain, None, ignored)
        numbers = _read_label_file(f"{public_uri(uri)}/{found[0]}", files[found[0]])
        below = posixpath.relpath(root or ".", posixpath.dirname(found[0]) or ".")
        numbers = {posixpath.relpath(name, below): number for name, number in numbers.items()}
        ignored = tuple(name for name in ignored if name != found[0])
        return _Place(where, plain, _matched(where, numbers, plain), ignored)


@dataclass(frozen=True)
class _Place:
    """The images below one folder, by their relative names."""

    where: str
    images: Files
    numbers: dict[str, int] | None  # from the label file; empty if it declares no labels
    ignored: tuple[str, ...] = ()  # files that are not images

    def below(self, folder: str) -> "_Place":
        """Return the part below `folder`."""
        plain = {name: name.removeprefix(f"{folder}/") for name in self.images if name.startswith(f"{folder}/")}
        numbers = self.numbers and {plain[name]: self.numbers[name] for name in plain}
        return _Place(f"{self.where}/{folder}", {plain[name]: self.images[name] for name in plain}, numbers)

    def classes(self, labels: str) -> Classes | None:
        """Return the class of each image, or None if there are none."""
        if labels == "none" or self.numbers == {}:
            return None
        if self.numbers:
            return self.numbers
        if labels == "file":
            raise UserError(f"{self.where}: no {LABEL_FILE} here, which data.source.labels=file asks for")
        folders = {name: name.partition("/")[0] for name in self.images if "/" in name}
        if not folders and labels == "auto":
            return None
        if len(folders) < len(self.images):
            stray = next(name for name in self.images if name not in folders)
            raise UserError(f"{self.where}/{stray}: lies in no class folder; move it, or set data.source.labels=none")
        return folders


def _find_images(where: str, files: Files) -> tuple[Files, tuple[str, ...]]:
    """Return the images by name, sorted, and the names of other files.

    An image that this program cannot read is among the images, and refused when it is opened.
    """
    images: Files = {}
    ignored = []
    for name in sorted(files):
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
        advice = (
            None if hidden or name.endswith(LABEL_FILE) else _advice(files[name], posixpath.splitext(name)[1].lower())
        )
        if advice:
            images[name] = partial(_refuse, f"{where}/{name}: {advice}")
        elif not hidden and name.lower().endswith(EXTENSIONS):
            images[name] = files[name]
        else:
            ignored.append(name)
    return images, tuple(ignored)


def _advice(read: Callable[[], Path | BytesIO], extension: str) -> str | None:
    """Return what to do about a file that is plainly an image and not read here, else None."""
    if extension in EXTENSIONS or remedy(extension):
        return remedy(extension)
    with suppress(UserError, OSError):  # pipes, and files that are no business of ours
        kind = extension_by_contents(first_bytes(read, HEAD))
        return f"is an image by its contents; end its name in {kind}, or move it elsewhere" if kind else None
    return None


def _refuse(message: str) -> Path:
    raise UserError(message)


def _list_files(uri: str, sha256: str | None, scratch: Path, monitor: Monitor) -> Files:
    is_folder = is_local(uri) and local_path(uri).is_dir()
    is_prefix = uri.startswith("s3://") and not uri.lower().endswith(ARCHIVE_SUFFIXES)
    if (is_folder or is_prefix) and sha256:
        raise UserError(f"{public_uri(uri)}: a folder has no SHA-256; leave data.source.sha256 away or name an archive")
    if is_folder:
        return folder_files(local_path(uri))
    if is_prefix:
        return folder_files(fetch_prefix(uri, scratch / "objects", monitor=monitor))
    kept = download_dir(sha256) if sha256 else scratch
    return archive_files(fetch(uri, kept, sha256=sha256, monitor=monitor), scratch / "unpacked")


def _read_label_file(where: str, read: Callable[[], Path | BytesIO]) -> dict[str, int]:
    """Read `{"labels": [[name, number], ...]}`, or `{"labels": null}`: no labels."""
    try:
        pairs = json.loads(contents(read))["labels"]
        numbers = {plain_name(str(name)): number for name, number in pairs or ()}
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{where}: not of the form {{"labels": [["a/1.png", 0], ...]}} ({error})') from error
    for name, number in numbers.items():
        if type(number) is not int or not 0 <= number < MAX_CLASSES:
            raise UserError(f"{where}: {name} has the label {number}; allowed are whole numbers 0 to {MAX_CLASSES - 1}")
    return numbers


def _matched(where: str, numbers: dict[str, int], images: Files) -> dict[str, int]:
    """Return `numbers` if it names exactly the images."""
    if numbers and (missing := numbers.keys() - images.keys()):
        raise UserError(f"{where}: {LABEL_FILE} names {min(missing)}, which is not there ({len(missing)} such names)")
    if numbers and (unnamed := images.keys() - numbers.keys()):
        raise UserError(f"{where}/{min(unnamed)}: has no label in {LABEL_FILE} ({len(unnamed)} such images)")
    return numbers


def _class_names(classes: Classes | None) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the classes' names in the order of their numbers, and the gaps between labels that are numbers."""
    used = (classes or {}).values()
    numbers = {label for label in used if isinstance(label, int)}
    names = map(str, sorted(numbers)) if numbers else sorted(set(map(str, used)))
    return tuple(names), label_gaps(numbers)


def _items(place: _Place, classes: Classes | None, class_names: tuple[str, ...]) -> list[Item]:
    numbers = {name: number for number, name in enumerate(class_names)}
    if classes is None and numbers:
        raise UserError(f"{place.where}: held-out images without labels, where the training images have some")
    items = []
    for name, read in place.images.items():
        where = f"{place.where}/{name}"
        given = None if classes is None else str(classes[name])
        label = -1 if given is None else numbers.get(given)
        if label is None:
            raise UserError(f"{where}: no training image is of the class {given}")
        items.append(Item(name, where, label, partial(open_image, read, where)))
    return items
