"""DyMU: similar tokens merge inside the vision tower, and the language model gets fewer of them."""

from sfa_adapters.reduction.dymu.calibrate import calibrate_dymu
from sfa_adapters.reduction.dymu.config import DyMUConfig, load_dymu, save_dymu
from sfa_adapters.reduction.dymu.inject import (
    TokenCounts,
    dymu_state,
    eject_dymu,
    inject_dymu,
    token_counts,
    tower_signature,
)

__all__ = [
    "DyMUConfig",
    "TokenCounts",
    "calibrate_dymu",
    "dymu_state",
    "eject_dymu",
    "inject_dymu",
    "load_dymu",
    "save_dymu",
    "token_counts",
    "tower_signature",
]
