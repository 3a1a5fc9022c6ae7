"""Names of the bias terms and of the initialisations, in a module that the command line can import without torch."""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["AXES", "DEFAULT_SFA_LR", "DEFAULT_TERMS", "INITS", "TERMS", "Init", "Term"]

Term = Literal["row", "col", "dist", "block"]
TERMS: tuple[Term, ...] = get_args(Term)
# In the studies of docs/results.md distance and blocks added nothing clear to these.
DEFAULT_TERMS: tuple[Term, ...] = ("row", "col")
Init = Literal["normal", "axial"]
INITS: tuple[Init, ...] = get_args(Init)
# The terms in which a head can start strong, in the order of precedence of `calibrate_axial`.
AXES = ("row", "col")
# For Adam and its variants. The default of recipes, `sfa_parameter_groups` and `SFATrainerMixin`.
DEFAULT_SFA_LR = 0.1
