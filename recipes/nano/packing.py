"""Packs several questions about one picture into one sequence: each attends to the picture and to itself only.

Questions have the positions that they would have alone, so training matches inference, and the tower runs once for all
of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

__all__ = ["IGNORE", "pack", "right_answers"]

IGNORE = -100  # the label that transformers leaves out of the loss
Tokens = Sequence[int]


def pack(prefix: Tokens, questions: Sequence[Sequence[tuple[Tokens, Tokens]]], padding: int) -> dict[str, Tensor]:
    """Packs questions after the tokens of a picture.

    Args:
        prefix: Tokens of a picture and of the text around it, the same for all.
        questions: For each picture, pairs of the tokens of a question and those of its answer with an end token.
        padding: Token on the right of shorter sequences.

    Returns:
        `input_ids`, `labels` (`IGNORE` but on answers) and `position_ids` `[batch, length]`, and an additive
        `attention_mask` `[batch, 1, length, length]`, fp32.
    """
    start = len(prefix)
    rows: dict[str, list[Tensor]] = {"input_ids": [], "labels": [], "position_ids": [], "segment": []}
    for pairs in questions:
        ids, labels = list(prefix), [IGNORE] * start
        positions, segment = list(range(start)), [0] * start
        for number, (prompt, target) in enumerate(pairs, 1):
            ids += [*prompt, *target]
            labels += [*[IGNORE] * len(prompt), *target]
            positions += range(start, start + len(prompt) + len(target))
            segment += [number] * (len(prompt) + len(target))
        for key, value in zip(rows, (ids, labels, positions, segment), strict=True):
            rows[key].append(torch.tensor(value))
    blank = {"input_ids": padding, "labels": IGNORE, "position_ids": 0, "segment": -1}
    pad = torch.nn.utils.rnn.pad_sequence
    batch = {k: pad(v, batch_first=True, padding_value=blank[k]) for k, v in rows.items()}
    segment = batch.pop("segment")
    length = segment.shape[1]
    same = (segment[:, :, None] == segment[:, None, :]) | (segment == 0)[:, None, :]
    seen = same & torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)
    return {**batch, "attention_mask": mask[:, None]}


def right_answers(guesses: Tensor, labels: Tensor, end: int) -> list[np.ndarray]:
    """Whether greedy decoding would give exactly the true answers of a packed batch.

    It gives the true answer, and then stops, if and only if each of its tokens, the end token included, is the most
    likely one after the tokens before it.

    Args:
        guesses: The most likely next token at each place, `[batch, length]`.
        labels: As `pack` gives them.
        end: The token that ends an answer.

    Returns:
        For each picture, 1.0 or 0.0 per question, fp64.
    """
    return [_of_picture(guess[:-1], label[1:], end) for guess, label in zip(guesses, labels, strict=True)]


def _of_picture(guess: Tensor, label: Tensor, end: int) -> np.ndarray:
    good = (guess == label) | (label == IGNORE)
    ends = [-1, *(label == end).nonzero().flatten().tolist()]
    return np.array([float(good[before + 1 : last + 1].all()) for before, last in pairwise(ends)])
