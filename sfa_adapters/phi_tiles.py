"""`PhiTiles`: phi of one image for a few queries at a time, written by broadcasting, and the sums of its gradient.

On a regular grid whose keys come row by row, phi of one query is a number per row of the page, plus a number per
column, plus a product of two block values: one pass over memory writes it, and nothing is looked up for a pair of
tokens. Keys in another order are put into this one first; keys that fill no whole grid are looked up.

Shape letters: H heads, N tokens, K keys (tokens that are no padding), P keys without a place, U / V row / column kinds
of the layout, u / v those that the keys of this image have, A active adapters, T queries of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sfa_adapters.bias import BiasFactors
from sfa_adapters.layout import TokenLayout

__all__ = ["KeyOrder", "PhiTiles", "TableSums", "key_order"]


@dataclass(frozen=True, eq=False)
class KeyOrder:
    """In which order the keys of one image are taken: those without a place first, then row by row.

    Attributes:
        index: Numbers of the keys in the sequence, int64 `[K]`; None where they are all tokens in their own order.
        off_page: P, the keys without a place.
        rows: Row kinds that there are, `[u]`.
        columns: Column kinds that there are, `[v]`.
        row_of: Which of `rows` each key with a place is in, `[K - P]`.
        column_of: Which of `columns`, `[K - P]`.
        is_grid: Whether these keys are u x v tokens, one in each place.
        is_plain_grid: Whether, besides, no two of their rows overlap, and no two of their columns.
    """

    index: Tensor | None
    off_page: int
    rows: Tensor
    columns: Tensor
    row_of: Tensor
    column_of: Tensor
    is_grid: bool
    is_plain_grid: bool


def key_order(layout: TokenLayout, image: int) -> KeyOrder:
    """The order of the keys of one image.

    Args:
        layout: Where the tokens lie.
        image: Number of the image; of no interest where all images share one layout.
    """
    name = (key_order, 0 if layout.batch_size is None else image)
    if name not in layout.memo:
        layout.memo[name] = _key_order(layout, image)
    return layout.memo[name]


def _key_order(layout: TokenLayout, image: int) -> KeyOrder:

    def of_image(values: Tensor) -> Tensor:
        return values if values.ndim == 1 else values[image]

    row, column = of_image(layout.rows.index), of_image(layout.columns.index)
    spatial, off_page = of_image(layout.spatial), of_image(layout.off_page)
    without = off_page if layout.padding is None else off_page & ~of_image(layout.padding)
    rows, row_of = torch.unique(row[spatial], return_inverse=True)
    columns, column_of = torch.unique(column[spatial], return_inverse=True)
    raster = torch.argsort(row_of * max(len(columns), 1) + column_of, stable=True)
    index = torch.cat((without.nonzero().flatten(), spatial.nonzero().flatten()[raster]))
    row_of, column_of = row_of[raster], column_of[raster]
    is_grid = len(row_of) == len(rows) * len(columns) and bool(
        (row_of * len(columns) + column_of == torch.arange(len(row_of), device=row.device)).all()
    )
    whole = len(index) == layout.num_tokens and bool((index == torch.arange(len(index), device=row.device)).all())
    apart = layout.rows.lie_apart(rows) and layout.columns.lie_apart(columns)
    order = None if whole else index
    return KeyOrder(order, int(without.sum()), rows, columns, row_of, column_of, is_grid, is_grid and apart)


@dataclass(eq=False)
class TableSums:
    """Gradients of the tables of phi, summed up tile by tile.

    Attributes:
        row_table: `[H, U, U]`.
        column_table: `[H, V, V]`.
        block_value: `[A, H, N]` of the image.
    """

    row_table: Tensor
    column_table: Tensor
    block_value: Tensor


class PhiTiles:
    """Phi of one image.

    Args:
        bias: The tables of phi; gradients do not go through them here.
        image: Number of the image.
        dtype: In which phi is written.
    """

    def __init__(self, bias: BiasFactors, image: int, dtype: torch.dtype) -> None:
        layout = bias.layout
        self.keys = key_order(layout, image)

        def of_image(values: Tensor) -> Tensor:
            return values if layout.batch_size is None else values[image]

        self._row, self._column = of_image(layout.rows.index), of_image(layout.columns.index)
        self._placed = of_image(layout.spatial).to(dtype).unsqueeze(-1)  # [N, 1]
        self._row_table = bias.row_table.detach()[..., self.keys.rows].to(dtype)  # [H, U, u]
        self._column_table = bias.column_table.detach()[..., self.keys.columns].to(dtype)
        values = bias.block_value.detach()
        self._value = (values if layout.batch_size is None else values[:, image]).to(dtype)  # [A, H, N]
        placed = slice(None) if self.keys.index is None else self.keys.index
        self._key_value = self._value[..., placed][..., self.keys.off_page :]  # [A, H, K - P]

    @property
    def num_keys(self) -> int:
        """K."""
        return self.keys.off_page + len(self.keys.row_of)

    def arrange(self, states: Tensor) -> Tensor:
        """Keys or values `[H, N, D]` in the order of the keys, `[H, K, D]`."""
        return states if self.keys.index is None else states[:, self.keys.index]

    def write(self, heads: slice, queries: slice, out: Tensor) -> None:
        """Writes phi of some heads and queries.

        Args:
            heads: The heads, h of them.
            queries: The queries, T of them.
            out: `[h, T, K]`, overwritten.
        """
        keys = self.keys
        by_row = self._row_table[heads][:, self._row[queries]] * self._placed[queries]  # [h, T, u]
        by_column = self._column_table[heads][:, self._column[queries]] * self._placed[queries]
        if keys.off_page:
            out[..., : keys.off_page] = 0
        placed = out[..., keys.off_page :]
        if keys.is_grid:
            grid = placed.unflatten(-1, (len(keys.rows), len(keys.columns)))
            torch.add(by_row.unsqueeze(-1), by_column.unsqueeze(-2), out=grid)
        else:
            torch.add(by_row[..., keys.row_of], by_column[..., keys.column_of], out=placed)
        for value, key_value in zip(self._value, self._key_value, strict=True):
            placed.addcmul_(value[heads, queries, None], key_value[heads, None])

    def add_gradient(self, heads: slice, queries: slice, gradient: Tensor, sums: TableSums) -> None:
        """Adds what a tile contributes to the gradients of the tables.

        Args:
            heads: As in `write`.
            queries: As in `write`.
            gradient: Of phi, `[h, T, K]`.
            sums: Grows.
        """
        keys = self.keys
        placed = gradient[..., keys.off_page :]
        if keys.is_grid:
            grid = placed.unflatten(-1, (len(keys.rows), len(keys.columns)))
            by_row, by_column = grid.sum(-1), grid.sum(-2)
        else:
            by_row = placed @ _one_hot(keys.row_of, len(keys.rows), placed)
            by_column = placed @ _one_hot(keys.column_of, len(keys.columns), placed)
        where = self._placed[queries]
        for total, kinds, index, part in (
            (sums.row_table, keys.rows, self._row, by_row),
            (sums.column_table, keys.columns, self._column, by_column),
        ):
            of_queries = torch.zeros(len(part), total.shape[1], len(kinds), dtype=part.dtype, device=part.device)
            of_queries.index_add_(1, index[queries], part * where)
            total[heads, :, kinds] += of_queries.to(total.dtype)
        order = slice(None) if keys.index is None else keys.index
        for value, key_value, total in zip(self._value, self._key_value, sums.block_value, strict=True):
            of_queries = (placed @ key_value[heads].unsqueeze(-1) * where).squeeze(-1)
            total[heads, queries] += of_queries.to(total.dtype)
            of_keys = (value[heads, queries].unsqueeze(-2) @ placed).squeeze(-2).to(total.dtype)
            numbers = torch.arange(total.shape[-1], device=total.device)[order][keys.off_page :]
            total[heads] = total[heads].index_add(-1, numbers, of_keys)


def _one_hot(index: Tensor, kinds: int, like: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(index, kinds).to(like.dtype)
