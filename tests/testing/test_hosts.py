"""The host contract suite over every record of a vision-language model."""

import pytest

from sfa_adapters.testing.test_hosts import HOST_CLASSES, test_every_record_has_a_small_model
from tests.support.nightly_hosts import NIGHTLY_HOSTS

__all__ = ["test_every_record_has_a_small_model"]

for _name, _tests in HOST_CLASSES.items():
    globals()[_name] = pytest.mark.nightly(_tests) if _tests.family in NIGHTLY_HOSTS else _tests
