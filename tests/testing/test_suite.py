"""A contract test runs on the towers that fit it, and is skipped with a reason where there are none."""

import pytest

from sfa_adapters.testing import TowerCase
from sfa_adapters.testing.cases import NoTower
from sfa_adapters.testing.suite import Suite, needs
from tests.support.towers import CASES

SQUARE = [case for case in CASES if case.name in ("clip", "timm_cls")]


class Contract(Suite):
    def test_everywhere(self, case: TowerCase) -> None: ...

    @needs("a prefix", lambda case: case.prefix > 0)
    @needs("timm", lambda case: case.library == "timm")
    def test_of_some(self, case: TowerCase) -> None: ...


class Asked:
    """A fake of pytest's `Metafunc`."""

    def __init__(self, test: str) -> None:
        self.function = getattr(Contract, test)
        self.fixturenames = ["case"]
        self.cases: list[TowerCase] = []

    def parametrize(self, name: str, values: list, ids: object = None) -> None:
        assert name == "case"
        self.cases = values


def cases_of(test: str, *cases: TowerCase | NoTower) -> list:
    metafunc = Asked(test)
    contract = Contract()
    contract.__class__ = type("Contract", (Contract,), {"cases": cases})
    contract.pytest_generate_tests(metafunc)  # pyright: ignore[reportArgumentType]
    return metafunc.cases


def test_each_test_gets_the_towers_that_fit() -> None:
    assert cases_of("test_everywhere", *SQUARE) == SQUARE
    assert cases_of("test_of_some", *SQUARE) == SQUARE[1:]
    assert cases_of("test_everywhere", NoTower("new", "none"), SQUARE[0]) == SQUARE[:1]


@pytest.mark.parametrize(
    ("test", "cases", "reason"),
    [
        ("test_of_some", SQUARE[:1], "needs timm and a prefix"),
        ("test_everywhere", [NoTower("new", "none")], "needs no small tower"),
    ],
)
def test_a_test_that_fits_none_is_skipped_with_a_reason(test: str, cases: list, reason: str) -> None:
    (parameter,) = cases_of(test, *cases)
    (mark,) = parameter.marks
    assert (mark.name, mark.kwargs["reason"]) == ("skip", reason)
