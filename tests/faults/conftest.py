"""A small disk for tests."""

import subprocess

import pytest

from disks import Disk


@pytest.fixture
def disk(tmp_path):
    disk = Disk(tmp_path / "disk")
    if (done := disk.mount("size=4m")).returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk.folder)], check=True)
