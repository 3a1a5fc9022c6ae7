"""What each method of `calibrate_heads` takes from a batch, and the scores that come of it.

Nothing grows with the number of samples: a sum per head, or a mean and a variance per channel, in fp64 on the CPU.
A batch counts only when all of it went through, so that running out of memory half-way leaves no trace.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfa_adapters.analysis.dominance import text_queries
from sfa_adapters.analysis.prompts import IMAGE, TEXT, Aligned, TokenKinds, prompt_groups
from sfa_adapters.analysis.report import Skip, Skips
from sfa_adapters.attention_call import HIDDEN, AttentionCall, Rows
from sfa_adapters.errors import DataError, RecipeError
from sfa_adapters.heads.scores import HeadLayer
from sfa_adapters.observe import observe
from sfa_adapters.readers import Reader, fitted_to_keys

__all__ = ["FlapScore", "GateScore", "ImageMoments", "Measure", "S4Score"]

_IGNORE = -100  # the label that transformers leaves out of the loss


class ImageMoments(Reader):
    """Mean and variance of the attention over the image tokens, averaged over queries: `[B, H, 2]`.

    The variance of a row is the population variance over the image tokens that it sees. NaN for a prompt without query.

    Args:
        queries: Which rows, bool `[B, N]`.
        image: Which keys are image tokens, bool `[B, N]`.
    """

    def __init__(self, queries: Tensor, image: Tensor) -> None:
        super().__init__(queries)
        self.image = image

    def begin(self, call: AttentionCall) -> list[Tensor]:
        """Sums and counts."""
        return []

    def block(self, state: list[Tensor], call: AttentionCall, rows: Rows) -> None:
        """Adds sums and counts."""
        weights = self.row_weights(call, rows)[:, None]  # [1 or B, 1, R]
        seen = rows.logits > HIDDEN / 2
        seen = seen & fitted_to_keys(self.image, call, False)[:, None, None, : seen.shape[-1]]
        count = seen.sum(-1).clamp(min=1)
        mean = (rows.probabilities * seen).sum(-1) / count
        # From the deviations: the difference of two means of squares would lose all digits of small numbers.
        variance = ((rows.probabilities - mean[..., None]).square() * seen).sum(-1) / count
        found = [(torch.stack((mean, variance), -1) * weights[..., None]).sum(2), weights.sum(-1)[..., None]]
        state[:] = [old + new for old, new in zip(state, found, strict=True)] if state else found

    def end(self, state: list[Tensor], call: AttentionCall) -> Tensor:
        """Means; zero over zero is NaN."""
        return state[0] / state[1]


class Measure(ABC):
    """Sums of a method over samples.

    Attributes:
        samples: How many count.
        skipped: Those that do not.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, HeadLayer]) -> None:
        self.model, self.layers = model, layers
        self.samples, self.skipped = 0, Skips()

    @abstractmethod
    def take(self, batch: dict[str, Any], block_bytes: int) -> None:
        """Measures a batch; `block_bytes` as in `observe`."""

    @abstractmethod
    def scores(self) -> dict[str, list[float]]:
        """For each layer one number per head."""

    def skip(self, count: int, reason: str) -> None:
        """Counts samples that cannot be measured."""
        number = self.samples + len(self.skipped)
        self.skipped.extend(Skip(number + i, reason) for i in range(count))

    def forward(self, batch: Mapping[str, Any], **options: Any) -> Any:
        """Runs the model without labels; options that it does not know are left out."""
        model: Any = self.model
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        known = inspect.signature(inner.forward).parameters
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return model(**inputs, **{name: value for name, value in options.items() if name in known})


class _PerSample(Measure):
    """A mean over samples of one number per head."""

    def __init__(self, model: nn.Module, layers: Mapping[str, HeadLayer]) -> None:
        super().__init__(model, layers)
        self.sums = {n: torch.zeros(layer.num_heads, dtype=torch.float64) for n, layer in layers.items()}

    def add(self, found: Mapping[str, Tensor], reasons: list[str | None]) -> None:
        """Adds `[B, H]` of each layer for the samples without a reason against it."""
        good = torch.tensor([reason is None for reason in reasons])
        for name, values in found.items():
            self.sums[name] += values.double().cpu()[good].sum(0)
        for reason in reasons:
            if reason is None:
                self.samples += 1
            else:
                self.skip(1, reason)

    def scores(self) -> dict[str, list[float]]:
        """Means."""
        return {name: (values / self.samples).tolist() for name, values in self.sums.items()}


class S4Score(_PerSample):
    """Variance + gamma * mean of text-to-image attention."""

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
        found: dict[str, Tensor] = {}
        if None in reasons:
            moments = ImageMoments(asking, groups == IMAGE)
            with observe(self.model, [moments, Aligned(groups.shape[1])], list(self.layers), block_bytes):
                self.forward(batch, use_cache=False, logits_to_keep=1)
            for name in self.layers:
                mean, variance = moments.results[name][0].unbind(-1)
                found[name] = variance + self.gamma * mean
        self.add(found, reasons)


