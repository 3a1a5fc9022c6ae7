"""The measurements of `calibrate_heads`: what each method accumulates from batches, and its scores.

Memory does not grow with the number of samples: a sum per head, or a mean and a variance per channel, in fp64 on the
CPU. A batch is added only when it was measured completely, so running out of memory half-way has no effect.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfa_adapters.analysis.dominance import text_queries
from sfa_adapters.analysis.prompts import IMAGE, TEXT, Aligned, TokenKinds, prompt_groups
from sfa_adapters.analysis.report import Skip, Skips
from sfa_adapters.errors import DataError, RecipeError
from sfa_adapters.heads.image_moments import ImageMoments
from sfa_adapters.heads.layers import HeadLayer, entering
from sfa_adapters.observe import observe
from sfa_adapters.vlm.parts import forward_names

__all__ = ["GateScore", "Measure", "S4Score"]

_IGNORE = -100  # the label that transformers leaves out of the loss


class Measure(ABC):
    """Base of the methods: accumulates a measurement over samples.

    Attributes:
        samples: Number of measured samples.
        skipped: Samples that were not measured.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, HeadLayer]) -> None:
        self.model, self.layers = model, layers
        self.outputs = {name: layer.output for name, layer in layers.items()}
        self.samples, self.skipped = 0, Skips()

    @abstractmethod
    def take(self, batch: dict[str, Any], block_bytes: int) -> None:
        """Measures a batch and adds it; `block_bytes` as in `observe`."""

    @abstractmethod
    def scores(self) -> dict[str, list[float]]:
        """The scores: for each layer one number per head."""

    def skip(self, count: int, reason: str) -> None:
        """Counts samples that cannot be measured."""
        number = self.samples + len(self.skipped)
        self.skipped.extend(Skip(number + i, reason) for i in range(count))

    def forward(self, batch: Mapping[str, Any], **options: Any) -> Any:
        """Runs the model without labels, with those options that its forward accepts."""
        model: Any = self.model
        known = forward_names(model)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return model(**inputs, **{name: value for name, value in options.items() if name in known})


class _PerSample(Measure):
    """Base of methods whose score is a mean over samples of one number per head."""

    def __init__(self, model: nn.Module, layers: Mapping[str, HeadLayer]) -> None:
        super().__init__(model, layers)
        self.sums = {n: torch.zeros(layer.num_heads, dtype=torch.float64) for n, layer in layers.items()}

    def add(self, batch_values: Mapping[str, Tensor], reasons: list[str | None]) -> None:
        """Adds the values `[B, H]` of each layer for the samples without a reason to skip them."""
        good = torch.tensor([reason is None for reason in reasons])
        for name, values in batch_values.items():
            self.sums[name] += values.double().cpu()[good].sum(0)
        for reason in reasons:
            if reason is None:
                self.samples += 1
            else:
                self.skip(1, reason)

    def scores(self) -> dict[str, list[float]]:
        """The means over samples."""
        return {name: (values / self.samples).tolist() for name, values in self.sums.items()}


class S4Score(_PerSample):
    """S4 score: variance + gamma * mean of the attention from text to image tokens."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, HeadLayer],
        gamma: float,
        image_token_id: int | None,
        modules: str,
    ) -> None:
        if modules != "language":
            raise RecipeError("method='s4' reads attention from text to image; a tower has no text. Use 'flap' there.")
        super().__init__(model, layers)
        self.gamma = gamma
        self.kinds = TokenKinds.of(model, image_token_id, True, True, None, None)

    def take(self, batch: dict[str, Any], block_bytes: int) -> None:
        """Reads one forward."""
        groups = prompt_groups(batch, self.kinds, self.samples + len(self.skipped))
        asking = text_queries(groups) == TEXT
        reasons = _unusable(groups, asking)
        scores: dict[str, Tensor] = {}
        if None in reasons:
            moments = ImageMoments(asking, groups == IMAGE)
            with observe(self.model, [moments, Aligned(groups.shape[1])], list(self.layers), block_bytes):
                self.forward(batch, use_cache=False, logits_to_keep=1)
            for name in self.layers:
                mean, variance = moments.results[name][0].unbind(-1)
                scores[name] = variance + self.gamma * mean
        self.add(scores, reasons)


class GateScore(_PerSample):
    """Gate score: |dL/dg| of a factor g = 1 on each head before the output projection; L is the mean over labels."""

    def __init__(self, model: nn.Module, layers: Mapping[str, HeadLayer], image_token_id: int | None) -> None:
        super().__init__(model, layers)
        self.image_token_id = image_token_id

    def take(self, batch: dict[str, Any], block_bytes: int) -> None:
        """Runs one forward and one backward, in which only the gates get gradients."""
        labels, reasons = self._labels(batch)
        scores: dict[str, Tensor] = {}
        if None in reasons:
            gates: dict[str, Tensor] = {}
            with torch.enable_grad(), entering(self.outputs, lambda name, states: self._gated(gates, name, states)):
                logits = self.forward(batch, use_cache=False).logits[:, :-1].float()
                loss = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=_IGNORE, reduction="none")
                # A mean for each sample, then the sum, so that no gradient depends on other samples of the batch.
                loss = (loss.sum(1) / (labels[:, 1:] != _IGNORE).sum(1).clamp(min=1)).sum()
                grads = torch.autograd.grad(loss, list(gates.values()))
            scores = {name: grad.abs() for name, grad in zip(gates, grads, strict=True)}
            self._check(scores, len(labels))
        self.add(scores, reasons)

    def _check(self, scores: Mapping[str, Tensor], batch: int) -> None:
        wrong = [n for n in self.layers if n not in scores or len(scores[n]) != batch]
        if wrong:
            raise RecipeError(
                f"method='gate': {wrong[0]} did not run once with one row per prompt, so gradients cannot be told "
                "apart by prompt. Use 'flap' here."
            )

    def _gated(self, gates: dict[str, Tensor], name: str, states: Tensor) -> Tensor:
        layer = self.layers[name]
        gate = torch.ones(states.shape[0], layer.num_heads, device=states.device, dtype=torch.float32)
        gates[name] = gate.requires_grad_()
        heads = states.unflatten(-1, (layer.num_heads, layer.head_dim))
        shape = (len(gate), *[1] * (heads.ndim - 3), layer.num_heads, 1)
        return (heads * gate.view(shape).to(states.dtype)).flatten(-2)

    def _labels(self, batch: Mapping[str, Any]) -> tuple[Tensor, list[str | None]]:
        ids, labels = batch["input_ids"], batch.get("labels")
        if labels is None:
            kinds = TokenKinds.of(self.model, self.image_token_id, True, True, None, None)
            groups = prompt_groups(batch, kinds, self.samples + len(self.skipped))
            asking = text_queries(groups) == TEXT
            return ids.masked_fill(~asking, _IGNORE), _unusable(groups, asking)
        if not isinstance(labels, Tensor) or labels.shape != ids.shape:
            raise DataError(
                f"labels must be {tuple(ids.shape)} as input_ids are; got {getattr(labels, 'shape', None)}."
            )
        there = (labels[:, 1:] != _IGNORE).any(1).tolist()
        return labels, [None if has else "no label" for has in there]


def _unusable(groups: Tensor, asking: Tensor) -> list[str | None]:
    image, text = (groups == IMAGE).any(1).tolist(), asking.any(1).tolist()
    reasons: dict[tuple[bool, bool], str | None] = {(True, True): None, (True, False): "no text behind the image"}
    return [reasons.get(pair, "no image tokens") for pair in zip(image, text, strict=True)]
