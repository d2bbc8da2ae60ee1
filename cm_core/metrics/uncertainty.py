"""How far metrics would move with other images of the same model: their standard deviations, from one set of images.

By the infinitesimal jackknife (Efron 1982, chapter 6): the deviation, over the square root of the number of images, of
each image's influence, which is the metric's derivative by that image's weight. It is the bootstrap's limit without two
of its faults: a resampled set holds fewer different images, so that its FID is biased upwards once more, and holds some
twice, so that its nearest neighbours lie at distance 0. The reference is taken as given.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from cm_core.metrics.evaluation import MetricParams, Moments, Reference, random_rows
from cm_core.metrics.features import ImageFeatures

MOST_IMAGES = 5_000  # whose influence is computed, at most: cost is bounded, and 1 % of the deviation is lost


def deviations(
    generated: ImageFeatures, reference: Reference, params: MetricParams, metrics: Mapping[str, float]
) -> dict[str, float]:
    """Return {<metric>_std} of the metrics that `compare` returned for these images.

    That of FID is absent where images are no more than features: their covariance has no inverse.
    """
    count, dim = generated.features.shape
    rows = random_rows(count, MOST_IMAGES)
    influences: dict[str, Tensor] = {}
    if count > dim:
        influences["fid"] = _fid_influence(generated.features, reference, rows)
    if "is" in metrics and generated.logits is not None:
        influences["is"] = metrics["is"] * _certainty(generated.logits)
    if "kid" in metrics and reference.features is not None:
        influences["kid"] = _kid_influence(generated.features[rows], reference.features)
    found = {f"{key}_std": float(influence.std()) / math.sqrt(count) for key, influence in influences.items()}
    if "kid_std" in found:  # a mean over random subsets, of which there are only so many
        found["kid_std"] = math.hypot(found["kid_std"], metrics["kid_std"] / math.sqrt(params.kid_subsets))
    if "precision" in metrics and reference.features is not None:
        numbers = {"precision": count, "recall": len(reference.features)}  # of the images that are counted
        for key, number in numbers.items():
            found[f"{key}_std"] = _of_share(metrics[key], min(number, params.prc_images))
    return found


def _fid_influence(features: Tensor, reference: Reference, rows: Tensor) -> Tensor:
    """Return 2 (m - m_r) (x - m) + (x - m)' (I - T) (x - m) [B] of some rows, but for a constant.

    T is the linear map that takes the Gaussian of the features to the reference's.
    """
    moments = Moments()
    moments.add(features)
    mu, sigma = moments.statistics()
    root = _power(reference.statistics.sigma, 0.5)
    transport = root @ _power(root @ sigma @ root, -0.5) @ root
    centred = features[rows].double().cpu() - torch.from_numpy(mu)
    curvature = torch.from_numpy(np.eye(len(mu)) - transport)
    slope = torch.from_numpy(2 * (mu - reference.statistics.mu))
    return centred @ slope + ((centred @ curvature) * centred).sum(1)


def _power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    """Return a power of a symmetric matrix [D, D], on the space where it is not singular."""
    values, vectors = np.linalg.eigh(matrix)
    kept = values > values[-1] * len(values) * np.finfo(values.dtype).eps
    return (vectors[:, kept] * values[kept] ** exponent) @ vectors[:, kept].T


def _certainty(logits: Tensor) -> Tensor:
    """Return KL(p(y|x) || p(y)) [N], of whose mean the Inception score is the exponential."""
    own = logits.double().log_softmax(1)
    return (own.exp() * (own - own.exp().mean(0).log())).sum(1)


def _kid_influence(generated: Tensor, reference: Tensor) -> Tensor:
    """Return 2 (mean k(x, x') - mean k(x, r)) [B], of the cubic kernel of KID."""
    reference = reference[random_rows(len(reference), MOST_IMAGES)].to(generated)

    def kernel(others: Tensor) -> Tensor:
        return (generated @ others.T / generated.shape[1] + 1) ** 3

    own = kernel(generated)
    among = (own.sum(1) - own.diagonal()) / (len(own) - 1)
    return 2 * (among - kernel(reference).mean(1))


def _of_share(share: float, count: int) -> float:
    """Return the binomial deviation of a share of `count` images."""
    return math.sqrt(share * (1 - share) / count)
