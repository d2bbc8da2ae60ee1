"""Stage `features`: the network that measures images, and its features of the training images (the reference).

An evaluation reads these features and never the training images.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from cm_core.metrics.features import (
    NETWORKS,
    Classifier,
    ClassifierFeatures,
    accuracy,
    build_extractor,
    extract_features,
    save_classifier,
    train_classifier,
)
from cm_core.params import Params
from cm_core.randomness import derive_seed
from flows.data.dataset import Dataset, load_dataset
from flows.data.feature_files import write_feature_files
from flows.errors import UserError
from flows.monitor import Monitor
from flows.storage.fetch import download_dir, fetch, file_digest

LOG_EVERY = 10  # steps


class Download(NamedTuple):
    """A published pretrained network; `digest` is the start of the SHA-256 if the file name holds it."""

    url: str
    digest: str = ""

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


PUBLISHED = {
    "inception-v3-compat": Download(  # by torch-fidelity
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "6726825d",
    ),
    "vgg16": Download("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"),  # by torchvision
}


class Pretrained(Params):
    """The fields of the pretrained feature networks."""

    kind: str
    """Name of the feature network."""
    weights: str | None = None
    """State dict: a path, s3:// or https:// address; null: the published file, from torch's cache or its download."""
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    """Checksum the weights must have; null accepts any file and records its checksum."""
    batch_size: int = Field(100, ge=1)
    """Images per batch of the network."""

    @property
    def extractor(self) -> str:
        """Name in torch-fidelity's registry."""
        return self.kind

    @property
    def download(self) -> Download:
        """The published weights."""
        return PUBLISHED[self.kind]


class InceptionFeatures(Pretrained):
    """Inception v3 of 2015-12-05, the network of published FIDs."""

    model_config = ConfigDict(title="inception-v3-compat")

    kind: Literal["inception-v3-compat"] = "inception-v3-compat"
    """Name of the feature network."""


class Vgg16Features(Pretrained):
    """VGG16 trained on ImageNet, the network of published precision and recall (Kynkaanniemi et al., 2019)."""

    model_config = ConfigDict(title="vgg16")

    kind: Literal["vgg16"] = "vgg16"
    """Name of the feature network."""


class DinoFeatures(Pretrained):
    """DINOv2, for FD-DINOv2 (Stein et al., 2023)."""

    model_config = ConfigDict(title="dinov2")

    kind: Literal["dinov2"] = "dinov2"
    """Name of the feature network."""
    size: Literal["s", "b", "l"] = "l"
    """Vision transformer with 384, 768 or 1024 features; published numbers are of `l`."""

    @property
    def extractor(self) -> str:
        return f"dinov2_vit{self.size}14"

    @property
    def download(self) -> Download:
        return Download(f"https://dl.fbaipublicfiles.com/dinov2/{self.extractor}/{self.extractor}_pretrain.pth")


Features = ClassifierFeatures | InceptionFeatures | Vgg16Features | DinoFeatures


def features(seed: int, features: Features, prepare_dir: Path, out_dir: Path, monitor: Monitor) -> None:
    """Train or fetch the feature network, extract the features of the training images, write both.
    Raises UserError if weights are unavailable or do not fit, or if a classifier has no labels to learn.
    """
    dataset = load_dataset(prepare_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out_dir.mkdir(parents=True, exist_ok=True)
    if isinstance(features, ClassifierFeatures):
        extractor_name, learnt = "classifier", _train(features, dataset, derive_seed(seed, "features"), device, monitor)
        weights = out_dir / "weights.safetensors"
        save_classifier(learnt, weights)
        facts = _report_accuracy(learnt, features, dataset, monitor)
    else:
        extractor_name, facts = features.extractor, {}
        weights = out_dir / "weights.pth"
        _place_weights(features, weights, monitor)
    try:
        extractor = build_extractor(extractor_name, weights, device)
    except ValueError as error:
        raise UserError(f"features.weights: {error}") from error
    reference = extract_features(
        dataset.train_images,
        extractor,
        batch_size=features.batch_size,
        device=device,
        on_batch=lambda done, total: monitor.progress(done, total, "images"),
    ).features
    facts = {
        "kind": features.kind,
        "extractor": extractor_name,
        "short_name": NETWORKS[extractor_name].short_name,
        "layer": NETWORKS[extractor_name].layer,
        "weights": weights.name,
        "sha256": file_digest(weights),
        "reference_sha256": dataset.sha256["train"],
        **facts,
    }
    write_feature_files(out_dir, facts, reference.numpy())


def _train(
    features: ClassifierFeatures, dataset: Dataset, seed: int, device: torch.device, monitor: Monitor
) -> Classifier:
    def on_step(step: int, loss: Tensor) -> None:
        monitor.progress(step, features.num_steps, "steps")
        if step % LOG_EVERY == 0:
            monitor.metrics({"loss": float(loss)}, step)

    try:
        return train_classifier(
            dataset.train_images,
            dataset.train_labels,
            num_classes=dataset.num_classes,
            params=features,
            seed=seed,
            device=device,
            on_step=on_step,
        )
    except ValueError as error:
        raise UserError(
            f"features=classifier: data set {dataset.name}: {error}; allowed: inception-v3-compat, vgg16, dinov2"
        ) from error


def _report_accuracy(
    net: Classifier, features: ClassifierFeatures, dataset: Dataset, monitor: Monitor
) -> dict[str, Any]:
    """Measure accuracy on held-out images, if the data set has labelled ones."""
    if not (dataset.heldout_labels >= 0).any():
        return {}
    share = accuracy(net, dataset.heldout_images, dataset.heldout_labels, batch_size=features.batch_size)
    monitor.metrics({"heldout_accuracy": share}, features.num_steps)
    monitor.remark(f"the feature network classifies {share:.1%} of the held-out images correctly")
    return {"accuracy": share}


def _place_weights(features: Pretrained, path: Path, monitor: Monitor) -> None:
    """Copy the weights to `path`: the artifact must work without access to their source."""
    if features.weights is None:
        shutil.copyfile(_published_weights(features, monitor), path)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = download_dir(features.sha256) if features.sha256 else Path(scratch)
        shutil.copyfile(fetch(features.weights, folder, sha256=features.sha256, monitor=monitor), path)


def _published_weights(features: Pretrained, monitor: Monitor) -> Path:
    """Return the published file from the folder that torch.hub keeps; download it if absent."""
    folder, download = Path(torch.hub.get_dir()) / "checkpoints", features.download
    path = folder / download.name
    if not path.is_file() or features.sha256:
        path = _fetch_published(features, folder, monitor)
    if not file_digest(path).startswith(download.digest):
        raise UserError(f"{path}: its SHA-256 does not begin with {download.digest}; remove the damaged file")
    return path


def _fetch_published(features: Pretrained, folder: Path, monitor: Monitor) -> Path:
    monitor.remark(f"looking for the weights {features.download.name} in {folder}, then at {features.download.url}")
    try:
        return fetch(features.download.url, folder, sha256=features.sha256, monitor=monitor)
    except UserError as error:
        raise UserError(
            f"features={features.kind}: no {features.download.name} in {folder}, and {error}; put the file there, "
            "set features.weights to its path or s3:// address, or use features: classifier"
        ) from error
