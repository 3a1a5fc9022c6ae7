"""The head score of FLAP (Fluctuation-based Adaptive Structured Pruning, arXiv 2312.11983).

Heads whose output hardly varies are removed: their mean can replace them, which `compensation="bias"` adds.
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
    """FLAP score: variance of the channels times the squared norm of their columns, standardised within a layer."""

    def __init__(self, model: nn.Module, layers: Mapping[str, HeadLayer], modules: str) -> None:
        super().__init__(model, layers)
        self.language = modules == "language"
        self.norms = {name: _column_norms(name, layer) for name, layer in layers.items()}
        # For each channel: number of tokens, their mean, sum of squared deviations.
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
        """Scores of the heads: means over their channels."""
        layer_scores = {}
        for name, layer in self.layers.items():
            # The variance times the number of tokens, a factor that the standardisation removes.
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
    """Moments of `[n, channels]`: n, means, sums of squared deviations."""
    tokens = tokens.float()
    mean = tokens.mean(0)
    return len(tokens), mean.double().cpu(), (tokens - mean).square().sum(0).double().cpu()


def _joined(one: tuple[int, Tensor, Tensor], two: tuple[int, Tensor, Tensor]) -> tuple[int, Tensor, Tensor]:
    """Combines the moments of two samples (Chan, Golub, LeVeque 1979)."""
    count, apart = one[0] + two[0], two[1] - one[1]
    mean = one[1] + apart * two[0] / count
    return count, mean, one[2] + two[2] + apart.square() * one[0] * two[0] / count
