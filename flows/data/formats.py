"""File formats of images: which are read, by what package, and how files of other names are recognised."""

import importlib
from functools import cache

# Formats by name: by default Pillow also tries decoders that start other programs (EPS).
BUILT_IN = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k", ".jpf", ".jpx"),
    "QOI": (".qoi",),
}
PLUGINS = {  # format: extensions, its module, the package to install
    "HEIF": ((".heic", ".heif", ".hif"), "pillow_heif", "pillow-heif"),
    "JXL": ((".jxl",), "pillow_jxl", "pillow-jxl-plugin"),
}
EXTENSIONS = sum(BUILT_IN.values(), ()) + sum((extensions for extensions, *_ in PLUGINS.values()), ())
RAW = (".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw", ".raw")
OTHERS = (".psd", ".svg", ".eps", ".tga", ".ico", ".exr", ".hdr", ".dds", ".pcx", ".sgi", ".xcf", ".jxr", ".dcm")
HEAD = 32  # bytes that tell a format
MAGIC = {
    b"\x89PNG\r\n\x1a\n": ".png",
    b"\xff\xd8\xff": ".jpg",
    b"GIF87a": ".gif",
    b"GIF89a": ".gif",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
    b"\0\0\0\x0cjP  ": ".jp2",
    b"\0\0\0\x0cJXL ": ".jxl",
    b"\xff\x0a": ".jxl",
    b"qoif": ".qoi",
}
BRANDS = {b"avif": ".avif", b"avis": ".avif", b"heic": ".heic", b"heix": ".heic", b"mif1": ".heic", b"msf1": ".heic"}


@cache
def missing_plugins() -> dict[str, str]:
    """Register the plugins that are installed; return {extension: package} of the others."""
    missing: dict[str, str] = {}
    for extensions, module, package in PLUGINS.values():
        try:
            plugin = importlib.import_module(module)
        except ImportError:
            missing |= dict.fromkeys(extensions, package)
            continue
        if hasattr(plugin, "register_heif_opener"):
            plugin.register_heif_opener(thumbnails=False)
    return missing


def readable() -> tuple[str, ...]:
    """Return Pillow's names of the formats that are read here."""
    missing = missing_plugins()
    return (*BUILT_IN, *(name for name, (extensions, *_) in PLUGINS.items() if extensions[0] not in missing))


def remedy(extension: str) -> str | None:
    """Return what to do about a file of an image format that is not read here; None if it is, or is no image."""
    if package := missing_plugins().get(extension):
        return f"{extension} files need the package {package}: pip install {package}"
    if extension in RAW:
        return f"{extension} is a camera's raw format, which is not read; develop it to TIFF or PNG"
    return f"{extension} is not read; save it as PNG" if extension in OTHERS else None


def extension_by_contents(head: bytes) -> str | None:
    """Return the extension that the first HEAD bytes of a file ask for, if they are an image's."""
    if head[4:8] == b"ftyp":
        return BRANDS.get(head[8:12])
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return ".webp"
    return next((extension for magic, extension in MAGIC.items() if head.startswith(magic)), None)
