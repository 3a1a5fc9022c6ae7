"""The tower of Qwen2.5-VL: a flat sequence of patches of all images, in window order, with 2-D RoPE and no CLS.

Blocks attend inside windows of 8x8 patches (ragged at the borders of an image), four blocks inside whole images; both
are given
as boundaries (`cu_seqlens`) of consecutive segments, and the attention runs once per segment. It takes no mask, but a
`position_bias` (transformers 5.14 and later, sdpa).

Order of tokens: the processor lists 2x2 groups of patches row by row, the four patches of a group next to each other;
the tower then sorts groups by window. `window_order` says which place each token of that sequence has.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from sfa_adapters.errors import LayoutError
from sfa_adapters.layout import TokenLayout
from sfa_adapters.registry import Backbone, Geometry, register_backbone

# (frames, rows, columns) of each image or video in patches, patches per merge side, merge groups per window side.
Description = tuple[tuple[tuple[int, int, int], ...], int, int]


def geometry(tower: nn.Module) -> Geometry:
    """Images of any size, no prefix."""
    return Geometry(grid=None, prefix_tokens=0)


def describe_input(tower: nn.Module, args: tuple[Any, ...], kwargs: Any) -> tuple[int, Description]:
    """Sizes of the images of this forward, from `grid_thw`."""
    config: Any = tower.config
    grid_thw = args[1] if len(args) > 1 else kwargs["grid_thw"]
    sizes = tuple((int(t), int(h), int(w)) for t, h, w in grid_thw.tolist())
    merge = int(config.spatial_merge_size)
    window = int(config.window_size) // merge // int(config.patch_size)
    return sum(t * h * w for t, h, w in sizes), (sizes, merge, window)


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


def segment_layouts(description: Description, bounds: tuple[int, ...], block_map: Tensor) -> list[TokenLayout]:
    """The layout of each segment; distances are relative to the whole image, also inside a window.

    Raises:
        LayoutError: A segment reaches over the border of an image.
    """
    sizes, merge, window = description
    images: list[tuple[int, tuple[int, int], Tensor, Tensor]] = []  # end of the image, its grid, rows, columns
    end = 0
    for frames, height, width in sizes:
        rows, columns = window_order(frames, height, width, merge, window)
        end += len(rows)
        images.append((end, (height, width), rows, columns))
    layouts: list[TokenLayout] = []
    for start, stop in itertools.pairwise(bounds):
        image_end, grid, rows, columns = next(image for image in images if start < image[0])
        offset = image_end - len(rows)
        if stop > image_end or start == stop:
            raise LayoutError(f"Segment {start}..{stop} does not lie inside one image of the sizes {sizes}.")
        part = slice(start - offset, stop - offset)
        ones = torch.ones(stop - start)
        layouts.append(TokenLayout.from_boxes(rows[part], columns[part], ones, grid, block_map=block_map))
    return layouts


QWEN_VIT = register_backbone(
    Backbone(
        name="qwen2_5_vit",
        towers=("transformers.models.qwen2_5_vl.*.Qwen2_5_VisionTransformerPretrainedModel",),
        attentions=("transformers.models.qwen2_5_vl.*.Qwen2_5_VLVisionAttention",),
        geometry=geometry,
        mask_argument="position_bias",
        describe_input=describe_input,
        segment_layouts=segment_layouts,
    )
)
