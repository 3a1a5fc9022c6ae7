"""Towers on one flat sequence: the patches of all images of a forward, of any size each (NaViT; Qwen-VL and relatives).

The attention runs once for each segment between two boundaries (`cu_seqlens`): an image, a frame, a whole clip, or a
window. It is given no mask, but takes a `position_bias` (transformers 5.14 and later, sdpa). Beside the patches come
grids, `[images, 3]`: frames, rows, columns. Towers differ in the order of the tokens:

* merge groups (`navit`): the processor lists groups of 2x2 patches row by row, the four of a group next to each other;
* row by row (`navit_raster`): patches merge behind the tower;
* windows (`qwen2_5_vit`, `navit_windows`): the tower sorts merge groups, or patches, by window. Most of its layers
  attend inside windows, ragged at the borders of an image; the others inside whole images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from sfa_adapters import processor_statistics
from sfa_adapters.arrangement import ImageTokens, Listed, MergeGroups, Raster, Windows
from sfa_adapters.attention_contract import parameter_names
from sfa_adapters.errors import LayoutError
from sfa_adapters.patch_groups import PatchGroups
from sfa_adapters.registry import Backbone, Geometry, Layouts, register_backbone

# A tower with its attention, by the module of `transformers.models` that they stand in.
MERGE_GROUPS = """
    qwen2_vl         Qwen2VisionTransformerPretrainedModel         VisionAttention
    qwen3_vl         Qwen3VLVisionModel                            Qwen3VLVisionAttention
    qwen3_vl_moe     Qwen3VLMoeVisionModel                         Qwen3VLMoeVisionAttention
    qwen3_5          Qwen3_5VisionModel                            Qwen3_5VisionAttention
    qwen3_5_moe      Qwen3_5MoeVisionModel                         Qwen3_5MoeVisionAttention
    qwen4_exp        Qwen4ExpVisionModel                           Qwen4ExpVisionAttention
    qwen3_omni_moe   Qwen3OmniMoeVisionEncoder                     Qwen3OmniMoeVisionAttention
    glm_ocr          GlmOcrVisionModel                             GlmOcrVisionAttention
    glm4v            Glm4vVisionModel                              Glm4vVisionAttention
    glm4v_moe        Glm4vMoeVisionModel                           Glm4vMoeVisionAttention
    glm5_next        Glm5NextVisionModel                           Glm5NextVisionAttention
    glm_image        GlmImageVisionModel                           GlmImageVisionAttention
    ernie4_5_vl_moe  Ernie4_5_VLMoeVisionTransformerPretrainedModel Ernie4_5_VLMoeVisionAttention
    dots3_note       Dots3NoteVisionModel                          Dots3NoteVisionAttention
    video_llama_3    VideoLlama3VisionModel                        VideoLlama3VisionAttention
    lfm3_vl          Lfm3VlVisionModel                             Lfm3VlVisionAttention
    minimax_m3_vl    MiniMaxM3VLVisionModel                        MiniMaxM3VLVisionAttention
    cosmos3_edge     Cosmos3EdgeVisionModel                        Cosmos3EdgeVisionAttention
    inkling2         Inkling2VisionModel                           Inkling2VisionAttention
    cohere_compass   CohereCompassVisionModel                      CohereCompassVisionAttention
"""
RASTER = """
    paddleocr_vl     PaddleOCRVisionModel                          PaddleOCRVisionAttention
    hunyuan_vl       HunYuanVLVisionTransformer                    HunYuanVLVisionAttention
    hy_v4_vl         HYV4VLVisionModel                             HYV4VLVisionAttention
    kimi_k25         Kimi_K25VisionModel                           Kimi_K25VisionAttention
"""
QWEN2_5 = """
    qwen2_5_vl       Qwen2_5_VisionTransformerPretrainedModel      Qwen2_5_VLVisionAttention
"""
WINDOWS = """
    qwen2_5_omni     Qwen2_5OmniVisionEncoder                      Qwen2_5OmniVisionAttention
    exaone4_5        Exaone4_5_VisionModel                         Exaone4_5_VisionAttention
    muse_glimmer     MuseGlimmerVisionModel                        MuseGlimmerVisionAttention
    muse_spark       MuseSparkVisionModel                          MuseSparkVisionAttention
