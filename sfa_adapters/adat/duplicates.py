"""`repeated_groups`: parts of a page that only repeat a neighbour, as in PixelPrune (arXiv 2604.00886).

A group is predicted from its neighbours on the left (A), above (B) and above on the left (C), in the manner in which
LOCO-I predicts pixels (M. J. Weinberger, G. Seroussi, G. Sapiro, 2000): B where C equals A and not B, a vertical edge,
else A. The first row has A only, the first column B only. A group that equals its prediction is repeated: whoever has
seen the neighbour has seen it.

With a tolerance, a group is compared to the kept group that stands for a neighbour, not to the neighbour itself.
Otherwise a page that darkens slowly from left to right would be dropped from its second column on. So every repeated
group is within the tolerance of the kept group that stands for it.

Groups on one diagonal from below left to above right depend on earlier diagonals only, and are decided at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["repeated_groups"]

# A color in [0, 1] that went through a tower's normalisation and back has about this error. A gray level is 0.004.
ROUNDING = 1e-6


def repeated_groups(image: Tensor, side: int, tolerance: float = 0.0) -> tuple[Tensor, Tensor]:
    """Finds the groups of a page that repeat a neighbour.

    Args:
        image: `[3, height, width]` in [0, 1], of whole groups.
        side: Side of a group in pixels.
        tolerance: Groups are equal if no color of a pixel differs by more; 0 takes exact repetitions only.

    Returns:
        repeated: Bool `[rows, columns]`, on the device of the image; False for the first group of the page.
        stands_in: Number, row by row, of the kept group that a group repeats (its own for kept groups), int64
            `[rows, columns]`.
    """
    rows, columns = image.shape[1] // side, image.shape[2] // side
    groups = image.unfold(1, side, side).unfold(2, side, side)  # [3, rows, columns, side, side]
    groups = groups.permute(1, 2, 0, 3, 4).reshape(rows * columns, -1)
    limit = tolerance + ROUNDING if tolerance else 0.0

    def equal(first: Tensor, second: Tensor) -> Tensor:
        return (groups[first] - groups[second]).abs().amax(1) <= limit

    # One row and one column in front, so that every group has three neighbours; those in front are never chosen.
    stands_in = torch.zeros(rows + 1, columns + 1, dtype=torch.long, device=image.device)
    for diagonal in range(1, rows + columns - 1):
        row = torch.arange(max(0, diagonal - columns + 1), min(rows, diagonal + 1), device=image.device)
        column = diagonal - row
        number = row * columns + column
        left, above, corner = stands_in[row + 1, column], stands_in[row, column + 1], stands_in[row, column]
        inside = (row > 0) & (column > 0)
        takes_above = (column == 0) | (inside & equal(corner, left) & ~equal(corner, above))
        predicted = torch.where(takes_above, above, left)
        stands_in[row + 1, column + 1] = torch.where(equal(number, predicted), predicted, number)
    stands_in = stands_in[1:, 1:]
    return stands_in != torch.arange(rows * columns, device=image.device).view(rows, columns), stands_in
