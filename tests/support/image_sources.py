"""Folders, archives and pictures as people bring them, and the stage prepare on them."""

import io
import json
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flows.data.dataset import load_dataset
from flows.errors import UserError
from flows.monitor import Monitor
from flows.stages.prepare import Data, prepare


def prepared(out_dir: Path, source: dict, monitor: Monitor | None = None, **fields):
    """Run the stage and return what later stages see, and dataset.json."""
    prepare(Data(source=source, **fields), out_dir, monitor or Monitor())
    return load_dataset(out_dir), json.loads((out_dir / "dataset.json").read_text())


def refused(tmp_path: Path, source: dict, *parts: str, **fields):
    """Assert that the stage says all `parts` in one line and leaves nothing that looks complete."""
    out_dir = tmp_path / "refused"
    with pytest.raises(UserError) as caught:
        prepare(Data(source=source, **fields), out_dir, Monitor())
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    assert not (out_dir / "dataset.json").exists()


def colours(count: int, size=(6, 6), seed: int = 0) -> np.ndarray:
    """Random uint8 [count, H, W, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, fmt: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, fmt, **options)
    return buffer.getvalue()


def write_tree(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_zip(path: Path, files: dict[str, bytes], **options) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, files: dict[str, bytes], links: dict[str, tuple[bytes, str]] | None = None) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, (kind, target) in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    return path


def two_classes(prefix: str = "") -> dict[str, bytes]:
    """Four cats and four dogs."""
    pixels = colours(8)
    names = [f"{prefix}{kind}/{index}.png" for kind in ("cat", "dog") for index in range(4)]
    return {name: encoded(image) for name, image in zip(names, pixels, strict=True)}


def png16(rows: list[list[int]], colour_type: int) -> bytes:
    """Encode 16-bit samples, of which Pillow writes greyscale alone; colour types 0 grey, 2 RGB."""
    samples = np.array(rows, dtype=">u2")
    per_pixel = {0: 1, 2: 3}[colour_type]
    header = struct.pack(">IIBBBBB", samples.shape[1] // per_pixel, len(rows), 16, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in samples))
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def one_image(tmp_path: Path, content: bytes, name: str = "x.png", **fields):
    folder = write_tree(tmp_path / "in", {name: content})
    dataset, facts = prepared(tmp_path / "out", {"kind": "images", "path": str(folder)}, heldout_fraction=0, **fields)
    counts = {name for name, count in facts["counts"].items() if count and name != "train"}
    return np.asarray(dataset.train_images[0]), counts
