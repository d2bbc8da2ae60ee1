"""The student as an MLflow model: its weights, the sampling code, and the metadata for `mlflow models serve`."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import flows
from cm_core.latents import DECODER_FILE
from flows.inference.generate import write_levels
from flows.workspace.import_closure import PACKAGES, import_closure

MODULE, WEIGHTS = "flows.inference.server", "student"
REQUIRED = ("mlflow", "numpy", "pillow", "pydantic", "pyyaml", "safetensors", "torch")  # what the packed code imports


@contextmanager
def packaged_student(files: Mapping[str, Path], mid_sigmas: Sequence[Sequence[float]], model_id: str) -> Iterator[Path]:
    """Yield the folder of an MLflow model with the weight files {name: path} and the code that samples them.

    `mid_sigmas` are the sampling levels of its recipe, one entry per number of steps.
    """
    from mlflow import pyfunc
    from mlflow.models import Model

    required = (*REQUIRED, "diffusers") if DECODER_FILE in files else REQUIRED  # which decodes latents
    with TemporaryDirectory() as scratch:
        weights, code = Path(scratch) / WEIGHTS, Path(scratch) / "code"
        weights.mkdir()
        for name, path in files.items():
            shutil.copyfile(path, weights / name)  # MLflow refuses links that lead elsewhere
        write_levels(weights, mid_sigmas)
        root = Path(flows.__file__).resolve().parents[1]
        for file in import_closure(root, MODULE):
            (code / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / file, code / file)
        pyfunc.save_model(
            Path(scratch) / "model",
            python_model=str(code.joinpath(*MODULE.split(".")).with_suffix(".py")),
            artifacts={WEIGHTS: str(weights)},
            code_paths=[str(code / package) for package in PACKAGES],
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in required],
            mlflow_model=Model(model_id=model_id),
        )
        yield Path(scratch) / "model"


def weights_of(model: Path) -> Path:
    """Return the folder with model.json below a downloaded model."""
    packed = model / "artifacts" / WEIGHTS
    return packed if packed.exists() else model  # models logged before serving existed have the weights at the top
