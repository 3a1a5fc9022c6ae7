"""`Places`: what the triton kernels need to know of where tokens lie, as flat int32 tensors.

Whether images share one layout, have one each, or lie behind one another in a packed sequence: the kernels see
segments, runs of tokens that attend to each other and to nothing else. Each names where its tokens begin in the states
and among the places, and which tables are its own.

Shape letters: B batch, N tokens of a row, P places, S segments, U / V row / column kinds of a layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from sfa_adapters.axis_kinds import AxisKinds
from sfa_adapters.layout import TokenLayout

__all__ = ["Places", "TableRun", "kinds_lie_apart", "places_of_batch", "places_of_segments"]

OFF_PAGE, PADDING = -1, -2  # in place of a row and a column


class TableRun(NamedTuple):
    """Places whose kinds index one pair of tables.

    Attributes:
        places: First place and the one behind the last.
        group: Number of the tables.
        row_table: Where the table begins among the entries of all row tables, and its side U.
        column_table: As `row_table`, of columns, with V.
    """

    places: tuple[int, int]
    group: int
    row_table: tuple[int, int]
    column_table: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Places:
    """Places of the tokens of one attention computation.

    Attributes:
        row: Row kind of each place; -1 off the page, -2 at padding; int32 `[P]`.
        column: Column kind of each place, as `row`.
        segments: A record of each segment, int32 `[S, 10]`, see `sfa_adapters.triton_kernels.RECORD`.
        longest: Tokens of the longest segment.
        runs: Which places index which tables.
        groups: Pairs of tables that there are.
    """

    row: Tensor
    column: Tensor
    segments: Tensor
    longest: int
    runs: tuple[TableRun, ...]
    groups: int

    @property
    def most_kinds(self) -> int:
        """The largest side of a table."""
        return max(max(run.row_table[1], run.column_table[1]) for run in self.runs)


def places_of_batch(layout: TokenLayout, batch: int) -> Places:
    """The places of `[B, H, N, D]`: a segment for each image, one pair of tables.

    Args:
        layout: Of all images, or one row per image.
        batch: B.
    """
    name = (places_of_batch, batch)
    if name not in layout.memo:
        with torch.inference_mode(False):  # it may be used in training later
            layout.memo[name] = _places_of_batch(layout, batch)
    return layout.memo[name]


def _places_of_batch(layout: TokenLayout, batch: int) -> Places:
    tokens, device = layout.num_tokens, layout.device
    row, column = (_marked(layout, axis).flatten() for axis in (layout.rows, layout.columns))
    image = torch.arange(batch, device=device)
    first = torch.zeros_like(image)
    length = torch.full_like(image, tokens)
    behind = length if layout.padding is None else _behind_the_keys(layout.padding)
    place = first if layout.batch_size is None else image * tokens
    sides = layout.rows.num_kinds, layout.columns.num_kinds
    rows, columns = (torch.full_like(image, side) for side in sides)
    record = torch.stack((image, first, place, length, behind, first, first, rows, first, columns), dim=-1)
    run = TableRun((0, len(row)), 0, (0, sides[0]), (0, sides[1]))
    return Places(row, column, record.int(), tokens, (run,), 1)


def places_of_segments(layouts: Sequence[TokenLayout], groups: Sequence[int]) -> Places:
    """The places of a packed sequence: segments behind one another, each with the tables of its group.

    Args:
        layouts: Of each segment, `[tokens]`, without padding.
        groups: Number of the tables of each segment, ascending from 0 as they first come up. Segments of one group have
            one layout.
    """
    name = (places_of_segments, tuple(map(id, layouts)), tuple(groups))
    memo = layouts[0].memo
    if name not in memo:
        with torch.inference_mode(False):
            # The layouts are kept beside it, so that no other one gets the id of one of them.
            memo[name] = _places_of_segments(layouts, groups), tuple(layouts)
    return memo[name][0]


def _places_of_segments(layouts: Sequence[TokenLayout], groups: Sequence[int]) -> Places:
    runs: list[TableRun] = []
    records: list[tuple[int, ...]] = []
    begins: dict[int, tuple[int, int]] = {}
    row_entries = column_entries = 0
    ends = list(accumulate(layout.num_tokens for layout in layouts))
    for layout, group, end in zip(layouts, groups, ends, strict=True):
        rows, columns = layout.rows.num_kinds, layout.columns.num_kinds
        if group not in begins:
            begins[group] = row_entries, column_entries
            row_entries, column_entries = row_entries + rows**2, column_entries + columns**2
        row_at, column_at = begins[group]
        first, length = end - layout.num_tokens, layout.num_tokens
        records.append((0, first, first, length, length, group, row_at, rows, column_at, columns))
        runs.append(TableRun((first, end), group, (row_at, rows), (column_at, columns)))
    row, column = (
        torch.cat([_marked(layout, axis) for layout, axis in zip(layouts, axes, strict=True)])
        for axes in ([layout.rows for layout in layouts], [layout.columns for layout in layouts])
    )
    segments = torch.tensor(records, dtype=torch.int32, device=row.device)
    return Places(row, column, segments, max(layout.num_tokens for layout in layouts), tuple(runs), len(begins))


def _marked(layout: TokenLayout, axis: AxisKinds) -> Tensor:
    """Kinds of all tokens, int32, with marks where there is no place."""
    index = axis.index.masked_fill(layout.off_page, OFF_PAGE)
    return (index if layout.padding is None else index.masked_fill(layout.padding, PADDING)).int()


def _behind_the_keys(padding: Tensor) -> Tensor:
    """Number behind the last token that is no padding, of each image; reads nothing from the device."""
    numbers = torch.arange(1, padding.shape[-1] + 1, device=padding.device)
    return (numbers * ~padding).amax(-1)


def kinds_lie_apart(layout: TokenLayout) -> bool:
    """Whether tokens of an image are in one row, or column, if and only if they have one kind of it.

    So it is on any part of a grid; tokens of different sizes overlap in part.
    """
    if kinds_lie_apart not in layout.memo:
        images = range(1 if layout.batch_size is None else layout.batch_size)
        layout.memo[kinds_lie_apart] = all(
            axis.lie_apart(_of_image(axis.index, image)[_of_image(layout.spatial, image)].unique())
            for axis in (layout.rows, layout.columns)
            for image in images
        )
    return layout.memo[kinds_lie_apart]


def _of_image(values: Tensor, image: int) -> Tensor:
    return values if values.ndim == 1 else values[image]
