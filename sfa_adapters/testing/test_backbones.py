"""The contract suite over all installed towers, for `pytest --pyargs sfa_adapters.testing`."""

import pytest

from sfa_adapters.registry import registered_backbones
from sfa_adapters.testing.backbones import backbone_contract
from sfa_adapters.testing.cases import NoTower, TowerCase
from sfa_adapters.testing.contract_bias import BiasContract
from sfa_adapters.testing.registered import towers_or_reasons

TestInstalledTowers = backbone_contract()


class TestBiasOfFurtherTowers(BiasContract):
    """The part about the bias, for towers that ask for no more of each run (`TowerCase.runs`)."""

    cases = tuple(entry for entry in towers_or_reasons(runs=("bias",)) if isinstance(entry, TowerCase))


@pytest.mark.parametrize("backbone", sorted(registered_backbones()))
def test_every_registered_backbone_has_a_small_tower(backbone: str) -> None:
    """A backbone without one would not be tested."""
    for entry in towers_or_reasons(backbone):
        if isinstance(entry, NoTower):
            skip_or_fail = pytest.fail if entry.library is None else pytest.skip
            skip_or_fail(entry.reason)
