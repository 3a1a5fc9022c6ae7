"""The hooks with which a tower keeps its `TowerState` up to date. No forward is changed.

Beside those of `forward_hooks`: (1) in front of its image module the shape of the images is noted; (2) behind its
embedding the autograd graph begins where scalars train.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfa_adapters.forward_hooks import add_hook, holders_of, unwatch_forwards, watch_forwards
from sfa_adapters.forwards import begin_gradient
from sfa_adapters.tower import STATE_NAME, TowerState

__all__ = ["hook_tower", "unhook_idle_towers"]

LOG_NAME = "_sfa_log"


def hook_tower(tower: nn.Module, attentions: Sequence[str], state: TowerState) -> None:
    """Hooks a tower, once.

    Args:
        tower: The tower.
        attentions: Paths in it of all its attention layers.
        state: What its layers share.
    """
    watch_forwards(tower, attentions, state.log, LOG_NAME)
    tower.__dict__[STATE_NAME] = state
    seer = tower.get_submodule(state.backbone.image_module)
    seer.__dict__[STATE_NAME] = state
    add_hook(seer, LOG_NAME, seer.register_forward_pre_hook(see_tower_input, with_kwargs=True))
    above_any, above_all = holders_of(attentions)
    for path in above_all:
        for name, child in tower.get_submodule(path).named_children():
            child_path = f"{path}.{name}" if path else name
            beside = child_path not in above_any and child_path not in attentions
            if beside and next(child.parameters(), None) is not None:
                child.__dict__[STATE_NAME] = state
                add_hook(child, LOG_NAME, child.register_forward_hook(begin_graph))


def unhook_idle_towers(model: nn.Module) -> list[nn.Module]:
    """Takes hooks and states out of all towers that have no SFA layer any more, and returns those towers."""
    states = [module.__dict__[STATE_NAME] for module in model.modules() if STATE_NAME in module.__dict__]
    idle = {id(state) for state in states if not state.layers} | {id(state.log) for state in states if not state.layers}
    towers: list[nn.Module] = []
    for module in list(model.modules()):
        state, log = module.__dict__.get(STATE_NAME), module.__dict__.get(LOG_NAME)
        if id(state) not in idle and id(log) not in idle:
            continue
        if state is not None and log is not None:
            towers.append(module)
        unwatch_forwards(module, LOG_NAME)
        module.__dict__.pop(STATE_NAME, None)
    return towers


def see_tower_input(seer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the module that `Backbone.image_module` names: notes the grid of the images."""
    seer.__dict__[STATE_NAME].see_input(seer, args, kwargs)


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
