"""Common parts of several studies: a step of the optimizer, and the score of a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from sfa_adapters.rates import SFA_GROUP

__all__ = ["NONE", "Stepper", "picture_scores"]

NONE = -100  # target of a place without a question, which cross_entropy ignores


class Stepper:
    """AdamW with warm-up, a cosine schedule, and gradient clipping.

    Args:
        groups: Parameter groups; the one with the name `SFA_GROUP` is not clipped, because its gradients have another
            scale than those of weights.
        steps: Steps of the run.
        warmup: Steps in which the rates rise.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], steps: int, warmup: int) -> None:
        groups = [group for group in groups if group["params"]]
        self.weights = [p for group in groups if group.get("name") != SFA_GROUP for p in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, warmup, steps)

    def step(self, loss: Tensor) -> None:
        """Runs the backward pass and one step.

        Args:
            loss: A scalar.
        """
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()


def picture_scores(answers: Tensor, targets: Tensor) -> np.ndarray:
    """Share of right answers of each picture, fp64, `[pictures]`.

    Args:
        answers: `[pictures, ...]`.
        targets: The same shape, `NONE` where there is no question; every picture has one.
    """
    questions = (targets != NONE).flatten(1).sum(1)
    right = (answers == targets).flatten(1).sum(1)  # no answer is NONE
    return (right.double() / questions).numpy()
