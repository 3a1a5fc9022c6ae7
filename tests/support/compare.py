"""Comparisons for tests: the contract suite's own helpers, and one for caches of generation."""

from typing import Any

from torch import nn

from sfa_adapters.compat import with_cache
from sfa_adapters.testing.compare import (
    Snapshot,
    assert_close,
    assert_same_gradients,
    difference,
    fill,
    freeze_base,
    gradients,
    injected,
    loss_of,
    read,
    set_backend,
    strong_config,
    structural,
)

__all__ = [
    "Snapshot",
    "assert_close",
    "assert_same_gradients",
    "difference",
    "fill",
    "freeze_base",
    "gradients",
    "injected",
    "loss_of",
    "passing",
    "read",
    "set_backend",
    "strong_config",
    "structural",
]


def passing(model: nn.Module, cache: Any) -> dict[str, Any]:
    """A cache as an argument of a model or of its `generate`, under the name that this version of transformers has."""
    return with_cache(model, {}, cache)
