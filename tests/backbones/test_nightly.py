"""The whole contract over every small tower, also over those that only a nightly job runs: `pytest -m nightly`."""

import pytest

from sfa_adapters.testing.backbones import backbone_contract
from sfa_adapters.testing.registered import small_towers

pytestmark = pytest.mark.nightly

TestEveryTower = backbone_contract(*small_towers(runs=("bias", "nightly")))
