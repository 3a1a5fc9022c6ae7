"""Means with 95% intervals, by drawing the samples again (percentile bootstrap)."""

from dataclasses import dataclass

import numpy as np

__all__ = ["Interval", "bootstrap"]


@dataclass(frozen=True)
class Interval:
    """A measured value and its 95% interval; NaN where there was nothing to measure."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(values: np.ndarray, seed: int = 0, rounds: int = 2000) -> Interval:
    """Mean of `values` with a percentile bootstrap interval.

    Args:
        values: one number or truth value per sample, [N].
        seed: of the resampling.
        rounds: how often the samples are drawn again.

    Returns:
        Mean and 95% interval.
    """
    if len(values) == 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    drawn = np.random.default_rng(seed).integers(0, len(values), (rounds, len(values)))
    low, high = np.quantile(np.asarray(values, dtype=np.float64)[drawn].mean(1), (0.025, 0.975))
    return Interval(float(np.mean(values)), float(low), float(high))
