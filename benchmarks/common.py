"""What the benchmarks share: the network, timing that waits for the device, a table or JSON."""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import torch
import yaml
from pydantic import TypeAdapter

from cm_core.networks import Network, SongUNetParams
from cm_core.noise import Noise
from cm_core.training.cost import matmul_rate
from flows.stages.models import pick_device


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with what every benchmark of a network takes; the defaults are DDPM++ on CIFAR-10's shape."""
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--channels", type=int, default=128, help="base width of the network")
    arguments.add_argument("--blocks", type=int, default=4, help="residual blocks a resolution")
    arguments.add_argument("--network", help="another network, as in a recipe: '{kind: edm2, channels: 128}'")
    arguments.add_argument("--size", type=int, default=32, help="height and width of the images")
    arguments.add_argument("--json", action="store_true", help="print JSON")
    return arguments


def network(args: argparse.Namespace) -> Network:
    """Return the network asked for."""
    if args.network is None:
        return SongUNetParams(channels=args.channels, num_blocks=args.blocks)
    return TypeAdapter[Network](Network).validate_python(yaml.safe_load(args.network))


NOISE = Noise()


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(action: Callable[[], object], device: torch.device, *, repeats: int) -> float:
    """Return the mean duration of `action`, the device's work included."""
    synchronise(device)
    started = time.perf_counter()
    for _ in range(repeats):
        action()
    synchronise(device)
    return (time.perf_counter() - started) / repeats


def hardware() -> dict[str, Any]:
    """Describe where the numbers come from."""
    device = pick_device()
    on_gpu = device.type == "cuda"
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "matmul_tflops": round(matmul_rate(device) / 1e12, 1) if on_gpu else None,
    }


def told(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the table after saying it: the table is to come, and the next rows may take minutes."""
    print(", ".join(f"{key} {_cell(value)}" for key, value in row.items()), file=sys.stderr, flush=True)
    return row


def report(args: argparse.Namespace, facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Print the rows below what they were measured on."""
    if args.json:
        print(json.dumps({"hardware": facts, "rows": rows}, indent=2))
        return
    print(", ".join(f"{key} {value}" for key, value in facts.items() if value is not None))
    if not rows:
        return
    table = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.3g}" if value < 100 else f"{value:,.0f}"
