"""Nano hosts whose tower takes images of any size as one sequence: a small model of each host's own classes.

All have random weights. Chat templates have the turns and the special tokens of the full-size hosts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import (
    Glm46VImageProcessor,
    Glm46VProcessor,
    Glm46VVideoProcessor,
    GlmOcrConfig,
    GlmOcrForConditionalGeneration,
    PaddleOCRVLConfig,
    PaddleOCRVLForConditionalGeneration,
    PaddleOCRVLImageProcessor,
    PaddleOCRVLProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLImageProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5Tokenizer,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from sfa_adapters.recipes.nano.hosts import LOOK, WIDTH, ending, text_settings
from sfa_adapters.recipes.nano.tokenizer import CHATML, CONTENT, host_tokenizer, token_id
from sfa_adapters.recipes.synthetic.questions import PHRASES

__all__ = ["glm_ocr", "paddleocr_vl", "qwen3_5", "qwen3_vl"]

_QWEN = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>")
_QWEN_NAMED = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"

# An answer follows an empty thought, unless thinking is asked for.
_THINKING = CHATML.replace(
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}",
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}<think>{{ '\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '\n' }}</think>{{ '\n\n' }}{% endif %}"
    "{% endif %}",
)
_GLM = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message['role'] }}|>{{ '\n' }}" + CONTENT + "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ '\n' }}{% endif %}"
)
_ERNIE = (
    "<|begin_of_sentence|>{% for message in messages %}{% if message['role'] == 'user' %}User: "
    + CONTENT
    + "{{ '\n' }}"
    "{% else %}Assistant:{{ '\n' }}" + CONTENT + "</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{{ '\n' }}{% endif %}"
)


def _mrope(tokenizer: PreTrainedTokenizerFast, interleaved: bool = False, **more: Any) -> dict[str, Any]:
    """Settings of a language model whose positions have three axes: time, row and column.

    Qwen3 mixes the channels of the axes. transformers does so whatever the configuration says; vLLM reads it there, and
    the full-size checkpoints have it.
    """
    settings = text_settings(tokenizer)
    rope = {**settings["rope_parameters"], "mrope_section": [4, 2, 2]}
    if interleaved:
        rope["mrope_interleaved"] = True
    return {**settings, "rope_parameters": rope, **more}


def _qwen_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    return {name: token_id(tokenizer, token) for name, token in names.items()}


def _qwen_processor(tokenizer: PreTrainedTokenizerFast, template: str) -> Qwen3VLProcessor:
    size = {"shortest_edge": 64 * 64, "longest_edge": 160 * 160}
    return Qwen3VLProcessor(
        Qwen2VLImageProcessor(**LOOK, size=size, patch_size=16),
        tokenizer,
        Qwen3VLVideoProcessor(**LOOK, size=size, patch_size=16),
        chat_template=template.replace("PICTURE", _PICTURE),
    )


def _qwen_vision(**more: Any) -> dict[str, Any]:
    return {
        "depth": 3, "hidden_size": WIDTH, "intermediate_size": 172, "num_heads": 4, "out_hidden_size": WIDTH,
        "num_position_embeddings": 64, **more,
    }  # fmt: skip


def qwen3_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    """A nano Qwen3-VL: the first layer of its tower is read as well, and input and output embeddings are one."""
    tokenizer = host_tokenizer("<|im_end|>", _QWEN, _QWEN_NAMED)
    config = Qwen3VLConfig(
        vision_config=_qwen_vision(deepstack_visual_indexes=[0]),
        text_config=_mrope(tokenizer, interleaved=True, tie_word_embeddings=True),
        tie_word_embeddings=True,
        **_qwen_ids(tokenizer),
    )
    ends = [token_id(tokenizer, "<|im_end|>"), token_id(tokenizer, "<|endoftext|>")]
    model = ending(Qwen3VLForConditionalGeneration(config), tokenizer, ends)
    return model, _qwen_processor(tokenizer, CHATML)


def _byte_tokenizer(end: str, specials: tuple[str, ...], named: Mapping[str, str]) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, of the class that transformers gives every checkpoint of Qwen3.5 whatever it was saved as.

    The fixed parts of the questions are one token each, as in `host_tokenizer`, whose arguments it has.
    """
    from tokenizers import AddedToken, pre_tokenizers

    symbols = ["<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Qwen3_5Tokenizer(
        vocab={symbol: number for number, symbol in enumerate(symbols)},
        pad_token=symbols[0],
        eos_token=end,
        extra_special_tokens=dict(named),
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    phrases: list[Any] = [AddedToken(phrase, normalized=False) for phrase in PHRASES if len(phrase) > 1]
    tokenizer.add_tokens(phrases)
    marks: list[Any] = [AddedToken(token, normalized=False, special=True) for token in specials]
    tokenizer.add_tokens(marks, special_tokens=True)
    return tokenizer


def qwen3_5() -> tuple[PreTrainedModel, ProcessorMixin]:
    """A nano Qwen3.5: of the layers of its language model one attends to all tokens; its template can think."""
    tokenizer = _byte_tokenizer("<|im_end|>", (*_QWEN, "<think>", "</think>"), _QWEN_NAMED)
    text = _mrope(tokenizer, interleaved=True, tie_word_embeddings=True)
    text |= {
        "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
        "linear_value_head_dim": 16, "rope_parameters": {**text["rope_parameters"], "partial_rotary_factor": 1.0},
    }  # fmt: skip
    config = Qwen3_5Config(
        vision_config=_qwen_vision(), text_config=text, tie_word_embeddings=True, **_qwen_ids(tokenizer)
    )
    ends = [token_id(tokenizer, "<|im_end|>"), token_id(tokenizer, "<|endoftext|>")]
    model = ending(Qwen3_5ForConditionalGeneration(config), tokenizer, ends)
    return model, _qwen_processor(tokenizer, _THINKING)


def glm_ocr() -> tuple[PreTrainedModel, ProcessorMixin]:
    """A nano GLM-OCR; its processor counts the pixels of both frames of a still image."""
    turns = ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>")
    pictures = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
    named = {"image_token": "<|image|>", "video_token": "<|video|>"}
    tokenizer = host_tokenizer("<|endoftext|>", (*turns, *pictures), named)
    ids = {"image_token_id": "<|image|>", "video_token_id": "<|video|>"}
    ids |= {"image_start_token_id": pictures[0], "image_end_token_id": pictures[1]}
    ids |= {"video_start_token_id": pictures[2], "video_end_token_id": pictures[3]}
    numbers: dict[str, Any] = {name: token_id(tokenizer, token) for name, token in ids.items()}
    config = GlmOcrConfig(
        vision_config={
            "depth": 3, "hidden_size": WIDTH, "intermediate_size": 172, "num_heads": 4, "out_hidden_size": WIDTH,
        },
        text_config=_mrope(tokenizer),
        **numbers,
    )  # fmt: skip
    ends = [token_id(tokenizer, "<|endoftext|>"), token_id(tokenizer, "<|user|>")]
    model = ending(GlmOcrForConditionalGeneration(config), tokenizer, ends)
    size = {"shortest_edge": 2 * 56 * 56, "longest_edge": 2 * 140 * 140}
    return model, Glm46VProcessor(
        Glm46VImageProcessor(**LOOK, size=size),
        tokenizer,
        Glm46VVideoProcessor(**LOOK, size=size),
        chat_template=_GLM.replace("PICTURE", "<|begin_of_image|><|image|><|end_of_image|>"),
    )


def paddleocr_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    """A nano PaddleOCR-VL: patches stay in rows until the projector joins four of them."""
    specials = ("<|begin_of_sentence|>", "<|IMAGE_START|>", "<|IMAGE_END|>", "<|video_pad|>")
    tokenizer = host_tokenizer("</s>", ("</s>", *specials), {"image_token": "<|IMAGE_PLACEHOLDER|>"})
    config = PaddleOCRVLConfig(
        vision_config={
            "hidden_size": WIDTH, "intermediate_size": 172, "num_hidden_layers": 3, "num_attention_heads": 4,
            "image_size": 112, "patch_size": 14,
        },
        text_config=_mrope(tokenizer),
        image_token_id=token_id(tokenizer, "<|IMAGE_PLACEHOLDER|>"),
        video_token_id=token_id(tokenizer, "<|video_pad|>"),
        vision_start_token_id=token_id(tokenizer, "<|IMAGE_START|>"),
        vision_end_token_id=token_id(tokenizer, "<|IMAGE_END|>"),
        tie_word_embeddings=False,
    )  # fmt: skip
    model = ending(PaddleOCRVLForConditionalGeneration(config), tokenizer, tokenizer.eos_token_id)
    return model, PaddleOCRVLProcessor(
        PaddleOCRVLImageProcessor(**LOOK, size={"shortest_edge": 56 * 56, "longest_edge": 140 * 140}),
        tokenizer,
        chat_template=_ERNIE.replace("PICTURE", "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"),
    )
