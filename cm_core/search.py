"""Time points of multistep sampling by greedy ternary search (CM, 2303.01469, section 4 and App. C).

Points of a decreasing grid are added one at a time, each where the score, e.g. FID, is lowest with the others fixed;
the score is assumed unimodal between two neighbours. Differs from the paper's code: every gap between points is
searched, gaps of fewer than three intervals too, and no candidate is scored twice.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

Indices = tuple[int, ...]  # grid indices, increasing: decreasing noise levels


@dataclass
class Search:
    """Scores of the candidates so far, in order of evaluation; lower is better."""

    score: Callable[[Indices], float]
    scores: dict[Indices, float] = field(default_factory=dict)

    def __call__(self, indices: Indices) -> float:
        """Return the score of a candidate, computed once. Raises ValueError if it is not finite."""
        if indices not in self.scores:
            value = self.score(indices)
            if not math.isfinite(value):
                raise ValueError(f"the score of {list(indices)} is {value}")
            self.scores[indices] = value
        return self.scores[indices]

    def run(self, *, num_scales: int, nfe: int) -> Indices:
        """Return the best indices of `nfe` points, the first of them 0, on a grid without its last point.

        Raises ValueError if the grid has too few points.
        """
        if not 2 <= nfe < num_scales:
            raise ValueError(f"nfe={nfe} must lie between 2 and num_scales - 1 = {num_scales - 1}")
        chosen: Indices = (0,)
        while len(chosen) < nfe:
            ends = (*chosen, num_scales - 1)
            found = [self._between(chosen, lo, hi) for lo, hi in zip(ends, ends[1:], strict=False) if hi - lo > 1]
            chosen = min(found, key=self)
        return chosen

    def _between(self, chosen: Indices, lo: int, hi: int) -> Indices:
        """Return `chosen` with the best point between two neighbours, hi - lo > 1."""
        with_point = {index: tuple(sorted((*chosen, index))) for index in range(lo + 1, hi)}
        while hi - lo > 2:
            third = (hi - lo) / 3
            left, right = lo + math.floor(third), hi - math.ceil(third)
            if self(with_point[left]) < self(with_point[right]):
                hi = right
            else:
                lo = left
        self(with_point[lo + 1])  # the remaining candidate
        return min((one for one in with_point.values() if one in self.scores), key=self)  # all seen: noise has dips
