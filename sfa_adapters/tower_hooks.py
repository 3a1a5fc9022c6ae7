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
    if state.log.current() is None or not isinstance(output, Tensor) or not output.is_floating_point():
        return None
    begins = not output.requires_grad and _must_begin(state)
    if begins:
        output = begin_gradient(output)
    state.log.note(output)
    return output if begins else None


def _must_begin(state: TowerState) -> bool:
    """Whether to start the graph at the embedding: if layer 0 trains or checkpointing needs it; it costs memory."""
    first = state.first_training_layer()
    tower = state.log.tower()
    if first is None or first == 0 or tower is None:
        return first is not None
    flags = ("gradient_checkpointing", "grad_checkpointing")
    return any(getattr(module, flag, False) for module in tower.modules() for flag in flags)
