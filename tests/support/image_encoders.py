"""PNG, TIFF and ICC files written sample by sample, without a library whose reading they test."""

import struct
import zlib
from collections.abc import Sequence

import numpy as np

# Primaries as seen at D50, and the exponent or sRGB's curve: what profiles of these spaces hold.
DISPLAY_P3 = [(0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)]
ADOBE_RGB = [(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)]
SRGB = [(0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)]
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def packed(samples: Sequence[int], bits: int) -> bytes:
    """Return samples of 1 to 16 bits, most significant bit first, filled to whole bytes."""
    text = "".join(f"{sample:0{bits}b}" for sample in samples)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[at : at + 8], 2) for at in range(0, len(text), 8))


def png(row: Sequence[int], bits: int, colour_type: int, chunks: Sequence[tuple[bytes, bytes]] = ()) -> bytes:
    """Return a PNG of one row; colour types: 0 grey, 2 RGB, 3 palette, 4 grey with alpha, 6 RGBA."""
    width = len(row) // {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour_type]
    header = struct.pack(">IIBBBBB", width, 1, bits, colour_type, 0, 0, 0)
    all_chunks = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" + packed(row, bits))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in all_chunks
    )


def tiff(
    data: bytes,
    width: int,
    bits: int,
    *,
    samples: int = 1,
    photometric: int = 1,
    sample_format: int = 1,
    extra: int | None = None,
    profile: bytes | None = None,
) -> bytes:
    """Return a TIFF of one row; photometric: 0 white is zero, 1 black is zero, 2 RGB, 5 CMYK, 8 LAB."""
    tags = {256: [width], 257: [1], 258: [bits] * samples, 259: [1], 262: [photometric], 273: [0], 277: [samples]}
    tags |= {278: [1], 279: [len(data)], 339: [sample_format] * samples}
    values = {tag: ("I" if tag in (273, 279) else "H", numbers) for tag, numbers in tags.items()}
    if extra is not None:
        values[338] = ("H", [extra])
    if profile is not None:
        values[34675] = ("B", list(profile))
    kinds, sizes = {"B": 1, "H": 3, "I": 4}, {"B": 1, "H": 2, "I": 4}
    start = 8 + 2 + 12 * len(values) + 4
    far = sum(sizes[kind] * len(numbers) for kind, numbers in values.values() if sizes[kind] * len(numbers) > 4)
    values[273] = ("I", [start + far])
    entries, heap = b"", b""
    for tag, (kind, numbers) in sorted(values.items()):
        raw = struct.pack(f"<{len(numbers)}{kind}", *numbers)
        entries += struct.pack("<HHI", tag, kinds[kind], len(numbers))
        if len(raw) <= 4:
            entries += raw.ljust(4, b"\0")
        else:
            entries += struct.pack("<I", start + len(heap))
            heap += raw
    return b"II*\0" + struct.pack("<IH", 8, len(values)) + entries + bytes(4) + heap + data


def _whole_profile(space: bytes, kind: bytes, pcs: bytes, tags: dict[bytes, bytes]) -> bytes:
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = struct.pack(">I4sI4s4s4s", 0, bytes(4), 0x02400000, kind, space, pcs) + bytes(12) + b"acsp"
    head = head.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061)  # white of D50
    whole = head.ljust(128, b"\0") + table + body
    return struct.pack(">I", len(whole)) + whole[4:]


def cmyk_icc(cyan: Sequence[int]) -> bytes:
    """Return a profile of a printer: paper is white, full cyan is `cyan` (L, a + 128, b + 128), other inks black."""
    ramp = bytes(range(256))
    corners = [bytes([255, 128, 128]), *([bytes([0, 128, 128])] * 15)]  # the last channel, black, varies fastest
    corners[8] = bytes(cyan)
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    lut += ramp * 4 + b"".join(corners) + ramp * 3
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    return _whole_profile(b"CMYK", b"prtr", b"Lab ", {b"wtpt": white, b"A2B0": lut})


def icc(colorants: Sequence[Sequence[float]] | None, curve: float | Sequence[float]) -> bytes:
    """Return a display profile: RGB of three colorants (XYZ at D50), or grey; an exponent, or an sRGB-like curve."""

    def fixed(numbers: Sequence[float]) -> bytes:
        return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)

    numbers = [curve] if isinstance(curve, int | float) else list(curve)
    curve_tag = b"para" + bytes(4) + struct.pack(">HH", 0 if len(numbers) == 1 else 3, 0) + fixed(numbers)
    xyz = [b"XYZ " + bytes(4) + fixed(one) for one in colorants or ()]
    white = b"XYZ " + bytes(4) + fixed((0.9642, 1.0, 0.8249))
    tags = {b"wtpt": white}
    tags |= dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), xyz, strict=False))
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC") if colorants else (b"kTRC",), curve_tag)
    return _whole_profile(b"RGB " if colorants else b"GRAY", b"mntr", b"XYZ ", tags)


def grid(levels: int = 9) -> np.ndarray:
    """Return colours from all over RGB, uint8 [levels, levels ** 2, 3]."""
    steps = np.linspace(0, 255, levels).round().astype(np.uint8)
    return np.stack(np.meshgrid(steps, steps, steps), -1).reshape(levels, -1, 3)
