"""`ScalarDict`: the values of one structural term in one layer, by adapter name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ScalarDict", "execution_device", "keeping_float32"]


class ScalarDict(nn.ParameterDict):
    """A `ParameterDict` that is read by calling it.

    Libraries that offload weights (accelerate) bring the parameters of a module back when that module is called, and
    only then. A plain `ParameterDict` cannot be called, so its parameters would stay on the meta device.
    """

    # ParameterDict overrides it with a method that raises.
    __call__: Callable[..., Any] = nn.Module.__call__  # pyright: ignore[reportIncompatibleMethodOverride]

    def forward(self, adapter_name: str) -> Tensor | None:
        """The values of one adapter, `[heads]` or `[heads, blocks]`, or None where it does not have this term."""
        return self.get(adapter_name)


def keeping_float32(fn: Callable[[Tensor], Tensor], kept: Iterable[Tensor]) -> Callable[[Tensor], Tensor]:
    """Wraps a function that `Module._apply` maps over tensors, so that some tensors move but are never rounded.

    A structural scalar is a few logits large. In bfloat16 the numbers around 0.25 are 0.001 to 0.002 apart, so an
    optimizer step below 1e-3 rounds to nothing there, and the scalar does not train, without an error.

    Args:
        fn: What `Module.to`, `.half()` or `.bfloat16()` does to a tensor.
        kept: Tensors that keep their precision where `fn` would give them less than 32 bits.

    Returns:
        The wrapped function.
    """
    held = list(kept)  # holding them keeps their ids from being given to other tensors
    ids = {id(tensor) for tensor in held}

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        if id(tensor) in ids and moved.is_floating_point() and torch.finfo(moved.dtype).bits < 32:
            return tensor.to(moved.device)
        return moved

    return move


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes: the device of its parameters, or of accelerate's hooks where these are offloaded."""
    parameters = list(module.parameters())
    real = next((p.device for p in parameters if p.device.type != "meta"), None)
    if real is not None or not parameters:
        return real or torch.device("cpu")
    for part in module.modules():
        hook: Any = getattr(part, "_hf_hook", None)
        for single in getattr(hook, "hooks", [hook]):
            device = getattr(single, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return torch.device("meta")
