"""`AxisKinds`: the distinct positions of tokens on one axis of the page.

Shape letters: B batch, N tokens, U distinct (start, extent) pairs on one axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["AxisKinds", "axis_of_boxes", "axis_of_cells", "merge_axes", "pad_rows"]


@dataclass(frozen=True, eq=False)
class AxisKinds:
    """The distinct positions of tokens on one axis; on a regular grid these are its rows (or columns).

    Positions are divided by the largest Manhattan distance of their own image, so that images of different sizes
    share one table and the distance term needs no per-image factor.

    Attributes:
        index: Which kind each token is, `[N]` or `[B, N]`, int64. Prefix and padding tokens have 0; they are masked
            later.
        start: Normalised upper (or left) edge of each kind, `[U]`, float32.
        extent: Normalised size of each kind, `[U]`, float32.
    """

    index: Tensor
    start: Tensor
    extent: Tensor

    @property
    def num_kinds(self) -> int:
        """U, the number of distinct positions."""
        return self.start.shape[0]

    def overlap(self) -> Tensor:
        """Share of the shorter token's extent beside the other, `[U, U]` in [0, 1]; 1[row_i = row_j] on a grid."""
        end = self.start + self.extent
        # Differences of edges that differ by rounding only must not count as a shared row.
        shared = torch.minimum(end[:, None], end) - torch.maximum(self.start[:, None], self.start)
        shorter = torch.minimum(self.extent[:, None], self.extent)
        return torch.where(shared > 1e-4 * shorter, (shared / shorter).clamp(max=1.0), 0.0).fill_diagonal_(1.0)

    def lie_apart(self, kinds: Tensor) -> bool:
        """Whether no two of these kinds, int64 `[k]`, overlap, as on any part of a grid."""
        shared = self.overlap()[kinds][:, kinds]
        return bool((shared == torch.eye(len(kinds), device=shared.device)).all())

    def distance(self) -> Tensor:
        """Distance of centres along this axis in units of the largest Manhattan distance on the grid, `[U, U]`."""
        centre = self.start + self.extent / 2
        return (centre[:, None] - centre).abs()


def axis_of_cells(index: Tensor, cells: int, reach: int) -> AxisKinds:
    """The rows, or columns, of a regular grid.

    Args:
        index: Row or column of each token, `[N]`.
        cells: How many there are.
        reach: The largest Manhattan distance on the grid, in cells.
    """
    # A grid without cells (prefix tokens only) keeps one kind, so that tables are never empty.
    start = torch.arange(max(cells, 1), device=index.device, dtype=torch.float32) / reach
    return AxisKinds(index, start, torch.full_like(start, 1.0 / reach))


def axis_of_boxes(start: Tensor, extent: Tensor, prefix_tokens: int) -> AxisKinds:
    """The distinct positions of tokens of any size.

    Args:
        start: Upper or left edge of each token, divided by the largest Manhattan distance, `[N]`.
        extent: Size of each token, divided likewise, `[N]`.
        prefix_tokens: Leading tokens that are not listed.
    """
    if start.numel() == 0:
        return axis_of_cells(torch.zeros(prefix_tokens, dtype=torch.long, device=start.device), 1, 1)
    kinds, index = _distinct(torch.stack((start, extent), dim=-1).float())
    return AxisKinds(torch.nn.functional.pad(index, (prefix_tokens, 0)), kinds[:, 0].clone(), kinds[:, 1].clone())


def _distinct(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows of fp32 `[N, 2]`, and which of them each row is.

    Two fp32 numbers are one int64; unique over numbers is many times as fast as over rows (`dim=0`).
    """
    codes = (pairs + 0.0).view(torch.int64)[:, 0]  # minus zero is zero
    kinds, index = torch.unique(codes, return_inverse=True)
    return kinds[:, None].view(torch.float32), index


def pad_rows(rows: Sequence[Tensor], length: int) -> Tensor:
    """Rows of different lengths as one matrix, `[B, length]`, zeros behind each."""
    return torch.stack([torch.nn.functional.pad(row, (0, length - len(row))) for row in rows])


def merge_axes(axes: Sequence[AxisKinds], length: int) -> AxisKinds:
    """One table of kinds for all images of a batch."""
    pairs = torch.cat([torch.stack((axis.start, axis.extent), dim=-1) for axis in axes])
    kinds, inverse = _distinct(pairs)
    renamed = [part[axis.index] for part, axis in zip(inverse.split([a.num_kinds for a in axes]), axes, strict=True)]
    index = pad_rows(renamed, length)
    return AxisKinds(index, kinds[:, 0].clone(), kinds[:, 1].clone())
