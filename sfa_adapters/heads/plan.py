"""`plan_heads`: chooses the heads to prune from scores, a rate and a kind of plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from sfa_adapters.errors import RecipeError
from sfa_adapters.heads.head_plan import HeadPlan
from sfa_adapters.heads.quotas import (
    EARLY_SKIP_RATE,
    adaptive_quotas,
    chosen_heads,
    early_skip_quotas,
    global_quotas,
    rounded_down,
    uniform_quotas,
)
from sfa_adapters.heads.scores import HeadScores

__all__ = ["HeadPlan", "Kind", "checked_rate", "plan_heads"]

Kind = Literal["uniform", "adaptive", "early_skip", "global"]


def plan_heads(
    scores: HeadScores, rate: float | None = None, kind: Kind = "uniform", protect: Iterable[int | str] = ()
) -> HeadPlan:
    """Makes a plan to prune the heads with the lowest scores.

    Early layers are the first 6 of 32, late ones the last 10, and the same share in models of other depth.

    * "uniform": the same rate in every layer, rounded: 30% of 32 heads are 10.
    * "adaptive": half the rate in early layers; the total is the rate of all heads, rounded down.
    * "early_skip": no heads of early layers, 6 parts of middle and 11 parts of late ones. Without a rate it is the
      published plan: 6 and 11 of 32 heads, 206 of the 1,024 of LLaVA-1.5-7B.
    * "global": the lowest scores of the whole model, rounded down, but never a whole layer. Scores must be comparable
      between layers: "flap" and "random" are; "s4" favours layers that attend to the image.

    With grouped-query attention whole groups are removed, and an equal number of query heads from each remaining one,
    as near to the number for the layer as possible. The resulting rate is `plan.rate`.

    Args:
        scores: From `calibrate_heads`.
        rate: Share of the heads to prune, between 0 and 1; only "early_skip" has a default.
        kind: As above.
        protect: Layers that keep all their heads, by number or pattern ("*layers.0.*"); the rate applies to the others.

    Returns:
        The plan, for all scored layers.

    Raises:
        RecipeError: An option cannot be used, a layer would lose all its heads, or no head would go.
    """
    rate = checked_rate(rate, kind)
    kept = _protected(tuple(scores.values), protect)
    values = {name: head_scores for name, head_scores in scores.values.items() if name not in kept}
    if not values:
        raise RecipeError(f"protect keeps all {len(kept)} layers: no head can go.")
    heads = scores.num_heads
    quotas = dict.fromkeys(heads, 0) | _quotas(kind, heads, values, rate)
    full = [name for name, quota in quotas.items() if quota >= heads[name]]
    if full or (kind == "global" and sum(quotas.values()) < rounded_down(rate, map(len, values.values()))):
        name = full[0] if full else next(iter(values))
        raise RecipeError(f"rate={rate:g} ({kind}) would leave {name} without a head of {heads[name]}. Lower the rate.")
    removed, carry = dict[str, tuple[int, ...]](), 0
    for name, quota in quotas.items():
        goal = quota
        if quota and kind in ("adaptive", "global"):  # these fix the total, so the next layer makes up the difference
            goal = quota + carry
        removed[name] = chosen_heads(scores.values[name], scores.num_kv_heads[name], goal) if goal else ()
        carry += quota - len(removed[name])
    if not any(removed.values()):
        name = next(iter(values))
        raise RecipeError(
            f"rate={rate:g} ({kind}) removes no head. A layer such as {name} has {heads[name]} heads in "
            f"{scores.num_kv_heads[name]} key/value groups: whole groups go, or as many from each. Raise the rate."
        )
    how: dict[str, Any] = {"kind": kind, "rate": rate, "method": scores.method, "protected": sorted(kept)}
    return HeadPlan(removed, heads, scores.num_kv_heads, how | {"model": dict(scores.model)})


def checked_rate(rate: float | None, kind: str) -> float:
    """Checks the kind and the rate of a plan; returns the rate, or the default of "early_skip".

    Raises:
        RecipeError: There is no such kind, it needs a rate, or the rate is not between 0 and 1.
    """
    if kind not in get_args(Kind):
        raise RecipeError(f"kind={kind!r} must be one of {', '.join(get_args(Kind))}.")
    if rate is None:
        if kind != "early_skip":
            raise RecipeError(f"kind={kind!r} needs a rate, such as 0.2; only 'early_skip' has one of its own.")
        return EARLY_SKIP_RATE
    number = isinstance(rate, int | float) and not isinstance(rate, bool)  # pyright: ignore[reportUnnecessaryIsInstance]
    if not number or not 0 < rate < 1:
        raise RecipeError(f"rate={rate!r} must be between 0 and 1, such as 0.2 for one head of five.")
    return float(rate)


def _quotas(
    kind: Kind, heads: Mapping[str, int], values: Mapping[str, tuple[float, ...]], rate: float
) -> dict[str, int]:
    """Number of heads to prune in each layer that is not protected."""
    if kind == "global":
        return global_quotas(values, rate)
    # Early and late refer to the whole model, protected layers included.
    weigh = {"uniform": uniform_quotas, "adaptive": adaptive_quotas, "early_skip": early_skip_quotas}[kind]
    return weigh({name: count if name in values else 0 for name, count in heads.items()}, rate)


def _protected(names: tuple[str, ...], protect: Iterable[int | str]) -> set[str]:
    protected: set[str] = set()
    for wanted in [protect] if isinstance(protect, int | str) else protect:
        if isinstance(wanted, int):
            fitting: set[str] = {names[wanted]} if 0 <= wanted < len(names) else set()
        else:
            fitting = {name for name in names if fnmatchcase(name, wanted)}
        if not fitting:
            raise RecipeError(
                f"protect={wanted!r} fits no layer. There are 0 to {len(names) - 1}, {names[0]} to {names[-1]}."
            )
        protected |= fitting
    return protected
