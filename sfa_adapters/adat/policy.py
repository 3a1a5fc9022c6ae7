"""`PatchPolicy`: which patch size each cell of a page gets, from its text density and a budget of tokens.

A cell whose density lies above the first threshold gets the first level, and so on; every cell above no threshold gets
the last. A budget adds one shift to all thresholds: the smallest one, with the most tokens, that stays within it. What
is left is spent on cells that lie at this shift exactly, those with most content first (`sfa_adapters.adat.ties`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from sfa_adapters.adat.plan import PatchPlan, cell_grid, check_page, tokens_per_cell
from sfa_adapters.adat.scorers import Scorer, check_scorer, content, score
from sfa_adapters.adat.shift import Level, margins_over, shifted_levels, smallest_shift
from sfa_adapters.adat.ties import crossings
from sfa_adapters.errors import DataError, PlanError

__all__ = ["PUBLISHED_LEVELS", "PatchPolicy"]

DENSE, COARSE = 0.3, 4  # of the default levels: density above which a cell is text, and side of blank cells in patches
PUBLISHED_LEVELS = ((0.7, 8), (0.3, 14), (0.0, 32))  # of the method: density above which it is used, patch in px


@dataclass(frozen=True)
class PatchPolicy:
    """Chooses small patches where the text is and large ones elsewhere, within a budget of tokens.

    A cell of side c at a level of p pixels holds n * n tokens with n = c / p rounded (halves up) and at least 1: a
    patch larger than the cell, or than the page, gives one token per cell. Sizes are exact where c is a multiple of p.

    Attributes:
        levels: For each level the density above which it is used, and its patch in pixels; densities descend to 0.0,
            patches ascend. By default the tower's own patch above a density of 0.3, and four times its side elsewhere:
            the levels that put most words under fine patches on real pages (docs/patch_policy.md).
        cell: Side of a cell in pixels; by default twice the side of the tower's own patches, and four times with the
            default levels.
        scorer: Where densities come from: a name, or a function of images `[B, 3, H, W]` in [0, 1] that returns
            `[B, h, w]`.
        budget: Largest number of tokens of a page: a share of the tower's own number (float), or an absolute number
            (int); by default the thresholds are fixed.
        reduce: How a density map finer than the cells is reduced to one density per cell; the maximum keeps a lone
            digit.

    Raises:
        PlanError: A field has a wrong value; names the field, the entry and the value.
    """

    levels: Sequence[tuple[float, int]] | None = None
    cell: int | None = None
    scorer: Scorer = "density"
    budget: float | int | None = None
    reduce: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        if self.levels is not None:
            object.__setattr__(self, "levels", _checked_levels(self.levels))
        whole = isinstance(self.cell, int) and not isinstance(self.cell, bool)
        if self.cell is not None and (not whole or self.cell < 1):
            raise PlanError(
                f"cell={self.cell!r} must be a whole number of pixels, or None for twice the tower's patch."
            )
        if self.budget is not None:
            _check_budget(self.budget)
        check_scorer(self.scorer, self.reduce)

    @classmethod
    def published(
        cls,
        cell: int | None = None,
        scorer: Scorer = "density",
        budget: float | int | None = None,
        reduce: Literal["max", "mean"] = "max",
    ) -> PatchPolicy:
        """The levels with which the method was published, whatever the defaults are.

        8 px above a density of 0.7, 14 px above 0.3, else 32 px.

        Args:
            cell: As the attribute, and so are all others.
            scorer: Where densities come from.
            budget: Largest number of tokens of a page.
            reduce: How a density map is reduced to cells.

        Raises:
            PlanError: As `PatchPolicy`.
        """
        return cls(PUBLISHED_LEVELS, cell, scorer, budget, reduce)

    # -- planning -----------------------------------------------------------------------------------------------------

    def cell_of(self, patch: int) -> int:
        """Side of a cell in pixels for a tower with patches of `patch` pixels."""
        if self.cell is not None:
            return self.cell
        return (COARSE if self.levels is None else 2) * patch

    def levels_of(self, patch: int) -> Sequence[tuple[float, int]]:
        """The levels for a tower with patches of `patch` pixels: `levels`, or the default ones."""
        return ((DENSE, patch), (0.0, COARSE * patch)) if self.levels is None else self.levels

    def sides_of(self, patch: int) -> tuple[tuple[float, int], ...]:
        """(Threshold, tokens along the side of a cell) of each level for a tower; equal levels are merged."""
        return tuple((threshold, side) for threshold, side, _ in self._merged(patch))

    def plan(
        self, density: Tensor, image_size: tuple[int, int], patch: int, content: Tensor | None = None
    ) -> PatchPlan:
        """Makes the patch plan of one page.

        Args:
            density: Density of each cell in [0, 1], `[cell_rows, cell_columns]`; `to_cells` reduces finer maps.
            image_size: Height and width in pixels of the part that the tower sees, multiples of `patch`.
            patch: Side of the tower's own patches in pixels.
            content: What finer patches would show in each cell, at least 0, of the shape of `density`: the order of
                cells of equal density within a budget; `sfa_adapters.adat.scorers.content` measures it. Without it,
                cells of equal density count as equal in content, and those that become finer are spread evenly over
                the page (`sfa_adapters.adat.ties.spread_rank`). With `scorer="uniform"` they change level together.

        Returns:
            The patch plan.

        Raises:
            PlanError: The page does not consist of whole patches, a map has another shape, a density is NaN or outside
                [0, 1], a content is NaN, infinite or negative, or the budget is below the fewest tokens that the levels
                can give.
        """
        check_page(image_size, patch)
        values = None if content is None else _checked_content(content, density)
        return self._plan(density, image_size, patch, lambda: values)

    def _plan(
        self, density: Tensor, image_size: tuple[int, int], patch: int, content: Callable[[], Tensor | None]
    ) -> PatchPlan:
        cell, merged = self.cell_of(patch), self._merged(patch)
        grid, sides = cell_grid(image_size, cell), [side for _, side, _ in merged]
        values = _checked_density(density, grid, image_size, cell)
        margins = margins_over(values, merged)
        crossing = margins > 0
        if self.budget is not None:
            counts = tokens_per_cell(image_size, cell, sides).flatten(1)
            uniform = (image_size[0] // patch) * (image_size[1] // patch)
            limit, least = _tokens(self.budget, uniform), int(counts[-1].sum())
            if limit < least:
                raise PlanError(
                    f"budget={self.budget} allows {limit} tokens on a page of {image_size} px, but these levels give "
                    f"at least {least} ({least / uniform:.3f} of the {uniform} of the tower). Raise the budget, or the "
                    f"cell ({cell} px) and the patch of the last level."
                )
            gain, spare = counts[:-1] - counts[1:], limit - least
            if self.scorer == "uniform":
                crossing = margins > smallest_shift(margins, gain, spare)  # cells that are all alike stay alike
            else:
                crossing = crossings(margins, gain, spare, values, content, grid)
        level = (~crossing).sum(0).reshape(grid)
        return PatchPlan.from_levels(level, sides, image_size, patch, cell)

    def plan_images(self, images: Tensor, patch: int) -> list[PatchPlan]:
        """Scores images and makes the patch plan of each.

        Args:
            images: RGB in [0, 1], before a tower's normalisation, `[B, 3, H, W]`; rows and columns behind the last
                whole patch are ignored, as in the tower.
            patch: Side of the tower's own patches in pixels.

        Returns:
            One patch plan per image.

        Raises:
            DataError: The images cannot be used.
            PlanError: As in `plan`, or the scorer did not return a density map.
        """
        if images.ndim != 4:
            raise DataError(f"images {tuple(images.shape)} must be [batch, 3, height, width].")
        height, width = images.shape[-2:]
        size = (height, width) if min(height, width) < patch else (height // patch * patch, width // patch * patch)
        check_page(size, patch)
        seen = images[..., : size[0], : size[1]]
        cell = self.cell_of(patch)
        density = score(seen, self.scorer, cell, self.reduce, self._own_patch_density(patch)).cpu()
        return [
            self._plan(page, size, patch, lambda page=seen[i : i + 1]: content(page, cell)[0].flatten().cpu())
            for i, page in enumerate(density)
        ]

    # -- thresholds from data -----------------------------------------------------------------------------------------

    def calibrate(
        self, densities: Sequence[Tensor], image_sizes: Sequence[tuple[int, int]], patch: int, ratio: float
    ) -> PatchPolicy:
        """Shifts all thresholds alike, so that the mean share of tokens over some pages meets a target.

        Unlike a budget, which limits every page to one number, this gives dense pages more tokens than sparse ones. Its
        result is thresholds, and thresholds cannot tell cells of the very same density apart: where many are equal, as
        in a saturated map, the mean stays below the target. Use a budget there.

        Args:
            densities: Density of each cell of each page, as `plan` takes it.
            image_sizes: Height and width of each page in pixels.
            patch: Side of the tower's own patches in pixels.
            ratio: Target of the tokens over the tower's own number of tokens: the mean over the pages is at most this,
                and as near to it as one shift allows.

        Returns:
            A policy with other thresholds and no budget, without the levels that no density can reach any more.

        Raises:
            PlanError: There is no page, the lists differ in length, a density or the ratio cannot be used, or the ratio
                is below the least mean that the levels can give.
        """
        if not densities or len(densities) != len(image_sizes):
            raise PlanError(f"calibrate needs one size per density map: got {len(densities)} and {len(image_sizes)}.")
        if not math.isfinite(ratio) or ratio <= 0:
            raise PlanError(f"ratio={ratio} must be a finite number above 0.")
        cell, merged = self.cell_of(patch), self._merged(patch)
        values, shares = list[Tensor](), list[Tensor]()
        for density, size in zip(densities, image_sizes, strict=True):
            check_page(size, patch)
            values.append(_checked_density(density, cell_grid(size, cell), size, cell))
            counts = tokens_per_cell(size, cell, [side for _, side, _ in merged]).flatten(1).double()
            shares.append(counts / ((size[0] // patch) * (size[1] // patch) * len(densities)))
        share = torch.cat(shares, 1)
        least = float(share[-1].sum())
        if ratio < least * (1 - 1e-9):
            raise PlanError(f"ratio={ratio} is below {least:.4f}, the least mean ratio of these levels on these pages.")
        margins = margins_over(torch.cat(values), merged)
        # Sums of shares round; a billionth of a page is no token.
        shift = smallest_shift(margins, share[:-1] - share[1:], ratio - least + 1e-9)
        levels = shifted_levels(merged, torch.cat(values), margins, shift)
        # The default levels have cells of their own; with these levels in their place the cells stay.
        return replace(self, levels=levels, budget=None, cell=cell if self.levels is None else self.cell)

    # -- parts --------------------------------------------------------------------------------------------------------

    def _merged(self, patch: int) -> list[Level]:
        """(Threshold, n, patch) of each level; levels with the same n are merged into the one of lowest threshold."""
        cell = self.cell_of(patch)
        merged: dict[int, Level] = {}
        for threshold, size in self.levels_of(patch):
            side = max(1, (2 * cell + size) // (2 * size))
            merged[side] = (threshold, side, size)
        return list(merged.values())

    def _own_patch_density(self, patch: int) -> float:
        """A density that selects the level nearest to the tower's own patch size, for `scorer="uniform"`."""
        sides = self.sides_of(patch)
        wanted = self.cell_of(patch) / patch
        best = min(range(len(sides)), key=lambda k: abs(sides[k][1] - wanted))
        above = 1.0 if best == 0 else sides[best - 1][0]
        return 0.0 if best == len(sides) - 1 else (sides[best][0] + above) / 2


