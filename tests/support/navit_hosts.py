"""Small hosts whose towers work on one sequence of patches, with two prompts about an image of 4x6 patches each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from tests.support.hosts import IMAGE, TEXT
from tests.support.towers import lively

IDS: dict[str, Any] = {
    "image_token_id": IMAGE, "video_token_id": IMAGE + 1, "vision_start_token_id": IMAGE + 2,
    "vision_end_token_id": IMAGE + 3,
}  # fmt: skip
WORDS: dict[str, Any] = {**TEXT, "num_hidden_layers": 3, "head_dim": 8}
MROPE: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
QWEN: dict[str, Any] = {
    "depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32, "patch_size": 4,
}  # fmt: skip
PLAIN: dict[str, Any] = {
    "num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "patch_size": 4,
}  # fmt: skip


def qwen3_vl() -> nn.Module:
    vision = {**QWEN, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    config = transformers.Qwen3VLConfig(vision_config=vision, text_config={**WORDS, **MROPE}, **IDS)
    return transformers.Qwen3VLForConditionalGeneration(config)


def qwen2_vl() -> nn.Module:
    vision = {**QWEN, "embed_dim": 32, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(vision_config=vision, text_config={**WORDS, **MROPE}, **IDS)
    return transformers.Qwen2VLForConditionalGeneration(config)


def qwen3_5() -> nn.Module:
    """Three of four layers of its language model are linear attention."""
    text = {
        **WORDS, "num_hidden_layers": 4, "rope_parameters": {**MROPE["rope_parameters"], "partial_rotary_factor": 1.0},
        "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    }  # fmt: skip
    config = transformers.Qwen3_5Config(vision_config={**QWEN, "num_position_embeddings": 16}, text_config=text, **IDS)
    return transformers.Qwen3_5ForConditionalGeneration(config)


def glm_ocr() -> nn.Module:
    config = transformers.GlmOcrConfig(
        vision_config={**QWEN, "image_size": 16}, text_config={**WORDS, **MROPE}, image_token_id=IMAGE,
        video_token_id=IMAGE + 1, image_start_token_id=IMAGE + 2, image_end_token_id=IMAGE + 3,
    )  # fmt: skip
    return transformers.GlmOcrForConditionalGeneration(config)


def paddleocr_vl() -> nn.Module:
    vision = {**PLAIN, "image_size": 16}
    config = transformers.PaddleOCRVLConfig(vision_config=vision, text_config={**WORDS, **MROPE}, **IDS)
    return transformers.PaddleOCRVLForConditionalGeneration(config)


BUILD: dict[str, Callable[[], nn.Module]] = {
    build.__name__: lively(build) for build in (qwen3_vl, qwen2_vl, qwen3_5, glm_ocr, paddleocr_vl)
}


def prompts(name: str) -> dict[str, Any]:
    """What the processor of a host returns, without words that matter."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, 50, (2, 8), generator=generator)
    image = torch.full((2, 8), IMAGE)
    image[:, 0], image[:, -1] = IMAGE + 2, IMAGE + 3
    ids = torch.cat((words[:, :2], image, words[:, 2:]), dim=1)
    shape = (48, 3, 4, 4) if name == "paddleocr_vl" else (48, 3 * 2 * 4 * 4)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).long(),
        "pixel_values": torch.randn(*shape, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 6], [1, 4, 6]]),
    }
