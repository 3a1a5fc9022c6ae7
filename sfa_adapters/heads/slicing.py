"""Slices projections: all new weights are prepared first and set together, so an error leaves the model unchanged.

The old and the new attention weights are in memory at once. Modules stay the same objects and only get new parameters,
so hooks, LoRA wrappers and references to them keep working. Optimizers hold the old parameters; make them afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from sfa_adapters.heads.kinds import base_linear

__all__ = ["Edits", "channels"]


def channels(heads: tuple[int, ...], size: int) -> Tensor:
    """Channel numbers of heads of `size` channels each, int64 `[heads * size]`."""
    return (torch.tensor(heads, dtype=torch.long)[:, None] * size + torch.arange(size)).flatten()


class Edits:
    """Collects new parameters and attributes of modules, to be set by `commit`."""

    def __init__(self) -> None:
        self.parameters: dict[tuple[nn.Module, str], nn.Parameter] = {}
        self.values: list[tuple[Any, str, Any]] = []

    def tensor(self, owner: nn.Module, name: str) -> Tensor | None:
        """A parameter as it will be after `commit`."""
        edited = self.parameters.get((owner, name))
        return owner._parameters[name] if edited is None else edited

    def put(self, owner: nn.Module, name: str, tensor: Tensor, like: Tensor) -> None:
        """Prepares a new value of a parameter, with the dtype and `requires_grad` of `like`."""
        data = tensor.detach().to(like.dtype).contiguous()
        self.parameters[owner, name] = nn.Parameter(data, requires_grad=like.requires_grad)

    def take(self, owner: nn.Module, name: str, index: Tensor, axis: int) -> None:
        """Keeps some rows (axis 0) or columns (axis 1) of a parameter, if it exists."""
        tensor = self.tensor(owner, name)
        if tensor is not None:
            with torch.no_grad():
                self.put(owner, name, tensor.index_select(axis, index.to(tensor.device)), tensor)

    def rows(self, path: str, module: nn.Module, index: Tensor) -> None:
        """Keeps some output channels of a projection, also in LoRA around it."""
        linear = base_linear(path, module)
        self.take(linear, "weight", index, 0)
        self.take(linear, "bias", index, 0)
        self.values.append((linear, "out_features", len(index)))
        if isinstance(module, LoraLinear):
            for part in module.lora_B.values():
                self.take(part, "weight", index, 0)
                self.take(part, "bias", index, 0)
                self.values.append((part, "out_features", len(index)))
            self.values.append((module, "out_features", len(index)))

    def columns(self, path: str, module: nn.Module, index: Tensor) -> None:
        """Keeps some input channels of a projection, also in LoRA around it."""
        linear = base_linear(path, module)
        self.take(linear, "weight", index, 1)
        self.values.append((linear, "in_features", len(index)))
        if isinstance(module, LoraLinear):
            for part in module.lora_A.values():
                self.take(part, "weight", index, 1)
                self.values.append((part, "in_features", len(index)))
            self.values.append((module, "in_features", len(index)))

    def scale_inputs(self, path: str, module: nn.Module, factor: float) -> None:
        """Scales the input of a projection, by scaling its weight and the `A` matrices of LoRA around it."""
        owners = [base_linear(path, module)]
        if isinstance(module, LoraLinear):
            owners += [part for part in module.lora_A.values() if isinstance(part, nn.Linear)]
        for owner in owners:
            weight = self.tensor(owner, "weight")
            assert weight is not None
            self.put(owner, "weight", weight.detach() * factor, weight)

    def commit(self) -> None:
        """Sets all new parameters and attributes; this cannot fail."""
        for (owner, name), parameter in self.parameters.items():
            owner.register_parameter(name, parameter)
        for owner, name, value in self.values:
            setattr(owner, name, value)
