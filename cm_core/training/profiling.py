"""A trace of a few training steps, for chrome://tracing or Perfetto, and a table of kernel times."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

SKIPPED, RECORDED = 10, 3  # steps: the first compile, select and capture kernels
ROWS = 40  # rows of the table


@contextmanager
def profiled(folder: Path | None) -> Iterator[Callable[[], None]]:
    """Yield a function to call after every step; write trace.json and kernels.txt into `folder`, unless None."""
    if folder is None:
        yield lambda: None
        return
    on_gpu = torch.cuda.is_available()

    def write(found: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(folder / "trace.json"))
        by = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        (folder / "kernels.txt").write_text(found.key_averages().table(sort_by=by, row_limit=ROWS) + "\n")

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    steps = schedule(wait=SKIPPED, warmup=1, active=RECORDED, repeat=1)
    with profile(activities=activities, schedule=steps, on_trace_ready=write) as profiler:
        yield profiler.step
