"""Means with 95% bootstrap intervals, medians with intervals from order statistics, and the sign test."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Interval", "bootstrap", "median_interval", "seeds_bootstrap", "sign_test"]


@dataclass(frozen=True)
class Interval:
    """A measured value and its 95% interval; all NaN where there were no samples."""

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
        rounds: bootstrap rounds.

    Returns:
        Mean and 95% interval.
    """
    if len(values) == 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    drawn = np.random.default_rng(seed).integers(0, len(values), (rounds, len(values)))
    low, high = np.quantile(np.asarray(values, dtype=np.float64)[drawn].mean(1), (0.025, 0.975))
    return Interval(float(np.mean(values)), float(low), float(high))


def median_interval(values: Sequence[float]) -> Interval:
    """Median of a few values with a distribution-free interval from their order statistics (sign test).

    For timings: one outlier moves neither end far, and unlike a bootstrap of few values it is not too narrow. It covers
    the true median with at least 95%; 5 values can reach 94% at most, from the smallest to the largest.

    Args:
        values: at least one number.

    Returns:
        Median and interval.
    """
    ordered, outside, rank = sorted(values), 0.0, 0
    while (outside := outside + math.comb(len(ordered), rank) / 2 ** len(ordered)) <= 0.025:
        rank += 1
    rank = max(rank - 1, 0)
    return Interval(statistics.median(ordered), ordered[rank], ordered[-1 - rank])


def seeds_bootstrap(values: Sequence[np.ndarray], seed: int = 0, rounds: int = 2000) -> Interval:
    """Mean over training runs, with an interval over runs and test samples (hierarchical bootstrap).

    Runs are resampled, then the samples inside each of them. For paired arms pass the differences sample by sample.
    With few runs the interval is too narrow: three seeds hardly predict a fourth.

    Args:
        values: for each run, one number per test sample.
        seed: of the resampling.
        rounds: bootstrap rounds.

    Returns:
        The mean over runs of their means, and a 95% interval.
    """
    if len(values) == 0 or any(len(run) == 0 for run in values):
        return Interval(float("nan"), float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    runs = rng.integers(0, len(values), (rounds, len(values)))
    means = np.empty(runs.shape)
    for number, run in enumerate(values):
        places = runs == number
        drawn = rng.integers(0, len(run), (int(places.sum()), len(run)))
        means[places] = np.asarray(run, dtype=np.float64)[drawn].mean(1)
    low, high = np.quantile(means.mean(1), (0.025, 0.975))
    return Interval(float(np.mean([np.mean(run) for run in values])), float(low), float(high))


def sign_test(better: int, worse: int) -> float:
    """Exact two-sided sign test: is one direction more frequent than chance?

    Args:
        better: Pairs that differ in one direction; pairs without a difference are left out.
        worse: Pairs that differ in the other.

    Returns:
        The p value; 1 where no pair differs. Five pairs cannot go below 0.0625.
    """
    pairs, ways, tail = better + worse, 1, 0
    for count in range(min(better, worse) + 1):
        tail += ways
        ways = ways * (pairs - count) // (count + 1)
    return min(1.0, 2 * tail / 2**pairs)  # whole numbers up to here: exact however many pairs there are
