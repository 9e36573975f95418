"""Means over seeds, and differences between models trained with the same seeds."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan, sqrt
from statistics import mean, stdev
from typing import Dict, Sequence

from scipy.stats import t

__all__ = ["Difference", "paired_difference", "standard_error"]


@dataclass(frozen=True)
class Difference:
    """A mean difference and its confidence interval; the interval of one pair is unknown (nan)."""

    mean: float
    low: float
    high: float
    pairs: int


def standard_error(values: Sequence[float]) -> float:
    """
    Args:
        values (sequence[float]): one for each seed.

    Returns:
        float: of their mean; nan for a single value.
    """
    return stdev(values) / sqrt(len(values)) if len(values) > 1 else nan


def paired_difference(
    ours: Dict[int, float], theirs: Dict[int, float], confidence: float = 0.95
) -> Difference:
    """
    Compare two models by the seeds that both were trained with. A seed decides on the order of the
    data, so that the difference within a pair varies less than the values do.

    Args:
        ours, theirs (dict[int, float]): value by seed.
        confidence (float): of the interval, which is Student's for the mean of the differences.

    Returns:
        Difference: ours minus theirs.

    Raises:
        ValueError: if they have no seed in common.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        raise ValueError("no seed in common")
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    centre = mean(differences)
    if len(seeds) == 1:
        return Difference(centre, nan, nan, 1)
    reach = t.ppf(0.5 + confidence / 2, len(seeds) - 1) * standard_error(differences)
    return Difference(centre, centre - reach, centre + reach, len(seeds))
