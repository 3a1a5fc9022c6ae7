"""The tower of MiniCPM-V 4.6, 4.7 and MiniCPM-OCR: one flat sequence of all images, of which 2x2 patches merge midway.

Behind layer `insert_layer_id` a merger makes one token of 2x2 patches, so that later layers see a grid of half the
height and width (`TokenArrangement.after_merge`); with `use_vit_merger=False` nothing merges. The merger has attention
of its own, inside windows of the four patches that it makes one token of. It gets no bias: four patches always lie in
the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sfa_adapters.arrangement import ImageTokens, MergeGroups, TokenArrangement
from sfa_adapters.attention_contract import parameter_names
from sfa_adapters.errors import LayoutError
from sfa_adapters.registry import Backbone, Geometry, register_backbone

MEMBERS = (("minicpmv4_6", "MiniCPMV4_6"), ("minicpmv4_7", "MiniCPMV4_7"), ("minicpm_ocr", "MiniCPMOcr"))
# The tower halves sizes by this number, whatever its configuration says.
SIDE = 2


def geometry(tower: nn.Module) -> Geometry:
    """Images of any size, no prefix."""
    return Geometry(grid=None, prefix_tokens=0)


def layouts(tower: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenArrangement:
    """Patches row by row, in the sizes of `target_sizes`; behind the merger the same on half the grid.

    Raises:
        LayoutError: The sizes are missing, do not fit the patches, or are odd in front of the merger.
    """
    names, _ = parameter_names(tower)
    given = {**kwargs, **dict(zip(names, args, strict=False))}
    sizes, pixels = given.get("target_sizes"), given.get("pixel_values")
    config: Any = tower.config
    kind = type(tower).__name__
    if not isinstance(sizes, Tensor) or sizes.ndim != 2 or sizes.shape[-1] != 2:
        form = tuple(sizes.shape) if isinstance(sizes, Tensor) else type(sizes).__name__
        raise LayoutError(
            f"{kind} takes rows and columns of patches of its images as target_sizes, a tensor [images, 2]; it got "
            f"{form}. Pass what the processor returns."
        )
    grids = [(int(rows), int(columns)) for rows, columns in sizes.tolist()]
    count = pixels.shape[-1] // int(config.patch_size) if isinstance(pixels, Tensor) else 0
    if grids and count != sum(rows * columns for rows, columns in grids):
        raise LayoutError(
            f"{kind} got {count} patches, but its target_sizes {grids} have "
            f"{sum(rows * columns for rows, columns in grids)}. Both must come from one call of the processor."
        )
    images, merged = tuple(ImageTokens(grid) for grid in grids), None
    if grids and given.get("use_vit_merger", True) and config.insert_layer_id >= 0:
        for rows, columns in grids:
            MergeGroups(SIDE).check(rows, columns)
        merged = TokenArrangement("segments", tuple(ImageTokens((h // SIDE, w // SIDE)) for h, w in grids))
    return TokenArrangement("segments", images, after_merge=merged)


MINICPM_VIT = register_backbone(
    Backbone(
        name="minicpm_vit",
        towers=tuple(f"transformers.models.{folder}.*.{name}VisionModel" for folder, name in MEMBERS),
        attentions=tuple(f"transformers.models.{folder}.*.{name}VisionAttention" for folder, name in MEMBERS),
        attention_paths=("encoder.layers.*",),  # not that of the merger
        geometry=geometry,
        layouts=layouts,
        joined="segments",
        small_towers="sfa_adapters.testing.towers_minicpm:MINICPM_VIT",
    )
)
