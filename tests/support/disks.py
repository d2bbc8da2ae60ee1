"""A small disk that gets full."""

import os
import subprocess
from pathlib import Path


class Disk:
    """A file system of a few megabytes in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def mount(self, *options: str) -> subprocess.CompletedProcess:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(self.folder)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def grow(self) -> None:
        """Give it more space, as someone does who reads the line."""
        assert self.mount("remount", "size=64m").returncode == 0


def fill(folder: Path, leave: int = 0) -> None:
    """Take all but so many bytes of what is left of a file system."""
    with (folder / "ballast").open("wb") as file:
        free = os.statvfs(folder)
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - leave)
