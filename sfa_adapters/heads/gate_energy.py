"""Importance of each head of a tower for its output, without labels: the diagonal of J^T J over head gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sfa_adapters.errors import ObservationError
from sfa_adapters.heads.layers import entering, head_layer
from sfa_adapters.tower_search import FoundTower

__all__ = ["gate_energy"]


def gate_energy(
    vision: FoundTower, pages: Sequence[Mapping[str, Any]], layers: Sequence[int], projections: int, seed: int
) -> dict[int, Tensor]:
    """Estimates sum |d output / d g|^2 for a factor g = 1 on each head before its output projection.

    For a random v with independent entries of variance 1, E (d <v, output> / d g)^2 is that sum, so a few v per page
    estimate it. No parameter gets a gradient.

    Args:
        vision: The tower, in eval mode.
        pages: Keyword arguments of its forward.
        layers: Numbers of attention layers.
        projections: Random v per page.
        seed: Seed of v.

    Returns:
        By layer `[heads]`, fp64: the mean over v of the sum over pages.

    Raises:
        RecipeError: An attention module has no output projection that is known.
        ObservationError: An output projection did not run once, or the tower gives no tensor with gradients.
    """
    heads = {str(layer): head_layer(*vision.attentions[layer]) for layer in layers}
    outputs = {name: layer.output for name, layer in heads.items()}
    energy = {layer: torch.zeros(heads[str(layer)].num_heads, dtype=torch.float64) for layer in layers}
    generator = torch.Generator().manual_seed(seed)
    for page in pages:
        gates: dict[str, Tensor] = {}

        def gated(name: str, states: Tensor, gates: dict[str, Tensor] = gates) -> Tensor:
            layer = heads[name]
            gate = torch.ones(layer.num_heads, device=states.device, dtype=torch.float32, requires_grad=True)
            if gates.setdefault(name, gate) is not gate:
                raise ObservationError(f"{vision.attentions[int(name)][0]} ran twice in one forward of the tower.")
            split = states.unflatten(-1, (layer.num_heads, layer.head_dim))
            return (split * gate[:, None].to(states.dtype)).flatten(-2)

        with torch.enable_grad(), entering(outputs, gated):
            output = _tensor(vision.tower(**page))
            if len(gates) < len(layers) or not output.requires_grad:
                raise ObservationError(
                    f"{type(vision.tower).__name__} ran {len(gates)} of {len(layers)} attention layers with gradients; "
                    "call this outside of torch.inference_mode, with pages that pass all of them."
                )
            for number in range(projections):
                direction = torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
                more = number + 1 < projections
                grads = torch.autograd.grad(
                    (output * direction).sum(), list(gates.values()), retain_graph=more, allow_unused=True
                )
                for name, grad in zip(gates, grads, strict=True):
                    if grad is not None:  # else the output does not depend on the layer: its heads do nothing
                        energy[int(name)] += grad.detach().double().cpu().square() / projections
    return energy


def _tensor(output: Any) -> Tensor:
    """The hidden states of a tower, `[.., tokens, width]`."""
    states = getattr(output, "last_hidden_state", None)
    states = output[0] if states is None and isinstance(output, tuple | list) else states
    states = output if states is None else states
    if not isinstance(states, Tensor):
        raise ObservationError(f"The tower gives a {type(output).__name__} without last_hidden_state.")
    return states
