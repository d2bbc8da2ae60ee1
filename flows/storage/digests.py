"""Digests of files on record: a file is read again only if its inode, size or time of modification differ."""

import functools
import hashlib
import logging
import sqlite3
from contextlib import closing
from pathlib import Path

logger = logging.getLogger(__name__)
TABLE = "digests (name, device, inode, size, modified, digest, PRIMARY KEY (name, device, inode))"
KNOWN = "SELECT digest FROM digests WHERE name = ? AND device = ? AND inode = ? AND size = ? AND modified = ?"


def file_digest(path: Path, name: str = "sha256") -> str:
    """Return the checksum of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.new(name, usedforsecurity=False)).hexdigest()


def recorded_digest(record: Path, path: Path, name: str) -> str:
    """Return the checksum of a file from the record, an SQLite database; an unknown file is read and recorded.

    A record that cannot be read or written, as on a full disk, costs time alone.
    """
    status = path.stat()
    facts = (name, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    try:
        with _opened(record) as database:
            if known := database.execute(KNOWN, facts).fetchone():
                return known[0]
    except (OSError, sqlite3.Error) as error:
        _warn(record, str(error))
    digest = file_digest(path, name)
    try:
        with _opened(record) as database, database:
            database.execute("INSERT OR REPLACE INTO digests VALUES (?, ?, ?, ?, ?, ?)", (*facts, digest))
    except (OSError, sqlite3.Error) as error:
        _warn(record, str(error))
    return digest


def _opened(record: Path) -> "closing[sqlite3.Connection]":
    record.parent.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(record, timeout=60)
    try:
        database.execute(f"CREATE TABLE IF NOT EXISTS {TABLE}")
    except sqlite3.Error:
        database.close()
        raise
    return closing(database)


@functools.cache  # once a process
def _warn(record: Path, reason: str) -> None:
    logger.warning("%s: hashes are not recorded, files are read each time: %s", record, reason)
