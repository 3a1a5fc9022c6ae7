"""`AxialRamp`: a linear warm-up of the axial start, so that a trained tower is not disturbed all at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from sfa_adapters.config import SFAConfig
from sfa_adapters.errors import InjectionError, TrainingError
from sfa_adapters.layer import SFALayer
from sfa_adapters.tuner import injected_layers

__all__ = ["AxialRamp"]


class AxialRamp:
    """Adds `init_strength / init_warmup_steps` to the scalars that `init="axial"` chose, once per optimizer step.

        ramp = AxialRamp(model)
        for batch in batches:
            ...
            optimizer.step()
            ramp.step()

    The updates of the optimizer are kept. After `init_warmup_steps` steps the additions amount to `init_strength`
    exactly, and further steps do nothing. The steps taken are saved with the adapter. `SFATrainerMixin` calls `step`
    itself. Where no adapter has a warm-up, `step` does nothing.

    Args:
        model: A model with SFA. The adapters that are active now are ramped.
        done: Steps taken before, for a resumed run; by default the number saved with the adapter.

    Attributes:
        done: Steps taken, at most `steps`.
        steps: Steps of the longest warm-up; 0 where there is none.

    Raises:
        InjectionError: The model has no SFA, or `done` is negative.
    """

    def __init__(self, model: nn.Module, done: int | None = None) -> None:
        layers = [layer for _, _, layer in injected_layers(model)]
        if not layers:
            raise InjectionError(f"{type(model).__name__} has no SFA, so there is nothing to ramp.")
        if done is not None and (isinstance(done, bool) or done < 0):
            raise InjectionError(f"done={done!r} must be a number of steps, at least 0.")
        self._chosen = [
            (layer, name, layer.configs[name])
            for layer in layers
            for name in layer.active
            if layer.configs[name].init_warmup_steps
        ]
        self._configs = {id(config): config for _, _, config in self._chosen}
        self.steps = max((config.init_warmup_steps for config in self._configs.values()), default=0)
        if done is None:
            done = max((config.init_warmup_done for config in self._configs.values()), default=0)
        self.done = min(done, self.steps)
        self._note()

    @torch.no_grad()
    def step(self) -> None:
        """Raises the strength by one step; call it after each `optimizer.step()`.

        Raises:
            TrainingError: Heads were removed, or parameters flattened, since the ramp began.
        """
        if self.done >= self.steps:
            return
        for layer, name, config in self._chosen:
            if self.done < config.init_warmup_steps:
                for axis, heads in layer.configs[name].strong_heads(layer.index, layer.num_heads).items():
                    if heads:
                        _raise(layer.tensors(name)[f"sfa_{axis}"], heads, config, self.done, layer)
        self.done += 1
        self._note()

    def _note(self) -> None:
        for config in self._configs.values():
            config.init_warmup_done = min(self.done, config.init_warmup_steps)


def _raise(parameter: nn.Parameter, heads: list[int], config: SFAConfig, done: int, layer: SFALayer) -> None:
    if parameter.shape != (layer.num_heads,):
        raise TrainingError(
            f"{layer.name}: the scalars have shape {tuple(parameter.shape)} in place of ({layer.num_heads},): they "
            "were flattened (FSDP 1) or partitioned (ZeRO 3), so single heads cannot be ramped. Set "
            "init_warmup_steps=0, or shard with fully_shard."
        )
    addition = torch.zeros(layer.num_heads, dtype=torch.float64, device=parameter.device)
    # The differences of rounded targets add up without an error, also in bfloat16; a constant increment does not.
    addition[heads] = _target(config, done + 1, parameter) - _target(config, done, parameter)
    if isinstance(parameter, DTensor):
        addition = distribute_tensor(addition, parameter.device_mesh, parameter.placements)
    parameter.copy_((parameter.double() + addition).to(parameter.dtype))


def _target(config: SFAConfig, done: int, like: Tensor) -> float:
    """Strength after `done` steps, rounded to the parameter's dtype."""
    share = done / config.init_warmup_steps
    return float(torch.tensor(config.init_strength * share, dtype=torch.float64).to(like.dtype))
