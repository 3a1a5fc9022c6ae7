"""What `pytest --pyargs sfa_adapters.testing` runs: the contract of every tower that is installed."""

import pytest

from sfa_adapters.testing.backbones import backbone_contract
from sfa_adapters.testing.cases import TowerCase
from sfa_adapters.testing.registered import NoTower

TestInstalledTowers = backbone_contract()


@pytest.mark.parametrize("entry", TestInstalledTowers.cases, ids=str)
def test_every_registered_backbone_has_a_small_tower(entry: TowerCase | NoTower) -> None:
    """A backbone without one is not tested, which must not go unseen."""
    if isinstance(entry, NoTower):
        if entry.library is not None:
            pytest.skip(entry.reason)
        pytest.fail(entry.reason)
