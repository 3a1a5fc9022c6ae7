"""`SegmentPlaces`: where the tokens of a flat sequence lie, in groups of segments that lie alike.

A tower with windows cuts a page into a hundred segments of 64 tokens. Phi between two tokens depends on the difference
of their places (and on their blocks), so windows of one shape share one small table of 8 rows and 8 columns. A table
over the rows and columns of the whole page would be too wide for the attention kernels of an engine.

Shape letters: S segments of a group, n tokens of each, N tokens of the sequence.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sfa_adapters.arrangement import TokenArrangement
from sfa_adapters.axis_kinds import AxisKinds
from sfa_adapters.layout import TokenLayout

__all__ = ["SegmentGroup", "segment_groups"]


@dataclass(frozen=True, eq=False)
class SegmentGroup:
    """Segments whose tokens lie alike, relative to their upper left corner.

    Attributes:
        tokens: Which tokens of the sequence they are, `[S, n]`, int64.
        layout: Their layout; a batch of S, since their blocks differ.
    """

    tokens: Tensor
    layout: TokenLayout


def segment_groups(
    arrangement: TokenArrangement, bounds: Sequence[int], block_map: Tensor | None
) -> list[SegmentGroup]:
    """Sorts the segments of a sequence into groups that lie alike.

    Args:
        arrangement: How the tokens of the images lie.
        bounds: Where segments begin and end, from 0; empty segments are left out.
        block_map: As in `TokenLayout.regular`.

    Raises:
        LayoutError: A segment reaches over the border of an image, or the bounds end before the tokens do.
    """
    bounds = [bound for number, bound in enumerate(bounds) if number == 0 or bound != bounds[number - 1]]
    layouts = arrangement.segments(bounds, block_map)
    groups: dict[tuple[object, ...], list[tuple[int, TokenLayout]]] = {}
    for (start, _), layout in zip(itertools.pairwise(bounds), layouts, strict=True):
        shape = (layout.grid, layout.prefix_tokens, _shape(layout.rows), _shape(layout.columns))
        # Tokens without a place keep the whole layout to themselves.
        key = (start,) if layout.has_off_page else shape
        groups.setdefault(key, []).append((start, layout))
    return [_group(entries) for entries in groups.values()]


def _shape(axis: AxisKinds) -> tuple[object, ...]:
    """What one axis of a segment looks like, apart from where on the page it begins.

    On a grid kinds are whole cells apart, so counting in cells leaves no rounding.
    """
    cells = (axis.start / axis.extent).round()
    return tuple((cells - cells.min()).tolist()), tuple(axis.index.tolist())


def _group(entries: list[tuple[int, TokenLayout]]) -> SegmentGroup:
    starts = torch.tensor([start for start, _ in entries])
    first = entries[0][1]
    tokens = starts[:, None] + torch.arange(first.num_tokens)

    def alike(axis: AxisKinds) -> AxisKinds:
        return replace(axis, index=axis.index.expand(len(entries), -1))

    layout = TokenLayout(
        (first.grid,) * len(entries),  # pyright: ignore[reportArgumentType]
        first.prefix_tokens,
        torch.stack([layout.block for _, layout in entries]),
        alike(first.rows),
        alike(first.columns),
        placeless=None if first.placeless is None else torch.stack([first.placeless]),
    )
    return SegmentGroup(tokens, layout)
