"""Mutated image files, read in a process of their own by the stage prepare and by `cm edit`; prints what happened.

python tests/support/fuzz_images.py FOLDER COUNT SEED
"""

import io
import json
import random
import re
import sys
import time
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from cm_core.model import ModelSpec
from cm_core.networks.mlp import MLPParams
from cm_core.noise import Noise
from flows.commands.drawing import Context
from flows.commands.edit import stroke
from flows.commands.editor import Editor
from flows.data.formats import BUILT_IN, PLUGINS, readable
from flows.errors import UserError
from flows.monitor import Monitor
from flows.stages.prepare import Data, prepare
from image_encoders import ADOBE_RGB, icc


def originals() -> dict[str, list[bytes]]:
    """Return good files by extension: noise and flat, with alpha, EXIF and a profile where the format has them."""
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)), Image.new("RGB", (33, 17), "teal")]
    exif = Image.Exif()
    exif[0x0112] = 6
    exif.get_ifd(0x8769)[0xA005] = {1: "R98"}
    found: dict[str, list[bytes]] = {}
    for fmt in readable():
        extension = (BUILT_IN.get(fmt) or PLUGINS[fmt][0])[0]
        for picture in pictures:
            for extra in ({}, {"exif": exif.tobytes(), "icc_profile": icc(ADOBE_RGB, 2.2)}):
                for mode in ("RGB", "RGBA", "L", "P"):
                    buffer = io.BytesIO()
                    try:
                        picture.convert(mode).save(buffer, fmt, **extra)
                    except (OSError, ValueError, TypeError, NotImplementedError):
                        continue  # a mode that the format does not know
                    found.setdefault(extension, []).append(buffer.getvalue())
    return found


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Return a file with bytes changed, cut out, repeated or cut off, most often near its head."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = min(int(rng.expovariate(8 / len(data))), len(data) - 1) if rng.random() < 0.6 else rng.randrange(len(data))
        kind = rng.randrange(6)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\1\0\0"))
        elif kind == 2:
            del data[at : at + rng.randrange(1, 40)]
        elif kind == 3:
            data[at:at] = data[at : at + rng.randrange(1, 200)]
        elif kind == 4:
            data[at] = rng.randrange(256)
        elif len(data) > 8 and rng.random() < 0.5:
            del data[at:]
        if not data:
            return b""
    return bytes(data)


def main(folder: Path, count: int, seed: int) -> None:
    rng, files = random.Random(seed), originals()
    for index in range(count):
        extension = sorted(files)[index % len(files)]
        (folder / f"{index:05}{extension}").write_bytes(mutated(rng.choice(files[extension]), rng))
    began, outcomes = time.monotonic(), Counter[str]()
    source, out = {"kind": "images", "path": str(folder)}, folder.with_name("out")
    how = {"resolution": 16, "resize": "pad", "channels": "rgb"}
    prepare(Data(source=source, damaged="skip", **how), out, Monitor())
    counts = json.loads((out / "dataset.json").read_text())["counts"]
    try:
        prepare(Data(source=source, **how), out, Monitor())
    except UserError as error:
        outcomes["one line"] = "\n" not in str(error)
    try:
        prepare(Data(source=source), out, Monitor())  # reads headers
    except UserError as error:
        outcomes["one line of headers"] = "\n" not in str(error)
    spec = ModelSpec(form="skip", network=MLPParams(), noise=Noise(), image_shape=(3, 16, 16))
    args = Namespace(task=stroke, model="a model", label=None, guidance=None, resize="pad")
    editor = Editor(args, Context(load=lambda name: (spec, None)))
    longest = 0.0
    for path in sorted(folder.iterdir()):
        start = time.monotonic()
        try:
            editor.read(path)
            outcomes["read"] += 1
        except UserError:
            outcomes["refused"] += 1
        longest = max(longest, time.monotonic() - start)
    report = {**outcomes, "formats": len(files), "skipped": counts["skipped"], "longest": longest}
    status = Path("/proc/self/status").read_text()  # getrusage's peak would begin with that of the parent process
    report["memory"] = int(re.search(r"^VmHWM:\s+(\d+) kB$", status, re.M)[1]) << 10
    print(json.dumps({**report, "seconds": time.monotonic() - began}), file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
