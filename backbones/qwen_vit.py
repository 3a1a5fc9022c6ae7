"""The tower of Qwen2.5-VL: a flat sequence of patches of all images, in window order, with 2-D RoPE and no CLS.

Blocks attend inside windows of 8x8 patches (ragged at the borders of an image), four blocks inside whole images; both
are given as boundaries (`cu_seqlens`) of consecutive segments, and the attention runs once per segment. It takes no
mask, but a `position_bias` (transformers 5.14 and later, sdpa).

Order of tokens: the processor lists 2x2 groups of patches row by row, the four patches of a group next to each other;
the tower then sorts groups by window. `window_order` gives row and column of each token of that sequence.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sfa_adapters import processor_statistics
from sfa_adapters.errors import LayoutError
from sfa_adapters.layout import TokenLayout
from sfa_adapters.registry import Backbone, Geometry, register_backbone


class Whole(NamedTuple):
    """A forward on whole images: (frames, rows, columns) of each in patches, and how they are merged and windowed."""

    sizes: tuple[tuple[int, int, int], ...]
    merge: int
    window: int


class Given(NamedTuple):
    """A forward with positions from the caller: end and grid of each image, row and column of every token in order."""

    ends: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]
    places: tuple[tuple[int, int], ...]


def geometry(tower: nn.Module) -> Geometry:
    """No fixed grid, since images have any size, and no prefix tokens."""
    return Geometry(grid=None, prefix_tokens=0)


def describe_input(tower: nn.Module, args: tuple[Any, ...], kwargs: Any) -> tuple[int, Whole | Given]:
    """Number of tokens of this forward, and the sizes of its images (`grid_thw`) or the positions from the caller."""
    config: Any = tower.config
    merge = int(config.spatial_merge_size)
    positions, index = kwargs.get("position_ids"), kwargs.get("window_index")
    if positions is not None and index is not None and kwargs.get("cu_seqlens") is not None:
        ordered = positions.view(-1, merge**2, 2)[index.to(positions.device)].flatten(0, 1)
        ends = tuple(kwargs["cu_seqlens"].tolist()[1:])
        pages = kwargs.get("page_grids")
        if pages is None:
            pages = [part.amax(0) + 1 for part in ordered.tensor_split(list(ends[:-1]))]
        grids = tuple((int(h), int(w)) for h, w in pages)
        return len(ordered), Given(ends, grids, tuple((row, column) for row, column in ordered.tolist()))
    grid_thw = args[1] if len(args) > 1 else kwargs["grid_thw"]
    sizes = tuple((int(t), int(h), int(w)) for t, h, w in grid_thw.tolist())
    window = int(config.window_size) // merge // int(config.patch_size)
    return sum(t * h * w for t, h, w in sizes), Whole(sizes, merge, window)


def window_order(frames: int, height: int, width: int, merge: int, window: int) -> tuple[Tensor, Tensor]:
    """Row and column of each token of one image, in the order in which the blocks see them.

    Args:
        frames: Temporal positions; each is laid out on its own.
        height: Patch rows.
        width: Patch columns.
        merge: Patches per side of a merge group.
        window: Merge groups per side of a window.

    Returns:
        Rows and columns, `[frames * height * width]`.
    """
    group_rows, group_columns = height // merge, width // merge
    row = torch.arange(group_rows).repeat_interleave(group_columns)
    column = torch.arange(group_columns).repeat(group_rows)
    windows_across = -(-group_columns // window)
    number = (row // window) * windows_across + column // window
    order = torch.argsort(number * window**2 + (row % window) * window + column % window)
    inner_row = torch.arange(merge).repeat_interleave(merge)
    inner_column = torch.arange(merge).repeat(merge)
    rows = (row[order, None] * merge + inner_row).flatten()
    columns = (column[order, None] * merge + inner_column).flatten()
    return rows.repeat(frames), columns.repeat(frames)


def segment_layouts(description: Whole | Given, bounds: tuple[int, ...], block_map: Tensor) -> list[TokenLayout]:
    """The layout of each segment; distances are relative to the whole image, also inside a window.

    Raises:
        LayoutError: A segment reaches over the border of an image.
    """
    ends, grids, rows, columns = _places(description)
    layouts: list[TokenLayout] = []
    for start, stop in itertools.pairwise(bounds):
        image = bisect.bisect_right(ends, start)
        if start == stop or image == len(ends) or stop > ends[image]:
            raise LayoutError(f"Segment {start}..{stop} does not lie inside one image; images end at {ends}.")
        ones = torch.ones(stop - start)
        part = slice(start, stop)
        layouts.append(TokenLayout.from_boxes(rows[part], columns[part], ones, grids[image], block_map=block_map))
    return layouts


def _places(description: Whole | Given) -> tuple[Sequence[int], Sequence[tuple[int, int]], Tensor, Tensor]:
    """Ends and grids of the images, row and column of every token."""
    if isinstance(description, Given):
        row, column = torch.tensor(description.places).unbind(-1)
        return description.ends, description.grids, row, column
    sizes, merge, window = description
    orders = [window_order(*size, merge, window) for size in sizes]
    row, column = (torch.cat(parts) for parts in zip(*orders, strict=True))
    return list(itertools.accumulate(t * h * w for t, h, w in sizes)), [(h, w) for _, h, w in sizes], row, column


def statistics(tower: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of its image processor, by channel."""
    return processor_statistics.CLIP


QWEN_VIT = register_backbone(
    Backbone(
        name="qwen2_5_vit",
        towers=("transformers.models.qwen2_5_vl.*.Qwen2_5_VisionTransformerPretrainedModel",),
        attentions=("transformers.models.qwen2_5_vl.*.Qwen2_5_VLVisionAttention",),
        geometry=geometry,
        mask_argument="position_bias",
        describe_input=describe_input,
        segment_layouts=segment_layouts,
        statistics=statistics,
        small_towers="sfa_adapters.testing.towers_qwen:QWEN_VIT",
    )
)