"""
GRID_NAMES = ("grid_thw", "image_grid_thw")

Args = tuple[Any, ...]


def _patterns(table: str, column: int) -> tuple[str, ...]:
    """The class patterns of a record: towers stand in column 1 of a table, attentions in column 2."""
    rows = [row.split() for row in table.strip().splitlines()]
    return tuple(f"transformers.models.{row[0]}.*.{row[column]}" for row in rows)


def geometry(tower: nn.Module) -> Geometry:
    """Images of any size. Inkling 2 puts a class token in front of each; the others have no prefix."""
    has_class = hasattr(getattr(tower, "embeddings", None), "cls_position_embedding")
    return Geometry(grid=None, prefix_tokens=int(has_class))


# -- what a forward was given -----------------------------------------------------------------------------------------


def _argument(tower: nn.Module, args: Args, kwargs: Mapping[str, Any], *names: str) -> Any:
    """The first argument of the tower's forward that has one of these names, or None."""
    parameters, _ = parameter_names(tower)
    for position, name in enumerate(parameters):
        if name in names:
            return args[position] if position < len(args) else kwargs.get(name)
    return None


def _grids(tower: nn.Module, args: Args, kwargs: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """Frames, rows and columns of patches of each image.

    Raises:
        LayoutError: They are missing, have another form, or do not fit the number of patches.
    """
    grids = _argument(tower, args, kwargs, *GRID_NAMES)
    kind = type(tower).__name__
    if not isinstance(grids, Tensor) or grids.ndim != 2 or grids.shape[-1] != 3:
        form = tuple(grids.shape) if isinstance(grids, Tensor) else type(grids).__name__
        raise LayoutError(
            f"{kind} takes the grids of its images as {' or '.join(GRID_NAMES)}, a tensor [images, 3] of frames, rows "
            f"and columns; it got {form}. Pass what the processor returns (image_grid_thw)."
        )
    rows = [(int(t), int(h), int(w)) for t, h, w in grids.tolist()]
    pixels = _argument(tower, args, kwargs, parameter_names(tower)[0][0])
    side = _token_side(tower)
    count = pixels.shape[int(pixels.ndim == 5)] if isinstance(pixels, Tensor) else 0
    if rows and count != sum(map(math.prod, rows)):
        raise LayoutError(
            f"{kind} got {count} patches, but its grids (frames, rows, columns) {rows} have "
            f"{sum(map(math.prod, rows))}. Patches and grids must come from one call of the processor."
        )
    return [(t, h * side, w * side) for t, h, w in rows]


def _token_side(tower: nn.Module) -> int:
    """Patches along one side of what a grid counts: Inkling 2 counts tokens of the language model."""
    names, _ = parameter_names(tower)
    config: Any = tower.config
    return int(config.spatial_merge_size) if "image_grid_thw" in names else 1


def _given_places(
    tower: nn.Module, kwargs: Mapping[str, Any], sort: Callable[[Tensor], Tensor | None]
) -> list[ImageTokens] | None:
    """Tokens at positions that were given beside the grids; None where none were.

    Positions come where tokens are left out (`drop_blank_groups`), and where somebody computed them ahead:
    `position_ids` (row and column are the last two), `cu_seqlens`, and `page_grids`, the sizes of the whole pages.
    """
    positions, bounds = kwargs.get("position_ids"), kwargs.get("cu_seqlens")
    if positions is None or bounds is None or positions.ndim != 2:
        return None
    ordered = sort(positions[:, -2:])
    if ordered is None:
        return None
    prefix = geometry(tower).prefix_tokens
    ends = [bound - prefix * (number + 1) for number, bound in enumerate(bounds.tolist()[1:-1])]
    parts = ordered.tensor_split(ends)
    pages = kwargs.get("page_grids")
    pages = [part.amax(0) + 1 for part in parts] if pages is None else pages
    return [ImageTokens((int(h), int(w)), Listed.of(part)) for (h, w), part in zip(pages, parts, strict=True)]


# -- the orders -------------------------------------------------------------------------------------------------------


def _merge_groups(tower: nn.Module, args: Args, kwargs: Mapping[str, Any]) -> list[ImageTokens]:
    """Merge groups of a side that the configuration names, or the caller for each image (VideoLLaMA 3)."""
    given = _given_places(tower, kwargs, lambda positions: positions)
    if given is not None:
        return given
    grids = _grids(tower, args, kwargs)
    sides = _argument(tower, args, kwargs, "merge_sizes")
    config: Any = tower.config
    sides = [int(config.spatial_merge_size)] * len(grids) if sides is None else [int(side) for side in sides]
    return [ImageTokens((h, w), MergeGroups(side), frames=t) for (t, h, w), side in zip(grids, sides, strict=True)]


def _raster(tower: nn.Module, args: Args, kwargs: Mapping[str, Any]) -> list[ImageTokens]:
    given = _given_places(tower, kwargs, lambda positions: positions)
    if given is not None:
        return given
    return [ImageTokens((h, w), Raster(), frames=t) for t, h, w in _grids(tower, args, kwargs)]


def _windows(tower: nn.Module, args: Args, kwargs: Mapping[str, Any]) -> list[ImageTokens]:
    """Windows as the tower's forward computes them; `window_index`, where given, sorts the merge groups."""
    names: Any = tower
    side, index = int(names.spatial_merge_size), kwargs.get("window_index")

    def sort(positions: Tensor) -> Tensor | None:
        if index is None:
            return None
        return positions.view(-1, side**2, 2)[index.to(positions.device)].flatten(0, 1)

    given = _given_places(tower, kwargs, sort)
    if given is not None:
        return given
    order = Windows(side, int(names.window_size) // side // int(names.patch_size))
    return [ImageTokens((h, w), order, frames=t) for t, h, w in _grids(tower, args, kwargs)]


# -- pixels -----------------------------------------------------------------------------------------------------------

# Models whose processor was read: how it normalises. Patches are channels, frames (of a still image all the same), rows
# and columns. With PaddleOCR-VL it is the checkpoint that says it; the default of its class is another one.
STATISTICS = {
    "qwen2_vl": processor_statistics.CLIP,
    "qwen2_5_vl": processor_statistics.CLIP,
    "qwen3_vl": processor_statistics.HALF,
    "qwen3_vl_moe": processor_statistics.HALF,
    "qwen3_5": processor_statistics.HALF,
    "qwen3_5_moe": processor_statistics.HALF,
    "glm_ocr": processor_statistics.CLIP,
    "paddleocr_vl": processor_statistics.HALF,
}


def _model(tower: nn.Module) -> str:
    """The module of `transformers.models` that a tower stands in."""
    names = (kind.__module__ for kind in type(tower).__mro__)
    return next((name.split(".")[2] for name in names if name.startswith("transformers.models.")), "")


def statistics(tower: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation of the image processor of a tower; None where it was not read."""
    return STATISTICS.get(_model(tower))


def patch_groups(tower: nn.Module) -> PatchGroups | None:
    """The patches as the processor lists them, which Qwen2.5's tower sorts by window later; None if not known."""
    if _model(tower) not in STATISTICS:
        return None
    config: Any = tower.config
    side = int(config.spatial_merge_size)
    order = Raster() if NAVIT_RASTER.is_tower(tower) else MergeGroups(side)
    return PatchGroups(order, side, int(config.patch_size))


def _record(name: str, table: str, layouts: Layouts, small_towers: str, **more: Any) -> Backbone:
    """The record of the towers of a table, which differ in the order of their tokens."""
    return register_backbone(
        Backbone(
            name=name,
            towers=_patterns(table, 1),
            attentions=_patterns(table, 2),
            geometry=geometry,
            layouts=layouts,
            joined="segments",
            statistics=statistics,
            patch_groups=patch_groups,
            small_towers=f"sfa_adapters.testing.{small_towers}",
            **more,
        )
    )


NAVIT = _record("navit", MERGE_GROUPS, _merge_groups, "towers_navit:NAVIT")
NAVIT_RASTER = _record("navit_raster", RASTER, _raster, "towers_navit:NAVIT_RASTER")
# Adapters of Qwen2.5-VL are saved under this name. DyMU knows its windows and its merger.
QWEN2_5_VIT = _record("qwen2_5_vit", QWEN2_5, _windows, "towers_qwen:QWEN_VIT", token_reduction=True)
NAVIT_WINDOWS = _record("navit_windows", WINDOWS, _windows, "towers_navit:NAVIT_WINDOWS")
