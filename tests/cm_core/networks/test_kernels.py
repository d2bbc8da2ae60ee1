"""The GPU's kernels, interpreted on the CPU where Triton is installed (`make triton`), against PyTorch's."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from miniature import REPOSITORY, SUPPORT, python_path

TRITON = Path(sys.prefix, "triton")  # beside the other packages, which it would slow down and make talk
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (TRITON.is_dir() or find_spec("triton")), reason="CPU builds of PyTorch bring no Triton: make triton"
    ),
]


@pytest.fixture(scope="module")
def errors():
    path = python_path(TRITON, REPOSITORY)
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    script = SUPPORT / "interpreted_kernels.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "kind",
    ["norm", "residual_add", "downsample", "upsample", "project_residual_add", "dropout", "network", "forward mode"]
    + ["network edm2", "unit_weight", "force_unit_rms", "mp_fork", "unit_rows", "mp_modulated_silu", "mp_sum"],
)
def test_kernels_compute_outputs_and_gradients_of_the_formulas(errors, kind):
    found = {name: error for name, error in errors.items() if name.startswith(kind)}
    bound = 1e-5 if kind == "network" else 2e-6  # NCSN++'s gradients: 4e-6
    assert found and max(found.values()) < bound, found
