"""`LinePage`: the tokens of an image row by row and column by column, as `sfa_adapters.lines` needs them.

Heads are taken a few at a time, so that the copies and the logits along lines stay in the caches.

Shape letters: B batch, H heads, h heads of a chunk, N tokens, R rows, C columns, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sfa_adapters.bias import BiasFactors
from sfa_adapters.phi_tiles import KeyOrder, key_order

__all__ = ["LineChunk", "LinePage", "line_groups", "wide_dtype"]

# Logits of one chunk of heads. What a chunk needs, about five times as much, should fit into the caches of the cores.
CHUNK_BYTES = 2**19


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed in. On a CPU the kernels are no faster in half precision, their backward passes far slower."""
    return torch.promote_types(dtype, torch.float32)


def line_groups(bias: BiasFactors, batch: int) -> Iterator[tuple[slice, KeyOrder]]:
    """Images that share a layout, and the order of their keys."""
    if bias.layout.batch_size is None:
        yield slice(0, batch), key_order(bias.layout, 0)
        return
    for image in range(batch):
        yield slice(image, image + 1), key_order(bias.layout, image)


@dataclass(eq=False)
class LineChunk:
    """Some heads of one image: queries, keys, values (and gradients) of placed tokens, row by row and column by column.

    Attributes:
        image: Number of the image in its group.
        heads: The heads.
        by_row: Each `[h, R, C, D]`.
        by_column: Each `[h, C, R, D]`.
    """

    image: int
    heads: slice
    by_row: list[Tensor]
    by_column: list[Tensor]


class LinePage:
    """The grid of one image, and the factors of its lines.

    Args:
        order: The order of the keys, of a whole grid.
        lines: w_row and w_col, `[2, H]`.
        dtype: Of the queries.
    """

    def __init__(self, order: KeyOrder, lines: Tensor, dtype: torch.dtype) -> None:
        self.dtype = wide_dtype(dtype)
        self.grid = len(order.rows), len(order.columns)
        self.off_page, self.index = order.off_page, order.index
        self.factors = torch.expm1(lines.detach().to(self.dtype))  # a and b, [2, H]
        self.weights = torch.exp(lines.detach().to(self.dtype))

    def placed(self, states: Tensor) -> Tensor:
        """`[..., N, D]` of all tokens to `[..., R, C, D]`; a view where tokens come in the order of the keys."""
        if self.index is None:
            return states[..., self.off_page :, :].unflatten(-2, self.grid)
        return states[..., self.index[self.off_page :], :].unflatten(-2, self.grid)

    def write(self, states: Tensor, grid: Tensor) -> None:
        """Writes `[..., R, C, D]` to the places of `[..., N, D]`."""
        if self.index is None:
            self.placed(states).copy_(grid)
        else:
            states[..., self.index[self.off_page :], :] = grid.flatten(-3, -2).to(states.dtype)

    def chunks(self, *states: Tensor) -> Iterator[LineChunk]:
        """Copies of `[B, H, N, D]` in chunks of heads that stay in the caches."""
        batch, heads = states[0].shape[:2]
        rows, columns = self.grid
        size = torch.finfo(self.dtype).bits // 8 * rows * columns * max(rows, columns, 1)
        step = max(1, min(heads, CHUNK_BYTES // max(size, 1)))
        for image in range(batch):
            for first in range(0, heads, step):
                some = slice(first, first + step)
                by_row = [self.placed(part[image, some]).contiguous() for part in states]
                by_column = [part.transpose(1, 2).contiguous() for part in by_row]
                yield LineChunk(image, some, by_row, by_column)
