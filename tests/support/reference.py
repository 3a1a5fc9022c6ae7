"""Slow, obvious references: phi pair by pair from its formula, and attention of every kind of tower in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sfa_adapters.layer import SFALayer

Place = tuple[float, float] | None  # row and column of a token, None for a prefix token


def phi_by_pairs(
    places: list[Place],
    grid: tuple[int, int],
    row: Tensor,
    col: Tensor,
    dist: Tensor,
    block: Tensor,
    block_grid: tuple[int, int] = (4, 4),
) -> Tensor:
    """The formula of the method, for tokens of one cell each; `[heads, tokens, tokens]`, float64."""
    reach = max(grid[0] - 1 + grid[1] - 1, 1)

    def block_id(place: tuple[float, float]) -> int:
        return int((place[0] + 0.5) * block_grid[0] / grid[0]) * block_grid[1] + int(
            (place[1] + 0.5) * block_grid[1] / grid[1]
        )

    row, col, dist, block = (weights.detach().double() for weights in (row, col, dist, block))
    phi = torch.zeros(len(row), len(places), len(places), dtype=torch.float64)
    for i, here in enumerate(places):
        for j, there in enumerate(places):
            if here is None or there is None:
                continue
            value = block[:, block_id(here)] * block[:, block_id(there)]
            if here[0] == there[0]:
                value = value + row
            if here[1] == there[1]:
                value = value + col
            manhattan = abs(here[0] - there[0]) + abs(here[1] - there[1])
            phi[:, i, j] = value - dist * manhattan / reach
    return phi


def regular_places(grid: tuple[int, int], prefix: int) -> list[Place]:
    return [None] * prefix + [(float(r), float(c)) for r in range(grid[0]) for c in range(grid[1])]


def layer_phi(layer: SFALayer, places: list[Place], grid: tuple[int, int]) -> Tensor:
    """phi of one injected layer, from its own scalars."""
    scalars: list[Any] = [dict(getattr(layer, name).items())["default"] for name in layer.adapter_layer_names]
    return phi_by_pairs(places, grid, *scalars)


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, phi: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Attention of `[..., heads, tokens, width]` with phi on its logits; `allowed` says which keys may be seen."""
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5 + phi
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1) @ value


def _linear(module: Any, states: Tensor) -> Tensor:
    bias = None if module.bias is None else module.bias.double()
    return torch.nn.functional.linear(states, module.weight.double(), bias)


def _norm(module: nn.Module, states: Tensor) -> Tensor:
    return module(states.float()).double()


def project(module: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of an attention module, `[..., heads, tokens, width]`, float64."""
    hidden = hidden.double()
    heads = module.num_heads

    def cut(states: Tensor) -> Tensor:
        return states.unflatten(-1, (heads, -1)).transpose(-3, -2)

    if hasattr(module, "qkv"):
        query, key, value = _linear(module.qkv, hidden).chunk(3, dim=-1)
    else:
        query, key, value = (_linear(getattr(module, name), hidden) for name in ("q_proj", "k_proj", "v_proj"))
    q_norm, k_norm = getattr(module, "q_norm", None), getattr(module, "k_norm", None)
    if q_norm is None or k_norm is None:
        return cut(query), cut(key), cut(value)
    if type(module).__module__.startswith("timm"):  # timm normalises each head, InternViT the full width
        return _norm(q_norm, cut(query)), _norm(k_norm, cut(key)), cut(value)
    return cut(_norm(q_norm, query)), cut(_norm(k_norm, key)), cut(value)


def merge_heads(module: Any, out: Tensor) -> Tensor:
    """The output projection."""
    name = next(name for name in ("out_proj", "projection_layer", "proj") if hasattr(module, name))
    return _linear(getattr(module, name), out.transpose(-3, -2).flatten(-2))


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of `[heads, tokens, width]`."""
    first, second = states.chunk(2, dim=-1)
    return states * cos.double() + torch.cat((-second, first), dim=-1) * sin.double()


def places_from_rotary(cos: Tensor, sin: Tensor, largest: int = 32) -> list[Place]:
    """Reads each token's row and column back from Qwen's rotary embedding, without knowing the order of tokens.

    The first half of the channels turns by position * frequency: a quarter for the row, a quarter for the column.
    """
    quarter = cos.shape[-1] // 4
    frequency = 10000.0 ** -(torch.arange(quarter).double() / quarter)
    angle = torch.arange(largest).double()[:, None] * frequency
    wanted = torch.cat((angle.cos(), angle.sin()), dim=-1)
    found: list[list[float]] = []
    for axis in range(2):
        part = slice(axis * quarter, (axis + 1) * quarter)
        seen = torch.cat((cos[:, part], sin[:, part]), dim=-1).double()
        distance = torch.cdist(seen, wanted)
        assert distance.min(dim=1).values.max() < 1e-3, "the rotary embedding does not look as expected"
        found.append(distance.argmin(dim=1).double().tolist())
    return list(zip(*found, strict=True))
