"""Encodes pictures, questions and answers as the inputs of a nano host.

A prompt is the image tokens, the question and a line break; the answer and an end token follow.

`encode_packed` puts many questions about one picture into one sequence, see `packing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sfa_adapters.recipes.nano.models import NanoHost
from sfa_adapters.recipes.nano.packing import IGNORE, pack
from sfa_adapters.recipes.nano.tokenizer import EOS, IMAGE, PAD, VIDEO, nano_tokenizer

__all__ = ["EOS", "IGNORE", "IMAGE", "PAD", "VIDEO", "encode", "encode_packed", "nano_tokenizer", "pixel_values"]

if TYPE_CHECKING:  # Pillow is not among the dependencies of the library itself
    from PIL import Image

Picture: TypeAlias = "np.ndarray | Image.Image"


def _ids(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    # A question may hold the text "<image>"; it must not become an image token.
    return list(tokenizer([t.replace("<", "(") for t in texts], add_special_tokens=False)["input_ids"])  # pyright: ignore[reportReturnType]


def pixel_values(images: Sequence[Picture], pixels: int) -> Tensor:
    """Pictures as float32 [B, 3, pixels, pixels] in -2..0; pictures of another size are resized.

    White is 0: most of a chart is white, and a small tower learns faster when white patches are zero.

    Args:
        images: uint8 arrays [H, W, 3] or PIL images.
        pixels: side of the square that the tower takes.

    Returns:
        The batch.
    """
    arrays = []
    for image in images:
        picture = image if isinstance(image, np.ndarray) else np.asarray(image.convert("RGB"))
        if picture.shape[:2] != (pixels, pixels):
            from PIL import Image

            picture = np.asarray(Image.fromarray(picture).resize((pixels, pixels), Image.Resampling.BICUBIC))
        arrays.append(picture)
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).to(torch.float32).sub_(255).div_(127.5).contiguous()


def _picture_inputs(host: NanoHost, images: Sequence[Picture]) -> dict[str, Tensor]:
    inputs = {"pixel_values": pixel_values(images, host.pixels)}
    if host.name == "llava_onevision":
        inputs["image_sizes"] = torch.full((len(images), 2), host.pixels)
    return inputs


def encode(
    host: NanoHost, images: Sequence[Picture], questions: Sequence[str], answers: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Encodes one question per picture, as keyword arguments of the model or of its `generate`.

    Args:
        host: the host that gets them.
        images: B pictures.
        questions: B questions.
        answers: B answers for training. Sequences are then padded on the right and carry `labels` [B, L] with -100 on
            everything but the answers. Without answers they are prompts, padded on the left for `generate`.

    Returns:
        `input_ids` and `attention_mask` [B, L], `pixel_values`, other inputs of the host, and `labels`.
    """
    rows, targets = [], []
    question_ids = _ids(host.tokenizer, [f"{q}\n" for q in questions])
    answered = [[]] * len(question_ids) if answers is None else [[*ids, EOS] for ids in _ids(host.tokenizer, answers)]
    for ids, answer in zip(question_ids, answered, strict=True):
        prompt = [IMAGE] * host.image_tokens + ids
        rows.append(torch.tensor(prompt + answer))
        targets.append(torch.tensor([IGNORE] * len(prompt) + answer))
    pad = torch.nn.utils.rnn.pad_sequence
    side = "left" if answers is None else "right"
    batch = _picture_inputs(host, images)
    batch["input_ids"] = pad(rows, batch_first=True, padding_value=PAD, padding_side=side)
    ones = [torch.ones_like(row) for row in rows]
    batch["attention_mask"] = pad(ones, batch_first=True, padding_value=0, padding_side=side)
    if answers is not None:
        batch["labels"] = pad(targets, batch_first=True, padding_value=IGNORE, padding_side=side)
    return batch


def encode_packed(
    host: NanoHost, images: Sequence[Picture], questions: Sequence[Sequence[tuple[str, str]]]
) -> dict[str, Any]:
    """Encodes several questions per picture in one sequence, for training.

    Args:
        host: the host that gets them.
        images: B pictures.
        questions: for each picture, its (question, answer) pairs. They cannot see each other.

    Returns:
        `input_ids`, `labels` and `position_ids` [B, L], an additive `attention_mask` [B, 1, L, L], `pixel_values`, and
        other inputs of the host.
    """
    questioned = iter(_ids(host.tokenizer, [f"{q}\n" for pairs in questions for q, _ in pairs]))
    answered = iter(_ids(host.tokenizer, [a for pairs in questions for _, a in pairs]))
    tokens = [[(next(questioned), [*next(answered), EOS]) for _ in pairs] for pairs in questions]
    return {**_picture_inputs(host, images), **pack([IMAGE] * host.image_tokens, tokens, PAD)}
