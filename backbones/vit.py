"""Plain vision transformers of transformers, trained on images alone: ViT, DeiT, I-JEPA, the DINO family, BEiT.

All patches of an image row by row, behind a prefix of CLS, distillation or register tokens. Where positions are rotary
(DINOv3) or a learned relative bias (BEiT), the structural bias is added to the same logits.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from sfa_adapters.family import Member, attention_patterns, grid_behind_prefix, tower_patterns
from sfa_adapters.pixel_grids import pixel_layouts
from sfa_adapters.registry import Backbone, register_backbone


def cls_and_registers(tower: nn.Module) -> int:
    """One CLS token and as many registers as the configuration says."""
    model: Any = tower
    return 1 + int(model.config.num_register_tokens)


# Older releases of transformers have the attention of DINOv2 one level deeper, in a module `*SelfAttention`.
MEMBERS = (
    Member("vit", "ViTModel", "ViTAttention", 1),
    Member("vit_msn", "ViTMSNModel", "ViTMSNAttention", 1),
    Member("deit", "DeiTModel", "DeiTAttention", 2),
    Member("ijepa", "IJepaModel", "IJepaAttention", 0),
    Member("dinov2", "Dinov2Model Dinov2Backbone", "Dinov2Attention Dinov2SelfAttention", 1),
    Member(
        "dinov2_with_registers",
        "Dinov2WithRegistersModel Dinov2WithRegistersBackbone",
        "Dinov2WithRegistersAttention Dinov2WithRegistersSelfAttention",
        cls_and_registers,
    ),
    Member("dinov3_vit", "DINOv3ViTModel DINOv3ViTBackbone", "DINOv3ViTAttention", cls_and_registers),
    Member("tipsv2", "Tipsv2VisionModel Tipsv2VisionBackbone", "Tipsv2VisionAttention", cls_and_registers),
    Member("beit", "BeitModel BeitBackbone", "BeitAttention", 1),
)

VIT = register_backbone(
    Backbone(
        name="vit",
        towers=tower_patterns(MEMBERS),
        attentions=attention_patterns(MEMBERS),
        geometry=grid_behind_prefix(MEMBERS),
        layouts=pixel_layouts,
        image_module="embeddings",
        small_towers="sfa_adapters.testing.towers_vit:VIT",
    )
)

DATA2VEC = (Member("data2vec", "Data2VecVisionModel", "Data2VecVisionSelfAttention", 1),)

DATA2VEC_VISION = register_backbone(
    Backbone(
        name="data2vec_vision",
        towers=tower_patterns(DATA2VEC),
        attentions=attention_patterns(DATA2VEC),
        geometry=grid_behind_prefix(DATA2VEC),
        layouts=pixel_layouts,
        image_module="embeddings",
        mask_argument="relative_position_bias",  # added to the logits beside the layer's own
        small_towers="sfa_adapters.testing.towers_vit:DATA2VEC_VISION",
    )
)
