"""Stage `features`: the network that measures images, and the reference: statistics of the training images' features.

An evaluation reads the reference and never the training images. Published statistics can take its place.
"""

import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from cm_core.metrics.classifier import (
    Classifier,
    ClassifierFeatures,
    accuracy,
    save_classifier,
    train_classifier,
)
from cm_core.metrics.evaluation import Reference
from cm_core.metrics.features import NETWORKS, build_extractor, extract_features, feature_batches
from cm_core.params import Params
from cm_core.randomness import derive_seed
from flows.data.archives import refuse_zip_bomb
from flows.data.dataset import Dataset, load_dataset
from flows.data.feature_files import read_statistics, write_feature_files
from flows.errors import UserError
from flows.monitor import Monitor
from flows.storage.digests import file_digest
from flows.storage.fetch import download_dir, fetch

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
    reference: str | None = None
    """Published statistics to compare with, an .npz of mu and sigma: a path, s3:// or https:// address; null: the
    training images. FID and the Inception score alone can use them (evaluate.beside_fid)."""
    reference_sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    """Checksum the statistics must have; null accepts any file and records its checksum."""
    batch_size: int = Field(100, ge=1)
    """Images per batch of the network."""

    @property
    def extractor(self) -> str:
        """Name in torch-fidelity's registry."""
        return self.kind

    @property
    def short_name(self) -> str:
        """The network in names of metrics: fid_<short name>."""
        return self.kind.partition("-")[0]  # inception-v3-compat: inception

    @property
    def download(self) -> Download:
        """The published weights."""
        return PUBLISHED[self.kind]


class ImageNetFeatures(Pretrained):
    """Inception v3 of 2015-12-05, the network of published FIDs; or VGG16, the one of published precision and recall.

    Kynkaanniemi et al. (2019) measure precision and recall on VGG16.
    """

    kind: Literal["inception-v3-compat", "vgg16"] = "inception-v3-compat"
    """Name of the feature network."""


class DinoFeatures(Pretrained):
    """DINOv2, for FD-DINOv2 (Stein et al., 2023)."""

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


Features = ClassifierFeatures | ImageNetFeatures | DinoFeatures


def features(seed: int, features: Features, prepare_dir: Path, out_dir: Path, monitor: Monitor) -> None:
    """Train or fetch the feature network, measure the training images or fetch published statistics, write both.
    Raises UserError if weights or statistics are unavailable or do not fit, or if a classifier has no labels to learn.
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
    if isinstance(features, Pretrained) and features.reference:
        reference, described = _published_reference(features, dataset, extractor, device, monitor)
    else:
        batches = feature_batches(
            dataset.train_images,
            extractor,
            batch_size=features.batch_size,
            device=device,
            on_batch=lambda done, total: monitor.progress(done, total, "images"),
        )
        count = len(dataset.train_images)
        reference = Reference.collect((batch[0] for batch in batches), count)
        described = {"images": f"{count} training images", "sha256": dataset.sha256["train"]}
    facts = {
        "kind": features.kind,
        "extractor": extractor_name,
        "short_name": features.short_name,
        "layer": NETWORKS[extractor_name].layer,
        "weights": weights.name,
        "sha256": file_digest(weights),
        "data_sha256": dataset.sha256["train"],
        "reference": described,
        **facts,
    }
    write_feature_files(out_dir, facts, reference)


def _published_reference(
    features: Pretrained, dataset: Dataset, extractor: nn.Module, device: torch.device, monitor: Monitor
) -> tuple[Reference, dict[str, Any]]:
    """Fetch published statistics and compare their shape with the features of one image."""
    assert features.reference is not None, "the caller asks for a published reference alone"
    dim = extract_features(dataset.train_images[:1], extractor, batch_size=1, device=device).features.shape[1]
    with _fetched(features.reference, features.reference_sha256, monitor) as path:
        if zipfile.is_zipfile(path):
            refuse_zip_bomb(path)
        try:
            statistics = read_statistics(path)
            if len(statistics.mu) != dim:
                raise ValueError(f"statistics of {len(statistics.mu)} features, {features.extractor} has {dim}")
        except ValueError as error:
            raise UserError(f"features.reference={features.reference}: {error}") from error
        name = features.reference.rpartition("/")[2]  # whatever folder or mirror it came from: the checksum tells it
        described = {"images": f"published statistics, {name}", "sha256": file_digest(path)}
    return Reference(statistics), described


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
    with _fetched(features.weights, features.sha256, monitor) as found:
        shutil.copyfile(found, path)


@contextmanager
def _fetched(uri: str, sha256: str | None, monitor: Monitor) -> Iterator[Path]:
    """Yield the file at a path or address; downloads of a known checksum are kept."""
    with tempfile.TemporaryDirectory() as scratch:
        yield fetch(uri, download_dir(sha256) if sha256 else Path(scratch), sha256=sha256, monitor=monitor)


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
