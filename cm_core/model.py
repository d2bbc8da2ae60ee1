"""The description of a trained model, from which it can be rebuilt, and its weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator

from cm_core.checkpoint import load_tensors, save_tensors
from cm_core.guidance import WeightRange, check_weight
from cm_core.latents import Latents
from cm_core.networks import Network
from cm_core.noise import Noise
from cm_core.params import Params
from cm_core.precond import AverageVelocity, Precond
from cm_core.randomness import seeded
from cm_core.sampling import check_levels

SPEC_FILE, WEIGHTS_FILE = "model.json", "ema.safetensors"


Form = Literal["denoiser", "skip", "unshifted", "piecewise", "euler", "average_velocity", "generator"]
CONSISTENCY_FUNCTIONS = ("skip", "unshifted", "piecewise")


class ModelSpec(Params):
    """A network, its preconditioning, and its images; stored beside the weights as model.json."""

    form: Form
    """denoiser: EDM's scalings; skip, piecewise: a consistency function, its boundary at sigma_min (CM, eq. 5, 4);
    unshifted: one with EDM's scalings, its boundary at 0 (ECT, sCM); euler: a denoiser for few Euler steps (PD);
    average_velocity: a flow map between two times, by a network of both, without scalings (MeanFlow); generator: maps
    noise of one level to images (DMD2)."""
    network: Network
    """The raw network's hyperparameters."""
    noise: Noise
    """Range of noise levels and sigma_data."""
    image_shape: tuple[int, int, int]
    """Channels, height, width of what the network sees: images, or latents of images."""
    num_classes: int = Field(0, ge=0)
    """Classes the network is conditioned on; 0: unconditional."""
    augment_dim: int = Field(0, ge=0)
    """Length of the augmentation vector, a network input; 0: none."""
    noise_scale: float = Field(1.0, gt=0)
    """Factor on ln(sigma) / 4 before the noise embedding; 1000 for networks in OpenAI's convention."""
    euler_steps: int = Field(1, ge=1)
    """Steps that a model of form euler was distilled to; it samples with exactly that many."""
    generator_sigma: float | None = Field(None, gt=0)
    """The only noise level of a model of form generator; empty: noise.sigma_max."""
    guidance_range: WeightRange | None = None
    """Range of the guidance weight that the network takes as an input; empty: it takes none."""
    guidance: float | None = None
    """The weight that such a model samples with unless told another."""
    truncated_at: float | None = Field(None, gt=0)
    """The noise level below which a consistency function was not trained (TCM); empty: it was at all."""
    latents: Latents | None = None
    """How latents that the network sees become images; empty: it sees images."""

    @model_validator(mode="after")
    def _names_its_weight(self) -> "ModelSpec":
        if (self.guidance_range is None) != (self.guidance is None):
            raise ValueError("guidance_range and guidance, the weight in it to sample with, come together")
        if self.guidance is not None:
            self.checked_guidance(self.guidance)
        return self

    def checked_guidance(self, weight: float) -> float:
        """Return a weight of guidance; raise ValueError if the model takes none, or none such."""
        if self.guidance_range is None:
            raise ValueError("this model takes no weight of guidance as an input; train one with guidance_range")
        check_weight(weight, self.guidance_range)
        return weight

    @property
    def pixel_shape(self) -> tuple[int, int, int]:
        """Channels, height, width of the images."""
        return self.latents.pixel_shape if self.latents else self.image_shape

    @property
    def is_consistency_function(self) -> bool:
        """Whether f maps points of a trajectory to its end: what levels of one's choice need."""
        return self.form in CONSISTENCY_FUNCTIONS

    @property
    def edits(self) -> bool:
        """Whether f maps every point of a trajectory to its end: what editing needs, down to small noise."""
        return self.is_consistency_function and self.truncated_at is None

    @property
    def fixed_steps(self) -> int | None:
        """The network calls for which a student was trained, if it samples with no other number."""
        return {"euler": self.euler_steps, "generator": 1}.get(self.form)

    @property
    def boundary(self) -> float:
        """The noise level at which f(x, sigma) = x."""
        return self.noise.sigma_min if self.form in ("skip", "piecewise") else 0.0

    def check_levels(self, sigmas: Sequence[float]) -> None:
        """Raise ValueError unless noise levels decrease, stay above sigma_min and lie where the model was trained."""
        check_levels(sigmas, sigma_min=self.noise.sigma_min)
        if self.truncated_at is not None and sigmas[-1] < self.truncated_at:
            raise ValueError(
                f"this model was trained at noise levels from {self.truncated_at:g} on alone (TCM), got {list(sigmas)}"
            )

    def build(self, *, autocast: torch.dtype | None = None) -> Precond:
        """Return the model with fresh weights from the global generator."""
        two_times, takes_guidance = self.form == "average_velocity", self.guidance_range is not None
        inputs = {"two_times": two_times, "takes_guidance": takes_guidance}
        net = self.network.build(self.image_shape, self.num_classes, augment_dim=self.augment_dim, **inputs)
        return (AverageVelocity if two_times else Precond)(
            net,
            sigma_min=self.boundary,
            sigma_data=self.noise.sigma_data,
            c_noise=self.noise.c_noise,
            noise_scale=self.noise_scale,
            piecewise=self.form == "piecewise",
            autocast=autocast,
            guidance=self.guidance,
        )


