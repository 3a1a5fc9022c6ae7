"""Modules are recognised by the names of their classes, `module.Class`: paths in models moved too often."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

__all__ = ["matches", "qualified_name"]


def qualified_name(module: nn.Module) -> str:
    """`module.Class` of a module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def matches(module: nn.Module, patterns: Sequence[str]) -> bool:
    """Whether the class of a module, or a class it derives from, fits one of the patterns, as in `fnmatch`."""
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__]
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
