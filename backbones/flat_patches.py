"""Pix2Struct and Kosmos-2.5: padded rows of flattened patches, each with its row and column in front; no CLS.

Adding a relative is one line in `FAMILIES`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from sfa_adapters.arrangement import ImageTokens
from sfa_adapters.errors import LayoutError
from sfa_adapters.placed_tokens import placed_images
from sfa_adapters.registry import Backbone, Geometry, register_backbone

# Model folder of transformers, and the names of its classes up to "VisionModel" and "VisionAttention".
FAMILIES = {"pix2struct": "Pix2Struct", "kosmos2_5": "Kosmos2_5"}


def geometry(tower: nn.Module) -> Geometry:
    """Images of any aspect, no prefix."""
    return Geometry(grid=None, prefix_tokens=0)


def layouts(tower: nn.Module, args: tuple[Any, ...], kwargs: Any) -> list[ImageTokens]:
    """The first two numbers of a patch are its row and column, from 1; padding is zero throughout.

    Raises:
        LayoutError: `attention_mask` lets tokens be seen that have no place.
    """
    patches = args[0] if args else kwargs["flattened_patches"]
    mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    real = (patches[..., :2] > 0).all(-1)
    if mask is not None and bool((mask.to(real.device).bool() & ~real).any()):
        raise LayoutError(
            "attention_mask shows patches that have no row and column (0 in flattened_patches): they are padding. Pass "
            "the mask that the processor gives beside these patches, or none."
        )
    return placed_images(patches[..., :2] - 1, real)


FLAT_PATCHES = register_backbone(
    Backbone(
        name="flat_patches",
        towers=tuple(f"transformers.models.{folder}.*.{name}VisionModel" for folder, name in FAMILIES.items()),
        attentions=tuple(f"transformers.models.{folder}.*.{name}VisionAttention" for folder, name in FAMILIES.items()),
        geometry=geometry,
        layouts=layouts,
        joined="padded",
        small_towers="sfa_adapters.testing.towers_grids:FLAT_PATCHES",
    )
)
