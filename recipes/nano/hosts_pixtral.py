"""A nano LightOnOCR: Pixtral's tower and Qwen3, with random weights."""

from __future__ import annotations

from typing import Any

from transformers import (
    LightOnOcrConfig,
    LightOnOcrForConditionalGeneration,
    LightOnOcrProcessor,
    PixtralImageProcessor,
    PixtralVisionConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen3Config,
)

from sfa_adapters.recipes.nano.hosts import WIDTH, ending, text_settings
from sfa_adapters.recipes.nano.tokenizer import CHATML, host_tokenizer, token_id

__all__ = ["lighton_ocr"]

PATCH, LONGEST = 14, 280


def lighton_ocr() -> tuple[PreTrainedModel, ProcessorMixin]:
    """A nano LightOnOCR, whose tower takes pages of any size behind one another; model and processor."""
    named = {
        "image_token": "<|image_pad|>",
        "image_break_token": "<|vision_pad|>",
        "image_end_token": "<|vision_end|>",
    }
    tokenizer = host_tokenizer("<|im_end|>", ("<|im_start|>", "<|im_end|>"), named)
    vision: Any = PixtralVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=172,
        num_hidden_layers=3,
        num_attention_heads=4,
        head_dim=WIDTH // 4,  # pyright: ignore[reportCallIssue]
        image_size=LONGEST,
        patch_size=PATCH,
        hidden_act="silu",
    )
    config = LightOnOcrConfig(
        vision_config=vision,
        text_config=Qwen3Config(**text_settings(tokenizer)),
        image_token_id=token_id(tokenizer, named["image_token"]),
        tie_word_embeddings=False,
    )
    model = ending(LightOnOcrForConditionalGeneration(config), tokenizer, tokenizer.eos_token_id)
    return model, LightOnOcrProcessor(
        PixtralImageProcessor(size={"longest_edge": LONGEST}, patch_size={"height": 2 * PATCH, "width": 2 * PATCH}),
        tokenizer,
        patch_size=PATCH,
        chat_template=CHATML.replace("PICTURE", named["image_token"]),
    )
