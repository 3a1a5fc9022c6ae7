"""Every tower that is installed keeps the contract; a few checks are about one kind of tower only."""

from sfa_adapters.testing.test_backbones import TestInstalledTowers, test_every_registered_backbone_has_a_small_tower

__all__ = ["TestInstalledTowers", "test_every_registered_backbone_has_a_small_tower"]
