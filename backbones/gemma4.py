"""The tower of Gemma 4 and DiffusionGemma: padded rows of patches that bring their places, with 2-D RoPE and no CLS.

Behind the layers it pools patches to soft tokens by their places, padding left out; nothing of that concerns a bias.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from sfa_adapters.arrangement import ImageTokens
from sfa_adapters.placed_tokens import placed_images
from sfa_adapters.registry import Backbone, Geometry, register_backbone


def geometry(tower: nn.Module) -> Geometry:
    """Images of any aspect, no prefix."""
    return Geometry(grid=None, prefix_tokens=0)


def layouts(tower: nn.Module, args: tuple[Any, ...], kwargs: Any) -> list[ImageTokens]:
    """`pixel_position_ids` hold column and row of each patch, in this order, and (-1, -1) at padding."""
    places = args[1] if len(args) > 1 else kwargs["pixel_position_ids"]
    return placed_images(places.flip(-1), ~(places == -1).all(-1))


def statistics(tower: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Its image processor only scales to 0..1; the tower itself shifts to -1..1."""
    return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


GEMMA4 = register_backbone(
    Backbone(
        name="gemma4",
        towers=("transformers.models.gemma4.*.Gemma4VisionModel",),
        attentions=("transformers.models.gemma4.*.Gemma4VisionAttention",),
        geometry=geometry,
        layouts=layouts,
        joined="padded",
        statistics=statistics,
        small_towers="sfa_adapters.testing.towers_grids:GEMMA4",
    )
)
