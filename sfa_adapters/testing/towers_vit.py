"""Small plain vision transformers of transformers: ViT, DeiT, I-JEPA, the DINO family, BEiT, Data2Vec."""

from __future__ import annotations

from typing import Any

from sfa_adapters.testing.cases import images
from sfa_adapters.testing.members import Small, grids_of_patches, installed
from sfa_adapters.testing.towers_transformers import set_checkpointing, set_eager

__all__ = ["DATA2VEC_VISION", "VIT"]

PATCH = 14
OPTIONS: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56,
    "patch_size": PATCH,
}  # fmt: skip
COMMON: dict[str, Any] = {
    "layers": 2, "heads": 4, "grid": (4, 4), "prefix": 1, "inputs": images(56, 56), "grids": grids_of_patches(PATCH),
    "library": "transformers", "eager": set_eager, "checkpointing": set_checkpointing,
}  # fmt: skip
RESIZED = images(42, 70)
INTERPOLATED = images(42, 70, interpolate_pos_encoding=True)
OWN_BIAS = {"use_relative_position_bias": True, "layer_scale_init_value": 1.0}
SHARED_BIAS = {"use_shared_relative_position_bias": True, "layer_scale_init_value": 1.0}

VIT = installed(
    "vit", OPTIONS, COMMON,
    (
        Small("dinov2.modeling_dinov2", "Dinov2Model", "Dinov2Config", resized=RESIZED, encoder="encoder"),
        Small("vit.modeling_vit", "ViTModel", "ViTConfig", resized=INTERPOLATED),
        Small(
            "dinov2_with_registers.modeling_dinov2_with_registers", "Dinov2WithRegistersModel",
            "Dinov2WithRegistersConfig", {"num_register_tokens": 4}, prefix=5, resized=RESIZED, encoder="encoder",
        ),
        Small(
            "dinov3_vit.modeling_dinov3_vit", "DINOv3ViTModel", "DINOv3ViTConfig", {"num_register_tokens": 2},
            prefix=3, resized=RESIZED,
        ),
        Small("deit.modeling_deit", "DeiTModel", "DeiTConfig", prefix=2, resized=INTERPOLATED),
        Small("ijepa.modeling_ijepa", "IJepaModel", "IJepaConfig", prefix=0, resized=INTERPOLATED),
        Small("vit_msn.modeling_vit_msn", "ViTMSNModel", "ViTMSNConfig", resized=INTERPOLATED),
        Small("beit.modeling_beit", "BeitModel", "BeitConfig", OWN_BIAS),
        Small("beit.modeling_beit", "BeitModel", "BeitConfig", SHARED_BIAS, name="beit_shared_bias"),
    ),
)  # fmt: skip
DATA2VEC_VISION = installed(
    "data2vec_vision", OPTIONS, {**COMMON, "eager": None},
    (
        Small("data2vec.modeling_data2vec_vision", "Data2VecVisionModel", "Data2VecVisionConfig",
              OWN_BIAS),
        Small("data2vec.modeling_data2vec_vision", "Data2VecVisionModel", "Data2VecVisionConfig", SHARED_BIAS,
              name="data2vec_shared_bias"),
    ),
)  # fmt: skip
