"""FID, Inception score, KID, precision and recall of generated images, computed by torch-fidelity.

FID: Heusel et al. 2017; IS: Salimans et al. 2016; KID: Binkowski et al. 2018; precision and recall: Kynkaanniemi
et al. 2019. Reference features are extracted once and compared with every set of generated images.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from cm_core.metrics.features import ImageFeatures, extract_features, register_extractors
from cm_core.params import Params


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
    prc_images: int = Field(10_000, ge=4)
    """Precision and recall: images of each set, spread evenly over it; time and memory grow with the square."""

    def adapted_to(self, num_images: int) -> "MetricParams":
        """Shrink parts and subsets to fit `num_images`; raise ValueError if a metric needs more images."""
        needed = self.prc_neighbourhood + 1
        if num_images < needed:
            raise ValueError(
                f"{num_images} images are too few: prc_neighbourhood={self.prc_neighbourhood} needs at least {needed}"
            )
        splits = max(1, min(self.isc_splits, num_images // self.isc_min_images))
        subset = max(2, min(self.kid_subset_size, num_images // 4))  # larger ones would hardly differ
        return self.model_copy(update={"isc_splits": splits, "kid_subset_size": subset})


@dataclass(frozen=True)
class Reference:
    """Features of the real reference images, and their mean and covariance."""

    features: Tensor  # float32 [M, D]
    statistics: dict[str, Any]

    @classmethod
    def of(cls, features: Tensor) -> "Reference":
        """Compute the statistics once: it takes seconds for 50,000 x 2048 features."""
        return cls(features, _statistics(features))


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
    params = params.adapted_to(min(len(generated), len(reference.features)))
    found = extract_features(generated, extractor, batch_size=batch_size, device=device, on_batch=on_batch)
    return compare(found, reference, params)


def compare(generated: ImageFeatures, reference: Reference, params: MetricParams) -> dict[str, float]:
    """Compute the metrics from features; `params` already fit the number of images."""
    metrics = {"fid": frechet_distance(generated.features, reference)}
    if "is" in params.beside_fid and generated.logits is not None:
        metrics |= _inception_score(generated.logits, params)
    if "kid" in params.beside_fid:
        metrics |= _kernel_distance(generated.features, reference.features, params)
    if "precision_recall" in params.beside_fid:
        metrics |= _precision_recall(generated.features, reference.features, params)
    return metrics


def frechet_distance(features: Tensor, reference: Reference) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 sqrt(C1 C2)) of the two Gaussians with these moments."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    return fid_statistics_to_metric(_statistics(features), reference.statistics, verbose=False)[KEY_METRIC_FID]


def _statistics(features: Tensor) -> dict[str, Any]:
    register_extractors()  # torch_fidelity imports torchvision
    from torch_fidelity.metric_fid import fid_features_to_statistics

    return fid_features_to_statistics(features.double())  # float32 sums over 50,000 images lose digits


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
        spread(generated, params.prc_images),
        spread(reference, params.prc_images),
        prc_neighborhood=params.prc_neighbourhood,
        save_cpu_ram=True,  # distances in chunks
        verbose=False,
    )
    return {"precision": found["precision"], "recall": found["recall"]}


def spread(features: Tensor, count: int) -> Tensor:
    """Return at most `count` rows, evenly spaced: a data set may be sorted by class."""
    if len(features) <= count:
        return features
    return features[torch.arange(count) * len(features) // count]


def _inception_score(logits: Tensor, params: MetricParams) -> dict[str, float]:
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    found = isc_features_to_metric(logits, splits=params.isc_splits)
    return {"is": found[KEY_METRIC_ISC_MEAN], "is_std": found[KEY_METRIC_ISC_STD]}
