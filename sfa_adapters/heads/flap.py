"""The score of FLAP (Fluctuation-based Adaptive Structured Pruning, arXiv 2312.11983).

Heads whose output hardly varies go: their mean can stand for them, which is what `compensation="bias"` adds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sfa_adapters.errors import DataError, RecipeError
from sfa_adapters.heads.layers import HeadLayer, entering
from sfa_adapters.heads.measures import Measure

__all__ = ["FlapScore"]


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
            batch_moments = _moments(states.detach().flatten(0, -2))
            seen[name] = _joined(seen[name], batch_moments) if name in seen else batch_moments

        with entering(self.outputs, see):
            self.forward(batch, use_cache=False, logits_to_keep=1)
        unread = [name for name in self.layers if name not in seen]
        if unread:
            raise DataError(f"{unread[0]} did not run: give prompts with images, or choose other modules.")
        for name, batch_moments in seen.items():
            self.moments[name] = _joined(self.moments[name], batch_moments) if name in self.moments else batch_moments
        self.samples += len(ids)

    def scores(self) -> dict[str, list[float]]:
        """Means over the channels of a head."""
        layer_scores = {}
        for name, layer in self.layers.items():
            # A variance up to the number of tokens, which standardising takes out.
            channels = self.moments[name][2] * self.norms[name]
            spread = channels.std().clamp(min=torch.finfo(torch.float64).tiny)
            channels = (channels - channels.mean()) / spread
            layer_scores[name] = channels.view(layer.num_heads, layer.head_dim).mean(1).tolist()
        return layer_scores


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
