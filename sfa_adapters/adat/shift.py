"""The exact smallest shift of a patch policy's thresholds at which the number of tokens is within a budget.

Only the differences of densities and thresholds ("margins") matter: a cell crosses a threshold if its margin is above
the shift, and then costs more tokens. So the margins are sorted and their tokens summed up, without a search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Level", "margins_over", "shifted_levels", "smallest_shift"]

Level = tuple[float, int, int]  # density above which it is used, n, patch in px


def margins_over(values: Tensor, merged: Sequence[Level]) -> Tensor:
    """Density of each cell minus each threshold except the last, `[levels - 1, cells]`, float64.

    Thresholds are rounded to float32 as densities are, so that a density of 0.3 is not above a threshold of 0.3.
    """
    thresholds = torch.tensor([threshold for threshold, _, _ in merged[:-1]], dtype=torch.float32)
    return values.double() - thresholds.double()[:, None]


def smallest_shift(margins: Tensor, gain: Tensor, spare: float) -> float:
    """The smallest shift of the thresholds at which the number of tokens is within a budget.

    Args:
        margins: Density minus threshold, `[levels - 1, cells]`.
        gain: Tokens that a cell costs more beyond a threshold, at least 0, `[levels - 1, cells]`.
        spare: Budget minus the fewest possible tokens, at least 0.

    Returns:
        The shift; minus infinity where the budget allows all.
    """
    ordered, order = margins.flatten().sort()
    gains = gain.flatten()[order]
    # At a shift of ordered[k] all margins behind k cross. (Equal ones do not; counting them only delays the choice to
    # the last of them, which has the same shift.)
    cost = gains.sum() - gains.cumsum(0)
    if len(ordered) == 0 or bool(gains.sum() <= spare):
        return -math.inf
    return float(ordered[min(int((cost > spare).sum()), len(ordered) - 1)])


def shifted_levels(
    merged: Sequence[Level], values: Tensor, margins: Tensor, shift: float
) -> tuple[tuple[float, int], ...]:
    """Levels with all thresholds shifted, such that exactly the cells whose margin is above the shift cross them."""
    levels: list[tuple[float, int]] = []
    for (threshold, _, patch), margin in zip(merged[:-1], margins, strict=True):
        crossing = margin > shift
        if bool(crossing.all()):
            return (*levels, (0.0, patch))
        # Rounding of threshold + shift must not move a cell across, so the sum stays between the two sides.
        low = float(values[~crossing].max())
        high = float(torch.nextafter(values[crossing].min(), torch.tensor(0.0))) if bool(crossing.any()) else 1.0
        moved = float(torch.tensor(min(max(threshold + shift, low), high), dtype=torch.float32))
        moved = max(moved, 1e-38)  # 0.0 is the threshold of the last level
        if moved < (levels[-1][0] if levels else 1.0):
            levels.append((moved, patch))
    return (*levels, (0.0, merged[-1][2]))
