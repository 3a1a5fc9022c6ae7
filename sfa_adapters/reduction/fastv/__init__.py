"""FastV: image tokens that the first layers of the language model hardly attend to are dropped after them."""

from sfa_adapters.reduction.fastv.inject import FastVConfig, eject_fastv, inject_fastv

__all__ = ["FastVConfig", "eject_fastv", "inject_fastv"]
