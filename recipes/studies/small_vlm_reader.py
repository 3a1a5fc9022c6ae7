"""`Reader`: the small VLM with its training and its evaluation, on a GPU where there is one."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sfa_adapters.eval_mode import evaluating
from sfa_adapters.recipes.nano.packing import IGNORE, right_answers
from sfa_adapters.recipes.studies.small_vlm import load_small_vlm
from sfa_adapters.recipes.studies.small_vlm_batches import Examples, Packer, batches
from sfa_adapters.recipes.studies.training import Stepper

__all__ = ["Reader"]


class Reader:
    """The small VLM in training, with fp32 weights.

    Args:
        size: Pixels of a side of the pictures.
        seed: Of the projector and of the order of pictures.

    Attributes:
        model: `InternVLForConditionalGeneration`.
        size: As given.
        device: Device of the model.

    Raises:
        WeightsError: A package with weights is missing.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # One process draws more slowly than a GPU trains; on a CPU drawing takes a small part of the time.
        self._workers = max(min(12, (os.cpu_count() or 1) - 2), 1) if self.device.type == "cuda" else 0
        self.size, self._seed = size, seed
        vlm = load_small_vlm(size, seed)
        self.model: Any = vlm.model.to(self.device)
        self.packer = Packer(vlm.processor, size, self.device)

    @property
    def projector(self) -> torch.nn.Module:
        """The projector, which is not pretrained."""
        return self.model.model.multi_modal_projector

    def learn(
        self,
        examples: Examples,
        groups: list[dict[str, Any]],
        batch: int,
        warmup: float,
        after_step: Callable[[int], None] | None = None,
    ) -> list[float]:
        """Trains on every picture once.

        Args:
            examples: Pictures with questions.
            groups: Parameter groups of the optimizer, each with a rate.
            batch: Pictures per step.
            warmup: Share of the steps in which the rates rise.
            after_step: Called with the number of the step; it may measure.

        Returns:
            The loss of each step.
        """
        steps = -(-len(examples) // batch)
        stepper, losses = Stepper(groups, steps, round(warmup * steps)), []
        self.model.train()
        for step, some in enumerate(batches(examples, batch, self._seed, self._workers), 1):
            inputs = self.packer(some)
            labels = inputs.pop("labels")[:, 1:]
            logits = self._logits(inputs)[:, :-1]
            loss = functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE)
            stepper.step(loss)
            losses.append(loss.detach())
            if after_step is not None:
                after_step(step)
        self.model.eval()
        return torch.stack(losses).tolist()

    def exact(self, examples: Examples, batch: int = 16) -> np.ndarray:
        """Share of right answers of each picture, by exact match of greedy answers.

        Args:
            examples: Pictures with questions.
            batch: Pictures per forward.
        """
        right = []
        with evaluating(self.model):
            for some in batches(examples, batch):
                inputs = self.packer(some)
                labels = inputs.pop("labels")
                right += right_answers(self._logits(inputs).argmax(-1).cpu(), labels.cpu(), self.packer.end)
        return np.array([answers.mean() for answers in right])

    def _logits(self, inputs: dict[str, Tensor]) -> Tensor:
        # bf16 on a GPU; a CPU without matrix units for it is slower in bf16 than in fp32.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.model(**inputs, use_cache=False).logits
