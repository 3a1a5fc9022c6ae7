"""Exact match of greedy answers without generating them: every token of the true answer must be the argmax.

One forward over packed questions is enough for all questions, see `packing.right_answers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sfa_adapters.eval_mode import evaluating
from sfa_adapters.recipes.nano.encode import EOS, Picture, encode_packed
from sfa_adapters.recipes.nano.packing import right_answers
from sfa_adapters.recipes.synthetic.questions import Question

if TYPE_CHECKING:
    from sfa_adapters.recipes.nano.models import NanoHost

__all__ = ["exact_matches"]


def exact_matches(
    host: NanoHost, images: Sequence[Picture], questions: Sequence[Sequence[Question]], batch_size: int = 16
) -> list[np.ndarray]:
    """Whether the greedy answer to each question is exactly the true one.

    Args:
        host: The model; it is in eval mode for the time of the call.
        images: N pictures.
        questions: For each, at least one question.
        batch_size: Pictures per forward.

    Returns:
        For each picture, 1.0 or 0.0 per question, fp64.
    """
    right = []
    with evaluating(host.model):
        for start in range(0, len(images), batch_size):
            some = slice(start, start + batch_size)
            pairs = [[(question.text, question.answer) for question in each] for each in questions[some]]
            batch = encode_packed(host, images[some], pairs)
            labels = batch.pop("labels")
            guesses = host.model(**batch, use_cache=False).logits.argmax(-1)
            right += right_answers(guesses, labels, EOS)
    return right
