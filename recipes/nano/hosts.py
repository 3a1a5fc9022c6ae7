"""The nano hosts in memory: a small model of each host's own class, and its own processor class.

InternVL tiles and expands `<IMG_CONTEXT>`, LLaVA-OneVision cuts anyres crops, LLaVA reads its tower before the last
layer, Qwen takes any size. LLaVA-OneVision starts from the weights of this package, which can read charts; the others
have random weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3Config,
)

from sfa_adapters.errors import RecipeError
from sfa_adapters.recipes.nano.models import PATCH, PIXELS, load_nano
from sfa_adapters.recipes.nano.tokenizer import CHATML, IMAGE, PLAIN, VICUNA, VIDEO, host_tokenizer, token_id
from sfa_adapters.vlm.records import vlm_spec

__all__ = [
    "LOOK",
    "TILE",
    "WIDTH",
    "build_host",
    "ending",
    "internvl",
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_5_vl",
    "text_settings",
    "vision_settings",
]

# White is 0 and black -2, as in `encode.pixel_values`.
LOOK: Mapping[str, Any] = {"image_mean": [1.0] * 3, "image_std": [0.5] * 3}
WIDTH, TILE = 64, 112
# Of the CLIP hosts, LLaVA-1.5 and LLaVA-NeXT.
_CROPPED: Mapping[str, Any] = {"size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}}
_VICUNA_PROMPT: Mapping[str, Any] = {
    "patch_size": 14,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
    "chat_template": VICUNA.replace("PICTURE", "<image>\n"),
}
_VISION: Mapping[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "image_size": TILE,
    "patch_size": 14,
}


def build_host(family: str, seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The nano host of a family in memory.

    Args:
        family: Name of its record.
        seed: Of new weights; the global random state is left as it was.

    Returns:
        The model, in fp32 and in eval mode, and its processor.

    Raises:
        RecipeError: There is no such record, or it builds none.
    """
    spec = vlm_spec(family)
    if spec.nano is None:
        raise RecipeError(f"No nano host of the family {family!r}: its record does not say how to build one.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return spec.nano()


def vision_settings() -> dict[str, Any]:
    """Settings of a small tower with a fixed grid."""
    return dict(_VISION)


def text_settings(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Settings of a small language model with the vocabulary of a tokenizer."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 172,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": WIDTH // 4,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "tie_word_embeddings": False,
        "initializer_range": 0.05,  # the usual 0.02 is meant for wide layers
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def ending(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, ends: Any) -> PreTrainedModel:
    """Sets the tokens that end an answer, and eval mode."""
    assert model.generation_config is not None
    model.generation_config.eos_token_id = ends
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = None
    return model.eval()


def internvl() -> tuple[PreTrainedModel, ProcessorMixin]:
    """A nano InternVL: InternViT, pixel shuffle and Qwen3; model and processor."""
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = host_tokenizer("<|im_end|>", ("<|im_start|>", "<|im_end|>"), named)
    config = InternVLConfig(
        vision_config={**_VISION, "attention_bias": True},
        text_config=Qwen3Config(**text_settings(tokenizer)),
        image_token_id=token_id(tokenizer, "<IMG_CONTEXT>"),
        image_seq_length=(TILE // 14 // 2) ** 2,
        tie_word_embeddings=False,
    )
    model = ending(InternVLForConditionalGeneration(config), tokenizer, tokenizer.eos_token_id)
    look: dict[str, Any] = {"size": {"height": TILE, "width": TILE}, **LOOK}
    return model, InternVLProcessor(
        GotOcr2ImageProcessor(**look, crop_to_patches=True, min_patches=1, max_patches=2),
        tokenizer,
        InternVLVideoProcessor(**look),
        image_seq_length=config.image_seq_length,
        chat_template=CHATML.replace("PICTURE", "<IMG_CONTEXT>\n"),
    )


def llava_onevision() -> tuple[PreTrainedModel, ProcessorMixin]:
    """The pretrained nano LLaVA-OneVision, and the processor class of the full-size one."""
    tokenizer = host_tokenizer("<eos>", (), {"image_token": "<image>", "video_token": "<video>"})
    model = load_nano("llava_onevision").model
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # bytes and special tokens are new
    model = ending(model, tokenizer, tokenizer.eos_token_id)
    assert (model.config.image_token_id, model.config.video_token_id) == (IMAGE, VIDEO)
    # The base picture, and one crop of it, or two for one that is long.
    points = [[PIXELS, PIXELS], [PIXELS, 2 * PIXELS], [2 * PIXELS, PIXELS]]
    model.config.image_grid_pinpoints = points
    look: dict[str, Any] = {"size": {"height": PIXELS, "width": PIXELS}, **LOOK}
    return model, LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(**look, image_grid_pinpoints=points),
        tokenizer,
        LlavaOnevisionVideoProcessor(**look),
        num_image_tokens=(PIXELS // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=PLAIN.replace("PICTURE", "<image>"),
    )


def llava() -> tuple[PreTrainedModel, ProcessorMixin]:
    """A nano LLaVA: CLIP and Llama; model and processor."""
    tokenizer = host_tokenizer("</s>", ("</s>",), {"image_token": "<image>"})
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_VISION),
        text_config=LlamaConfig(**text_settings(tokenizer)),
        image_token_index=token_id(tokenizer, "<image>"),
        image_seq_length=(TILE // 14) ** 2,
        vision_feature_layer=-2,  # the last layer is never read, as in LLaVA-1.5
    )
    model = ending(LlavaForConditionalGeneration(config), tokenizer, tokenizer.eos_token_id)
    return model, LlavaProcessor(CLIPImageProcessor(**_CROPPED, **LOOK), tokenizer, **_VICUNA_PROMPT)


def llava_next() -> tuple[PreTrainedModel, ProcessorMixin]:
    """A nano LLaVA-NeXT: CLIP and Llama, with pages cut into tiles; model and processor."""
    tokenizer = host_tokenizer("</s>", ("</s>",), {"image_token": "<image>"})
    points = [[TILE, TILE], [TILE, 2 * TILE], [2 * TILE, TILE]]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**_VISION),
        text_config=LlamaConfig(**text_settings(tokenizer)),
        image_token_index=token_id(tokenizer, "<image>"),
        image_seq_length=(TILE // 14) ** 2,
        image_grid_pinpoints=points,
        vision_feature_layer=-2,
    )
    model = ending(LlavaNextForConditionalGeneration(config), tokenizer, tokenizer.eos_token_id)
    pages = LlavaNextImageProcessor(**_CROPPED, **LOOK, image_grid_pinpoints=points)
    return model, LlavaNextProcessor(pages, tokenizer, **_VICUNA_PROMPT)


def qwen2_5_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    """A nano Qwen2.5-VL: a tower with windows, and Qwen2; model and processor."""
    specials = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>")
    tokenizer = host_tokenizer("<|im_end|>", specials, {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"})
    text = text_settings(tokenizer)
    text["rope_parameters"] = {**text["rope_parameters"], "mrope_section": [2, 3, 3]}
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 3, "hidden_size": WIDTH, "intermediate_size": 172, "num_heads": 4, "out_hidden_size": WIDTH,
            "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1],
        },
        text_config=text,
        image_token_id=token_id(tokenizer, "<|image_pad|>"), video_token_id=token_id(tokenizer, "<|video_pad|>"),
        vision_start_token_id=token_id(tokenizer, "<|vision_start|>"),
        vision_end_token_id=token_id(tokenizer, "<|vision_end|>"),
    )  # fmt: skip
    ends = [token_id(tokenizer, "<|im_end|>"), token_id(tokenizer, "<|endoftext|>")]  # two, as the full-size host has
    model = ending(Qwen2_5_VLForConditionalGeneration(config), tokenizer, ends)
    size = {"shortest_edge": 56 * 56, "longest_edge": 140 * 140}
    return model, Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**LOOK, size=size),
        tokenizer,
        Qwen2VLVideoProcessor(**LOOK, size=size),
        chat_template=CHATML.replace("PICTURE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
