"""The small towers of the contract suite, as the other tests use them."""

import pytest
from torch import nn

from sfa_adapters.testing.cases import Inputs, TowerCase, images, lively
from sfa_adapters.testing.registered import small_towers
from sfa_adapters.testing.towers_transformers import SMALL

__all__ = ["CASES", "SMALL", "Inputs", "TowerCase", "every_tower", "images", "lively", "set_checkpointing", "set_eager"]

CASES = small_towers()
every_tower = pytest.mark.parametrize("case", CASES, ids=str)


def set_eager(case: TowerCase, tower: nn.Module) -> None:
    """Moves a tower from fused to eager attention."""
    assert case.eager is not None
    case.eager(tower)


def set_checkpointing(case: TowerCase, tower: nn.Module, reentrant: bool | None) -> None:
    """Switches gradient checkpointing on, or off for None."""
    assert case.checkpointing is not None
    case.checkpointing(tower, reentrant)
