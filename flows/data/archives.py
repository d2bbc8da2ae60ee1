"""The files of a folder, zip or tar as one mapping. Nothing is written under a name that comes from an archive."""

import io
import lzma
import os
import posixpath
import shutil
import stat
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from flows.errors import UserError

Files = dict[str, Callable[[], Path | io.BytesIO]]  # name, "/" between its parts -> a path or the contents

MAX_RATIO = 100  # unpacked bytes per byte of the archive ...
MAX_FREE = 64 << 20  # ... that are suspicious beyond this many bytes
READ_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
ZIP_METHODS = {9: "Deflate64 (Windows Explorer does so above 2 GB)", 93: "Zstandard", 95: "XZ", 98: "PPMd"}
OTHER_ARCHIVES = {b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!\x1a\x07": "RAR", b"\x28\xb5\x2f\xfd": "Zstandard"}
DAMAGE = (
    OSError,
    EOFError,
    RuntimeError,
    NotImplementedError,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    tarfile.TarError,
)


def contents(read: Callable[[], Path | io.BytesIO]) -> bytes:
    """Return the bytes of one file."""
    source = read()
    return source.read_bytes() if isinstance(source, Path) else source.getvalue()


def plain_name(name: str) -> str:
    """Return `name` with "/" between its parts, whatever packed it, and its letters composed (Unicode NFC)."""
    return unicodedata.normalize("NFC", name.replace("\\", "/"))


def first_bytes(read: Callable[[], Path | io.BytesIO], size: int) -> bytes:
    """Return the first bytes of one file, without reading the rest."""
    source = read(size) if isinstance(read, _ZipMember) else read()
    if isinstance(source, io.BytesIO):
        return source.getvalue()[:size]
    with source.open("rb") as file:
        return file.read(size)


class _Listing:
    """The files found so far, under plain names; two of one name, or folders that look alike, are refused."""

    def __init__(self, where: Path) -> None:
        self.where = where
        self.files: Files = {}
        self._given: dict[str, str] = {}  # plain name -> the name as it was given
        self._folders: dict[str, str] = {}  # folder, case folded -> its name
        self._checked: set[str] = set()  # folders

    def plain(self, name: str) -> str:
        """Return a name in its plain form; refuse one that leads out of the archive."""
        plain = PurePosixPath(plain_name(name))
        if plain.is_absolute() or ".." in plain.parts:
            raise UserError(f"{self.where}: {name} points outside the archive")
        return str(plain)

    def add(self, name: str, read: Callable[[], Path | io.BytesIO]) -> None:
        plain = self.plain(name)
        if plain in self._given:
            other = self._given[plain]
            pair = (
                f"two entries are named {name}" if other == name else f"{ascii(other)} and {ascii(name)} are one name"
            )
            raise UserError(f"{self.where}: {pair}; keep one of them")
        self._given[plain] = name
        self.files[plain] = read
        folder = posixpath.dirname(plain)
        while folder and folder not in self._checked:
            self._checked.add(folder)
            if (seen := self._folders.setdefault(folder.casefold(), folder)) != folder:
                raise UserError(f"{self.where}: {seen} and {folder} differ by upper and lower case alone; join them")
            folder = posixpath.dirname(folder)


def folder_files(folder: Path) -> Files:
    """List the files below `folder`, following links, each folder once.

    Raises UserError for a folder that cannot be read, two files of one name, or folders that differ by case alone.
    """
    listing = _Listing(folder)
    try:
        for path, is_file in _walk(folder, set()):
            listing.add(
                path.relative_to(folder).as_posix(), partial(Path, path) if is_file else partial(_no_file, path)
            )
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); make it readable, or move it") from error
    return listing.files


def _walk(folder: Path, visited: set[str]) -> Iterator[tuple[Path, bool]]:
    """Yield what lies below a folder, and whether it is a regular file rather than a pipe or a broken link."""
    if (real := os.path.realpath(folder)) in visited:  # a link cycle
        return
    visited.add(real)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _walk(Path(entry.path), visited)
            else:
                yield Path(entry.path), entry.is_file()


def _no_file(path: Path) -> Path:
    raise UserError(f"{path}: is a pipe, a device or a broken link, no file that can be read")


