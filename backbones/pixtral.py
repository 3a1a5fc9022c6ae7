"""Pixtral, the tower of Mistral 3, Mistral Large 4 and LightOnOCR: images behind one another, with 2-D RoPE, no CLS.

Patches of all images form one sequence, row by row, under a block-diagonal mask. Images of different sizes come on one
canvas, and `image_sizes` says how much of it each of them fills.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sfa_adapters import processor_statistics
from sfa_adapters.arrangement import ImageTokens
from sfa_adapters.registry import Backbone, Geometry, register_backbone


def geometry(tower: nn.Module) -> Geometry:
    """Images of any size, no prefix."""
    return Geometry(grid=None, prefix_tokens=0)


def layouts(tower: nn.Module, args: tuple[Any, ...], kwargs: Any) -> list[ImageTokens]:
    """As the tower cuts its canvases: whole patches of each image, and no more than the canvas has."""
    model: Any = tower
    side = int(model.patch_size)
    pixels: Tensor = args[0] if args else kwargs["pixel_values"]
    sizes = args[1] if len(args) > 1 else kwargs.get("image_sizes")
    height, width = (int(length) for length in pixels.shape[-2:])
    if sizes is None:
        sizes = [(height, width)] * len(pixels)
    pairs = [(int(h), int(w)) for h, w in (sizes.tolist() if isinstance(sizes, Tensor) else sizes)]
    return [ImageTokens((min(h, height) // side, min(w, width) // side)) for h, w in pairs[: len(pixels)]]


def statistics(tower: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What its image processor normalises with."""
    return processor_statistics.CLIP


PIXTRAL = register_backbone(
    Backbone(
        name="pixtral",
        towers=("transformers.models.pixtral.*.PixtralVisionModel",),
        attentions=("transformers.models.pixtral.*.PixtralAttention",),
        geometry=geometry,
        layouts=layouts,
        joined="packed",
        statistics=statistics,
        small_towers="sfa_adapters.testing.towers_grids:PIXTRAL",
    )
)