def _checked_levels(levels: Sequence[tuple[float, int]]) -> tuple[tuple[float, int], ...]:
    pairs = list(levels)
    if not pairs:
        raise PlanError("levels is empty; give at least one, such as [(0.0, 14)].")
    for number, pair in enumerate(pairs):
        where = f"levels[{number}]={pair!r}"
        whole = len(pair) == 2 and isinstance(pair[1], int) and not isinstance(pair[1], bool)  # pyright: ignore[reportUnnecessaryIsInstance, reportUnnecessaryComparison]
        if not whole or pair[1] < 1:
            raise PlanError(f"{where} must be (density, patch) with a patch of whole pixels, at least 1.")
        if not 0 <= pair[0] < 1:
            raise PlanError(f"{where}: the density must lie in [0, 1); no cell is denser than 1.")
        if number and not pair[0] < pairs[number - 1][0]:
            raise PlanError(f"{where}: densities must descend, but the level before has {pairs[number - 1][0]}.")
        if number and not pair[1] > pairs[number - 1][1]:
            raise PlanError(f"{where}: patches must ascend, but the level before has {pairs[number - 1][1]} px.")
    if pairs[-1][0] != 0:
        raise PlanError(
            f"levels[{len(pairs) - 1}]={pairs[-1]!r} is the last and must have density 0.0: it takes the rest."
        )
    return tuple((float(threshold), patch) for threshold, patch in pairs)


