"""Towers of vision-language models that were built after SigLIP: patches row by row, without prefix tokens."""

from __future__ import annotations

from typing import Any

from torch import nn

from sfa_adapters.family import Member, attention_patterns, grid_behind_prefix, tower_patterns
from sfa_adapters.pixel_grids import pixel_layouts
from sfa_adapters.registry import Backbone, register_backbone

MEMBERS = (
    Member("granite_docling", "GraniteDoclingVisionModel", "GraniteDoclingVisionAttention"),
    Member("ovis2", "Ovis2VisionTransformer", "Ovis2VisionAttention"),
    Member("janus", "JanusVisionModel", "JanusVisionAttention"),
    Member("step3p7", "Step3p7VisionModel", "Step3p7VisionAttention"),
    Member("aimv2", "Aimv2VisionModel", "Aimv2Attention"),
)

SIGLIP_KIN = register_backbone(
    Backbone(
        name="siglip_kin",
        towers=tower_patterns(MEMBERS),
        attentions=attention_patterns(MEMBERS),
        geometry=grid_behind_prefix(MEMBERS),
        layouts=pixel_layouts,
        image_module="embeddings",
        small_towers="sfa_adapters.testing.towers_siglip_kin:SIGLIP_KIN",
    )
)

MOLMO2_MEMBERS = (Member("molmo2", "Molmo2VisionModel", "Molmo2VisionAttention"),)


def molmo2_layouts(tower: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
    """Its crops come cut into patches, `[crops, patches, values]`, always in the grid of the configuration."""


MOLMO2 = register_backbone(
    Backbone(
        name="molmo2",
        towers=tower_patterns(MOLMO2_MEMBERS),
        attentions=attention_patterns(MOLMO2_MEMBERS),
        geometry=grid_behind_prefix(MOLMO2_MEMBERS),
        layouts=molmo2_layouts,
        small_towers="sfa_adapters.testing.towers_siglip_kin:MOLMO2",
    )
)
