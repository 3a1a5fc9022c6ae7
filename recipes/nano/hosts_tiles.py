"""Nano hosts that cut a page into tiles with a tag before each: SmolVLM, and Idefics3 as Granite-Docling has it.

Both have random weights. Tiles are 112 pixels, and a tile becomes 2 x 2 image tokens.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from sfa_adapters.errors import RecipeError
from sfa_adapters.install import install_command
from sfa_adapters.recipes.nano.hosts import TILE, ending, text_settings, vision_settings
from sfa_adapters.recipes.nano.tokenizer import CONTENT, host_tokenizer, token_id

__all__ = ["idefics3", "smolvlm"]

SIDE = 4  # patches along the side of an image token, as in the small checkpoints
MOST = 2  # tiles along the longer side of a page
END = "<end_of_utterance>"
# The turns of SmolVLM: one token at the start of the text, and the roles with a capital letter.
SMOL = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
    + CONTENT.replace("PICTURE", "<image>")
    + END
    + "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
# Those of Granite-Docling.
GRANITE = (
    "{% for message in messages %}<|start_of_role|>{{ message['role'] }}<|end_of_role|>"
    + CONTENT.replace("PICTURE", "<image>")
    + "<|end_of_text|>{{ '\n' }}{% endfor %}"
    + "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)


def _tokenizer(end: str, specials: tuple[str, ...]) -> PreTrainedTokenizerFast:
    places = [f"<row_{row}_col_{column}>" for row in range(1, MOST + 1) for column in range(1, MOST + 1)]
    tags = ("<fake_token_around_image>", "<global-img>", *places)
    return host_tokenizer(end, (end, END, *specials, *tags), {"image_token": "<image>"})


def _settings(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vision_config": vision_settings(),
        "text_config": LlamaConfig(**text_settings(tokenizer)),
        "image_token_id": token_id(tokenizer, "<image>"),
        "scale_factor": SIDE,
        "tie_word_embeddings": False,
    }


def _look() -> dict[str, Any]:
    sizes: dict[str, Any] = {"size": {"longest_edge": MOST * TILE}, "max_image_size": {"longest_edge": TILE}}
    return {**sizes, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def smolvlm() -> tuple[PreTrainedModel, ProcessorMixin]:
    """A nano SmolVLM: SigLIP, pixel shuffle of 4 x 4 patches and Llama; model and processor.

    Raises:
        RecipeError: `num2words` is missing, without which transformers makes no processor of SmolVLM.
    """
    tokenizer = _tokenizer(END, ("<|im_start|>",))
    model = ending(
        SmolVLMForConditionalGeneration(SmolVLMConfig(**_settings(tokenizer))), tokenizer, tokenizer.eos_token_id
    )
    try:
        processor = SmolVLMProcessor(
            SmolVLMImageProcessor(**_look()),
            tokenizer,
            SmolVLMVideoProcessor(**_look()),
            image_seq_len=(TILE // 14 // SIDE) ** 2,
            chat_template=SMOL,
        )
    except ImportError as error:
        raise RecipeError(f"The processor of SmolVLM needs num2words: {install_command('recipes')}.") from error
    return model, processor


def idefics3() -> tuple[PreTrainedModel, ProcessorMixin]:
    """A nano Idefics3 with the template of Granite-Docling; model and processor."""
    tokenizer = _tokenizer("<|end_of_text|>", ("<|start_of_role|>", "<|end_of_role|>"))
    model = ending(
        Idefics3ForConditionalGeneration(Idefics3Config(**_settings(tokenizer))), tokenizer, tokenizer.eos_token_id
    )
    return model, Idefics3Processor(
        Idefics3ImageProcessor(**_look()),
        tokenizer,
        image_seq_len=(TILE // 14 // SIDE) ** 2,
        chat_template=GRANITE,
    )
