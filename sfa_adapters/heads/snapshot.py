"""`take_probe` and `unpruned`: a snapshot of a model before pruning, and its heads restored for a while, in place.

Pruning gives modules new parameters and numbers; the old ones are still there for whoever holds them. A probe holds
them, so that the original and the pruned model can take turns in one run without a second model: only what pruning
replaced is in memory twice, for as long as the probe lives (`del probe` frees it).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sfa_adapters.errors import RecipeError
from sfa_adapters.eval_mode import evaluating
from sfa_adapters.heads.kinds import attention_kinds
from sfa_adapters.heads.prune import PRUNED
from sfa_adapters.layer import SFALayer
from sfa_adapters.moved import know_old_names
from sfa_adapters.vlm.parts import plain_model

__all__ = ["Probe", "numbers", "output_of", "take_probe", "unpruned"]

know_old_names(__name__)

# What pruning sets beside parameters. `_dense` is a mask that SFA keeps for heads as they were.
_NUMBERS = frozenset(
    ("in_features", "out_features", "num_heads", "num_key_value_heads", "num_key_value_groups", "_dense", "_lost_heads")
)


def numbers() -> frozenset[str]:
    """Names of attributes that pruning sets, those of all kinds of attention modules together."""
    return _NUMBERS.union(*(kind.widths for kind in attention_kinds()))


@dataclass(frozen=True, eq=False)
class _Part:
    """One module as it was: references, no copies."""

    module: nn.Module
    parameters: dict[str, nn.Parameter | None]
    values: dict[str, Any]
    towers: tuple[tuple[Any, Any], ...]  # configurations of SFA and what they say of the heads of the tower

    @classmethod
    def of(cls, module: nn.Module) -> _Part:
        attributes = module.__dict__
        configs = module.configs.values() if isinstance(module, SFALayer) else ()
        values = {name: attributes[name] for name in (*numbers(), PRUNED) if name in attributes}
        return cls(module, dict(module._parameters), values, tuple((config, config.tower) for config in configs))

    def put_back(self) -> None:
        self.module._parameters.update(self.parameters)
        for name in (*numbers(), PRUNED):
            self.module.__dict__.pop(name, None)
        self.module.__dict__.update(self.values)
        for config, tower in self.towers:
            config.tower = tower


@dataclass(frozen=True, eq=False)
class Probe:
    """A model before pruning.

    Attributes:
        inputs: The probe batch.
        output: What the model gave for it: logits, or the hidden states of a tower; float32 on the CPU.
        parameters: Parameters that it had.
        parts: Its modules with the weights and numbers that they had, by reference: old weights live as long as the
            probe does.
    """

    inputs: Mapping[str, Any]
    output: Tensor
    parameters: int
    parts: tuple[Any, ...] = ()


def take_probe(model: nn.Module, inputs: Mapping[str, Any]) -> Probe:
    """Runs a model on a probe batch before it is pruned, and keeps hold of its weights.

    Args:
        model: The model.
        inputs: Keyword arguments of its forward; with an image where the model takes one.

    Returns:
        What `prune_receipt` and `unpruned` need. It holds the weights that pruning replaces: delete it when they are
        not needed any more.

    Raises:
        RecipeError: Its output is not finite, or none was found.
    """
    output = output_of(model, inputs)
    count = sum(parameter.numel() for parameter in model.parameters())
    return Probe(dict(inputs), output, count, tuple(_Part.of(module) for module in plain_model(model).modules()))


@contextmanager
def unpruned(probe: Probe, model: nn.Module) -> Iterator[None]:
    """Context manager that gives a pruned model its heads back; it is pruned again afterwards, also after an error.

    Nothing is copied. Inside, the model counts as unpruned.

    Args:
        probe: From `take_probe` of the same model before.
        model: The pruned model.

    Raises:
        RecipeError: Modules came or went since the probe was taken (LoRA, quantisation), or the model was moved or
            cast. The model is as it was.

    Example:
        >>> with unpruned(probe, model):  # doctest: +SKIP
        ...     before = model(**inputs)
        >>> after = model(**inputs)  # doctest: +SKIP
    """
    now = [_Part.of(module) for module in plain_model(model).modules()]
    _check_same(probe, now, type(plain_model(model)).__name__)
    for part in probe.parts:
        part.put_back()
    try:
        yield
    finally:
        for part in now:
            part.put_back()


def _check_same(probe: Probe, now: list[_Part], name: str) -> None:
    if {part.module for part in probe.parts} != {part.module for part in now}:
        raise RecipeError(
            f"{name} has other modules than when the probe was taken. Put adapters on before the probe, or after the "
            "receipt, and give it the model itself, never a reload."
        )
    current = {part.module: part.parameters for part in now}
    for part in probe.parts:
        for key, old in part.parameters.items():
            new = current[part.module].get(key)
            if old is not None and new is not None and (old.device, old.dtype) != (new.device, new.dtype):
                raise RecipeError(
                    f"{name} was {old.dtype} on {old.device} when the probe was taken and is {new.dtype} on "
                    f"{new.device} now. Move and cast it before the probe."
                )


def output_of(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Logits or hidden states, in eval mode, float32 on the CPU.

    Raises:
        RecipeError: There are none, or they are not finite.
    """
    with evaluating(model):
        output: Any = model(**inputs)
    if not isinstance(output, Tensor):
        logits = getattr(output, "logits", None)
        output = getattr(output, "last_hidden_state", None) if logits is None else logits
    if not isinstance(output, Tensor):
        raise RecipeError(f"{type(model).__name__} gives neither logits nor hidden states for the probe batch.")
    if not bool(output.isfinite().all()):
        raise RecipeError(f"{type(model).__name__} gives values that are not finite for the probe batch.")
    return output.detach().float().cpu()
