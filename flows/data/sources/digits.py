"""The scanned digits that come with scikit-learn: real images without a download."""

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import ConfigDict

from flows.data.sources import Contents, Source, array_items
from flows.monitor import Monitor


class Digits(Source):
    """1,797 scans of handwritten digits, 8x8 grey, ten classes."""

    native_shape: ClassVar = (1, 8, 8)
    model_config = ConfigDict(title="Digits")

    kind: Literal["digits"] = "digits"
    """The scans that scikit-learn carries."""
    licence: str = "CC BY 4.0: Optical Recognition of Handwritten Digits, UCI (Alpaydin and Kaynak, 1998)"
    """One line on the terms of use, repeated in dataset.json."""

    def origin(self) -> str:
        """Return the source's entry for dataset.json."""
        return "sklearn.datasets.load_digits"

    def read(self, scratch: Path, monitor: Monitor) -> Contents:
        """Scale the 17 levels of ink, 0..16, to 0..255."""
        from sklearn.datasets import load_digits

        scans = load_digits()
        pixels = np.rint(scans.images * (255 / 16)).astype(np.uint8)[..., None]
        names = tuple(str(name) for name in scans.target_names)
        return Contents(array_items(pixels, scans.target, "digits"), None, names)
