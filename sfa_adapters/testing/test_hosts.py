"""The contract suite over all installed records of whole models, for `pytest --pyargs sfa_adapters.testing`."""

import pytest

from sfa_adapters.testing.hosts import VLMContract
from sfa_adapters.vlm.records import registered_vlms

# One class for each record, so that a failure names it.
HOST_CLASSES = {
    f"Test{name.title().replace('_', '')}": type(
        f"Test{name}", (VLMContract,), {"family": name, "__module__": __name__}
    )
    for name, spec in registered_vlms().items()
    if spec.nano is not None
}
globals().update(HOST_CLASSES)


@pytest.mark.parametrize("name", sorted(registered_vlms()))
def test_every_record_has_a_small_model(name: str) -> None:
    """A record without one would not be tested."""
    assert registered_vlms()[name].nano is not None, f"Write {name}'s nano: a small model with its processor."