def _check_budget(budget: float) -> None:
    number = isinstance(budget, int | float) and not isinstance(budget, bool)  # pyright: ignore[reportUnnecessaryIsInstance]
    if not number or not math.isfinite(budget) or budget <= 0:
        raise PlanError(
            f"budget={budget!r} must be above 0 and finite: a share of the tower's tokens (float) or a number (int)."
        )


def _checked_content(content: Tensor, density: Tensor) -> Tensor:
    """Checks a map of content and flattens it to one number per cell, `[cells]`, float32."""
    if tuple(content.shape) != tuple(density.shape):
        raise PlanError(
            f"content {tuple(content.shape)} must have one value per cell, as density {tuple(density.shape)}."
        )
    flat = torch.as_tensor(content).detach().float().cpu().flatten()
    wrong = ~((flat >= 0) & (flat < math.inf))  # NaN fails both
    if bool(wrong.any()):
        number = int(wrong.nonzero()[0])
        at = divmod(number, content.shape[1])
        raise PlanError(f"content{list(at)} is {flat[number].item()}; contents must be finite and at least 0.")
    return flat


def _tokens(budget: float, uniform: int) -> int:
    # 0.29 * 100 is a little less than 29 in floating point.
    return budget if isinstance(budget, int) else math.floor(budget * uniform + 1e-6)


def _checked_density(density: Tensor, grid: tuple[int, int], image_size: tuple[int, int], cell: int) -> Tensor:
    """Checks a density map and flattens it to one density per cell, `[cells]`, float32."""
    if tuple(density.shape) != grid:
        raise PlanError(
            f"density {tuple(density.shape)} must have one value per cell: a page of {image_size} px has {grid} cells "
            f"of {cell} px. `sfa_adapters.adat.scorers.to_cells` reduces finer maps."
        )
    flat = torch.as_tensor(density).detach().float().cpu().flatten()  # labels come as arrays
    # NaN fails both comparisons.
    wrong = ~((flat >= 0) & (flat <= 1))
    if bool(wrong.any()):
        number = int(wrong.nonzero()[0])
        at = divmod(number, grid[1])
        raise PlanError(f"density{list(at)} is {flat[number].item()}; densities must lie in [0, 1].")
    return flat
