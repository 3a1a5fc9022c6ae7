"""Small plain vision transformers of transformers: ViT, DeiT, I-JEPA, the DINO family, BEiT, Data2Vec."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sfa_adapters.testing.cases import Inputs, Place, images
from sfa_adapters.testing.members import Small, grids_of_patches, installed
from sfa_adapters.testing.reference import regular_places
from sfa_adapters.testing.towers_transformers import set_checkpointing, set_eager

__all__ = ["DATA2VEC_VISION", "LAYOUTLMV3", "VIT", "VIT_MAE"]

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
OWN_BIAS = {"use_relative_position_bias": True, "layer_scale_init_value": 1.0, "drop_path_rate": 0.0}
SHARED_BIAS = {"use_shared_relative_position_bias": True, "layer_scale_init_value": 1.0, "drop_path_rate": 0.0}

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
            "dinov3_vit.modeling_dinov3_vit", "DINOv3ViTModel", "DINOv3ViTConfig",
            {"num_register_tokens": 2, "pos_embed_rescale": None}, prefix=3, resized=RESIZED,
        ),
        Small(
            "tipsv2.modeling_tipsv2", "Tipsv2VisionModel", "Tipsv2VisionConfig", {"num_register_tokens": 2}, prefix=3,
            resized=RESIZED, encoder="encoder",
        ),
        Small("deit.modeling_deit", "DeiTModel", "DeiTConfig", prefix=2, resized=INTERPOLATED),
        Small("ijepa.modeling_ijepa", "IJepaModel", "IJepaConfig", prefix=0, resized=INTERPOLATED),
        Small("vit_msn.modeling_vit_msn", "ViTMSNModel", "ViTMSNConfig", resized=INTERPOLATED),
        Small("beit.modeling_beit", "BeitModel", "BeitConfig", OWN_BIAS),
        Small("beit.modeling_beit", "BeitModel", "BeitConfig", SHARED_BIAS, name="beit_shared_bias", reentrant=False),
    ),
)  # fmt: skip
DATA2VEC_VISION = installed(
    "data2vec_vision", OPTIONS, {**COMMON, "eager": None},
    (
        Small("data2vec.modeling_data2vec_vision", "Data2VecVisionModel", "Data2VecVisionConfig",
              OWN_BIAS),
        Small("data2vec.modeling_data2vec_vision", "Data2VecVisionModel", "Data2VecVisionConfig", SHARED_BIAS,
              name="data2vec_shared_bias", reentrant=False),
    ),
)  # fmt: skip


# -- ViTMAE: half of the patches, shuffled --


def shuffled(height: int, width: int, **others: Any) -> Any:
    """Makes two images, and the random numbers that patches are sorted by."""
    picture = images(height, width, **others)

    def make(seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        patches = (height // PATCH) * (width // PATCH)
        return {**picture(seed), "noise": torch.rand(2, patches, generator=generator)}

    return make


def kept_places(inputs: Inputs, call: Mapping[str, Any]) -> list[Place]:
    """CLS, and the patches with the smallest half of the numbers, smallest first."""
    columns = inputs["pixel_values"].shape[-1] // PATCH
    places: list[Place] = []
    for numbers in inputs["noise"].tolist():
        smallest = sorted(range(len(numbers)), key=numbers.__getitem__)[: len(numbers) // 2]
        places += [None, *((float(k // columns), float(k % columns)) for k in smallest)]
    return places


def turn_shuffled(inputs: Inputs) -> Inputs:
    """Exchanges rows and columns; each patch keeps its number."""
    pixels, noise = inputs["pixel_values"], inputs["noise"]
    rows, columns = (side // PATCH for side in pixels.shape[-2:])
    turned = noise.view(-1, rows, columns).transpose(1, 2).flatten(1)
    return {**inputs, "pixel_values": pixels.transpose(-1, -2).contiguous(), "noise": turned}


VIT_MAE = installed(
    "vit_mae", {**OPTIONS, "mask_ratio": 0.5}, COMMON,
    (
        Small("vit_mae.modeling_vit_mae", "ViTMAEModel", "ViTMAEConfig", inputs=shuffled(56, 56),
              resized=shuffled(56, 84, interpolate_pos_encoding=True), places=kept_places, turn=turn_shuffled,
              grids=lambda inputs: grids_of_patches(PATCH)(inputs) * 2,
              tokens=lambda inputs: [1 + inputs["noise"].shape[1] // 2] * 2, compiles="no"),
    ),
)  # fmt: skip


# -- LayoutLMv3: words in front --

WORDS = 5


def words_and_images(seed: int) -> Inputs:
    """Two pages with five words each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 50, (2, WORDS), generator=generator)
    corner = torch.randint(0, 500, (2, WORDS, 2), generator=generator)
    size = torch.randint(1, 500, (2, WORDS, 2), generator=generator)
    return {"input_ids": ids, "bbox": torch.cat((corner, corner + size), -1), **images(56, 56)(seed)}


LAYOUTLMV3 = installed(
    "layoutlmv3", {**OPTIONS, "input_size": 56, "vocab_size": 50, "coordinate_size": 6, "shape_size": 4},
    {**COMMON, "checkpointing": None},
    (
        Small("layoutlmv3.modeling_layoutlmv3", "LayoutLMv3Model", "LayoutLMv3Config", inputs=words_and_images,
              places=lambda inputs, call: [*[None] * WORDS, *regular_places((4, 4), 1)]),
        Small("layoutlmv3.modeling_layoutlmv3", "LayoutLMv3Model", "LayoutLMv3Config",
              {"has_relative_attention_bias": False, "has_spatial_attention_bias": False}, name="layoutlmv3_no_bias"),
    ),
)  # fmt: skip
