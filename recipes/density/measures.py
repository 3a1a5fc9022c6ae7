"""How well a density map finds text: correlation, AUC, words found, false positives, with intervals over packages.

| measure | over | what it is |
|---|---|---|
| r | all cells of all pages | Pearson's correlation with the true density |
| AUC | cells | probability that a cell of text (true density at least 0.5) is ranked above one without any |
| hit | words with a letter or digit | share of those whose middle lies in a cell with a density over 0.3 |
| false | cells without text | share with a density over 0.3 |

Pages of one document are alike, so intervals (95%) resample documents (here: packages), not pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from sfa_adapters.recipes.nano.evaluate import Interval

__all__ = ["TEXT", "Measure", "PageCounts", "count_page", "measure"]

Measure = Literal["r", "AUC", "hit", "false"]
TEXT = 0.3  # density from which a cell counts as text: the lower threshold of the published plan
DENSE = 0.5
BINS = 500
ROUNDS = 1000


@dataclass(frozen=True)
class PageCounts:
    """Sums over the cells and words of one page, of which all measures are made.

    Attributes:
        group: Name of the document; intervals resample these.
        sums: n, sums of x, y, x^2, y^2, xy of the estimate x and the truth y, `[6]`.
        text: Histogram of the estimate in cells of text, `[BINS]`.
        blank: Histogram of the estimate in cells without text, `[BINS]`.
        words: Words found, and all words, `[2]`.
        false: Cells without text that count as text, and all cells without text, `[2]`.
    """

    group: str
    sums: np.ndarray
    text: np.ndarray
    blank: np.ndarray
    words: np.ndarray
    false: np.ndarray


def count_page(group: str, estimate: np.ndarray, truth: np.ndarray, middles: np.ndarray, coarse: int = 1) -> PageCounts:
    """Counts one page.

    Args:
        group: Name of its document.
        estimate: Estimated density, `[rows, columns]`.
        truth: True density, of the same shape.
        middles: Row and column (in cells) of the middle of each word, `[words, 2]`; words beside the page are left out.
        coarse: Cells along a side that are averaged before densities are compared, see `View.coarse`.
    """
    x, y = (_averaged(values.astype(np.float64), coarse).ravel() for values in (estimate, truth))
    sums = np.array([len(x), x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()])
    bins = np.minimum((x * BINS).astype(int), BINS - 1)
    none = y == 0
    cells = np.floor(middles).astype(int)
    cells = cells[((cells >= 0) & (cells < estimate.shape)).all(axis=1)]
    hits = estimate[cells[:, 0], cells[:, 1]] > TEXT
    return PageCounts(
        group,
        sums,
        np.bincount(bins[y >= DENSE], minlength=BINS).astype(float),
        np.bincount(bins[none], minlength=BINS).astype(float),
        np.array([hits.sum(), len(hits)], dtype=float),
        np.array([(x[none] > TEXT).sum(), none.sum()], dtype=float),
    )


def _averaged(cells: np.ndarray, count: int) -> np.ndarray:
    """Means of `count` x `count` cells, at the lower and right border of fewer."""
    if count == 1:
        return cells
    starts = [np.arange(0, side, count) for side in cells.shape]
    sums = np.add.reduceat(np.add.reduceat(cells, starts[0], axis=0), starts[1], axis=1)
    rows, columns = (np.diff([*start, side]) for start, side in zip(starts, cells.shape, strict=True))
    return sums / np.outer(rows, columns)


def measure(pages: Sequence[PageCounts], what: Measure, rounds: int = ROUNDS) -> Interval:
    """A measure over pages, with its 95% interval.

    Args:
        pages: Counts of all pages.
        what: Which measure.
        rounds: Times that the documents are resampled.

    Returns:
        NaN for all three numbers where the pages have nothing to count.
    """
    assert what in get_args(Measure)
    groups = sorted({page.group for page in pages})
    totals = np.stack([np.sum([_counted(p, what) for p in pages if p.group == group], axis=0) for group in groups])
    draws = np.random.default_rng(0).multinomial(len(groups), np.full(len(groups), 1 / len(groups)), rounds)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = float(_value(totals.sum(0)[None], what)[0])
        low, high = (
            np.nanquantile(_value(draws @ totals, what), (0.025, 0.975)) if np.isfinite(value) else (value, value)
        )
    return Interval(value, float(low), float(high))


def _counted(page: PageCounts, what: Measure) -> np.ndarray:
    if what == "r":
        return page.sums
    if what == "AUC":
        return np.concatenate([page.text, page.blank])
    return page.words if what == "hit" else page.false


def _value(totals: np.ndarray, what: Measure) -> np.ndarray:
    """The measure from sums, `[rounds, counts]` to `[rounds]`."""
    if what == "r":
        n, sx, sy, sxx, syy, sxy = totals.T
        return (n * sxy - sx * sy) / np.sqrt((n * sxx - sx**2) * (n * syy - sy**2))
    if what == "AUC":
        text, blank = totals[:, :BINS], totals[:, BINS:]
        below = blank.cumsum(1) - blank / 2  # a tie is worth a half
        return (text * below).sum(1) / (text.sum(1) * blank.sum(1))
    return totals[:, 0] / totals[:, 1]
