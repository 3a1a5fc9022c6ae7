"""Compares the features of the baked tower with those of the adapted one, before an export writes anything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sfa_adapters.bias import BiasFactors
from sfa_adapters.errors import BiasNotAppliedError
from sfa_adapters.eval_mode import evaluating
from sfa_adapters.layer import SFALayer
from sfa_adapters.sharing import baked
from sfa_adapters.tower_search import FoundTower

__all__ = ["difference_of"]

Layers = Sequence[tuple[str, nn.Module, SFALayer]]

# Largest difference between the two towers, relative to the largest feature: rounding only.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
HALF_TOLERANCE = 5e-2


def difference_of(
    located: FoundTower,
    layers: Layers,
    factors: Sequence[BiasFactors],
    size: tuple[int, int],
) -> float:
    """Largest difference of the features of a random image between the adapted tower and the baked one.

    Args:
        located: The tower.
        layers: Name, attention module and SFA layer of each layer with a bias.
        factors: Bias of each of these layers.
        size: Height and width of the image, in pixels.

    Raises:
        BiasNotAppliedError: It is more than rounding.
    """
    tower: Any = located.tower
    like = next(tower.parameters())
    channels = int(getattr(tower.config, "num_channels", 3))
    # With a separate generator: an export must not change the random numbers of a running training.
    image = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
    with evaluating(tower):
        adapted = tower(pixel_values=image).last_hidden_state
        with _baked(layers, factors, like.dtype):
            baked_features = tower(pixel_values=image).last_hidden_state
    difference = float((adapted.double() - baked_features.double()).abs().max())
    largest = max(float(adapted.double().abs().max()), 1.0)
    if not difference <= TOLERANCE.get(like.dtype, HALF_TOLERANCE) * largest:
        raise BiasNotAppliedError(
            f"The baked tower differs from the adapted one by {difference:g} (largest feature {largest:g}); nothing "
            "was written. Something else than SFA acts in its attention layers."
        )
    return difference


@contextmanager
def _baked(layers: Layers, factors: Sequence[BiasFactors], dtype: torch.dtype) -> Iterator[None]:
    """Switches the adapters off and attaches their bias as buffers, as the loader does."""
    states = [(layer, layer._disable_adapters) for _, _, layer in layers]
    attached: list[nn.Module] = []
    try:
        for (name, attention, layer), bias in zip(layers, factors, strict=True):
            layer._disable_adapters = True
            baked.attach_bias(
                attention, bias.dense()[0].to(dtype), layer.state.backbone.argument_of(attention).name, name
            )
            attached.append(attention)
        yield
    finally:
        for attention in attached:
            baked.detach_bias(attention)
        for layer, off in states:
            layer._disable_adapters = off
