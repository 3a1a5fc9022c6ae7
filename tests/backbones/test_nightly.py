"""The whole contract over every small tower, also over those that only a nightly job runs: `pytest -m nightly`."""

import pytest

from sfa_adapters.testing.backbones import backbone_contract
from sfa_adapters.testing.cases import TowerCase
from sfa_adapters.testing.registered import towers_or_reasons

pytestmark = pytest.mark.nightly

ENTRIES = towers_or_reasons(runs=("bias", "nightly"))
TestEveryTower = backbone_contract(*(entry for entry in ENTRIES if isinstance(entry, TowerCase)))
