"""The tower of Qwen2.5-VL: a flat sequence of patches of all images, in window order, with 2-D RoPE and no CLS.

Blocks attend inside windows of 8x8 patches (ragged at the borders of an image), four blocks inside whole images; both
are given as boundaries (`cu_seqlens`) of consecutive segments, and the attention runs once per segment. It takes no
mask, but a `position_bias` (transformers 5.14 and later, sdpa).

Order of tokens: the processor lists 2x2 groups of patches row by row, the four patches of a group next to each other;
the tower then sorts groups by window (`Windows`).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from sfa_adapters import processor_statistics
from sfa_adapters.arrangement import ImageTokens, Listed, Windows
from sfa_adapters.registry import Backbone, Geometry, register_backbone


def geometry(tower: nn.Module) -> Geometry:
    """No fixed grid, since images have any size, and no prefix tokens."""
    return Geometry(grid=None, prefix_tokens=0)


def layouts(tower: nn.Module, args: tuple[Any, ...], kwargs: Any) -> list[ImageTokens]:
    """Tokens of the images of a forward: in window order from `grid_thw`, or at the positions given beside it.

    Positions come beside the grids where tokens are left out (`drop_blank_groups`): `position_ids` in merge-group
    order, `window_index` that sorts the groups, and `page_grids`, the sizes of the whole pages.
    """
    config: Any = tower.config
    merge = int(config.spatial_merge_size)
    positions, index = kwargs.get("position_ids"), kwargs.get("window_index")
    if positions is not None and index is not None and kwargs.get("cu_seqlens") is not None:
        ordered = positions.view(-1, merge**2, 2)[index.to(positions.device)].flatten(0, 1)
        parts = ordered.tensor_split(kwargs["cu_seqlens"].tolist()[1:-1])
        pages = kwargs.get("page_grids")
        pages = [part.amax(0) + 1 for part in parts] if pages is None else pages
        return [ImageTokens((int(h), int(w)), Listed.of(part)) for (h, w), part in zip(pages, parts, strict=True)]
    grid_thw = args[1] if len(args) > 1 else kwargs["grid_thw"]
    order = Windows(merge, int(config.window_size) // merge // int(config.patch_size))
    return [ImageTokens((h, w), order, frames=t) for t, h, w in grid_thw.tolist()]


def statistics(tower: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of its image processor, by channel."""
    return processor_statistics.CLIP


QWEN_VIT = register_backbone(
    Backbone(
        name="qwen2_5_vit",
        towers=("transformers.models.qwen2_5_vl.*.Qwen2_5_VisionTransformerPretrainedModel",),
        attentions=("transformers.models.qwen2_5_vl.*.Qwen2_5_VLVisionAttention",),
        geometry=geometry,
        layouts=layouts,
        joined="segments",
        statistics=statistics,
        small_towers="sfa_adapters.testing.towers_qwen:QWEN_VIT",
    )
)
