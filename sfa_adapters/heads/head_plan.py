"""`HeadPlan`: which attention heads to prune from which layers. Made by `plan_heads`, applied by `prune_heads`.

Query heads are numbered as in the model before pruning. With grouped-query attention query head h reads key/value head
h // (num_heads / num_kv_heads), and a layer must have the same number of query heads for every key/value head. So whole
groups can be removed, and an equal number of query heads from each remaining group.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sfa_adapters.errors import RecipeError

__all__ = ["HeadPlan"]

_VERSION = 1


@dataclass(frozen=True)
class HeadPlan:
    """Which attention heads to prune from which layers.

    Attributes:
        removed: For each attention module (its path), the query heads to prune, sorted; an empty tuple where all stay.
        num_heads: Query heads of each of these modules before pruning.
        num_kv_heads: Key/value heads of each of them before pruning; the same number without grouped queries.
        how: How the plan was made (kind, rate, scores), for the record only.

    Raises:
        RecipeError: The plan is empty, the modules of the three differ, a head does not exist or is named twice, a
            layer would lose all its heads, or the remaining groups would not have equal numbers of query heads.
    """

    removed: Mapping[str, tuple[int, ...]]
    num_heads: Mapping[str, int]
    num_kv_heads: Mapping[str, int]
    how: Mapping[str, Any] = field(default_factory=dict[str, Any])

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
        # Copies, so that the plan cannot change after it was checked.
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
        left = {group: len(members) for group, members in _by_group(self.kept(name), heads // groups).items()}
        if len(set(left.values())) > 1:
            raise RecipeError(
                f"{name}: the key/value groups that stay would have {left} query heads (by group); attention needs the "
                "same number in each. plan_heads makes plans that can be carried out."
            )

    def kept(self, name: str) -> tuple[int, ...]:
        """The query heads of a module that are kept, sorted."""
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
        """Number of query heads to prune."""
        return sum(len(heads) for heads in self.removed.values())

    @property
    def rate(self) -> float:
        """Share of the query heads to prune, 0 to 1."""
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
        """Reads a plan that `to_json` wrote.

        Raises:
            RecipeError: The text is not a head plan, has another version, or the plan cannot be applied.
        """
        try:
            record = json.loads(text)
            if record["version"] != _VERSION:
                raise RecipeError(
                    f"The head plan has version {record['version']!r}; this library reads {_VERSION}. Update it."
                )
            layers = dict(record["layers"])
            removed = {name: tuple(layer["removed"]) for name, layer in layers.items()}
            num_heads = {name: layer["num_heads"] for name, layer in layers.items()}
            num_kv_heads = {name: layer["num_kv_heads"] for name, layer in layers.items()}
            how = dict(record["how"])
        except RecipeError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RecipeError(f"This is no head plan ({type(error).__name__}: {error}). Plan anew.") from error
        return cls(removed, num_heads, num_kv_heads, how)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _by_group(heads: tuple[int, ...], size: int) -> dict[int, tuple[int, ...]]:
    """Groups query heads by the key/value head that they read; empty groups are left out."""
    groups: dict[int, list[int]] = {}
    for head in heads:
        groups.setdefault(head // size, []).append(head)
    return {group: tuple(members) for group, members in groups.items()}
