"""The files of a folder, zip or tar as one mapping. Nothing is written under a name that comes from an archive."""

import io
import lzma
import os
import posixpath
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath

from flows.errors import UserError

Files = dict[str, Callable[[], Path | io.BytesIO]]  # name, "/" between its parts -> a path or the contents

MAX_RATIO = 100  # unpacked bytes per byte of the archive ...
MAX_FREE = 64 << 20  # ... that are suspicious beyond this many bytes
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


def folder_files(folder: Path) -> Files:
    """List the files below `folder`, following links, each folder once."""
    files: Files = {}
    visited = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(root)) in visited:  # a link cycle
            folders.clear()
            continue
        visited.add(real)
        for name in names:
            path = Path(root, name)
            files[path.relative_to(folder).as_posix()] = partial(Path, path)
    return files


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
    raise UserError(f"{path}: neither a zip nor a tar archive, or cut off")


def _zip_files(path: Path) -> Files:
    archive = zipfile.ZipFile(path)
    members = [member for member in archive.infolist() if not member.is_dir()]
    _refuse_bomb(path, sum(member.file_size for member in members))
    files: Files = {}
    links = {}
    for member in members:
        name = _inside(path, member.filename)
        if member.flag_bits & 1:
            raise UserError(f"{path}: {name} is encrypted; pack it without a password")
        if stat.S_ISLNK(member.external_attr >> 16):
            links[name] = posixpath.join(posixpath.dirname(name), archive.read(member).decode(errors="replace"))
        else:
            files[name] = partial(_read_member, archive, member)
    return files | _follow(path, links, files)


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> io.BytesIO:
    try:
        return io.BytesIO(archive.read(member))
    except DAMAGE as error:
        raise UserError(f"{archive.filename}: {member.filename} is damaged ({error})") from error


def _tar_files(path: Path, scratch: Path) -> Files:
    scratch.mkdir(parents=True, exist_ok=True)
    files: Files = {}
    links = {}
    unpacked = 0
    with tarfile.open(path) as archive:
        for member in archive:
            name = _inside(path, member.name)
            if member.issym():
                links[name] = posixpath.join(posixpath.dirname(name), member.linkname)
            elif member.islnk():
                links[name] = member.linkname
            elif member.isfile():
                unpacked += member.size
                _refuse_bomb(path, unpacked)
                copy = scratch / str(len(files))
                source = archive.extractfile(member)
                assert source is not None, "a regular file has contents"
                with source, copy.open("wb") as target:
                    shutil.copyfileobj(source, target)
                files[name] = partial(Path, copy)
            elif not member.isdir():
                raise UserError(f"{path}: {name} is a device or pipe; allowed are files, folders and links")
        _refuse_cut(path, archive)
    return files | _follow(path, links, files)


def _inside(path: Path, name: str) -> str:
    """Return `name` in its plain form; refuse one that leads out of the archive."""
    plain = PurePosixPath(name)
    if plain.is_absolute() or ".." in plain.parts:
        raise UserError(f"{path}: {name} points outside the archive")
    return str(plain)


def _follow(path: Path, links: dict[str, str], files: Files) -> Files:
    """Give each link the contents of its target; no link is created on disk."""
    followed: Files = {}
    for name, target in links.items():
        target = posixpath.normpath(target)
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
