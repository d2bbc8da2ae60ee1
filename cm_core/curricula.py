"""Curricula: pure functions of the optimiser step, so that a resumed run needs no hidden state."""

import math
from bisect import bisect_right
from itertools import accumulate
from typing import NamedTuple


def ct_num_scales(step: int, *, num_steps: int, s0: int, s1: int) -> int:
    """Grid points N(k) of consistency training, from s0 to s1 + 1 (CM, App. C).

    The released code's form, with at least one interval; `step` beyond `num_steps` counts as `num_steps`.
    """
    progress = min(step / num_steps, 1.0)
    intervals = math.ceil(math.sqrt(progress * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1)
    return max(intervals, 1) + 1


def ct_target_decay(num_scales: int, *, s0: int, mu0: float, per_interval: bool) -> float:
    """Target decay mu(k) = mu0 ** (s0 / N) (CM, App. C).

    `per_interval` divides by N - 1, as the released code that produced the paper's numbers; otherwise by N, as printed.
    """
    return math.exp(s0 * math.log(mu0) / (num_scales - 1 if per_interval else num_scales))


def ict_num_scales(step: int, *, num_steps: int, s0: int, s1: int) -> int:
    """Grid points N(k): s0 intervals, doubled at equal pace up to s1, plus one (iCT, section 3.4).

    One division replaces the paper's floor(k / floor(K / levels)), undefined for a run shorter than its levels.
    """
    levels = math.log2(s1 // s0) + 1
    return min(s0 * 2 ** int(step * levels / num_steps), s1) + 1


def ect_stage(step: int, *, num_steps: int, num_stages: int) -> int:
    """Stage of ECT's t -> r mapping: `num_stages` stages of equal length, 0-based (ECT, 2406.14548)."""
    return min(step * num_stages // num_steps, num_stages - 1)


class Halving(NamedTuple):
    """A round of progressive distillation: the student's steps, and the optimiser steps of the round."""

    num_intervals: int
    first: int
    end: int


def pd_halving(step: int, *, num_steps: int, start_steps: int, end_steps: int) -> Halving:
    """Return the round of `step`: intervals halve from start_steps to end_steps (CM, App. C; PD, 2202.00512).

    The rounds of two steps and of one last twice as long as the others, as in the released code (50,000 and 100,000).
    """
    intervals = [start_steps]
    while intervals[-1] > end_steps:
        intervals.append(intervals[-1] // 2)
    shares = list(accumulate(2 if n <= 2 else 1 for n in intervals))
    ends = [num_steps * share // shares[-1] for share in shares]
    index = min(bisect_right(ends, step), len(ends) - 1)
    return Halving(intervals[index], ends[index - 1] if index else 0, ends[index])


def learning_rate_decay(schedule: str, step: int, *, num_steps: int, start: int) -> float:
    """Factor that is 1 up to the step `start`, then falls as `schedule` says.

    `linear` and `cosine` reach 0 after the last step; `inverse_sqrt` is sqrt(start / step) (EDM2, eq. 67; sCM; ECT).
    """
    if schedule == "constant" or step <= start:
        return 1.0
    if schedule == "inverse_sqrt":
        return math.sqrt(start / step)
    progress = (step - start) / (num_steps - start)
    return 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2


def linear_ramp(step: int, *, ramp_steps: int) -> float:
    """Factor that grows from 1 / ramp_steps to 1 over the first `ramp_steps` steps; 1 when there is no ramp."""
    return 1.0 if ramp_steps == 0 else min((step + 1) / ramp_steps, 1.0)
