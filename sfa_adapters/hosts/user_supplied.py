"""Loading of a model that the user names on the command line, and questions encoded by its processor."""

from __future__ import annotations

from typing import Any

import numpy as np

from sfa_adapters.errors import DataError
from sfa_adapters.vlm.thinking import without_thinking

__all__ = ["load_user_model", "user_prompt"]


def load_user_model(model: str, **options: Any) -> tuple[Any, Any]:
    """Loads a vision-language model, in eval mode, and its processor.

    Args:
        model: Hub id or folder.
        options: For `from_pretrained` of the model.

    Returns:
        Model and processor.

    Raises:
        DataError: It cannot be loaded, or its processor takes no images or no text.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from sfa_adapters.heads.metadata import pruned_folder

    if pruned_folder(model):
        raise DataError(
            f"--model {model} lost attention heads: its layers have shapes of their own, which from_pretrained "
            "does not build. sfa eval takes it; here, name the model that it was made of."
        )

    try:
        processor: Any = AutoProcessor.from_pretrained(model)
        host = AutoModelForImageTextToText.from_pretrained(model, **options).eval()
    except (OSError, ValueError) as error:
        raise DataError(f"--model {model} cannot be loaded: {str(error).splitlines()[0]}") from error
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        raise DataError(f"--model {model}: its processor is {type(processor).__name__}, without images or text.")
    return host, processor


def user_prompt(processor: Any, image: np.ndarray, question: str) -> dict[str, Any]:
    """Encodes a question about a page with the processor of a model, and its chat template if it has one.

    Args:
        processor: Of the model.
        image: The page, uint8 `[H, W, 3]`.
        question: The question.

    Returns:
        Inputs of the model's forward, as tensors.
    """
    from PIL import Image

    if processor.chat_template is None:
        text = f"{processor.image_token} {question}"
    else:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        turns, options = [{"role": "user", "content": content}], without_thinking(processor)
        text = processor.apply_chat_template(turns, add_generation_prompt=True, **options)
    return dict(processor(images=[Image.fromarray(image)], text=[text], return_tensors="pt"))
