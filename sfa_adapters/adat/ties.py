"""Which cells become finer within a budget: in the order of their margin, and where margins are equal, of content.

A shift of all thresholds (`sfa_adapters.adat.shift`) moves cells of the very same density together. On a page where
most cells have the largest density that there is, none of them then fits the budget. So the cells at the shift itself
are taken one after another, those with most content first, until the next one does not fit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sfa_adapters.adat.shift import smallest_shift

__all__ = ["crossings", "spread_rank"]


def crossings(
    margins: Tensor,
    gain: Tensor,
    spare: int,
    density: Tensor,
    content: Callable[[], Tensor | None],
    grid: tuple[int, int],
) -> Tensor:
    """Which cells cross which threshold, within a budget of tokens.

    First all pairs of threshold and cell whose margin is above the smallest shift that stays within the budget. Then
    those whose margin is this shift, in the order of content (from the largest on), then density (from the largest on),
    then `spread_rank`, then threshold (from the lowest on), until the next one does not fit. Cells of neither density
    nor content are left out of the second part: finer patches would show nothing there.

    Args:
        margins: Density minus threshold, `[levels - 1, cells]`.
        gain: Tokens that a cell costs more beyond a threshold, at least 0, `[levels - 1, cells]`, int64.
        spare: Budget minus the fewest possible tokens, at least 0.
        density: Density of each cell, `[cells]`.
        content: Gives what finer patches would show in each cell, at least 0, `[cells]`, or None where it is not known;
            called only where the order of equal margins matters.
        grid: Rows and columns of the cells.

    Returns:
        Bool `[levels - 1, cells]`. Where no two margins are equal: those above the shift.
    """
    shift = smallest_shift(margins, gain, spare)
    crossing = margins > shift
    level, cell = (margins == shift).nonzero(as_tuple=True)
    left = spare - int(gain[crossing].sum())
    if len(cell) == 0 or int(gain[level, cell].min()) > left:
        return crossing
    shown = content()
    shown = torch.zeros_like(density) if shown is None else shown
    some = (shown[cell] > 0) | (density[cell] > 0)
    level, cell = level[some], cell[some]
    order = torch.argsort(level, descending=True, stable=True)
    # From the least important key to the most important one: a stable sort keeps the order of those before.
    for key in (-spread_rank(grid), density, shown):
        order = order[torch.argsort(key[cell[order]], descending=True, stable=True)]
    order = order[gain[level[order], cell[order]].cumsum(0) <= left]
    crossing[level[order], cell[order]] = True
    return crossing


def spread_rank(grid: tuple[int, int]) -> Tensor:
    """Ranks cells such that the first k of them lie evenly over the page, for every k.

    In reading order all of a budget would go to the top of the page. This is the order of the threshold matrix of
    ordered dithering (B. E. Bayer, 1973): the bits of row xor column and of the row, interleaved and reversed.

    Args:
        grid: Rows and columns of the cells.

    Returns:
        One distinct number per cell, row by row, `[rows * columns]`, int64.
    """
    row, column = (torch.arange(side) for side in grid)
    row, column = row[:, None].expand(grid), column.expand(grid)
    rank = torch.zeros(grid, dtype=torch.int64)
    for bit in range(max(*grid, 2).bit_length()):
        rank = rank * 4 + ((row ^ column) >> bit & 1) * 2 + (row >> bit & 1)
    return rank.flatten()
