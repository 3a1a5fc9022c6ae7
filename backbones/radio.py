"""RADIO: summary and register tokens in front of the patches, images of one size in a batch or of any sizes packed.

Packed images (`image_grid_hw`, as Nemotron Omni gives them) are one sequence that the attention computes image by
image, between `cu_seqlens`; a single one, and all images of one size, are plain batches. In either case it hands a
`position_bias` on.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from sfa_adapters.arrangement import ImageTokens, TokenArrangement
from sfa_adapters.family import Member, attention_patterns, grid_behind_prefix, tower_patterns
from sfa_adapters.pixel_grids import pixel_layouts
from sfa_adapters.registry import Backbone, register_backbone


def summary_tokens(tower: nn.Module) -> int:
    """CLS tokens and registers."""
    model: Any = tower
    return int(model.embeddings.cls_register_token.shape[0])


MEMBERS = (Member("radio", "RadioModel", "RadioAttention RadioSelfAttention", summary_tokens),)


def layouts(embeddings: nn.Module, args: tuple[Any, ...], kwargs: Any) -> ImageTokens | TokenArrangement | None:
    """One grid for `[batch, channels, height, width]`; a grid each for packed patches."""
    model: Any = embeddings
    grids = kwargs.get("image_grid_hw", args[1] if len(args) > 1 else None)
    if grids is None:
        return pixel_layouts(embeddings, args, kwargs)
    images = tuple(ImageTokens((rows, columns)) for rows, columns in grids.tolist())
    # A single image is not cut into segments.
    joined = "batch" if len(images) == 1 else "segments"
    return TokenArrangement(joined, images, int(model.cls_register_token.shape[0]))


RADIO = register_backbone(
    Backbone(
        name="radio",
        towers=tower_patterns(MEMBERS),
        attentions=attention_patterns(MEMBERS),
        geometry=grid_behind_prefix(MEMBERS),
        layouts=layouts,
        image_module="embeddings",
        mask_argument="position_bias",
        small_towers="sfa_adapters.testing.towers_radio:RADIO",
    )
)
