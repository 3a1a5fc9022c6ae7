"""Where a plan puts its fine patches: share of the words' area under patches of at most 14 px, and their mean side.

A page is shown `SIDE` px long to a tower with patches of 14 px, its own size. Two numbers per page: the share of the
area of all words that lies under patches of at most that size, and the mean side of the patches over words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sfa_adapters.adat.labels import filled
from sfa_adapters.adat.plan import PatchPlan
from sfa_adapters.recipes.density.real_pages import RealPage
from sfa_adapters.recipes.nano.evaluate import Interval

__all__ = [
    "BUDGETS",
    "LEVEL_SETS",
    "PATCH",
    "Levels",
    "PlanCounts",
    "count_plan",
    "grouped_mean",
    "shown_size",
    "word_area",
]

PATCH = 14
SIDE = 896
BUDGETS = (0.25, 0.5, 0.75)
Levels = tuple[tuple[float, int], ...]
# Name in tables: levels and cell in px.
LEVEL_SETS: dict[str, tuple[Levels, int]] = {
    "8, 14, 32 (published)": (((0.7, 8), (0.3, 14), (0.0, 32)), 28),
    "14, 28": (((0.3, 14), (0.0, 28)), 28),
    "14, 56": (((0.3, 14), (0.0, 56)), 56),
    "14, 28, 56": (((0.4, 14), (0.1, 28), (0.0, 56)), 56),
    "8, 14, 56": (((0.7, 8), (0.3, 14), (0.0, 56)), 56),
    "14, 112": (((0.3, 14), (0.0, 112)), 112),
}


@dataclass(frozen=True)
class PlanCounts:
    """One page under one plan.

    Attributes:
        group: Its document; intervals resample these.
        fine: Share of the words' area under patches of at most 14 px.
        side: Mean side of the patches over words, px.
        tokens: Tokens over the tower's own.
    """

    group: str
    fine: float
    side: float
    tokens: float


def word_area(page: RealPage, size: tuple[int, int]) -> np.ndarray:
    """Where words stand on a page that is shown in some size, bool `[height, width]`."""
    scale = np.tile((size[1] / page.size[1], size[0] / page.size[0]), 2)
    return filled(np.round(page.boxes * scale).astype(int), size)


def shown_size(page: RealPage, side: int = SIDE) -> tuple[int, int]:
    """Height and width in which a page is shown: whole cells of all level sets."""
    scale = side / max(page.size)
    height, width = (max(1, round(length * scale / 112)) * 112 for length in page.size)
    return height, width


def count_plan(group: str, plan: PatchPlan, words: np.ndarray) -> PlanCounts:
    """Counts the area of words under each size of patch.

    Args:
        group: Document of the page.
        plan: Patch plan.
        words: Where words stand, bool `[height, width]`, of the size of the page.
    """
    height, width = plan.padded_size
    padded = np.zeros((height, width))
    padded[: words.shape[0], : words.shape[1]] = words
    cell = plan.cell
    area = padded.reshape(height // cell, cell, width // cell, cell).sum(axis=(1, 3))
    side = (cell / np.asarray(plan.sides, dtype=float))[plan.level.numpy()]
    total = max(area.sum(), 1.0)
    return PlanCounts(group, float(area[side <= PATCH].sum() / total), float((area * side).sum() / total), plan.ratio)


def grouped_mean(groups: Sequence[str], values: Sequence[float], rounds: int = 2000) -> Interval:
    """A mean over pages with its 95% interval, documents resampled."""
    names = sorted(set(groups))
    sums = np.array([[sum(v for g, v in zip(groups, values, strict=True) if g == n), groups.count(n)] for n in names])
    draws = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), rounds) @ sums
    low, high = np.quantile(draws[:, 0] / draws[:, 1], (0.025, 0.975))
    return Interval(float(np.mean(values)), float(low), float(high))
