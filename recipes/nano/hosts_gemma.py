"""Nano Gemma 3 and Gemma 4, with random weights.

Gemma 3 sees a page as one picture and, with pan and scan, in crops. Gemma 4 takes pages of any aspect, as padded rows
of patches that bring their places; its language model has embeddings for each layer, and layers that reuse keys.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma3TextConfig,
    Gemma4AudioConfig,
    Gemma4AudioFeatureExtractor,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4TextConfig,
    Gemma4VideoProcessor,
    Gemma4VisionConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    SiglipVisionConfig,
)

from sfa_adapters.recipes.nano.hosts import TILE, WIDTH, ending, text_settings, vision_settings
from sfa_adapters.recipes.nano.tokenizer import CONTENT, host_tokenizer, token_id

__all__ = ["gemma3", "gemma4"]

TOKENS = 16  # image tokens of a picture of Gemma 3: 4 x 4, each the mean of 2 x 2 patches
SOFT = 70  # the fewest that the image processor of Gemma 4 can be set to
_TURNS = (
    "<bos>{% for message in messages %}START{{ 'model' if message['role'] == 'assistant' else message['role'] }}"
    "{{ '\n' }}" + CONTENT + "STOP{{ '\n' }}{% endfor %}{% if add_generation_prompt %}STARTmodel{{ '\n' }}{% endif %}"
)


def _template(start: str, stop: str, picture: str) -> str:
    return _TURNS.replace("START", start).replace("STOP", stop).replace("PICTURE", picture)


def _text(tokenizer: PreTrainedTokenizerFast, kinds: list[str]) -> dict[str, Any]:
    """Layers that see a window of tokens, and layers that see all."""
    settings = {**text_settings(tokenizer), "num_hidden_layers": len(kinds), "layer_types": kinds, "sliding_window": 64}
    settings.pop("rope_parameters")  # one for each kind of layer; the defaults of the class
    return settings


def gemma3() -> tuple[PreTrainedModel, ProcessorMixin]:
    """A nano Gemma 3: SigLIP, means of patches, and Gemma; model and processor."""
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = host_tokenizer("<end_of_turn>", ("<bos>", "<start_of_turn>", "<end_of_turn>"), named)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**vision_settings(), vision_use_head=False),
        text_config=Gemma3TextConfig(**_text(tokenizer, kinds), query_pre_attn_scalar=WIDTH // 4),
        mm_tokens_per_image=TOKENS,
        boi_token_index=token_id(tokenizer, named["boi_token"]),
        eoi_token_index=token_id(tokenizer, named["eoi_token"]),
        image_token_index=token_id(tokenizer, named["image_token"]),
        tie_word_embeddings=False,
    )
    model = ending(Gemma3ForConditionalGeneration(config), tokenizer, tokenizer.eos_token_id)
    # The class starts it at 0, and no image would count.
    torch.nn.init.normal_(
        model.get_parameter("model.multi_modal_projector.mm_input_projection_weight"), std=WIDTH**-0.5
    )
    return model, Gemma3Processor(
        Gemma3ImageProcessor(size={"height": TILE, "width": TILE}, pan_and_scan_min_crop_size=28),
        tokenizer,
        image_seq_length=TOKENS,
        chat_template=_template("<start_of_turn>", "<end_of_turn>", named["boi_token"]),
    )


def gemma4() -> tuple[PreTrainedModel, ProcessorMixin]:
    """A nano Gemma 4 with a tower for audio, which images never reach; model and processor."""
    named = {
        "boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>",
        "boa_token": "<|audio>", "eoa_token": "<audio|>", "audio_token": "<|audio|>",
    }  # fmt: skip
    tokenizer = host_tokenizer("<turn|>", ("<bos>", "<|turn>", "<turn|>", "<|video|>"), named)
    kinds = ["sliding_attention", "full_attention"] * 2
    text = _text(tokenizer, kinds) | {
        "num_key_value_heads": 1, "global_head_dim": WIDTH // 2, "num_kv_shared_layers": 2, "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": len(tokenizer), "final_logit_softcapping": 30.0,
    }  # fmt: skip
    config = Gemma4Config(
        vision_config=Gemma4VisionConfig(
            hidden_size=WIDTH, intermediate_size=172, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
            head_dim=WIDTH // 4, patch_size=4, position_embedding_size=256,
        ),
        text_config=Gemma4TextConfig(**text),
        audio_config=Gemma4AudioConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, subsampling_conv_channels=[8, 4],
            output_proj_dims=48,
        ),
        boi_token_id=token_id(tokenizer, named["boi_token"]), eoi_token_id=token_id(tokenizer, named["eoi_token"]),
        image_token_id=token_id(tokenizer, named["image_token"]), video_token_id=token_id(tokenizer, "<|video|>"),
        boa_token_id=token_id(tokenizer, named["boa_token"]), eoa_token_index=token_id(tokenizer, named["eoa_token"]),
        audio_token_id=token_id(tokenizer, named["audio_token"]),
        tie_word_embeddings=False,
    )  # fmt: skip
    model = ending(Gemma4ForConditionalGeneration(config), tokenizer, tokenizer.eos_token_id)
    look: dict[str, Any] = {"patch_size": 4, "max_soft_tokens": SOFT, "pooling_kernel_size": 3}
    return model, Gemma4Processor(
        Gemma4AudioFeatureExtractor(),
        Gemma4ImageProcessor(**look),
        tokenizer,
        Gemma4VideoProcessor(**look),
        image_seq_length=SOFT,
        chat_template=_template("<|turn>", "<turn|>", named["image_token"]),
    )
