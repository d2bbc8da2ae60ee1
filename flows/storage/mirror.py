"""Copy what a bucket holds into a folder, or back, for a backup.

    python -m flows.storage.mirror s3://BUCKET FOLDER
    python -m flows.storage.mirror FOLDER s3://BUCKET

What the other side has in the same size, and not from before, is left alone; nothing is deleted.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flows.errors import USER_ERROR, UserError
from flows.storage.bucket import Bucket, Entry, WrongBytes
from flows.storage.folder import Folder
from flows.storage.s3 import S3_WORKERS


def mirror(source: str, target: str) -> int:
    """Copy all that is new from a bucket to a folder, or from a folder to a bucket; return the number of copies.

    Raises UserError if not just one of them is s3://, for a store that refuses, and for a key outside the folder.
    """
    down = source.startswith("s3://")
    if down == target.startswith("s3://"):
        raise UserError(f"{source} {target}: one must be s3://BUCKET, the other a folder")
    bucket, folder = Bucket(source if down else target), Path(target if down else source)
    if not down and not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    stores = (bucket, Folder(folder)) if down else (Folder(folder), bucket)
    entries, known = stores[0].entries(), {entry.key: entry for entry in stores[1].entries()}
    new = [entry.key for entry in entries if not _has(known.get(entry.key), entry)]

    def copy(key: str) -> None:
        path = folder / key
        if down and not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{bucket.uri}/{key}: the key points outside {folder}")
        try:
            bucket.download(key, path, None) if down else bucket.upload(path, key)
        except WrongBytes as error:
            raise UserError(str(error)) from error

    with ThreadPoolExecutor(S3_WORKERS) as pool:
        return len(list(pool.map(copy, new)))


def _has(there: Entry | None, entry: Entry) -> bool:
    if there is None or there.size != entry.size:
        return False
    return int(there.modified.timestamp()) >= int(entry.modified.timestamp())  # S3 knows whole seconds


def main(arguments: list[str]) -> int:
    """Run the command; return its exit code."""
    try:
        if len(arguments) != 2:
            raise UserError("expected SOURCE and TARGET, a folder and s3://BUCKET or the other way round")
        source, target = arguments
        print(f"{target}: {mirror(source, target)} files copied")
    except UserError as error:
        print(f"mirror: {error}", file=sys.stderr)
        return USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
