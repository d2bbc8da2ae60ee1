"""FID, Inception score, KID, precision and recall of generated images, computed by torch-fidelity.

FID: Heusel et al. 2017; IS: Salimans et al. 2016; KID: Binkowski et al. 2018; precision and recall: Kynkaanniemi
et al. 2019. Reference features are extracted once and compared with every set of generated images.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from cm_core.metrics.features import ImageFeatures, extract_features, register_extractors
from cm_core.params import Params
from cm_core.randomness import make_generator

MOST_KEPT = 50_000  # reference images whose features are kept, for KID, precision and recall: 400 MB for Inception
NEEDED_FEATURES = "features of single reference images, which published statistics do not have"
SUBSET_SEED = 0  # of the subsets of precision and recall; torch-fidelity has its own for KID and the Inception score


class MetricParams(Params):
    """The metrics and their settings."""

    beside_fid: tuple[Literal["is", "kid", "precision_recall"], ...] = ("is", "kid", "precision_recall")
    """Metrics computed in addition to FID."""
    isc_splits: int = Field(10, ge=1)
    """Parts over which the Inception score is averaged; fewer where they would be small (see isc_min_images)."""
    isc_min_images: int = Field(500, ge=1)
    """Minimum images per part of the Inception score, which is biased downwards in small parts."""
    kid_subsets: int = Field(100, ge=1)
    """Random subsets over which KID is averaged."""
    kid_subset_size: int = Field(1000, ge=2)
    """Images per subset of KID; at most a quarter of the smaller set."""
    prc_neighbourhood: int = Field(3, ge=1)
    """Precision and recall: the k-th nearest neighbour sets the radius of a sample's ball."""
    prc_images: int = Field(10_000, ge=4, le=MOST_KEPT)
    """Precision and recall: images of each set, drawn at random; time and memory grow with the square."""

    @property
    def needs_features(self) -> bool:
        """Whether a metric compares single images of the reference."""
        return bool({"kid", "precision_recall"} & set(self.beside_fid))

    def adapted_to(self, num_images: int, reference: "Reference") -> "MetricParams":
        """Shrink parts and subsets to fit both sets; raise ValueError if a metric needs more images."""
        num_images = min(num_images, num_images if reference.features is None else len(reference.features))
        needed = self.prc_neighbourhood + 1
        if num_images < needed:
            raise ValueError(
                f"{num_images} images are too few: prc_neighbourhood={self.prc_neighbourhood} needs at least {needed}"
            )
        splits = max(1, min(self.isc_splits, num_images // self.isc_min_images))
        subset = max(2, min(self.kid_subset_size, num_images // 4))  # larger ones would hardly differ
        return self.model_copy(update={"isc_splits": splits, "kid_subset_size": subset})


class Moments:
    """Mean and covariance of rows that come in batches, float64; batches are merged around their means (Chan 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self._squares = torch.zeros(())  # the latter around the mean

    def add(self, rows: Tensor) -> None:
        """Take in rows [B, D], on any device."""
        rows = rows.double()
        mean, total = rows.mean(0), self.count + len(rows)
        centred, gap = rows - mean, mean - self.mean.to(rows)
        between = torch.outer(gap, gap) * (self.count * len(rows) / total)
        self._squares = self._squares.to(rows) + centred.T @ centred + between
        self.mean = self.mean.to(rows) + gap * (len(rows) / total)
        self.count = total

    def statistics(self) -> "Statistics":
        """Return what a Fréchet distance compares; the covariance is the unbiased estimate."""
        return Statistics(self.mean.cpu().numpy(), (self._squares / (self.count - 1)).cpu().numpy())


class Statistics(NamedTuple):
    """The Gaussian of a set of features."""

    mu: np.ndarray  # float64 [D]
    sigma: np.ndarray  # float64 [D, D]


@dataclass(frozen=True)
class Reference:
    """The reference that generated images are compared with."""

    statistics: Statistics
    features: Tensor | None = None  # float32 [M, D] of at most MOST_KEPT images, drawn at random; None: not known

    @classmethod
    def of(cls, features: Tensor) -> "Reference":
        """Return the reference of features [N, D]."""
        return cls.collect([features], len(features))

    @classmethod
    def collect(cls, batches: Iterable[Tensor], num_images: int) -> "Reference":
        """Return the reference of batches of features [B, D]; memory does not grow with the number of images."""
        moments, kept, chosen = Moments(), [], random_rows(num_images, MOST_KEPT)
        for batch in batches:
            rows = chosen - moments.count
            kept.append(batch[rows[(rows >= 0) & (rows < len(batch))].to(batch.device)].float().cpu())
            moments.add(batch)
        return cls(moments.statistics(), torch.cat(kept))


def evaluate_images(
    generated: np.ndarray,  # uint8 [N, H, W, C]
    reference: Reference,
    extractor: nn.Module,
    *,
    params: MetricParams,
    batch_size: int,
    device: torch.device,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Return fid and, as `params` ask, is, is_std (if the network scores classes), kid, kid_std, precision, recall.

    Raises ValueError for too few images.
    """
    params = params.adapted_to(len(generated), reference)
    found = extract_features(generated, extractor, batch_size=batch_size, device=device, on_batch=on_batch)
    return compare(found, reference, params)


def compare(generated: ImageFeatures, reference: Reference, params: MetricParams) -> dict[str, float]:
    """Compute the metrics from features; `params` already fit the number of images.

    Raises ValueError if a metric needs features of a reference that has statistics alone.
    """
    metrics = {"fid": frechet_distance(generated.features, reference)}
    if "is" in params.beside_fid and generated.logits is not None:
        metrics |= _inception_score(generated.logits, params)
    if params.needs_features:
        if reference.features is None:
            raise ValueError(f"kid and precision_recall need {NEEDED_FEATURES}")
        if "kid" in params.beside_fid:
            metrics |= _kernel_distance(generated.features, reference.features, params)
        if "precision_recall" in params.beside_fid:
            metrics |= _precision_recall(generated.features, reference.features, params)
    return metrics


def frechet_distance(features: Tensor, reference: Reference) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 sqrt(C1 C2)) of the two Gaussians with these moments."""
    register_extractors()  # torch_fidelity imports torchvision
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    moments = Moments()
    moments.add(features)
    pair = (moments.statistics()._asdict(), reference.statistics._asdict())
    return fid_statistics_to_metric(*pair, verbose=False)[KEY_METRIC_FID]


def _kernel_distance(generated: Tensor, reference: Tensor, params: MetricParams) -> dict[str, float]:
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    found = kid_features_to_metric(
        generated, reference, kid_subsets=params.kid_subsets, kid_subset_size=params.kid_subset_size, verbose=False
    )
    return {"kid": found[KEY_METRIC_KID_MEAN], "kid_std": found[KEY_METRIC_KID_STD]}


def _precision_recall(generated: Tensor, reference: Tensor, params: MetricParams) -> dict[str, float]:
    from torch_fidelity.metric_prc import prc_features_to_metric

    # torch-fidelity's order: generated first. Releases before 0.4 had the reverse.
    found = prc_features_to_metric(
        generated[random_rows(len(generated), params.prc_images)],
        reference[random_rows(len(reference), params.prc_images)],
        prc_neighborhood=params.prc_neighbourhood,
        save_cpu_ram=True,  # distances in chunks
        verbose=False,
    )
    return {"precision": found["precision"], "recall": found["recall"]}


def random_rows(num_rows: int, count: int) -> Tensor:
    """Return at most `count` of `num_rows` indices, increasing: a seeded random draw, as images may be sorted."""
    order = torch.randperm(num_rows, generator=make_generator("cpu", SUBSET_SEED, "subset"))
    return order[:count].sort().values


def _inception_score(logits: Tensor, params: MetricParams) -> dict[str, float]:
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    found = isc_features_to_metric(logits, splits=params.isc_splits)
    return {"is": found[KEY_METRIC_ISC_MEAN], "is_std": found[KEY_METRIC_ISC_STD]}
