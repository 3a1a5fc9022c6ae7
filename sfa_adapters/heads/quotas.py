"""How many heads each kind of head plan removes from each layer, and which ones its key/value groups allow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

__all__ = [
    "EARLY_SKIP_RATE",
    "adaptive_quotas",
    "chosen_heads",
    "early_skip_quotas",
    "global_quotas",
    "rounded_down",
    "uniform_quotas",
]

# The published plans are for a model of 32 layers: 0-5 are early, 6-21 in the middle, 22-31 late. Other depths are
# divided in the same proportion.
_DEPTH, _EARLY_END, _MIDDLE_END = 32, 6, 22
_SKIP_MIDDLE, _SKIP_LATE = 6, 11  # of 32 heads
EARLY_SKIP_RATE = (16 * _SKIP_MIDDLE + 10 * _SKIP_LATE) / 1024  # 206 of 1,024
_EARLY_WEIGHT = 0.5  # of an early layer under "adaptive"; the published description gives no number
_EPSILON = 1e-9  # 0.29 * 100 is 28.999999999999996


def uniform_quotas(heads: Mapping[str, int], rate: float) -> dict[str, int]:
    """The same share of each layer, rounded to whole heads: 30% of 32 are 10."""
    return {name: _rounded(rate * count) for name, count in heads.items()}


def early_skip_quotas(heads: Mapping[str, int], rate: float) -> dict[str, int]:
    """No heads of early layers, 6 parts of middle and 11 parts of late ones, scaled to the rate of all heads."""
    early, middle = _ends(len(heads))
    parts = dict(zip(heads, _stages(early, middle, len(heads), 0.0, _SKIP_MIDDLE, _SKIP_LATE), strict=True))
    whole = sum(parts[name] * count for name, count in heads.items())
    if not whole:
        return dict.fromkeys(heads, 0)
    scale = rate * sum(heads.values()) / whole
    return {name: _rounded(parts[name] * count * scale) for name, count in heads.items()}


def adaptive_quotas(heads: Mapping[str, int], rate: float) -> dict[str, int]:
    """Half the share in early layers; the total is the rate of all heads, rounded down."""
    early, middle = _ends(len(heads))
    weights = _stages(early, middle, len(heads), _EARLY_WEIGHT, 1.0, 1.0)
    parts = {name: weight * heads[name] for name, weight in zip(heads, weights, strict=True)}
    total = rounded_down(rate, heads.values())
    exact = {name: total * part / sum(parts.values()) for name, part in parts.items()}
    quotas = {name: math.floor(value + _EPSILON) for name, value in exact.items()}
    # Heads left over by rounding down go to the largest remainders, late layers first.
    order = sorted(heads, key=lambda name: exact[name] - quotas[name])
    for name in order[len(order) - (total - sum(quotas.values())) :]:
        quotas[name] += 1
    return quotas


def global_quotas(values: Mapping[str, Sequence[float]], rate: float) -> dict[str, int]:
    """The lowest scores of the whole model, with at least one head kept per layer; the total is rounded down.

    The sum is smaller than the total if that would remove whole layers; the caller checks it.
    """
    left = rounded_down(rate, map(len, values.values()))
    quotas = dict.fromkeys(values, 0)
    for _, name in sorted(
        ((value, name) for name, head_scores in values.items() for value in head_scores), key=lambda pair: pair[0]
    ):
        if left and quotas[name] < len(values[name]) - 1:
            quotas[name] += 1
            left -= 1
    return quotas


def chosen_heads(values: Sequence[float], groups: int, quota: int) -> tuple[int, ...]:
    """The heads of a layer to prune: the lowest scores among what its key/value groups allow.

    Whole groups are pruned, and an equal number of query heads from each remaining one. So the number of pruned heads
    may differ from the quota; it is the nearest possible one. Of several choices the heads with the higher scores are
    kept.

    Args:
        values: One score per query head.
        groups: Number of key/value heads.
        quota: Number of query heads to prune; at least one is kept.

    Returns:
        The query heads to prune, sorted.
    """
    size = len(values) // groups
    goal = len(values) - quota
    counts = [(g, n) for g in range(1, groups + 1) for n in range(1, size + 1)]
    nearest = min(abs(g * n - goal) for g, n in counts)
    best: tuple[float, int, set[int]] | None = None
    for number, group in counts:
        if abs(number * group - goal) != nearest:
            continue
        # The best `group` heads of every group, and then the `number` groups with the best sums of those.
        kept = [_highest(values, range(g * size, (g + 1) * size), group) for g in range(groups)]
        sums = [sum(values[head] for head in heads) for heads in kept]
        stay = {head for g in _highest(sums, range(groups), number) for head in kept[g]}
        # Of different numbers of heads the larger is kept: scores may be negative, so sums cannot decide.
        key = (len(stay), sum(values[head] for head in stay))
        if best is None or key > (best[1], best[0]):
            best = (key[1], len(stay), stay)
    assert best is not None
    return tuple(head for head in range(len(values)) if head not in best[2])


def _highest(values: Sequence[float], among: range, count: int) -> list[int]:
    """Indices of the highest values; of equal ones the later."""
    return sorted(among, key=lambda place: (values[place], place))[len(among) - count :]


def _ends(depth: int) -> tuple[int, int]:
    """Where early and middle layers end; a model of two layers or more has an early one."""
    early = max(round(_EARLY_END * depth / _DEPTH), min(1, depth - 1))
    return early, max(early, round(_MIDDLE_END * depth / _DEPTH))


def _stages(early: int, middle: int, depth: int, *values: float) -> list[float]:
    return [values[0]] * early + [values[1]] * (middle - early) + [values[2]] * (depth - middle)


def _rounded(value: float) -> int:
    return math.floor(value + 0.5 + _EPSILON)


def rounded_down(rate: float, heads: Iterable[int]) -> int:
    """The rate of all heads together, rounded down to whole heads."""
    return math.floor(rate * sum(heads) + _EPSILON)
