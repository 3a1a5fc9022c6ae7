"""Hosts on one sequence of patches for the tests of memory: images large enough that a CPU folds the bias, too."""

from __future__ import annotations

from typing import Any

import torch
import transformers as t
from torch import Tensor

__all__ = ["BUILD", "patches"]

_TOWER: dict[str, Any] = {
    "depth": 4, "hidden_size": 64, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 96, "patch_size": 14,
}  # fmt: skip
_MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 4, 4]}


def _qwen3_vl(text: dict[str, Any], image: dict[str, Any]) -> Any:
    vision = {**_TOWER, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 2]}
    return t.Qwen3VLForConditionalGeneration(t.Qwen3VLConfig(vision_config=vision, text_config=text, **image))


def _qwen3_5(text: dict[str, Any], image: dict[str, Any]) -> Any:
    """With as wide keys and values as in the full-size hosts: narrow ones would hide what a chunk keeps."""
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "num_hidden_layers": 4}
    linear |= {"linear_key_head_dim": 32, "linear_value_head_dim": 32}
    rope = {**_MROPE, "partial_rotary_factor": 1.0}
    config = t.Qwen3_5Config(
        vision_config={**_TOWER, "num_position_embeddings": 64},
        text_config={**text, **linear, "rope_parameters": rope},
        **image,
    )
    return t.Qwen3_5ForConditionalGeneration(config)


def _glm_ocr(text: dict[str, Any], image: dict[str, Any]) -> Any:
    return t.GlmOcrForConditionalGeneration(t.GlmOcrConfig(vision_config=_TOWER, text_config=text, **image))


def _paddleocr_vl(text: dict[str, Any], image: dict[str, Any]) -> Any:
    vision = {
        "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
        "image_size": 112, "patch_size": 14,
    }  # fmt: skip
    config = t.PaddleOCRVLConfig(vision_config=vision, text_config=text, tie_word_embeddings=False, **image)
    return t.PaddleOCRVLForConditionalGeneration(config)


_BUILD = {"qwen3_vl": _qwen3_vl, "qwen3_5": _qwen3_5, "glm_ocr": _glm_ocr, "paddleocr_vl": _paddleocr_vl}
BUILD = {
    name: lambda text, image, make=make: make({**text, "rope_parameters": _MROPE}, image)
    for name, make in _BUILD.items()
}


def patches(family: str, count: int) -> Tensor:
    """Random patches of 14 pixels, as the processor of a host gives them."""
    return torch.randn(count, 3, 14, 14) if family == "paddleocr_vl" else torch.randn(count, 3 * 2 * 14 * 14)