def count_parameters(spec: ModelSpec) -> int:
    """Return the number of a model's parameters, without their memory."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in spec.build().parameters())


def build_seeded(spec: ModelSpec, seed: int, *, autocast: torch.dtype | None = None) -> Precond:
    """Build the model on the CPU with weights that depend on `seed` alone."""
    with seeded(seed):
        return spec.build(autocast=autocast)


def save_model(folder: Path, spec: ModelSpec, weights: dict[str, torch.Tensor]) -> None:
    """Write the weights (and buffers), then model.json, whose presence marks the folder complete."""
    (folder / SPEC_FILE).unlink(missing_ok=True)
    save_tensors(folder / WEIGHTS_FILE, weights)
    (folder / SPEC_FILE).write_text(spec.model_dump_json(indent=2) + "\n")


def load_model(
    folder: Path, *, device: torch.device | str = "cpu", autocast: torch.dtype | None = None
) -> tuple[ModelSpec, Precond]:
    """Load a model from `save_model`, in eval mode, without gradients; raise FileNotFoundError if there is none."""
    spec = load_spec(folder)
    model = spec.build(autocast=autocast)
    load_weights(model, folder / WEIGHTS_FILE)
    return spec, model.to(device).eval().requires_grad_(False)


def load_spec(folder: Path) -> ModelSpec:
    """Read the spec of a model; raise FileNotFoundError if the folder holds none."""
    if not (folder / SPEC_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds no model: {SPEC_FILE} is missing")
    return ModelSpec.model_validate_json((folder / SPEC_FILE).read_text())


def load_weights(model: torch.nn.Module, path: Path, *, added: frozenset[str] = frozenset()) -> None:
    """Copy the weights and buffers in `path` into `model`; raise ValueError unless names and shapes agree.

    The tensors `added` are not in the file, and stay as they are.
    """
    weights, own = load_tensors(path), model.state_dict()
    own = {name: tensor for name, tensor in own.items() if name not in added}
    if weights.keys() != own.keys():
        odd = min(weights.keys() ^ own.keys())
        raise ValueError(f"{path}: the weights are of another network (only one of the two has {odd})")
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            shapes = f"{tuple(weights[name].shape)} in the file, {tuple(tensor.shape)} in the network"
            raise ValueError(f"{path}: the weights are of another network ({name}: {shapes})")
    model.load_state_dict(weights, strict=not added)
