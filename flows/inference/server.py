"""The logged student as MLflow loads and serves it: requests in, PNGs out, identical to the output of `cm sample`.

MLflow runs this file by itself ("models from code"), with its imported modules stored beside the weights: no network
is pickled, and the server needs no checkout.
"""

import base64
import io
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from cm_core.model import load_model
from flows.inference.generate import draw_images, read_levels, usual_mid_sigmas
from flows.stages.models import few_steps, pick_device, pixels_of

WEIGHTS = "student"  # the artifact that holds ema.safetensors and model.json
MAX_IMAGES, MAX_STEPS = 1024, 64  # per request


class Request(BaseModel):
    """A request for images."""

    model_config = ConfigDict(extra="forbid", strict=True)

    n: int = Field(16, ge=1, le=MAX_IMAGES)
    steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    seed: int = Field(0, ge=0)
    labels: list[int] | None = None
    guidance: float | None = None


class Images(BaseModel):
    """The response: base64 of PNG files, in the order of the images."""

    images: list[str]


class ServedStudent(PythonModel):
    """Draws images with one of the student's samplers; they depend on the request alone."""

    def load_context(self, context) -> None:
        """Load the weights, onto the GPU when there is one."""
        folder = Path(context.artifacts[WEIGHTS])
        self._device, self._levels = pick_device(), read_levels(folder)
        self._spec, self._model = load_model(folder)
        self._decode = pixels_of(self._spec, folder, self._device)

    def predict(self, context, model_input: list[Request], params=None) -> list[Images]:
        """Return the images of every request. Raises MlflowException with code 400 for invalid requests."""
        return [Images(images=[encode_png(pixels) for pixels in self._draw(request)]) for request in model_input]

    def _draw(self, request: Request) -> np.ndarray:
        labels = self._checked_labels(request)
        sampler = partial(few_steps, self._spec, mid_sigmas=self._mid_sigmas(request.steps))
        told: dict[str, Any] = {"labels": labels, "guidance": self._checked_guidance(request.guidance)}
        return draw_images(
            self._spec,
            self._model,
            sampler,
            n=request.n,
            seed=request.seed,
            device=self._device,
            decode=self._decode,
            **told,
        )

    def _mid_sigmas(self, steps: int | None) -> list[float]:
        if self._spec.fixed_steps is None:
            return usual_mid_sigmas(self._spec, (steps or 1) - 1, self._levels)
        if steps not in (None, self._spec.fixed_steps):
            raise _refusal(f"steps: this model was distilled to {self._spec.fixed_steps}, got {steps}")
        return []

    def _checked_guidance(self, weight: float | None) -> float | None:
        try:
            return weight if weight is None else self._spec.checked_guidance(weight)
        except ValueError as error:
            raise _refusal(f"guidance: {error}") from error

    def _checked_labels(self, request: Request) -> list[int] | None:
        labels, classes = request.labels, self._spec.num_classes
        if labels is None:
            return None
        if not classes:
            raise _refusal("labels: this model is not conditioned on classes; leave them out")
        if len(labels) != request.n:
            raise _refusal(f"labels: {len(labels)} of them for n={request.n} images; give one an image")
        odd = next((label for label in labels if not 0 <= label < classes), None)
        if odd is not None:
            raise _refusal(f"labels: {odd} is none of the model's classes 0 to {classes - 1}")
        return labels


def _refusal(reason: str) -> MlflowException:
    return MlflowException.invalid_parameter_value(reason)


def encode_png(pixels: np.ndarray) -> str:
    """Return base64 of a PNG, pixels uint8 [H, W, 1 or 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


set_model(ServedStudent())
