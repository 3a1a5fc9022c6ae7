"""Warns when a model with a warm-up of the axial start (`init_warmup_steps`) is trained without `AxialRamp`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sfa_adapters.config import SFAConfig
from sfa_adapters.errors import SFAWarning

__all__ = ["RampWatch"]

# Loading a file changes the values once; every optimizer step changes them again.
CHANGES = 2


class RampWatch:
    """Detects training without `AxialRamp` in one tower, from one tensor per adapter, and warns once.

    Steps are counted as changes of a tensor between forwards, not as forwards: gradient checkpointing runs forwards
    twice, and accumulation runs several per step.
    """

    def __init__(self) -> None:
        self.warned = False
        self.seen: dict[str, tuple[int, int, int]] = {}  # adapter: layer, version of its tensor, changes

    def see_forward(self, layer: int, adapter: str, config: SFAConfig, tensor: Tensor | None) -> None:
        """Counts changes of the scalars before a layer runs, and warns at the second.

        Args:
            layer: Its number.
            adapter: An adapter that is active in it.
            config: Configuration of the adapter.
            tensor: Trainable scalars of the adapter, or None.
        """
        if self.warned or not config.waits_for_ramp or tensor is None or not torch.is_grad_enabled():
            return
        first, version, changes = self.seen.get(adapter, (layer, tensor._version, 0))
        if first != layer:
            return
        changes += tensor._version != version
        self.seen[adapter] = (layer, tensor._version, changes)
        if changes >= CHANGES:
            self._warn(f"training has changed the scalars {changes} times")

    def see_state(self, config: SFAConfig, values: Mapping[str, Tensor], heads: Mapping[str, Any]) -> None:
        """Warns, when a state dict is made, if scalars that should still be zero were trained without the ramp.

        Args:
            config: Configuration of the adapter.
            values: Scalars of the layer by term.
            heads: Heads of the layer that start strong, by term.
        """
        if self.warned or not config.waits_for_ramp:
            return
        for axis, chosen in heads.items():
            tensor = values.get(axis)
            # Sharded and flattened tensors are skipped: reading them would be a collective, or read other scalars.
            if not chosen or tensor is None or type(tensor.data) is not Tensor or tensor.is_meta:
                continue
            if tensor.ndim == 1 and len(tensor) > max(chosen) and bool(tensor.detach()[chosen].any()):
                self._warn("the scalars were trained")
                return

    def _warn(self, what: str) -> None:
        self.warned = True
        warnings.warn(
            f"init_warmup_steps is set and {what}, but AxialRamp.step() never ran, so the axial start is still at "
            "strength 0. Call ramp = AxialRamp(model) before training and ramp.step() after each optimizer.step(), "
            "train with SFATrainerMixin, or set init_warmup_steps=0.",
            SFAWarning,
            stacklevel=3,
        )
