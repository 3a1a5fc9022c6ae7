"""`train_as_command`: what a recipe's file does when it is run by itself."""

from __future__ import annotations

import runpy
import sys

__all__ = ["train_as_command"]


def train_as_command(name: str) -> None:
    """`sfa train NAME` with the arguments of the command line.

    Args:
        name: Of the recipe.
    """
    sys.argv[1:1] = ["train", name]
    runpy.run_module("sfa_adapters", run_name="__main__")
