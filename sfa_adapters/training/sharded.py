"""Gathers and restores the state of an optimizer whose parameters are sharded (FSDP2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

__all__ = ["load_optimizer", "optimizer_state"]


def optimizer_state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Gathers the state of an optimizer; call it in every process.

    Args:
        model: The sharded model.
        optimizer: Its optimizer, bare or wrapped by accelerate.

    Returns:
        The whole state on the CPU, by parameter name; in all but the first process it is empty.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_optimizer_state_dict(model, _bare(optimizer), options=options)


def load_optimizer(model: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
    """Restores a gathered state; call it in every process, with the state in each.

    Args:
        model: The sharded model.
        optimizer: Its optimizer, bare or wrapped by accelerate.
        state: What `optimizer_state` returned in the first process.
    """
    set_optimizer_state_dict(model, _bare(optimizer), state, options=StateDictOptions(full_state_dict=True))


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)