def archive_files(path: Path, scratch: Path) -> Files:
    """List the files of a zip or of a tar, compressed or not; the contents of a tar are copied into `scratch`.

    Raises UserError for a damaged or encrypted archive, a bomb, another format, or a member that points outside.
    """
    try:
        if zipfile.is_zipfile(path):
            return _zip_files(path)
        if tarfile.is_tarfile(path):
            return _tar_files(path, scratch)
    except DAMAGE as error:
        raise UserError(f"{path}: damaged archive ({error})") from error
    with path.open("rb") as file:
        start = file.read(8)
    other = next((kind for magic, kind in OTHER_ARCHIVES.items() if start.startswith(magic)), None)
    if other:
        raise UserError(f"{path}: is packed as {other}, which is not read; unpack it, or pack it as zip or tar")
    raise UserError(f"{path}: neither a zip nor a tar archive, or cut off")


def refuse_zip_bomb(path: Path) -> None:
    """Raise UserError if a zip, which an .npz is as well, unpacks to suspiciously much."""
    with zipfile.ZipFile(path) as archive:
        _refuse_bomb(path, sum(member.file_size for member in archive.infolist()))


def _zip_files(path: Path) -> Files:
    refuse_zip_bomb(path)
    archive, listing = zipfile.ZipFile(path), _Listing(path)
    links = {}
    for member in archive.infolist():
        name = listing.plain(member.filename)
        if member.filename.endswith(("/", "\\")):  # a folder
            continue
        if member.flag_bits & 1:
            raise UserError(f"{path}: {name} is encrypted; pack it without a password")
        if member.compress_type not in READ_METHODS:
            method = ZIP_METHODS.get(member.compress_type, f"method {member.compress_type}")
            raise UserError(
                f"{path}: {name} is compressed by {method}, which is not read; pack the files again by Deflate, as"
                " `7z a -tzip -mm=Deflate` and `zip -r` do, or unpack them and name the folder"
            )
        if stat.S_ISLNK(member.external_attr >> 16):
            links[name] = posixpath.join(posixpath.dirname(name), archive.read(member).decode(errors="replace"))
        else:
            listing.add(member.filename, _ZipMember(archive, member))
    return listing.files | _follow(path, links, listing.files)


@dataclass(frozen=True, slots=True)
class _ZipMember:
    """Reader of one member of a zip, the whole of it or its first bytes."""

    archive: zipfile.ZipFile
    member: zipfile.ZipInfo

    def __call__(self, size: int = -1) -> io.BytesIO:
        try:
            with self.archive.open(self.member) as file:
                return io.BytesIO(file.read(size))
        except DAMAGE as error:
            raise UserError(f"{self.archive.filename}: {self.member.filename} is damaged ({error})") from error


def _tar_files(path: Path, scratch: Path) -> Files:
    scratch.mkdir(parents=True, exist_ok=True)
    listing, links = _Listing(path), {}
    unpacked = 0
    with tarfile.open(path) as archive:
        for member in archive:
            name = listing.plain(member.name)
            if member.issym():
                links[name] = posixpath.join(posixpath.dirname(name), member.linkname)
            elif member.islnk():
                links[name] = member.linkname
            elif member.isfile():
                unpacked += member.size
                _refuse_bomb(path, unpacked)
                copy = scratch / str(len(listing.files))
                source = archive.extractfile(member)
                assert source is not None, "a regular file has contents"
                with source, copy.open("wb") as target:
                    shutil.copyfileobj(source, target)
                listing.add(member.name, partial(Path, copy))
            elif not member.isdir():
                raise UserError(f"{path}: {name} is a device or pipe; allowed are files, folders and links")
        _refuse_cut(path, archive)
    return listing.files | _follow(path, links, listing.files)


def _follow(path: Path, links: dict[str, str], files: Files) -> Files:
    """Give each link the contents of its target; no link is created on disk."""
    followed: Files = {}
    for name, target in links.items():
        target = unicodedata.normalize("NFC", posixpath.normpath(target))
        if target.startswith(("/", "..")):
            raise UserError(f"{path}: the link {name} points outside the archive")
        if target not in files:
            raise UserError(f"{path}: the link {name} leads to {target}, which is no file of the archive")
        followed[name] = files[target]
    return followed


def _refuse_bomb(path: Path, unpacked: int) -> None:
    packed = path.stat().st_size
    if unpacked > MAX_FREE and unpacked > MAX_RATIO * packed:
        raise UserError(
            f"{path}: a decompression bomb? {packed} bytes unpack to {unpacked} or more,"
            f" allowed are {MAX_RATIO} times as many; pack the files with less compression"
        )


def _refuse_cut(path: Path, archive: tarfile.TarFile) -> None:
    """Refuse a tar without its end mark: tarfile silently takes a broken header for the end."""
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise UserError(
            f"{path}: damaged archive (cut off, or a broken header, after {len(archive.getmembers())} members)"
        )
