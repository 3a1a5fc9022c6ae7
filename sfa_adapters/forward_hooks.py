"""The hooks that record in a `ForwardLog` when a tower runs and which hidden states enter its encoder and layers.

Several features may watch one tower; each has a log, `state.log`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sfa_adapters.forwards import ForwardLog
from sfa_adapters.hooks import attach, state_of
from sfa_adapters.moved import know_old_names

__all__ = ["hidden_states_of", "holders_of", "watch_forwards"]

know_old_names(__name__)


def watch_forwards(tower: nn.Module, attentions: Sequence[str], feature: str, state: Any) -> None:
    """Attaches these hooks to a tower, once per feature.

    Args:
        tower: The tower.
        attentions: Paths in it of all its attention layers.
        feature: Name of the feature.
        state: State of the feature, with its `ForwardLog` as `log`.
    """
    above_any, _ = holders_of(attentions)
    attach(tower, feature, state, pre=partial(enter_tower, feature))
    for path in above_any:
        attach(tower.get_submodule(path), feature, state, pre=partial(note_states, feature))
    attach(tower, feature, state, post=partial(leave_tower, feature), always_call=True)


def holders_of(attentions: Sequence[str]) -> tuple[list[str], list[str]]:
    """Paths in a tower of the modules that hold any of its attention layers, and of those that hold all of them."""
    ancestors = [{path[:end] for end, letter in enumerate(path) if letter == "."} for path in attentions]
    return sorted(set.union(*ancestors)), sorted({"", *set.intersection(*ancestors)})


def hidden_states_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The hidden states among the arguments of an encoder, of one of its layers or of its attention."""
    if args:
        return args[0]
    names = ("hidden_states", "inputs_embeds", "x")
    return next((kwargs[name] for name in names if name in kwargs), None)


def enter_tower(feature: str, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a tower: records that a call begins."""
    if not torch.compiler.is_compiling():
        state_of(tower, feature).log.enter(tower)


def leave_tower(feature: str, tower: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of a tower, also called after an error: records that the call ended."""
    log: ForwardLog = state_of(tower, feature).log
    log.compiled = None
    if not torch.compiler.is_compiling():
        log.leave()


def note_states(feature: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of an encoder or layer: records that its input belongs to this forward."""
    states = hidden_states_of(args, kwargs)
    if not torch.compiler.is_compiling() and isinstance(states, Tensor):
        state_of(module, feature).log.note(states, module)
