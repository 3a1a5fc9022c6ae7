"""Towers of image-text models that were built after CLIP: one CLS token, then the patches row by row.

Their attention takes a mask, or, in the BLIP-2 family, hands a `position_bias` on to the fused attention.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from sfa_adapters.arrangement import ImageTokens
from sfa_adapters.family import Member, attention_patterns, grid_behind_prefix, tower_patterns
from sfa_adapters.pixel_grids import pixel_grid, pixel_layouts
from sfa_adapters.registry import Backbone, register_backbone

MEMBERS = (
    Member("blip_2", "Blip2VisionModel", "Blip2Attention", 1),
    Member("instructblip", "InstructBlipVisionModel", "InstructBlipAttention", 1),
    Member("instructblipvideo", "InstructBlipVideoVisionModel", "InstructBlipVideoAttention", 1),
    Member("kosmos2", "Kosmos2VisionTransformer", "Kosmos2VisionAttention", 1),
    Member("git", "GitVisionTransformer", "GitVisionAttention", 1),
    Member("idefics", "IdeficsVisionTransformer", "IdeficsVisionAttention", 1),
    Member("qianfan_ocr", "QianfanOCRVisionModel", "QianfanOCRVisionAttention", 1),
    Member("altclip", "AltCLIPVisionModel", "AltCLIPAttention", 1),
    Member("chinese_clip", "ChineseCLIPVisionModel", "ChineseCLIPVisionAttention", 1),
    Member("metaclip_2", "MetaClip2VisionModel", "MetaClip2Attention", 1),
    Member("clipseg", "CLIPSegVisionModel", "CLIPSegAttention", 1),
    Member("owlvit", "OwlViTVisionTransformer", "OwlViTAttention", 1),
    Member("owlv2", "Owlv2VisionTransformer", "Owlv2Attention", 1),
    Member("mlcd", "MLCDVisionModel", "MLCDAttention", 1),
)

CLIP_KIN = register_backbone(
    Backbone(
        name="clip_kin",
        towers=tower_patterns(MEMBERS),
        attentions=attention_patterns(MEMBERS),
        geometry=grid_behind_prefix(MEMBERS),
        layouts=pixel_layouts,
        image_module="embeddings",
        small_towers="sfa_adapters.testing.towers_clip_kin:CLIP_KIN",
    )
)

# -- X-CLIP --

X_CLIP_MEMBERS = (Member("x_clip", "XCLIPVisionModel", "XCLIPAttention", 1),)


def with_message_token(embeddings: nn.Module, args: tuple[Any, ...], kwargs: Any) -> ImageTokens | None:
    """Each layer puts a token with a message from the other frames behind the patches of a frame."""
    grid = pixel_grid(embeddings, args, kwargs)
    return None if grid is None else ImageTokens(grid, without_place=((grid[0] * grid[1], grid[0] * grid[1] + 1),))


X_CLIP = register_backbone(
    Backbone(
        name="x_clip",
        towers=tower_patterns(X_CLIP_MEMBERS),
        attentions=attention_patterns(X_CLIP_MEMBERS),
        attention_paths=("*.self_attn",),  # message_attn attends over frames
        geometry=grid_behind_prefix(X_CLIP_MEMBERS),
        layouts=with_message_token,
        image_module="embeddings",
        small_towers="sfa_adapters.testing.towers_clip_kin:X_CLIP",
    )
)
