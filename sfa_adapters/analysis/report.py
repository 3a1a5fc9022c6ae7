"""Common parts of the reports of this package: tables as JSON and CSV, skipped samples, intervals, figure style.

Figures are designed for half the width of a printed page or a screen: 12 inches with 17 pt letters.
"""

from __future__ import annotations

import csv
import json
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sfa_adapters import figure_style
from sfa_adapters.errors import DataError
from sfa_adapters.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Report", "Skip", "Skips", "formula_of_means", "write_csv"]

TITLE, LABEL = 19, 17  # pt
# Dense text, or the first of two, is orange.
COLOURS = (figure_style.ORANGE, figure_style.BLUE, *figure_style.COLOURS[2:5], figure_style.GRAY)
MARKERS = figure_style.MARKERS
Row = dict[str, Any]


@dataclass(frozen=True)
class Skip:
    """A sample that counts in no mean, with the reason; samples are numbered from 0 in the order of the input."""

    sample: int
    reason: str


class Skips(list[Skip]):
    """All skipped samples of a measurement."""

    def counts(self) -> dict[str, int]:
        """Number of skipped samples for each reason."""
        return dict(Counter(skip.reason for skip in self))

    def message(self) -> str:
        """All reasons with their counts in one line."""
        return "; ".join(f"{reason} ({count})" for reason, count in self.counts().items())

    def refuse_all(self, kept: int, what: str) -> None:
        """Raises an error if all samples were skipped.

        Args:
            kept: Number of samples that were not skipped.
            what: What the samples are, for the error.

        Raises:
            DataError: `kept` is 0; lists the reasons.
        """
        if not kept:
            raise DataError(f"None of the {len(self)} {what} can be measured. {self.message() or 'Give at least one.'}")


class Report(ABC):
    """Base of the results of measurements, with a table and a figure.

    Attributes:
        skipped: Samples that could not be measured.
    """

    skipped: Skips

    @abstractmethod
    def table(self) -> list[Row]:
        """The numbers, one row each; all rows have the same columns."""

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """The options of the measurement, as values for JSON."""

    @abstractmethod
    def figure(self) -> Figure:
        """Draws the result."""

    def to_json(self) -> str:
        """Everything as JSON: `options`, `table` (NaN and infinity are null) and `skipped`."""
        skipped = {"counts": self.skipped.counts(), "samples": [vars(skip) for skip in self.skipped]}
        record = {"options": self.options(), "table": [_finite(row) for row in self.table()], "skipped": skipped}
        return json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False)

    def to_csv(self, path: str | Path) -> Path:
        """Writes `table` as CSV."""
        return write_csv(self.table(), path)


def _finite(row: Row) -> Row:
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}


def write_csv(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Writes rows of the same columns as CSV."""
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return Path(path)


def interval_columns(name: str, interval: Interval) -> Row:
    """An interval as three columns."""
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}


def formula_of_means(formula: Callable[..., Any], *values: np.ndarray, seed: int = 0, rounds: int = 2000) -> Interval:
    """A function of means over samples, with a percentile bootstrap interval (all values of a sample stay together).

    Args:
        formula: Function of one mean for each of `values`, elementwise.
        *values: One number per sample each, `[N]`.
        seed: Seed of the bootstrap.
        rounds: Bootstrap rounds.

    Returns:
        Value and 95% interval, which has no width for a single sample.
    """
    count = len(values[0])
    drawn = np.random.default_rng(seed).integers(0, count, (rounds, count))
    low, high = np.quantile(formula(*(value[drawn].mean(1) for value in values)), (0.025, 0.975))
    return Interval(float(formula(*(value.mean() for value in values))), float(low), float(high))


# -- figures ----------------------------------------------------------------------------------------------------------


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; width and height in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=160, layout="constrained")


def plain(axis: Any, title: str = "", x: str = "", y: str = "") -> None:
    """Formats an axis: large letters, a light grid, no box."""
    axis.set_title(title, fontsize=TITLE, pad=10)
    axis.set_xlabel(x, fontsize=LABEL)
    axis.set_ylabel(y, fontsize=LABEL)
    axis.tick_params(labelsize=LABEL - 1)
    axis.grid(color=figure_style.GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def spaced(count: int, most: int) -> list[int]:
    """At most `most` of the numbers 0 to `count - 1`, evenly spaced, with the first and the last."""
    return list(range(count)) if count <= most else np.linspace(0, count - 1, most).round().astype(int).tolist()


def around(intervals: Sequence[Interval]) -> np.ndarray:
    """Lengths of error bars below and above the values, `[2, N]`; rounding may put a mean outside by an ulp."""
    return np.array([(i.value - i.low, i.high - i.value) for i in intervals]).T.clip(min=0)
