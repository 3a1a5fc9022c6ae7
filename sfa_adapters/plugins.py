"""`load_entry_points`: imports the modules that installed packages name in a group of entry points, each once."""

from __future__ import annotations

import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points

__all__ = ["load_entry_points"]


@cache
def _entry_points(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Read once for each search path: it opens the metadata of every installed package."""
    return tuple(entry_points(group=group))


def load_entry_points(group: str, loaded: set[str]) -> None:
    """Imports the modules of a group that were not imported yet.

    Args:
        group: Name of the group of entry points.
        loaded: Names of those that were imported; gets the new ones. A module that fails is tried again next time.
    """
    for entry_point in _entry_points(group, tuple(sys.path)):
        if entry_point.name not in loaded:
            entry_point.load()
            loaded.add(entry_point.name)
