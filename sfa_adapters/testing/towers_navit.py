"""Small towers on one flat sequence of patches: one of each model of transformers that works like this."""

from __future__ import annotations

from typing import Any

import torch

from sfa_adapters.testing.cases import TowerCase
from sfa_adapters.testing.flat_towers import PATCH, SmallTower, groups, raster

__all__ = ["NAVIT", "NAVIT_RASTER", "NAVIT_WINDOWS", "SMALL_TOWERS"]

QWEN: dict[str, Any] = {
    "depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32, "patch_size": PATCH,
}  # fmt: skip
TABLE: dict[str, Any] = {"num_position_embeddings": 16}
DEEP: dict[str, Any] = {**TABLE, "deepstack_visual_indexes": [0]}
GLM: dict[str, Any] = {**QWEN, "image_size": 16}
PLAIN: dict[str, Any] = {
    "num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "patch_size": PATCH,
}  # fmt: skip
STILL = (3 * PATCH * PATCH,)
FULL = ["full_attention", "window_attention", "full_attention"]

SMALL_TOWERS: dict[str, tuple[SmallTower, ...]] = {
    "navit": (
        SmallTower(
            model="qwen3_vl", tower="Qwen3VLVisionModel", config="Qwen3VLVisionConfig", options={**QWEN, **DEEP},
            runs="bias",
        ),
        SmallTower(
            model="qwen3_vl_moe", tower="Qwen3VLMoeVisionModel", config="Qwen3VLMoeVisionConfig",
            options={**QWEN, **DEEP},
        ),
        SmallTower(
            model="qwen3_5", tower="Qwen3_5VisionModel", config="Qwen3_5VisionConfig", options={**QWEN, **TABLE},
        ),
        SmallTower(
            model="qwen3_5_moe", tower="Qwen3_5MoeVisionModel", config="Qwen3_5MoeVisionConfig",
            options={**QWEN, **TABLE},
        ),
        SmallTower(
            model="qwen4_exp", tower="Qwen4ExpVisionModel", config="Qwen4ExpVisionConfig", options={**QWEN, **TABLE},
        ),
        SmallTower(
            model="qwen3_omni_moe", tower="Qwen3OmniMoeVisionEncoder", config="Qwen3OmniMoeVisionEncoderConfig",
            options={**QWEN, **DEEP},
        ),
        SmallTower(
            model="qwen2_vl", tower="Qwen2VisionTransformerPretrainedModel", config="Qwen2VLVisionConfig",
            options={**QWEN, "embed_dim": 32, "mlp_ratio": 2},
        ),
        SmallTower(model="glm_ocr", tower="GlmOcrVisionModel", config="GlmOcrVisionConfig", options=GLM),
        SmallTower(
            model="glm4v", tower="Glm4vVisionModel", config="Glm4vVisionConfig", options=GLM, frames=False,
        ),
        SmallTower(
            model="glm4v_moe", tower="Glm4vMoeVisionModel", config="Glm4vMoeVisionConfig", options=GLM, frames=False,
        ),
        SmallTower(
            model="glm5_next", tower="Glm5NextVisionModel", config="Glm5NextVisionConfig",
            options={**GLM, "projection_intermediate_size": 32},
        ),
        SmallTower(
            model="glm_image", tower="GlmImageVisionModel", config="GlmImageVisionConfig",
            options={**GLM, "spatial_merge_size": 2}, patch=STILL, frames=False, loops=groups,
        ),
        SmallTower(
            model="ernie4_5_vl_moe", tower="Ernie4_5_VLMoeVisionTransformerPretrainedModel",
            config="Ernie4_5_VLMoeVisionConfig", options=QWEN, patch=STILL,
        ),
        SmallTower(
            model="dots3_note", tower="Dots3NoteVisionModel", config="Dots3NoteVisionConfig",
            options={**PLAIN, "adapter_in_dim": 32, "adapter_out_dim": 32, "mlp_layer_types": ["dense"] * 3},
            patch=STILL,
        ),
        SmallTower(
            model="video_llama_3", tower="VideoLlama3VisionModel", config="VideoLlama3VisionConfig", options=PLAIN,
            patch=STILL, lora="q_proj", further=lambda sizes: {"merge_sizes": torch.tensor([2, 1])},
        ),
        SmallTower(
            model="lfm3_vl", tower="Lfm3VlVisionModel", config="Lfm3VlVisionConfig",
            options={
                **PLAIN, "num_hidden_layers": 4, "num_key_value_heads": 2,
                "layer_types": ["full_attention", "conv", "full_attention", "full_attention"],
            },
            lora="q_proj",
        ),
        SmallTower(
            model="minimax_m3_vl", tower="MiniMaxM3VLVisionModel", config="MiniMaxM3VLVisionConfig",
            options=PLAIN, lora="q_proj",
            positions=lambda places: torch.cat([torch.nn.functional.pad(places, (1, 0), value=t) for t in (0, 1)]),
        ),
        SmallTower(
            model="cosmos3_edge", tower="Cosmos3EdgeVisionModel", config="Cosmos3EdgeVisionConfig",
            options={**PLAIN, "num_patches": 16}, patch=STILL, loops=groups, lora="q_proj",
        ),
        SmallTower(
            model="inkling2", tower="Inkling2VisionModel", config="Inkling2VisionConfig",
            options={**PLAIN, "posemb_grid_size": 4, "projection_hidden_dim": 32, "text_hidden_size": 32},
            patch=(2 * PATCH, 2 * PATCH, 3), count=2, prefix=1, frames=False, lora="q_proj",
            positions=lambda places: places + 1,
        ),
        SmallTower(
            model="cohere_compass", tower="CohereCompassVisionModel", config="CohereCompassVisionConfig",
            options={**QWEN, **DEEP},
        ),
    ),
    "navit_raster": (
        SmallTower(
            model="paddleocr_vl", tower="PaddleOCRVisionModel", config="PaddleOCRVisionConfig",
            options={**PLAIN, "image_size": 16}, patch=(3, PATCH, PATCH), lora="q_proj", runs="bias",
        ),
        SmallTower(
            model="hunyuan_vl", tower="HunYuanVLVisionTransformer", config="HunYuanVLVisionConfig",
            options={**PLAIN, "max_image_size": 16, "text_hidden_size": 32}, patch=STILL, frames=False, loops=raster,
            lora="q_proj",
        ),
        SmallTower(
            model="hy_v4_vl", tower="HYV4VLVisionModel", config="HYV4VLVisionConfig",
            options={**PLAIN, "max_image_size": 16, "out_hidden_size": 32}, patch=STILL, frames=False, loops=raster,
            lora="q_proj",
        ),
        SmallTower(
            model="kimi_k25", tower="Kimi_K25VisionModel", config="Kimi_K25VisionConfig",
            options={**PLAIN, "pos_emb_height": 4, "pos_emb_width": 4}, patch=(3, PATCH, PATCH), lora="q_proj",
        ),
    ),
    "navit_windows": (
        SmallTower(
            model="qwen2_5_omni", tower="Qwen2_5OmniVisionEncoder", config="Qwen2_5OmniVisionEncoderConfig",
            options={**QWEN, "fullatt_block_indexes": [1], "window_size": 4 * PATCH}, lora="q", runs="bias",
        ),
        SmallTower(
            model="exaone4_5", tower="Exaone4_5_VisionModel", config="Exaone4_5_VisionConfig",
            options={**QWEN, "fullatt_block_indexes": [1], "window_size": 4 * PATCH, "num_key_value_heads": 2},
        ),
        SmallTower(
            model="muse_glimmer", tower="MuseGlimmerVisionModel", config="MuseGlimmerVisionConfig",
            options={**PLAIN, "pos_emb_height": 3, "pos_emb_width": 3, "layer_types": FULL}, lora="q_proj",
            positions=lambda places: places.flip(-1) + 1,
        ),
        SmallTower(
            model="muse_spark", tower="MuseSparkVisionModel", config="MuseSparkVisionConfig",
            options={**PLAIN, "pos_emb_height": 3, "pos_emb_width": 3, "layer_types": FULL}, lora="q_proj",
            positions=lambda places: places.flip(-1) + 1,
        ),
    ),
}  # fmt: skip


def cases(backbone: str) -> tuple[TowerCase, ...]:
    """The small towers of a record that the installed transformers has."""
    return tuple(small.case(backbone) for small in SMALL_TOWERS[backbone] if small.installed)


NAVIT = cases("navit")
NAVIT_RASTER = cases("navit_raster")
NAVIT_WINDOWS = cases("navit_windows")
