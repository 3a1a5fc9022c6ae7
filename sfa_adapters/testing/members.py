"""Small towers of families of transformers: one line for each member, which an older release may not have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Literal

from torch import nn

from sfa_adapters.compat import eager_takes_masks, has_vision_model
from sfa_adapters.testing.cases import Grid, Inputs, NoTower, TowerCase, lively, or_no_tower

__all__ = ["Small", "grids_of_patches", "installed"]


class Small:
    """One member of a family: the classes of its tower, and what its case has of its own.

    Args:
        module: Module in `transformers.models` that has both classes, e.g. `vit.modeling_vit`.
        tower: Class of the tower.
        config: Class of its configuration.
        options: Options of the configuration, on top of those of the family.
        **case: Fields of the `TowerCase`, likewise.
    """

    def __init__(
        self, module: str, tower: str, config: str, options: Mapping[str, Any] | None = None, **case: Any
    ) -> None:
        self.module, self.tower, self.config = module, tower, config
        self.options, self.case = options or {}, case

    @property
    def there(self) -> bool:
        """Whether the installed transformers has it, and it works."""
        return has_vision_model(self.module.partition(".")[0])

    def build(self, options: Mapping[str, Any]) -> nn.Module:
        """The tower, with random weights."""
        module = import_module(f"transformers.models.{self.module}")
        config = getattr(module, self.config)(**{**options, **self.options})
        return getattr(module, self.tower)(config)

    def tower_case(
        self, options: Mapping[str, Any], common: Mapping[str, Any], runs: Literal["everything", "bias", "nightly"]
    ) -> TowerCase:
        """Its case, named after its folder if it brings no name."""
        folder = self.module.partition(".")[0]
        fields: dict[str, Any] = {"name": folder, "runs": runs, **common, **self.case}
        if not eager_takes_masks(folder):
            fields["eager_takes_bias"] = False
        return TowerCase(**fields, build=lively(lambda: self.build(options)))


def installed(
    backbone: str, options: Mapping[str, Any], common: Mapping[str, Any], members: Sequence[Small]
) -> tuple[TowerCase | NoTower, ...]:
    """The cases of those members that the installed transformers has; the first is the one that runs by default.

    Where it has none of them, the only entry says so.

    Args:
        backbone: Name of their record.
        options: Options of all their configurations.
        common: Fields that their cases have in common.
        members: The most used one first.
    """
    there = [member for member in members if member.there]
    shared = {**common, "backbone": backbone}
    cases = [m.tower_case(options, shared, "nightly" if number else "bias") for number, m in enumerate(there)]
    return or_no_tower(backbone, cases)


def grids_of_patches(patch: int, name: str = "pixel_values") -> Any:
    """`TowerCase.grids` of towers that cut all `[batch, channels, height, width]` images of an input into patches."""

    def grids(inputs: Inputs) -> list[Grid]:
        height, width = inputs[name].shape[-2:]
        return [(height // patch, width // patch)]

    return grids
