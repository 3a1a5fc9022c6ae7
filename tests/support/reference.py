"""Attention of CLIP and SigLIP in float64, in parts; the other references are the contract suite's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfa_adapters.testing.cases import Place
from sfa_adapters.testing.reference import layer_phi, phi_by_pairs, regular_places, softmax_attention

__all__ = ["Place", "layer_phi", "merge_heads", "phi_by_pairs", "project", "regular_places", "softmax_attention"]


def _linear(module: Any, states: Tensor) -> Tensor:
    return torch.nn.functional.linear(states, module.weight.double(), module.bias.double())


def project(module: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of an attention module of CLIP or SigLIP, `[..., heads, tokens, width]`."""
    query, key, value = (
        _linear(getattr(module, name), hidden.double()).unflatten(-1, (module.num_heads, -1)).transpose(-3, -2)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    return query, key, value


def merge_heads(module: Any, out: Tensor) -> Tensor:
    """Merges the heads and applies the output projection; `[..., tokens, width]`."""
    return _linear(module.out_proj, out.transpose(-3, -2).flatten(-2))
