"""Time and memory of `cm import`, for a file of each format with the network of ImageNet-64 (ADM, 296 M parameters).

python -m benchmarks.import_checkpoint                       # needs diffusers; writes 3.6 GB below TMPDIR
python -m benchmarks.import_checkpoint --only edm.pkl

The weights are random. Beside the peak of the command's memory stands what the project promises: twice the file.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.common import hardware, report, told
from cm_core.metrics.torchvision_shim import ensure_torchvision
from tests.support.foreign_checkpoints import edm_pickle, to_edm, to_openai

WIDTHS, LAYERS, CLASSES, SIZE = (192, 384, 576, 768), 3, 1000, 64
PROMISED = 2.0  # times the size of the file


def write_edm(unet: torch.nn.Module, path: Path) -> None:
    """Write EDM's pickle."""
    shape = {"img_resolution": SIZE, "img_channels": 3, "label_dim": CLASSES, "model_type": "DhariwalUNet"}
    path.write_bytes(edm_pickle(to_edm(unet), **shape))


def write_openai(unet: torch.nn.Module, path: Path) -> None:
    """Write OpenAI's state dict."""
    torch.save(to_openai(unet), path)


def write_diffusers(unet: torch.nn.Module, path: Path) -> None:
    """Write a folder of diffusers."""
    import diffusers

    unet.save_pretrained(path / "unet")  # type: ignore[operator]  # diffusers' own
    diffusers.CMStochasticIterativeScheduler().save_pretrained(path / "scheduler")


FORMATS: dict[str, tuple[Callable[[torch.nn.Module, Path], None], list[str]]] = {
    "edm.pkl": (write_edm, []),
    "openai.pt": (write_openai, ["--form", "skip"]),
    "diffusers": (write_diffusers, []),
}


def make(path: Path) -> None:
    """Write the file of a format."""
    FORMATS[path.name][0](build(), path)


def build() -> torch.nn.Module:
    """Return the network as a UNet2DModel."""
    ensure_torchvision()
    import diffusers

    downs, ups = ("ResnetDownsampleBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "ResnetUpsampleBlock2D")
    return diffusers.UNet2DModel(
        sample_size=SIZE,
        block_out_channels=WIDTHS,
        layers_per_block=LAYERS,
        down_block_types=[downs[0], *[downs[1]] * 3],
        up_block_types=[*[ups[0]] * 3, ups[1]],
        downsample_type="resnet",
        upsample_type="resnet",
        attention_head_dim=64,
        attn_norm_num_groups=32,
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=CLASSES,
    )


def measure(path: Path, options: list[str], out: Path) -> tuple[float, int]:
    """Return seconds and the peak memory, in bytes, of importing a file in a process of its own."""
    command = [sys.executable, "-m", "flows.cli", "import", str(path), "--out", str(out), *options]
    started = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), command)
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--only", nargs="+", choices=FORMATS, default=list(FORMATS), help="these formats alone")
    arguments.add_argument("--json", action="store_true", help="print JSON")
    args, rows = arguments.parse_args(argv), []
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.only:
            path, options = Path(scratch) / name, FORMATS[name][1]
            maker = get_context("spawn").Process(
                target=make, args=(path,)
            )  # a child's peak starts at its parent's size
            maker.start()
            maker.join()
            if maker.exitcode:
                raise SystemExit(f"{name}: could not be written")
            files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
            size = sum(file.stat().st_size for file in files)
            seconds, peak = measure(path, options, Path(scratch) / "out" / name)
            row = {"format": name, "file_gb": size / 1e9, "seconds": seconds, "peak_gb": peak / 1e9}
            rows.append(told({**row, "times_the_file": peak / size, "promised": PROMISED}))
    report(args, hardware(), rows)


if __name__ == "__main__":
    main()
