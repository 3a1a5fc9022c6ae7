"""SigLIP 2 with images of native aspect (NaFlex), the tower of LFM2-VL: padded rows of patches, a grid for each image.

SigLIP 2 checkpoints of a fixed size are plain SigLIP towers (`siglip`).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from sfa_adapters import processor_statistics
from sfa_adapters.arrangement import ImageTokens
from sfa_adapters.placed_tokens import sized_images
from sfa_adapters.registry import Backbone, Geometry, register_backbone


def geometry(tower: nn.Module) -> Geometry:
    """Images of any aspect, no prefix."""
    return Geometry(grid=None, prefix_tokens=0)


def layouts(embeddings: nn.Module, args: tuple[Any, ...], kwargs: Any) -> list[ImageTokens]:
    """Rows and columns of each image are in `spatial_shapes`, and a row of patches is as long as the longest image."""
    pixels = args[0] if args else kwargs["pixel_values"]
    shapes = args[1] if len(args) > 1 else kwargs["spatial_shapes"]
    return sized_images(shapes, pixels.shape[1])


def statistics(tower: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What its image processor normalises with."""
    return processor_statistics.HALF


SIGLIP2_NAFLEX = register_backbone(
    Backbone(
        name="siglip2_naflex",
        towers=("transformers.models.siglip2.*.Siglip2VisionModel",),
        attentions=("transformers.models.siglip2.*.Siglip2Attention",),
        geometry=geometry,
        layouts=layouts,
        joined="padded",
        image_module="embeddings",
        statistics=statistics,
        small_towers="sfa_adapters.testing.towers_grids:SIGLIP2_NAFLEX",
    )
)
