"""Plans of real pages at 25, 50 and 75% of the tokens: scorers, level sets, and what one would do without them.

Rows for comparison use as many tokens on average:

* *down-sampling*: every patch is `14 / sqrt(budget)` px, so nothing is fine.
* *page router*: a page is either left as it is or gets a quarter of the tokens everywhere, as the density router of
  Granite-Docling in transformers chooses 256 or 64 tokens a tile for a whole page. Its pages are chosen here by their
  true density, the densest first, which a learned router can at best equal. That router saves tokens in the language
  model only: its tower sees every patch.
* *random*: cells chosen at random; *boxes*: by the true share of words in a cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sfa_adapters.adat.plan import cell_grid
from sfa_adapters.adat.policy import PatchPolicy
from sfa_adapters.adat.scorers import content, score
from sfa_adapters.errors import PlanError
from sfa_adapters.recipes.density.plan_measures import (
    BUDGETS,
    LEVEL_SETS,
    PATCH,
    PlanCounts,
    count_plan,
    grouped_mean,
    shown_size,
    word_area,
)
from sfa_adapters.recipes.density.real_pages import RealPage
from sfa_adapters.recipes.nano.evaluate import Interval

__all__ = ["CASES", "Case", "PlanRow", "plan_rows"]

SCORERS = ("density", "entropy", "reconstruction", "edges")
SMALLEST_CELL = 28  # px; larger cells take the maximum of these, as `to_cells` would
DOWN, ROUTER = "down-sampling", "page router"


@dataclass(frozen=True)
class Case:
    """One way to plan.

    Attributes:
        scorer: As `PatchPolicy` takes it, "boxes" or "random".
        levels: Name of a level set.
    """

    scorer: str
    levels: str

    @property
    def name(self) -> str:
        """As in the tables."""
        return f"{self.scorer}; {self.levels} px"


CASES = tuple(Case(scorer, levels) for scorer in ("boxes", *SCORERS, "random") for levels in LEVEL_SETS)


@dataclass(frozen=True)
class PlanRow:
    """One row of the table.

    Attributes:
        name: How plans were made.
        budget: Largest share of the tower's tokens.
        tokens: Mean share that was used.
        fine: Share of the words' area under patches of at most 14 px.
        side: Mean side of the patches over words, px.
    """

    name: str
    budget: float
    tokens: float
    fine: Interval
    side: Interval


def plan_rows(
    pages: Sequence[RealPage], cases: Sequence[Case] = CASES, budgets: Sequence[float] = BUDGETS
) -> list[PlanRow]:
    """Plans every page in every way.

    Args:
        pages: The pages.
        cases: Ways to plan; the two rows for comparison are added.
        budgets: Shares of the tower's tokens.

    Returns:
        One row per way and budget, without those whose levels cannot stay within the budget.
    """
    from rich.progress import track

    counts: dict[tuple[str, float], list[PlanCounts]] = {}
    groups, text_shares = [], []
    for number, page in enumerate(track(pages, "planning", transient=True)):
        shown = _Shown(page, number)
        groups.append(page.package)
        text_shares.append(float(shown.words.mean()))
        for case in cases:
            for budget in budgets:
                counted = shown.count(case, budget)
                if counted is not None:
                    counts.setdefault((case.name, budget), []).append(counted)
    rows = [_row(name, budget, part) for (name, budget), part in counts.items() if len(part) == len(pages)]
    for budget in budgets:
        side = PATCH / budget**0.5
        rows.append(_row(DOWN, budget, [PlanCounts(group, 0.0, side, budget) for group in groups]))
        rows.append(_row(ROUTER, budget, _routed(groups, text_shares, budget)))
    return rows


def _row(name: str, budget: float, part: Sequence[PlanCounts]) -> PlanRow:
    groups = [count.group for count in part]
    fine, side = (grouped_mean(groups, values) for values in ([c.fine for c in part], [c.side for c in part]))
    return PlanRow(name, budget, float(np.mean([count.tokens for count in part])), fine, side)


def _routed(groups: Sequence[str], text_shares: Sequence[float], budget: float) -> list[PlanCounts]:
    """Whole pages at all tokens or at a quarter: as many of the densest pages as the budget allows on average."""
    most = int((4 * budget - 1) / 3 * len(groups) + 1e-9)
    dense = set(np.argsort(text_shares, kind="stable")[::-1][: max(0, most)].tolist())
    return [
        PlanCounts(group, 1.0, PATCH, 1.0) if number in dense else PlanCounts(group, 0.0, 2 * PATCH, 0.25)
        for number, group in enumerate(groups)
    ]


class _Shown:
    """A page in the size in which it is planned; its densities are computed once for all cases."""

    def __init__(self, page: RealPage, number: int) -> None:
        import cv2

        self.page, self.number = page, number
        self.size = shown_size(page)
        self.words = word_area(page, self.size)
        picture = cv2.resize(page.picture(), self.size[::-1], interpolation=cv2.INTER_AREA)
        self.pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
        self.densities: dict[str, Tensor] = {}
        self.contents: dict[int, Tensor] = {}

    def count(self, case: Case, budget: float) -> PlanCounts | None:
        levels, cell = LEVEL_SETS[case.levels]
        policy = PatchPolicy(levels, cell=cell, budget=budget)
        if cell not in self.contents:
            self.contents[cell] = content(self.pixels, cell)[0]
        try:
            plan = policy.plan(self.density(case.scorer, cell), self.size, PATCH, self.contents[cell])
        except PlanError:  # these levels need more tokens than the budget has
            return None
        return count_plan(self.page.package, plan, self.words)

    def density(self, scorer: str, cell: int) -> Tensor:
        rows, columns = cell_grid(self.size, cell)
        if scorer == "random":
            return torch.rand((rows, columns), generator=torch.Generator().manual_seed(self.number))
        if scorer == "boxes":
            words = self.words.reshape(rows, cell, columns, cell)
            return torch.from_numpy(words.mean(axis=(1, 3))).float()
        if scorer not in self.densities:
            self.densities[scorer] = score(self.pixels, scorer, SMALLEST_CELL)[0]  # pyright: ignore[reportArgumentType]
        factor = cell // SMALLEST_CELL
        return torch.nn.functional.max_pool2d(self.densities[scorer][None], factor)[0]
