"""Small towers of DeepSeek-OCR 2 and Unlimited-OCR: a SAM of two layers, and behind it the encoder with the bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.models.deepseek_ocr2.configuration_deepseek_ocr2 import DeepseekOcr2VisionConfig
from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import DeepseekOcr2VisionModel
from transformers.models.unlimited_ocr.configuration_unlimited_ocr import UnlimitedOcrVisionConfig
from transformers.models.unlimited_ocr.modeling_unlimited_ocr import UnlimitedOcrVisionModel

from sfa_adapters.testing.cases import Grid, Inputs, Place, TowerCase, images, lively, read_hidden
from sfa_adapters.testing.reference import regular_places
from sfa_adapters.testing.towers_transformers import SMALL, set_checkpointing, set_eager

__all__ = ["DEEPSEEK_OCR2", "UNLIMITED_OCR"]

SAM: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 32, "image_size": 64,
    "patch_size": 4, "window_size": 7, "global_attn_indexes": [1], "output_channels": 8, "downsample_channels": [8, 32],
}  # fmt: skip


def grids(inputs: Inputs) -> list[Grid]:
    """A quarter of SAM's patches of 4 pixels on each side."""
    height, width = inputs["pixel_values"].shape[-2:]
    return [(height // 16, width // 16)]


def patches_then_queries(inputs: Inputs, call: Mapping[str, Any]) -> list[Place]:
    """Patches row by row, then queries without a place, as many as the attention gets further tokens."""
    places = regular_places(grids(inputs)[0], 0)
    return places + [None] * (call["hidden_states"].shape[1] - len(places))


def deepseek() -> nn.Module:
    """With grouped key heads."""
    encoder = {**SMALL, "num_key_value_heads": 2, "vocab_size": 8, "max_window_layers": 3}
    return DeepseekOcr2VisionModel(DeepseekOcr2VisionConfig(sam_config=SAM, encoder_config=encoder))


def build_unlimited() -> nn.Module:
    """A CLIP encoder whose own grid is that of SAM's map."""
    encoder = {**SMALL, "image_size": 16, "patch_size": 4}
    return UnlimitedOcrVisionModel(UnlimitedOcrVisionConfig(sam_config=SAM, encoder_config=encoder))


def read_map(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """What the second encoder gives, without the features of SAM behind it, which no bias touches."""
    return [states[:, :32] for states in read_hidden(model, inputs)]


COMMON: dict[str, Any] = {
    "inputs": images(64, 64), "resized": images(96, 64), "grids": grids, "layers": 3, "heads": 4, "grid": (4, 4),
    "library": "transformers", "checkpointing": set_checkpointing, "eager": set_eager, "compiles": "no",
    "lora_targets": ("self_attn.q_proj",), "runs": "nightly",
}  # fmt: skip
DEEPSEEK_OCR2 = (
    TowerCase(
        **COMMON, name="deepseek_ocr2", backbone="deepseek_ocr2", build=lively(deepseek), places=patches_then_queries,
        unread=1,
    ),
)  # fmt: skip
UNLIMITED_OCR = (
    TowerCase(
        **COMMON, name="unlimited_ocr", rounding=2.0, backbone="unlimited_ocr", build=lively(build_unlimited), prefix=1,
        hidden=read_map,
    ),
)  # fmt: skip
