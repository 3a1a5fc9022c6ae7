"""What a structural bias can be made of, and how it can start: names that the command line reads without torch."""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["AXES", "DEFAULT_SFA_LR", "INITS", "TERMS", "Init", "Term"]

Term = Literal["row", "col", "dist", "block"]
TERMS: tuple[Term, ...] = get_args(Term)
Init = Literal["normal", "axial"]
INITS: tuple[Init, ...] = get_args(Init)
# The terms that a head can start strong in. Sorted as `calibrate_axial` gives heads away.
AXES = ("row", "col")
# For Adam and its kin. Recipes, `sfa_parameter_groups` and `SFATrainerMixin` take it from here.
DEFAULT_SFA_LR = 0.1
