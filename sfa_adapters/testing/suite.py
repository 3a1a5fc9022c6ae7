"""`Suite`: a class of tests that runs on the small towers that a subclass names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import pytest

from sfa_adapters.testing.cases import NoTower, TowerCase

__all__ = ["Suite", "needs", "reentrant_or_not"]

Test = TypeVar("Test", bound=Callable[..., Any])
Need = Callable[[TowerCase], bool]

reentrant_or_not = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])


def needs(reason: str, holds: Need) -> Callable[[Test], Test]:
    """Runs a test only for small towers of some kind; where there are none, a skipped test says why.

    Args:
        reason: What the tower must have.
        holds: Whether a tower has it.
    """

    def mark(test: Test) -> Test:
        test.__dict__["needs"] = [*test.__dict__.get("needs", []), (reason, holds)]
        return test

    return mark


class Suite:
    """Tests with an argument `case` run once for each entry of `cases`.

    Attributes:
        cases: Small towers. A backbone that has none is an entry, too: it fails, or is skipped where a library is
            missing.
    """

    cases: ClassVar[Sequence[TowerCase | NoTower]] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Hook of pytest: parametrizes a test with the cases that it runs on."""
        if "case" not in metafunc.fixturenames:
            return
        wanted: list[tuple[str, Need]] = getattr(metafunc.function, "needs", [])
        cases = [case for case in self.cases if isinstance(case, TowerCase)]
        fitting = [case for case in cases if all(holds(case) for _, holds in wanted)]
        if fitting:
            metafunc.parametrize("case", fitting, ids=str)
            return
        reason = " and ".join(reason for reason, _ in wanted) if cases else "no small tower"
        metafunc.parametrize("case", [pytest.param(None, marks=pytest.mark.skip(reason=f"needs {reason}"), id="none")])
