"""Hosts with pages of 324 patches or more, which a CPU gives the folded bias, and their inputs, for `test_predict`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as t
from torch import Tensor

from sfa_adapters.vlm.sizes import Lengths

SIDE = 252
VISION: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "image_size": SIDE, "patch_size": 14,
}  # fmt: skip


def _smolvlm(text: dict[str, Any], image: int) -> Any:
    config = t.SmolVLMConfig(vision_config=VISION, text_config=t.LlamaConfig(**text), image_token_id=image)
    return t.SmolVLMForConditionalGeneration(config)


def _idefics3(text: dict[str, Any], image: int) -> Any:
    config = t.Idefics3Config(vision_config=VISION, text_config=t.LlamaConfig(**text), image_token_id=image)
    return t.Idefics3ForConditionalGeneration(config)


def _gemma3(text: dict[str, Any], image: int) -> Any:
    vision = t.SiglipVisionConfig(**VISION, vision_use_head=False)  # pyright: ignore[reportCallIssue]
    config = t.Gemma3Config(
        vision_config=vision, text_config=t.Gemma3TextConfig(**text), mm_tokens_per_image=81, image_token_index=image,
        tie_word_embeddings=False,
    )  # fmt: skip
    return t.Gemma3ForConditionalGeneration(config)


def _lighton_ocr(text: dict[str, Any], image: int) -> Any:
    vision = {key: VISION[key] for key in VISION if key != "image_size"}
    config = t.LightOnOcrConfig(
        vision_config={"model_type": "pixtral", **vision, "head_dim": 16, "image_size": 336, "hidden_act": "silu"},
        text_config=t.Qwen3Config(**text), image_token_id=image, tie_word_embeddings=False,
    )  # fmt: skip
    return t.LightOnOcrForConditionalGeneration(config)


def _gemma4(text: dict[str, Any], image: int) -> Any:
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    config = t.Gemma4Config(
        vision_config=t.Gemma4VisionConfig(
            hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
            head_dim=16, patch_size=8, position_embedding_size=256, use_clipped_linears=True,
        ),
        text_config=t.Gemma4TextConfig(
            **{**text, "global_head_dim": 48}, layer_types=kinds, num_kv_shared_layers=1, use_double_wide_mlp=True,
            hidden_size_per_layer_input=8, vocab_size_per_layer_input=text["vocab_size"], final_logit_softcapping=30.0,
        ),
        image_token_id=image, video_token_id=image + 1, audio_token_id=image + 2, tie_word_embeddings=False,
    )  # fmt: skip
    return t.Gemma4ForConditionalGeneration(config)


BUILD: dict[str, Callable[[dict[str, Any], int], Any]] = {
    "smolvlm": _smolvlm,
    "idefics3": _idefics3,
    "gemma3": _gemma3,
    "lighton_ocr": _lighton_ocr,
    "gemma4": _gemma4,
}


def pictures(family: str, lengths: Lengths, batch: int, is_image: Tensor) -> dict[str, Any]:
    """What the processor of a host gives beside the text.

    Args:
        family: One of `BUILD`.
        lengths: Of one question.
        batch: Questions.
        is_image: Which tokens are image tokens.
    """
    if family == "gemma4":
        rows, columns = 42, lengths.tower // 42
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        places = torch.stack((x, y), -1).flatten(0, 1).expand(batch, -1, -1)
        pixels = torch.rand(batch, lengths.tower, 3 * 8 * 8)
        return {"pixel_values": pixels, "image_position_ids": places, "mm_token_type_ids": is_image.long()}
    if family == "lighton_ocr":
        side = round(lengths.pixels**0.5)
        return {"pixel_values": torch.randn(batch, 3, side, side), "image_sizes": torch.tensor([[side, side]] * batch)}
    tiles = lengths.pixels // SIDE**2
    if family == "gemma3":
        return {"pixel_values": torch.randn(batch * tiles, 3, SIDE, SIDE), "token_type_ids": is_image.long()}
    return {"pixel_values": torch.randn(batch, tiles, 3, SIDE, SIDE)}
