"""Hosts that repeat another one on the same code: a nightly job runs their part of the tests over all hosts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

__all__ = ["NIGHTLY_HOSTS", "host_parameters"]

# Idefics3 repeats SmolVLM; the tower of Gemma 3 is SigLIP, its tiles are those of InternVL in another order.
NIGHTLY_HOSTS = frozenset({"idefics3", "gemma3"})


def host_parameters(families: Iterable[str]) -> list[Any]:
    """Parameters of a test over hosts, with the mark of those that only a nightly job runs."""
    nightly = pytest.mark.nightly
    return [pytest.param(name, marks=nightly if name in NIGHTLY_HOSTS else ()) for name in families]
