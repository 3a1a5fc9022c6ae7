"""Merging of similar tokens: bipartite matching, and the record of which was merged into which. Pure functions.

Tokens of even and of odd place are two sides; every even one names the odd one that is most similar to it, and merges
into it where the similarity is above a threshold (ToMe, arXiv 2210.09461, section 3; by a threshold instead of a fixed
count: DyMU, arXiv 2504.17040, section 3.1). The odd token *represents* the merged ones: it keeps its place in the
sequence and its position. So the order of tokens survives, which ToMe's own output order (unmatched first) does not.

A unit merges whole: it is one token, or the four tokens of which a host makes one. The units of all images are
concatenated.

Shape letters: U current units, U0 initial units, P pairs, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Merged", "Pairs", "merge_above", "pair_scores", "weighted_mean"]

# Similarities that are in memory at a time.
BLOCK = 2**24


@dataclass(frozen=True, eq=False)
class Pairs:
    """The most similar partner of every unit of even place, over all images.

    Attributes:
        score: Cosine similarity, at most 1, `[P]`, fp32.
        source: The unit that would merge, `[P]`, int64.
        target: The unit it would merge into, `[P]`, int64.
        units: U.
    """

    score: Tensor
    source: Tensor
    target: Tensor
    units: int


@dataclass(frozen=True, eq=False)
class Merged:
    """Which units are left, and which of them each initial unit is part of.

    Attributes:
        lengths: Current units of each image.
        size: How many initial units each current one stands for, `[U]`, fp32; the sum never changes.
        origin: The initial unit that represents each current one, `[U]`, int64, ascending.
        owner: The current unit that each initial one is part of, `[U0]`, int64.
    """

    lengths: tuple[int, ...]
    size: Tensor
    origin: Tensor
    owner: Tensor

    @classmethod
    def start(cls, lengths: Sequence[int], device: torch.device | str | None = None) -> Merged:
        """The state before any merge.

        Args:
            lengths: Units of each image.
            device: Of the result.
        """
        every_token = torch.arange(sum(lengths), device=device)
        return cls(tuple(lengths), torch.ones(len(every_token), device=device), every_token, every_token)

    @property
    def is_represented(self) -> Tensor:
        """True for the initial units that represent the unit that they are part of, bool `[U0]`."""
        return self.origin[self.owner] == torch.arange(len(self.owner), device=self.owner.device)


def pair_scores(metric: Tensor, lengths: Sequence[int]) -> Pairs:
    """Finds the partner of every unit of even place, inside its own image; of equally similar ones the first.

    Args:
        metric: What units are compared by, `[U, D]` (the keys of an attention layer, mean over its heads).
        lengths: Units of each image; images of fewer than two have no pairs.

    Returns:
        The pairs, images in order.
    """
    device = metric.device
    units = F.normalize(metric.detach().float(), dim=-1)
    longest = max(lengths, default=0)
    if longest < 2:
        none = torch.zeros(0, dtype=torch.long, device=device)
        return Pairs(torch.zeros(0, device=device), none, none, len(units))
    counts = torch.tensor(lengths)
    start = counts.cumsum(0) - counts
    place = torch.arange(longest)
    row = (start[:, None] + place).clamp(max=len(units) - 1)
    padded = units[row.to(device)]  # [B, longest, D]
    beyond = (place >= counts[:, None]).to(device)
    even, odd = padded[:, ::2], padded[:, 1::2]
    hidden = beyond[:, None, 1::2]
    step = max(1, BLOCK // max(1, len(lengths) * odd.shape[1]))
    maxima = [
        (block @ odd.transpose(1, 2)).masked_fill(hidden, float("-inf")).max(-1) for block in even.split(step, dim=1)
    ]
    score, partner = (torch.cat([block[k] for block in maxima], dim=1) for k in range(2))
    paired = ((place[::2] < counts[:, None]) & (counts[:, None] > 1)).flatten().nonzero()[:, 0]  # on the CPU: no wait
    pick = paired.to(device)
    first = start.to(device)[:, None]
    source = (first + place[::2].to(device)).flatten()[pick]
    target = (first + 2 * partner + 1).flatten()[pick]
    # Rounding must not lift twins above 1: a threshold of 1 merges nothing.
    return Pairs(score.flatten()[pick].clamp(max=1.0), source, target, len(units))


def merge_above(merged: Merged, pairs: Pairs, threshold: float) -> tuple[Merged, Tensor] | None:
    """Merges every pair whose similarity is above a threshold.

    Args:
        merged: The current units.
        pairs: From `pair_scores`, for these units.
        threshold: Cosine similarity; pairs at it stay apart.

    Returns:
        The units that are left, and for each of the given units the number of the one that it is part of, `[U]`,
        int64; None where nothing merges.
    """
    every_token = torch.arange(len(merged.size), device=merged.size.device)
    into = every_token.index_copy(0, pairs.source, torch.where(pairs.score > threshold, pairs.target, pairs.source))
    stays = into == every_token  # targets are of odd place and never move, so one step leads to a unit that stays
    image = torch.repeat_interleave(
        torch.arange(len(merged.lengths)), torch.tensor(merged.lengths, dtype=torch.long), output_size=len(every_token)
    ).to(every_token.device)
    left = torch.zeros(len(merged.lengths), dtype=torch.long, device=every_token.device).index_add(
        0, image, stays.long()
    )
    lengths = tuple(left.tolist())
    if lengths == merged.lengths:
        return None
    target = (stays.cumsum(0) - 1)[into]
    size = torch.zeros(sum(lengths), device=every_token.device).index_add(0, target, merged.size)
    return Merged(lengths, size, merged.origin[stays], target[merged.owner]), target


def weighted_mean(values: Tensor, size: Tensor, target: Tensor, new_size: Tensor) -> Tensor:
    """The values of merged units: the mean over their parts, weighted by size.

    Args:
        values: `[U, ...]`.
        size: Of each unit, `[U]`.
        target: Which new unit each one is part of, `[U]`, int64.
        new_size: Of each new unit, `[U']`.

    Returns:
        `[U', ...]` in the dtype of `values`; summed in fp32.
    """
    shape = (-1, *(1,) * (values.ndim - 1))
    exact = values if values.dtype == torch.float64 else values.float()
    total = exact.new_zeros(len(new_size), *values.shape[1:]).index_add(0, target, exact * size.view(shape))
    return (total / new_size.view(shape)).to(values.dtype)
