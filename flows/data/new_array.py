"""Arrays that are written in place, batch by batch."""

import os
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike


def new_array(path: Path, shape: tuple[int, ...], dtype: DTypeLike = np.uint8) -> np.memmap:
    """Create a .npy file of zeros and map it.

    Its space is taken now, which raises OSError where the disk has too little: running out while the map is written
    would kill the process (SIGBUS).
    """
    images = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return images
