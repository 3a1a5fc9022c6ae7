"""The hooks with which a tower keeps its `TowerState` up to date. No forward is changed.

Hooks: (1) in front of and behind the tower, a call of it begins and ends; (2) in front of its image module the shape of
the images is noted; (3) behind its embedding the autograd graph begins where scalars train; (4) in front of the modules
that hold the attention layers, hidden states are noted as belonging to this forward. They are functions that find the
state in their module, so that copies of a model have their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sfa_adapters.forwards import ForwardLog, begin_gradient
from sfa_adapters.tower import STATE_NAME, TowerState, hidden_states_of

__all__ = ["hook_tower", "unhook_tower"]

HOOK_IDS = "_sfa_hook_ids"


def hook_tower(tower: nn.Module, attentions: Sequence[str], state: TowerState) -> None:
    """Hooks a tower, once.

    Args:
        tower: The tower.
        attentions: Paths in it of all its attention layers.
        state: What its layers share.
    """
    ancestors = [{path[:end] for end, letter in enumerate(path) if letter == "."} for path in attentions]
    above_all = {"", *set.intersection(*ancestors)}
    above_any = set.union(*ancestors)
    _hook(tower, state, tower.register_forward_pre_hook(enter_tower))
    seer = tower.get_submodule(state.backbone.image_module)
    _hook(seer, state, seer.register_forward_pre_hook(see_tower_input, with_kwargs=True))
    for path in sorted(above_any):
        module = tower.get_submodule(path)
        _hook(module, state, module.register_forward_pre_hook(note_states, with_kwargs=True))
    for path in sorted(above_all):
        for name, child in tower.get_submodule(path).named_children():
            child_path = f"{path}.{name}" if path else name
            beside = child_path not in above_any and child_path not in attentions
            if beside and next(child.parameters(), None) is not None:
                _hook(child, state, child.register_forward_hook(begin_graph))
    _hook(tower, state, tower.register_forward_hook(leave_tower, always_call=True))


def _hook(module: nn.Module, state: TowerState, handle: RemovableHandle) -> None:
    module.__dict__[STATE_NAME] = state
    module.__dict__.setdefault(HOOK_IDS, []).append(handle.id)


def unhook_tower(module: nn.Module) -> None:
    """Takes the hooks and the state of a tower out of a module, if it has some."""
    # By id: unlike handles, ids stay valid in copies and pickles of a model.
    for number in module.__dict__.pop(HOOK_IDS, ()):
        for hooks in (
            module._forward_pre_hooks,
            module._forward_pre_hooks_with_kwargs,
            module._forward_hooks,
            module._forward_hooks_always_called,
        ):
            hooks.pop(number, None)
    module.__dict__.pop(STATE_NAME, None)


def enter_tower(tower: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of a tower: a call begins."""
    if not torch.compiler.is_compiling():
        tower.__dict__[STATE_NAME].log.enter(tower)


def leave_tower(tower: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of a tower, called after an error, too: the call ended."""
    log: ForwardLog = tower.__dict__[STATE_NAME].log
    log.compiled = None
    if not torch.compiler.is_compiling():
        log.leave()


def see_tower_input(seer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the module that `Backbone.image_module` names: notes the grid of the images."""
    seer.__dict__[STATE_NAME].see_input(seer, args, kwargs)


def note_states(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of what holds attention layers (encoder, layer): its input belongs to this forward."""
    states = hidden_states_of(args, kwargs)
    if not torch.compiler.is_compiling() and isinstance(states, Tensor):
        module.__dict__[STATE_NAME].log.note(states)


def begin_graph(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of what makes the tokens (embedding, norm): from here on they require gradients, if scalars train.

    As `enable_input_require_grads` of transformers does: reentrant checkpointing of a frozen tower would train nothing.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    state: TowerState = module.__dict__[STATE_NAME]
    if state.log.current() is None or not isinstance(output, Tensor) or not output.is_floating_point():
        return None
    begins = not output.requires_grad and _must_begin(state)
    if begins:
        output = begin_gradient(output)
    state.log.note(output)
    return output if begins else None


def _must_begin(state: TowerState) -> bool:
    """A graph that begins far in front of the first scalar costs memory: only where checkpointing needs it."""
    first = state.first_training_layer()
    tower = state.log.tower()
    if first is None or first == 0 or tower is None:
        return first is not None
    flags = ("gradient_checkpointing", "grad_checkpointing")
    return any(getattr(module, flag, False) for module in tower.modules() for flag in flags)
