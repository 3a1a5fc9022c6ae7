"""`HeadPlan`: which attention heads of which layers go. Made by `plan_heads`, carried out by `prune_heads`.

Query heads are numbered as in the model that was measured. Under grouped-query attention query head h reads key/value
head h // (num_heads / num_kv_heads), and every layer computes with one number of query heads per key/value head. So a
layer may lose whole groups, and an equal number of query heads from each group that is left.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from sfa_adapters.errors import RecipeError
from sfa_adapters.heads.quotas import (
    EARLY_SKIP_RATE,
    adaptive_quotas,
    chosen_heads,
    early_skip_quotas,
    global_quotas,
    uniform_quotas,
)
from sfa_adapters.heads.scores import HeadScores

__all__ = ["HeadPlan", "Kind", "plan_heads"]

Kind = Literal["uniform", "adaptive", "early_skip", "global"]
_VERSION = 1


@dataclass(frozen=True)
class HeadPlan:
    """Which heads go.

    Attributes:
        removed: For each attention module (its path), the query heads that go, sorted; an empty tuple where all stay.
        num_heads: Query heads of each of these modules before pruning.
        num_kv_heads: Key/value heads of each of them before pruning; the same number without grouped queries.
        how: How the plan was made (kind, rate, scores); told, not used.

    Raises:
        RecipeError: The plan is empty, the modules of the three do not agree, a head does not exist or stands twice,
            a layer would lose all its heads, or the groups that are left would not have equal numbers of query heads.
    """

    removed: Mapping[str, tuple[int, ...]]
    num_heads: Mapping[str, int]
    num_kv_heads: Mapping[str, int]
    how: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.num_heads:
            raise RecipeError("The head plan names no attention module.")
        if not self.removed.keys() == self.num_heads.keys() == self.num_kv_heads.keys():
            every = {*self.removed, *self.num_heads, *self.num_kv_heads}
            odd = sorted(every - (self.removed.keys() & self.num_heads.keys() & self.num_kv_heads.keys()))
            raise RecipeError(
                f"removed, num_heads and num_kv_heads must name the same attention modules; {odd[0]} is not in all."
            )
        for name in self.num_heads:
            self._check(name)
        # Copies: a plan that changes after it was checked is none.
        object.__setattr__(self, "removed", {name: tuple(heads) for name, heads in self.removed.items()})
        object.__setattr__(self, "num_heads", dict(self.num_heads))
        object.__setattr__(self, "num_kv_heads", dict(self.num_kv_heads))
        object.__setattr__(self, "how", dict(self.how))

    def _check(self, name: str) -> None:
        removed, heads, groups = self.removed[name], self.num_heads[name], self.num_kv_heads[name]
        if not (_is_count(heads) and _is_count(groups)) or heads % groups:
            raise RecipeError(
                f"{name}: {heads!r} query heads over {groups!r} key/value heads; both must be whole numbers of at "
                "least 1, the first a multiple of the second."
            )
        if not all(type(h) is int and 0 <= h < heads for h in removed) or list(removed) != sorted(set(removed)):
            raise RecipeError(
                f"{name}: the removed heads {list(removed)} must be sorted, each once, from 0 to {heads - 1}."
            )
        if len(removed) == heads:
            raise RecipeError(f"{name} would lose all its {heads} heads. Lower the rate, or leave the layer out.")
        left = {group: len(own) for group, own in _by_group(self.kept(name), heads // groups).items()}
        if len(set(left.values())) > 1:
            raise RecipeError(
                f"{name}: the key/value groups that stay would have {left} query heads (by group); attention needs the "
                "same number in each. plan_heads makes plans that can be carried out."
            )

    def kept(self, name: str) -> tuple[int, ...]:
        """The query heads of a module that stay, sorted."""
        gone = set(self.removed[name])
        return tuple(h for h in range(self.num_heads[name]) if h not in gone)

    def kept_kv(self, name: str) -> tuple[int, ...]:
        """The key/value heads of a module that a query head still reads, sorted."""
        return tuple(_by_group(self.kept(name), self.num_heads[name] // self.num_kv_heads[name]))

    @property
    def total(self) -> int:
        """Query heads before pruning."""
        return sum(self.num_heads.values())

    @property
    def count(self) -> int:
        """Query heads that go."""
        return sum(len(heads) for heads in self.removed.values())

    @property
    def rate(self) -> float:
        """Share of the query heads that go, 0 to 1."""
        return self.count / self.total

    def to_json(self) -> str:
        """The plan as JSON text."""
        layers = {
            name: {
                "removed": list(self.removed[name]),
                "num_heads": self.num_heads[name],
                "num_kv_heads": self.num_kv_heads[name],
            }
            for name in self.num_heads
        }
        return json.dumps({"version": _VERSION, "how": dict(self.how), "layers": layers}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> HeadPlan:
        """The plan that `to_json` wrote.

        Raises:
            RecipeError: The text is no head plan, is of a newer version, or the plan cannot be carried out.
        """
        try:
            told = json.loads(text)
            if told["version"] != _VERSION:
                raise RecipeError(
                    f"The head plan has version {told['version']!r}; this library reads {_VERSION}. Update it."
                )
            layers = dict(told["layers"])
            removed = {name: tuple(own["removed"]) for name, own in layers.items()}
            num_heads = {name: own["num_heads"] for name, own in layers.items()}
            num_kv_heads = {name: own["num_kv_heads"] for name, own in layers.items()}
            how = dict(told["how"])
        except RecipeError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RecipeError(f"This is no head plan ({type(error).__name__}: {error}). Plan anew.") from error
        return cls(removed, num_heads, num_kv_heads, how)


def plan_heads(
    scores: HeadScores, rate: float | None = None, kind: Kind = "uniform", protect: Iterable[int | str] = ()
) -> HeadPlan:
    """Chooses the heads with the lowest scores.

    Early layers are the first 6 of 32, late ones the last 10, and in other depths the same share.

    * "uniform": the rate of every layer, rounded: 30% of 32 heads are 10.
    * "adaptive": of an early layer half as much as of the others; all together the rate, rounded down.
    * "early_skip": nothing of early layers, 6 parts of middle and 11 parts of late ones. Without a rate it is the
      published plan: 6 and 11 of 32 heads, 206 of the 1,024 of LLaVA-1.5-7B.
    * "global": the lowest scores of the whole model, rounded down, but never all of a layer. Scores must be comparable
      between layers: "flap" and "random" are; "s4" prefers layers that look at the image.

    Under grouped-query attention whole groups go, and an equal number of query heads from each that stays; the number
    nearest to the quota of the layer is taken. The rate that comes out is `plan.rate`.

    Args:
        scores: From `calibrate_heads`.
        rate: Share of the heads that should go, between 0 and 1; only "early_skip" has one of its own.
        kind: As above.
        protect: Layers that keep all their heads, by number or pattern ("*layers.0.*"); the rate is of the others.

    Returns:
        The plan, for all scored layers.

    Raises:
        RecipeError: An option cannot be used, a layer would lose all its heads, or no head would go.
    """
    if kind not in get_args(Kind):
        raise RecipeError(f"kind={kind!r} must be one of {', '.join(get_args(Kind))}.")
    if rate is None:
        if kind != "early_skip":
            raise RecipeError(f"kind={kind!r} needs a rate, such as 0.2; only 'early_skip' has one of its own.")
        rate = EARLY_SKIP_RATE
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < 1:
        raise RecipeError(f"rate={rate!r} must be between 0 and 1, such as 0.2 for one head of five.")
    kept = _protected(tuple(scores.values), protect)
    values = {name: own for name, own in scores.values.items() if name not in kept}
    if not values:
        raise RecipeError(f"protect keeps all {len(kept)} layers: no head can go.")
    heads = scores.num_heads
    quotas = dict.fromkeys(heads, 0) | _quotas(kind, heads, values, rate)
    full = [name for name, quota in quotas.items() if quota >= heads[name]]
    wanted = int(rate * sum(len(own) for own in values.values()))
    if full or (kind == "global" and sum(quotas.values()) < wanted):
        name = full[0] if full else next(iter(values))
        raise RecipeError(f"rate={rate:g} ({kind}) would leave {name} without a head of {heads[name]}. Lower the rate.")
    removed, carry = {}, 0
    for name, quota in quotas.items():
        goal = quota
        if quota and kind in ("adaptive", "global"):  # these promise a total: what groups forbid, the next layer does
            goal = min(max(quota + carry, 0), heads[name] - 1)
        removed[name] = chosen_heads(scores.values[name], scores.num_kv_heads[name], goal) if goal else ()
        carry += quota - len(removed[name])
    if not any(removed.values()):
        raise RecipeError(
            f"rate={rate:g} ({kind}) removes no head: the layers have {min(heads.values())} to {max(heads.values())} "
            "heads, and only whole heads (of all groups alike, or whole groups) can go. Raise the rate."
        )
    how = {"kind": kind, "rate": float(rate), "method": scores.method, "protected": sorted(kept)}
    return HeadPlan(removed, heads, scores.num_kv_heads, how | {"model": dict(scores.model)})


def _quotas(
    kind: Kind, heads: Mapping[str, int], values: Mapping[str, tuple[float, ...]], rate: float
) -> dict[str, int]:
    """Heads that go by layer, of the layers that are not protected."""
    if kind == "global":
        return global_quotas(values, rate)
    # Early and late are places in the whole model, whatever is protected.
    weigh = {"uniform": uniform_quotas, "adaptive": adaptive_quotas, "early_skip": early_skip_quotas}[kind]
    return weigh({name: count if name in values else 0 for name, count in heads.items()}, rate)


def _protected(names: tuple[str, ...], protect: Iterable[int | str]) -> set[str]:
    found: set[str] = set()
    for wanted in [protect] if isinstance(protect, int | str) else protect:
        if isinstance(wanted, int):
            fitting = {names[wanted]} if 0 <= wanted < len(names) else set()
        else:
            fitting = {name for name in names if fnmatchcase(name, wanted)}
        if not fitting:
            raise RecipeError(
                f"protect={wanted!r} fits no layer. There are 0 to {len(names) - 1}, {names[0]} to {names[-1]}."
            )
        found |= fitting
    return found


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _by_group(heads: tuple[int, ...], size: int) -> dict[int, tuple[int, ...]]:
    """Query heads by the key/value head that they read; groups without one are not there."""
    groups: dict[int, list[int]] = {}
    for head in heads:
        groups.setdefault(head // size, []).append(head)
    return {group: tuple(own) for group, own in groups.items()}
