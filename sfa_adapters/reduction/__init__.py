"""Fewer tokens: DyMU merges similar ones in the tower, FastV drops unattended ones in the language model."""

from sfa_adapters.reduction.dymu import (
    DyMUConfig,
    calibrate_dymu,
    eject_dymu,
    inject_dymu,
    load_dymu,
    save_dymu,
    token_counts,
)
from sfa_adapters.reduction.fastv import FastVConfig, eject_fastv, inject_fastv

__all__ = [
    "DyMUConfig",
    "FastVConfig",
    "calibrate_dymu",
    "eject_dymu",
    "eject_fastv",
    "inject_dymu",
    "inject_fastv",
    "load_dymu",
    "save_dymu",
    "token_counts",
]
