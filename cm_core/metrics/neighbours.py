"""Nearest neighbours in feature space: a generator that has memorised shows images beside which training images lie."""

import torch
from torch import Tensor

CHUNK = 128  # queries at a time: their distances to 50,000 references are 26 MB


def nearest(queries: Tensor, references: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return Euclidean distances, float32 [Q, count], and indices, of the nearest references [M, D], nearest first."""
    distances, indices = [], []
    for some in queries.split(CHUNK):
        # Without the expansion |x|^2 - 2 xy + |y|^2, equal rows lie at distance 0 exactly.
        all_distances = torch.cdist(some, references.to(some), compute_mode="donot_use_mm_for_euclid_dist")
        found = all_distances.topk(min(count, len(references)), largest=False)
        distances.append(found.values)
        indices.append(found.indices)
    return torch.cat(distances), torch.cat(indices)
