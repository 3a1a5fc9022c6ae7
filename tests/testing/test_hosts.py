"""The host contract suite over every record of a vision-language model."""

import pytest

from sfa_adapters.testing.test_hosts import HOST_CLASSES, test_every_record_has_a_small_model
from tests.support.nightly_hosts import NIGHTLY

__all__ = ["test_every_record_has_a_small_model"]


def _here(name: str, suite: type) -> type:
    """The suite of a host in this module; with the marker where it runs nightly."""
    mark = {"pytestmark": pytest.mark.nightly} if suite.family in NIGHTLY else {}  # pyright: ignore[reportAttributeAccessIssue]
    return type(name, (suite,), {"__module__": __name__, **mark})


globals().update({name: _here(name, suite) for name, suite in HOST_CLASSES.items()})
