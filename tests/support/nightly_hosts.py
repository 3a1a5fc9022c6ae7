"""Which tests run on which hosts: relatives of another one only with `-m nightly`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from sfa_adapters.recipes.nano.checkpoint import nano_checkpoint

__all__ = ["CORE", "NIGHTLY", "NanoFolders", "families_of"]

# Hosts that repeat another one on the same code paths. Idefics3 repeats SmolVLM; the tower of Gemma 3 is SigLIP, its
# tiles are those of InternVL in another order.
NIGHTLY = frozenset({"glm_ocr", "paddleocr_vl", "qwen3_5", "idefics3", "gemma3"})
# One host for each way in which images become image tokens.
CORE = frozenset({"internvl", "llava", "llava_onevision", "qwen2_5_vl"})


def families_of(names: Iterable[str], core: bool = False) -> list[Any]:
    """Names of records as parameters of a test; those that run nightly have the marker.

    Args:
        names: The names.
        core: Whether a few hosts are enough for each change.
    """
    late = {name for name in names if name in NIGHTLY or (core and name not in CORE)}
    return [pytest.param(name, marks=pytest.mark.nightly) if name in late else name for name in names]


class NanoFolders(dict[str, Path]):
    """The nano host of each family as a checkpoint, written when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __missing__(self, family: str) -> Path:
        self[family] = nano_checkpoint(family, self.folder / family)
        return self[family]
