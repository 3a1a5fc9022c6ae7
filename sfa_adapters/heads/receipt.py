"""`take_probe` and `prune_receipt`: proof that heads are gone, and what changed, on the very object that is used next.

probe = take_probe(model, inputs)
model = prune_heads(model, plan)
receipt = prune_receipt(probe, model)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sfa_adapters.errors import InjectionError, RecipeError
from sfa_adapters.heads.kinds import read_geometry
from sfa_adapters.heads.prune import plain_model
from sfa_adapters.heads.pruned_files import pruned_of

__all__ = ["Probe", "PruneReceipt", "prune_receipt", "take_probe"]


@dataclass(frozen=True, eq=False)
class Probe:
    """A model before pruning.

    Attributes:
        inputs: The probe batch.
        output: What the model gave for it: logits, or the hidden states of a tower.
        parameters: Parameters that it had.
    """

    inputs: Mapping[str, Any]
    output: Tensor
    parameters: int


@dataclass(frozen=True)
class PruneReceipt:
    """What pruning did.

    Attributes:
        parameters: Parameters before and after.
        heads: Query heads before and after, by attention module.
        kv_heads: Key/value heads before and after, likewise.
        cache_channels: Numbers that a cache holds per token in these modules (keys and values), before and after; zero
            where none of them has a cache.
        largest_change: Largest absolute change of the output on the probe batch.
        mean_change: Mean absolute change of it.
        compensation: What was done for the heads that went.
    """

    parameters: tuple[int, int]
    heads: Mapping[str, tuple[int, int]]
    kv_heads: Mapping[str, tuple[int, int]]
    cache_channels: tuple[int, int]
    largest_change: float
    mean_change: float
    compensation: str

    def __str__(self) -> str:
        """A few lines to read."""
        before, after = self.parameters
        lost = sum(b - a for b, a in self.heads.values())
        lines = [
            f"parameters    {before:,} -> {after:,} ({after / before - 1:+.2%})",
            f"heads         {lost} of {sum(b for b, _ in self.heads.values())} gone in {len(self.heads)} modules",
            f"cache         {self.cache_channels[0]:,} -> {self.cache_channels[1]:,} numbers per token",
            f"output        changed by {self.mean_change:.3g} on average, {self.largest_change:.3g} at most",
            f"compensation  {self.compensation}",
        ]
        for name, (was, left) in self.heads.items():
            kv = "" if self.kv_heads[name] == (was, left) else " (key/value {} -> {})".format(*self.kv_heads[name])
            lines.append(f"  {name}  {was} -> {left}{kv}")
        return "\n".join(lines)


def take_probe(model: nn.Module, inputs: Mapping[str, Any]) -> Probe:
    """Runs a model on a probe batch before it is pruned.

    Args:
        model: The model.
        inputs: Keyword arguments of its forward.

    Raises:
        RecipeError: Its output is not finite, or none was found.
    """
    return Probe(dict(inputs), _output(model, inputs), _count(model))


def prune_receipt(probe: Probe, model: nn.Module) -> PruneReceipt:
    """Compares a pruned model with its probe.

    Args:
        probe: From `take_probe` of the same model before.
        model: The pruned model itself, never a reload by name.

    Raises:
        InjectionError: The model lost no heads, no parameters, or its output is the same to the last bit: nothing
            happened.
        RecipeError: The output is not finite, or of another shape than before.
    """
    pruned = pruned_of(model)
    plan, base = pruned.plan, plain_model(model)
    now = {path: read_geometry(path, base.get_submodule(path)) for path in plan.num_heads}
    heads = {path: (plan.num_heads[path], found.num_heads) for path, found in now.items()}
    kv_heads = {path: (plan.num_kv_heads[path], found.num_kv_heads) for path, found in now.items()}
    cached = [path for path in now if hasattr(base.get_submodule(path), "layer_idx")]
    channels = [2 * sum(kv_heads[path][side] * now[path].head_dim for path in cached) for side in (0, 1)]

    after = _output(model, probe.inputs)
    if after.shape != probe.output.shape:
        raise RecipeError(
            f"The probe gave {list(probe.output.shape)}, the model now {list(after.shape)}: not the same."
        )
    change = (after - probe.output).abs()
    parameters = _count(model)
    if parameters >= probe.parameters or not bool(change.any()):
        raise InjectionError(
            f"Nothing happened: {probe.parameters:,} parameters before and {parameters:,} now, and the output on the "
            f"probe batch changed by {float(change.max()):g}. Was the model reloaded, or the probe taken after pruning?"
        )
    return PruneReceipt(
        (probe.parameters, parameters),
        heads,
        kv_heads,
        (channels[0], channels[1]),
        float(change.max()),
        float(change.mean()),
        pruned.compensation,
    )


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _output(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Logits or hidden states, in eval mode, float32 on the host."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            found: Any = model(**inputs)
    finally:
        for module, was in training.items():
            module.training = was
    if not isinstance(found, Tensor):
        logits = getattr(found, "logits", None)
        found = getattr(found, "last_hidden_state", None) if logits is None else logits
    if not isinstance(found, Tensor):
        raise RecipeError(f"{type(model).__name__} gives neither logits nor hidden states for the probe batch.")
    if not bool(found.isfinite().all()):
        raise RecipeError(f"{type(model).__name__} gives values that are not finite for the probe batch.")
    return found.detach().float().cpu()
