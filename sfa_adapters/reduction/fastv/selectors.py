"""The selectors of FastV: a score for each image token; the tokens of each sample with the highest scores stay.

| selector | keeps | looks at |
|---|---|---|
| `attention` | what the question attends to (FastV, arXiv 2403.06764) | one layer's attention |
| `diversity` | tokens unlike each other (max-min cosine distance; DivPrune, arXiv 2503.02175) | their states |
| `importance+diversity` | attended tokens unlike the ones kept so far (maximal marginal relevance) | both |
| `density` | where the page has text: ADAT's density map | the pixels |
| `downsample` | an even grid of tokens, as a smaller image would give; a baseline | places only |
| `random` | tokens drawn once, the same places in every sample; a baseline | nothing |

Everything runs on the device of its arguments and never waits for it: no number is read back, no shape depends on a
value. Every sample is treated by itself, so padding and neighbours in a batch change nothing. Of equal scores the first
in order stay; cosines are computed in fp64 and compared in fp32, so that what is equal by the formula is equal in the
machine, whatever kernel multiplies.

Shape letters: B samples, N image tokens of the sample that has most, D width of the states.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from sfa_adapters.errors import PlanError

__all__ = ["ImageTokens", "Selector", "best", "needs_attention", "select"]

Selector = Literal["attention", "diversity", "importance+diversity", "density", "downsample", "random"]
# Additive recurrences whose points fill the line and the plane evenly: powers of the golden ratio, and of the plastic
# number, the real root of x^3 = x + 1.
GOLDEN, PLASTIC = 0.6180339887498949, 0.7548776662466927
NEVER = float("-inf")


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """The image tokens of a batch, each sample's in its own order at the front.

    Attributes:
        real: False after the last image token of a sample, bool `[B, N]`.
        budget: How many stay, int64 `[B]`.
        most: The largest of them.
        states: Input of the layer before which is pruned, `[B, N, D]`.
        run: Number of the image (the run of image tokens without text in between) of each token, int64 `[B, N]`.
        importance: How much the question attends to each, `[B, N]`, or None where it is not needed.
        density: Text density of each, `[B, N]`, or None where it is not needed.
    """

    real: Tensor
    budget: Tensor
    most: int
    states: Tensor
    run: Tensor
    importance: Tensor | None = None
    density: Tensor | None = None


def needs_attention(selector: str) -> bool:
    """Whether a selector needs `ImageTokens.importance`."""
    return selector in ("attention", "importance+diversity")


def check_selector(selector: str, balance: float) -> None:
    """Checks the options of a selector.

    Raises:
        PlanError: One cannot be used; names it.
    """
    if selector not in get_args(Selector):
        raise PlanError(f"selector={selector!r} must be one of {', '.join(get_args(Selector))}.")
    if not 0 <= balance <= 1:
        raise PlanError(f"balance={balance} must lie in 0..1: the weight of importance against diversity.")


def select(tokens: ImageTokens, selector: Selector, seed: int = 0, balance: float = 0.5) -> Tensor:
    """Chooses the image tokens that stay.

    Args:
        tokens: The image tokens.
        selector: Name of the selector.
        seed: Of `random`.
        balance: Of `importance+diversity`: 1 counts importance only, 0 diversity only.

    Returns:
        True for tokens that stay, `tokens.budget` of each sample, bool `[B, N]`. Of equal scores the first in order
        stay.
    """
    with torch.no_grad(), torch.autocast(tokens.states.device.type, enabled=False):
        return best(_SCORES[selector](tokens, seed, balance), tokens.real, tokens.budget)


def best(scores: Tensor, real: Tensor, budget: Tensor) -> Tensor:
    """The tokens with the highest scores of each sample.

    Args:
        scores: `[B, N]`.
        real: Which of them count, bool `[B, N]`.
        budget: How many stay, int64 `[B]`.

    Returns:
        True for them, bool `[B, N]`. Of equal scores the first in order stay.
    """
    order = scores.masked_fill(~real, NEVER).argsort(dim=1, descending=True, stable=True)
    place = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, place)
    return (rank < budget[:, None]) & real


# -- scores -----------------------------------------------------------------------------------------------------------


def _attention(tokens: ImageTokens, seed: int, balance: float) -> Tensor:
    assert tokens.importance is not None
    return tokens.importance


def _density(tokens: ImageTokens, seed: int, balance: float) -> Tensor:
    """Dense places first; among equally dense ones (blank paper, solid text) an even grid decides."""
    assert tokens.density is not None
    # Densities are compared in 256 steps, so that the noise of an estimator on blank paper decides nothing.
    return (tokens.density.float() * 256).round() + 0.5 * _downsample(tokens, seed, balance)


def _random(tokens: ImageTokens, seed: int, balance: float) -> Tensor:
    # Drawn by place, not by sample: beams of one prompt must agree, and a batch must not change a sample.
    return _drawn(seed, tokens.real.shape[1], str(tokens.real.device)).expand_as(tokens.real)


@cache
def _drawn(seed: int, count: int, device: str) -> Tensor:
    # One number after the other, so that a longer batch draws the same ones for its shorter samples.
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)


def _downsample(tokens: ImageTokens, seed: int, balance: float) -> Tensor:
    """An even pattern that stays even at any budget: a two-dimensional additive recurrence over rows and columns.

    The side of a square image is the root of its number of tokens; a run of any other length (tiles with line breaks,
    pages of any shape) is spread evenly along its order.
    """
    place = torch.arange(tokens.real.shape[1], device=tokens.real.device)
    same = (tokens.run[:, :, None] == tokens.run[:, None, :]) & tokens.real[:, None, :]
    length = same.sum(-1)
    within = (same & (place[None, :] < place[:, None])).sum(-1)
    side = length.double().sqrt().round().long().clamp(min=1)
    row, column = (within // side).double(), (within % side).double()
    flat = (within * GOLDEN).frac()
    grid = (row * PLASTIC + column * PLASTIC**2).frac()
    return torch.where(side * side == length, grid, flat).float()


def _diversity(tokens: ImageTokens, seed: int, balance: float) -> Tensor:
    """Farthest-point order: first the token whose nearest neighbour is farthest, then the one farthest from them."""
    alike = _cosines(tokens.states, tokens.real)
    itself = torch.eye(alike.shape[-1], dtype=torch.bool, device=alike.device)
    nearest = alike.masked_fill(itself | ~tokens.real[:, None], NEVER).amax(-1)
    return _greedy(tokens, -nearest, lambda closest: -closest, alike)


def _importance_diversity(tokens: ImageTokens, seed: int, balance: float) -> Tensor:
    """Maximal marginal relevance: balance * importance - (1 - balance) * largest cosine with a kept token."""
    assert tokens.importance is not None
    importance = tokens.importance.float()
    low = importance.masked_fill(~tokens.real, float("inf")).amin(1, keepdim=True)
    high = importance.masked_fill(~tokens.real, NEVER).amax(1, keepdim=True)
    scaled = (importance - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)
    alike = _cosines(tokens.states, tokens.real)
    return _greedy(tokens, scaled, lambda closest: balance * scaled - (1 - balance) * closest, alike)


def _greedy(tokens: ImageTokens, first: Tensor, value: Callable[[Tensor], Tensor], alike: Tensor) -> Tensor:
    """Chooses one token after the other; the earlier a token is chosen, the higher its score."""
    out = torch.full_like(first, NEVER)
    free = tokens.real.clone()
    closest = torch.full_like(first, NEVER)
    score = first
    for step in range(tokens.most):
        chosen = score.masked_fill(~free, NEVER).argmax(1, keepdim=True)  # the first of equal ones
        # A sample that has no free token left chooses one again; that must not make it a late one.
        out.scatter_(1, chosen, out.gather(1, chosen).clamp(min=float(-step)))
        free.scatter_(1, chosen, False)
        row = alike.gather(1, chosen[:, :, None].expand(-1, -1, alike.shape[-1])).squeeze(1)
        closest = torch.maximum(closest, row)
        score = value(closest)
    return out


def _cosines(states: Tensor, real: Tensor) -> Tensor:
    """Cosine of every pair of tokens, fp32 `[B, N, N]`, exactly symmetric.

    The order in which a kernel sums depends on the processor and on the shape of the batch. Tokens that are each
    other's nearest, of which one must be the first to go, would tie or not by its rounding.
    """
    directions = F.normalize(states.double().masked_fill(~real[:, :, None], 0.0), dim=-1)
    cosines = (directions @ directions.transpose(1, 2)).float()
    return torch.minimum(cosines, cosines.transpose(1, 2))


_SCORES: dict[str, Callable[[ImageTokens, int, float], Tensor]] = {
    "attention": _attention,
    "diversity": _diversity,
    "importance+diversity": _importance_diversity,
    "density": _density,
    "downsample": _downsample,
    "random": _random,
}
