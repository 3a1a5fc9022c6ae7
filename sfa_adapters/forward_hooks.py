"""The hooks that tell a `ForwardLog` when a tower runs and which hidden states pass its encoder and layers.

They are functions that find the log in their module, so that copies of a model have their own. Several logs may watch
one tower; each has a name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sfa_adapters.forwards import ForwardLog

__all__ = ["add_hook", "hidden_states_of", "holders_of", "unwatch_forwards", "watch_forwards"]


def watch_forwards(tower: nn.Module, attentions: Sequence[str], log: ForwardLog, name: str) -> None:
    """Hooks a tower, once per name.

    Args:
        tower: The tower.
        attentions: Paths in it of all its attention layers.
        log: Is told.
        name: Attribute of the hooked modules under which the log stands.
    """
    above_any, _ = holders_of(attentions)
    for path in ("", *above_any):
        tower.get_submodule(path).__dict__[name] = log
    add_hook(tower, name, tower.register_forward_pre_hook(partial(enter_tower, name)))
    for path in above_any:
        module = tower.get_submodule(path)
        add_hook(module, name, module.register_forward_pre_hook(partial(note_states, name), with_kwargs=True))
    add_hook(tower, name, tower.register_forward_hook(partial(leave_tower, name), always_call=True))


def holders_of(attentions: Sequence[str]) -> tuple[list[str], list[str]]:
    """Paths in a tower of the modules that hold any of its attention layers, and of those that hold all of them."""
    ancestors = [{path[:end] for end, letter in enumerate(path) if letter == "."} for path in attentions]
    return sorted(set.union(*ancestors)), sorted({"", *set.intersection(*ancestors)})


def add_hook(module: nn.Module, name: str, handle: RemovableHandle) -> None:
    """Remembers a hook of a module for `unwatch_forwards`."""
    module.__dict__.setdefault(f"{name}_ids", []).append(handle.id)


def unwatch_forwards(module: nn.Module, name: str) -> None:
    """Takes the hooks and the log of one name out of a module, if it has some."""
    # By id: unlike handles, ids stay valid in copies and pickles of a model.
    for number in module.__dict__.pop(f"{name}_ids", ()):
        for hooks in (
            module._forward_pre_hooks,
            module._forward_pre_hooks_with_kwargs,
            module._forward_hooks,
            module._forward_hooks_always_called,
        ):
            hooks.pop(number, None)
    module.__dict__.pop(name, None)


def hidden_states_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The hidden states among the arguments of an encoder, of one of its layers or of its attention."""
    if args:
        return args[0]
    names = ("hidden_states", "inputs_embeds", "x")
    return next((kwargs[name] for name in names if name in kwargs), None)


def enter_tower(name: str, tower: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of a tower: a call begins."""
    if not torch.compiler.is_compiling():
        tower.__dict__[name].enter(tower)


def leave_tower(name: str, tower: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of a tower, called after an error, too: the call ended."""
    log: ForwardLog = tower.__dict__[name]
    log.compiled = None
    if not torch.compiler.is_compiling():
        log.leave()


def note_states(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of what holds attention layers (encoder, layer): its input belongs to this forward."""
    states = hidden_states_of(args, kwargs)
    if not torch.compiler.is_compiling() and isinstance(states, Tensor):
        module.__dict__[name].note(states, module)
