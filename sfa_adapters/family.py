"""Families of towers of transformers that differ in little but their names: one line for each member.

A family's tokens lie in one way, so that one `Backbone` serves all of it; its members say under which names their
classes stand and how many prefix tokens they have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from sfa_adapters.class_names import matches
from sfa_adapters.pixel_grids import config_grid
from sfa_adapters.registry import Geometry

__all__ = ["Member", "attention_patterns", "grid_behind_prefix", "tower_patterns"]


@dataclass(frozen=True)
class Member:
    """One member of a family.

    Attributes:
        folder: Its folder in `transformers.models`.
        towers: Class names of its towers, separated by spaces.
        attentions: Class names of their attention modules, likewise.
        prefix: Leading tokens without a place (CLS, registers), or a function that reads their number from a tower.
    """

    folder: str
    towers: str
    attentions: str
    prefix: int | Callable[[nn.Module], int] = 0

    def patterns(self, names: str) -> tuple[str, ...]:
        """Patterns over `module.Class` for class names of this member, as `Backbone` takes them."""
        return tuple(f"transformers.models.{self.folder}.*.{name}" for name in names.split())


def tower_patterns(members: Sequence[Member]) -> tuple[str, ...]:
    """`Backbone.towers` of a family."""
    return tuple(pattern for member in members for pattern in member.patterns(member.towers))


def attention_patterns(members: Sequence[Member]) -> tuple[str, ...]:
    """`Backbone.attentions` of a family."""
    return tuple(pattern for member in members for pattern in member.patterns(member.attentions))


def grid_behind_prefix(members: Sequence[Member]) -> Callable[[nn.Module], Geometry]:
    """`Backbone.geometry` of a family: the grid of the configuration, behind the prefix of the member."""

    def geometry(tower: nn.Module) -> Geometry:
        member = next(member for member in members if matches(tower, member.patterns(member.towers)))
        prefix = member.prefix if isinstance(member.prefix, int) else member.prefix(tower)
        return Geometry(grid=config_grid(tower), prefix_tokens=prefix)

    return geometry