class GateScore(_PerSample):
    """|dL/dg| of a factor g = 1 on each head, at the input of the output projection; L is the mean over labels."""

    def __init__(self, model: nn.Module, layers: Mapping[str, HeadLayer], image_token_id: int | None) -> None:
        super().__init__(model, layers)
        self.image_token_id = image_token_id

    def take(self, batch: dict[str, Any], block_bytes: int) -> None:
        """One forward and one backward, which reaches the gates only."""
        labels, reasons = self._labels(batch)
        found: dict[str, Tensor] = {}
        if None in reasons:
            gates: dict[str, Tensor] = {}
            with torch.enable_grad(), _inputs(self.layers, lambda name, states: self._gated(gates, name, states)):
                logits = self.forward(batch, use_cache=False).logits[:, :-1].float()
                loss = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=_IGNORE, reduction="none")
                # A mean for each sample, and their sum: then no gradient depends on its neighbours in the batch.
                loss = (loss.sum(1) / (labels[:, 1:] != _IGNORE).sum(1).clamp(min=1)).sum()
                grads = torch.autograd.grad(loss, list(gates.values()))
            found = {name: grad.abs() for name, grad in zip(gates, grads, strict=True)}
            self._check(found, len(labels))
        self.add(found, reasons)

    def _check(self, found: Mapping[str, Tensor], batch: int) -> None:
        wrong = [n for n in self.layers if n not in found or len(found[n]) != batch]
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


class FlapScore(Measure):
    """Variance of the channels times the squared norm of their columns, standardised within a layer."""

    def __init__(self, model: nn.Module, layers: Mapping[str, HeadLayer], modules: str) -> None:
        super().__init__(model, layers)
        self.language = modules == "language"
        self.norms = {name: _column_norms(name, layer) for name, layer in layers.items()}
        # Of each channel: how many tokens, their mean, the sum of the squared deviations.
        self.moments: dict[str, tuple[int, Tensor, Tensor]] = {}

    def take(self, batch: dict[str, Any], block_bytes: int) -> None:
        """Reads one forward."""
        ids = batch["input_ids"]
        real = batch.get("attention_mask") if self.language else None
        seen: dict[str, tuple[int, Tensor, Tensor]] = {}

        def see(name: str, states: Tensor) -> None:
            if real is not None and states.shape[:2] == real.shape[:2]:
                states = states[real.bool()]
            found = _moments(states.detach().flatten(0, -2))
            seen[name] = _joined(seen[name], found) if name in seen else found

        with _inputs(self.layers, see):
            self.forward(batch, use_cache=False, logits_to_keep=1)
        unread = [name for name in self.layers if name not in seen]
        if unread:
            raise DataError(f"{unread[0]} did not run: give prompts with images, or choose other modules.")
        for name, found in seen.items():
            self.moments[name] = _joined(self.moments[name], found) if name in self.moments else found
        self.samples += len(ids)

    def scores(self) -> dict[str, list[float]]:
        """Means over the channels of a head."""
        found = {}
        for name, layer in self.layers.items():
            count, _, squares = self.moments[name]
            channels = squares / max(1, count - 1) * self.norms[name]
            spread = channels.std().clamp(min=torch.finfo(torch.float64).tiny)
            channels = (channels - channels.mean()) / spread
            found[name] = channels.view(layer.num_heads, layer.head_dim).mean(1).tolist()
        return found


def _unusable(groups: Tensor, asking: Tensor) -> list[str | None]:
    image, text = (groups == IMAGE).any(1).tolist(), asking.any(1).tolist()
    told: dict[tuple[bool, bool], str | None] = {(True, True): None, (True, False): "no text behind the image"}
    return [told.get(pair, "no image tokens") for pair in zip(image, text, strict=True)]


@contextmanager
def _inputs(layers: Mapping[str, HeadLayer], see: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """Shows what enters each output projection; what `see` gives back, if anything, enters instead."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
        def run(module: nn.Module, args: tuple[Any, ...]) -> Any:
            changed = see(name, args[0])
            return None if changed is None else (changed, *args[1:])

        return run

    handles = [layer.output.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _column_norms(name: str, layer: HeadLayer) -> Tensor:
    """Squared norm of each column of the output projection, fp64 on the CPU."""
    weight: Any = getattr(layer.output, "base_layer", layer.output).weight
    if weight.ndim != 2 or weight.shape[1] != layer.num_heads * layer.head_dim or not weight.is_floating_point():
        raise RecipeError(
            f"{name}: the output projection holds packed weights ({weight.dtype} {tuple(weight.shape)}), which have no "
            "columns. Load it unquantised for method='flap', or use 's4', which needs no weights."
        )
    return weight.detach().float().square().sum(0).double().cpu()


def _moments(tokens: Tensor) -> tuple[int, Tensor, Tensor]:
    """Of `[n, channels]`: n, means, sums of squared deviations."""
    tokens = tokens.float()
    mean = tokens.mean(0)
    return len(tokens), mean.double().cpu(), (tokens - mean).square().sum(0).double().cpu()


def _joined(one: tuple[int, Tensor, Tensor], two: tuple[int, Tensor, Tensor]) -> tuple[int, Tensor, Tensor]:
    """The moments of both together (Chan, Golub, LeVeque 1979)."""
    count, apart = one[0] + two[0], two[1] - one[1]
    mean = one[1] + apart * two[0] / count
    return count, mean, one[2] + two[2] + apart.square() * one[0] * two[0] / count
