"""Block maps: coarse partitions of the page, of which each block has an embedding of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from sfa_adapters.errors import LayoutError

__all__ = ["block_of", "check_block_map", "default_block_map"]


def default_block_map(block_grid: tuple[int, int] = (4, 4)) -> Tensor:
    """Numbers the cells of a coarse partition of the page, row by row.

    Args:
        block_grid: Rows and columns of the partition.

    Returns:
        Integer map `[rows, columns]` with the values 0 .. rows * columns - 1.
    """
    return torch.arange(block_grid[0] * block_grid[1]).reshape(block_grid)


def check_block_map(block_map: Tensor | None) -> Tensor:
    """Returns a valid block map, the 4x4 partition for None.

    Raises:
        LayoutError: The map is not a non-empty two-dimensional integer map with values from 0.
    """
    if block_map is None:
        return default_block_map()
    if block_map.ndim != 2 or block_map.numel() == 0 or block_map.is_floating_point() or block_map.dtype == torch.bool:
        raise LayoutError(
            f"block_map must be a non-empty [m, n] integer map; got {tuple(block_map.shape)} {block_map.dtype}."
        )
    # A value cannot be looked at inside a compiled graph; maps come here checked by then (`SFAConfig`).
    if not torch.compiler.is_compiling() and bool((block_map < 0).any()):
        raise LayoutError(f"Block ids start at 0; block_map holds {int(block_map.min())}.")
    return block_map.long()


def block_of(row: Tensor, column: Tensor, height: int, width: int, block_map: Tensor) -> Tensor:
    """Block of the map cell in which each centre lies."""
    map_row = (row * block_map.shape[0] / max(height, 1)).long().clamp_(0, block_map.shape[0] - 1)
    map_column = (column * block_map.shape[1] / max(width, 1)).long().clamp_(0, block_map.shape[1] - 1)
    return block_map[map_row, map_column]
