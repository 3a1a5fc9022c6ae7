"""The hooks that keep the `TowerState` of a tower up to date. No forward is changed.

Besides those of `forward_hooks` and the watcher of `tower_input`, a hook behind the embedding starts the autograd graph
there if scalars train.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfa_adapters.forward_hooks import holders_of, watch_forwards
from sfa_adapters.forwards import begin_gradient
from sfa_adapters.hooks import attach, detach, state_of
from sfa_adapters.tower import SFA, TowerState
from sfa_adapters.tower_input import watch_input

__all__ = ["hook_tower", "unhook_idle_towers"]


def hook_tower(tower: nn.Module, attentions: Sequence[str], state: TowerState) -> None:
    """Attaches all hooks of SFA to a tower, once, apart from those of its attention layers.

    Args:
        tower: The tower.
        attentions: Paths in it of all its attention layers.
        state: State that its layers share.
    """
    watch_forwards(tower, attentions, SFA, state)
    watch_input(tower, state.backbone, SFA, state)
    above_any, above_all = holders_of(attentions)
    for path in above_all:
        for name, child in tower.get_submodule(path).named_children():
            child_path = f"{path}.{name}" if path else name
            beside = child_path not in above_any and child_path not in attentions
            if beside and next(child.parameters(), None) is not None:
                attach(child, SFA, state, post=begin_graph)


def unhook_idle_towers(model: nn.Module) -> list[nn.Module]:
    """Removes hooks and states from all towers without SFA layers; returns the modules that had some."""
    idle = [module for module in model.modules() if (state := state_of(module, SFA)) is not None and not state.layers]
    for module in idle:
        detach(module, SFA)
    return idle


def begin_graph(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of an embedding or norm before the layers: makes its output require gradients, if scalars train.

    As `enable_input_require_grads` of transformers: reentrant checkpointing of a frozen tower would train nothing.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    state: TowerState = state_of(module, SFA)
    states = _states_of(output)
    if state.log.current() is None or states is None or not states.is_floating_point():
        return None
    begins = not states.requires_grad and _must_begin(state)
    if begins:
        states = begin_gradient(states)
    state.log.note(states)
    return _with_states(output, states) if begins else None


def _states_of(output: Any) -> Tensor | None:
    """The hidden states in an output: itself, the first of a tuple, or `last_hidden_state` of a whole encoder."""
    if isinstance(output, dict):
        output = output.get("last_hidden_state")
    elif type(output) is tuple and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def _with_states(output: Any, states: Tensor) -> Any:
    """The output with other hidden states."""
    if isinstance(output, dict):
        output["last_hidden_state"] = states
        return output
    return (states, *output[1:]) if type(output) is tuple else states


def _must_begin(state: TowerState) -> bool:
    """Whether to start the graph at the embedding: if layer 0 trains or checkpointing needs it; it costs memory."""
    first = state.first_training_layer()
    tower = state.log.tower()
    if first is None or first == 0 or tower is None:
        return first is not None
    flags = ("gradient_checkpointing", "grad_checkpointing")
    return any(getattr(module, flag, False) for module in tower.modules() for flag in flags)
