"""`backbone_contract`: all checks that a vision tower must pass, as one class for pytest."""

from __future__ import annotations

from sfa_adapters.testing.cases import NoTower, TowerCase
from sfa_adapters.testing.contract_adapters import AdapterContract
from sfa_adapters.testing.contract_bias import BiasContract
from sfa_adapters.testing.contract_checkpointing import CheckpointingContract
from sfa_adapters.testing.contract_training import TrainingContract
from sfa_adapters.testing.registered import towers_or_reasons

__all__ = ["BackboneContract", "backbone_contract"]


class BackboneContract(BiasContract, AdapterContract, TrainingContract, CheckpointingContract):
    """All checks of a vision tower. `backbone_contract` makes a class of it that pytest collects."""


def backbone_contract(*towers: str | TowerCase) -> type[BackboneContract]:
    """The contract suite over some small towers.

    Args:
        *towers: Names of registered backbones, whose records name their small towers (`Backbone.small_towers`), or
            small towers. By default those of every registered backbone.

    Returns:
        A class to assign to a name that pytest collects.

    Raises:
        ContractError: No backbone has that name, or its small towers cannot be used.

    Example:
        >>> TestCLIP = backbone_contract("clip")
        >>> [case.name for case in TestCLIP.cases]
        ['clip']
    """
    cases: list[TowerCase | NoTower] = []
    for tower in towers:
        cases.extend([tower] if isinstance(tower, TowerCase) else towers_or_reasons(tower))
    return type("BackboneContract", (BackboneContract,), {"cases": tuple(cases) if towers else towers_or_reasons()})
