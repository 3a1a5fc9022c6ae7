"""Contract test suites for vision towers and whole models, for packages that bring their own.

Towers: docs/adding_a_backbone.md. Whole models, `sfa_adapters.testing.hosts`: docs/adding_a_host.md.

`pytest --pyargs sfa_adapters.testing` runs them over all installed towers. Nothing else in the library imports pytest.
"""

try:
    import pytest
except ModuleNotFoundError as error:
    message = "sfa_adapters.testing holds suites for pytest, which is not installed. Run: pip install pytest"
    raise ModuleNotFoundError(message, name="pytest") from error

# So that failed asserts in these modules show their values, as in a test file.
for _part in (
    "compare",
    "reference",
    "contract_bias",
    "contract_adapters",
    "contract_training",
    "contract_checkpointing",
    "host_suite",
    "contract_records",
    "hosts",
):
    pytest.register_assert_rewrite(f"{__name__}.{_part}")

from sfa_adapters.testing.backbones import BackboneContract, backbone_contract  # noqa: E402
from sfa_adapters.testing.cases import TowerCase, images, lively, read_hidden, split_batch, turn_images  # noqa: E402
from sfa_adapters.testing.registered import small_towers  # noqa: E402

__all__ = [
    "BackboneContract",
    "TowerCase",
    "backbone_contract",
    "images",
    "lively",
    "read_hidden",
    "small_towers",
    "split_batch",
    "turn_images",
]
