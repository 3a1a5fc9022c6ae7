"""The host contract suite over every record of a vision-language model."""

import pytest

from sfa_adapters.testing.test_hosts import HOST_CLASSES, test_every_record_has_a_small_model
from tests.support.nightly_hosts import NIGHTLY

__all__ = ["test_every_record_has_a_small_model"]


def _suites() -> dict[str, type]:
    """The suite of each host; those of hosts that repeat another one have the marker `nightly`."""
    suites: dict[str, type] = {}
    for name, suite in HOST_CLASSES.items():
        nightly = {"pytestmark": pytest.mark.nightly} if suite.family in NIGHTLY else {}
        suites[name] = type(name, (suite,), {"__module__": __name__, **nightly})
    return suites


globals().update(_suites())
