"""Small text files rewritten whole: at any moment the file holds the old text or the new."""

import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write `text` to a hidden file beside `path`, then put it in its place."""
    partial = path.with_name(f".partial-{path.name}-{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)
