"""A class of the suite runs over the towers that it is given."""

from sfa_adapters.testing import BackboneContract, TowerCase, backbone_contract
from tests.support.towers import CASES


def test_a_class_runs_over_the_towers_that_it_is_given() -> None:
    assert [case.name for case in backbone_contract("siglip").cases] == ["siglip"]
    cases = backbone_contract().cases
    assert [case.name for case in cases if isinstance(case, TowerCase)] == [case.name for case in CASES]
    mine = CASES[0]
    contract = backbone_contract(mine, "siglip")
    assert issubclass(contract, BackboneContract)
    assert contract.cases[0] is mine
    assert all(isinstance(case, TowerCase) for case in contract.cases)
