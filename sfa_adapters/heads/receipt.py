"""`prune_receipt`: proof that heads are gone, and what changed, on the very object that is used next.

probe = take_probe(model, inputs)
model = prune_heads(model, plan)
receipt = prune_receipt(probe, model)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from sfa_adapters.errors import InjectionError, RecipeError
from sfa_adapters.heads.kinds import read_geometry
from sfa_adapters.heads.pruned_files import pruned_of
from sfa_adapters.heads.snapshot import Probe, output_of, take_probe
from sfa_adapters.heads.speed import Speed, check_rounds, measure_speed
from sfa_adapters.vlm.parts import plain_model

__all__ = ["Probe", "PruneReceipt", "prune_receipt", "take_probe"]


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
        compensation: What was done for the pruned heads.
        speed: Seconds and bytes of both, and whether it is worth it; None where no time was measured.
    """

    parameters: tuple[int, int]
    heads: Mapping[str, tuple[int, int]]
    kv_heads: Mapping[str, tuple[int, int]]
    cache_channels: tuple[int, int]
    largest_change: float
    mean_change: float
    compensation: str
    speed: Speed | None = None

    def __str__(self) -> str:
        """A few lines to read; modules that lost the same share one."""
        before, after = self.parameters
        lost = sum(b - a for b, a in self.heads.values())
        lines = [
            f"parameters    {before:,} -> {after:,} ({after / before - 1:+.2%})",
            f"heads         {lost} of {sum(b for b, _ in self.heads.values())} gone in {len(self.heads)} modules",
            f"cache         {self.cache_channels[0]:,} -> {self.cache_channels[1]:,} numbers per token",
            f"output        changed by {self.mean_change:.3g} on average, {self.largest_change:.3g} at most",
            f"compensation  {self.compensation}",
        ]
        alike: dict[str, list[str]] = {}
        for name, (was, left) in self.heads.items():
            kv = "" if self.kv_heads[name] == (was, left) else " (key/value {} -> {})".format(*self.kv_heads[name])
            alike.setdefault(f"{was} -> {left}{kv}", []).append(name)
        for change, names in alike.items():
            lines.append(f"  {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}  {change}")
        return "\n".join(lines if self.speed is None else [*lines, str(self.speed)])

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, for a file; `speed` with its verdict."""
        return {**asdict(self), "speed": None if self.speed is None else self.speed.to_dict()}

    def to_json(self) -> str:
        """The receipt as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"


def prune_receipt(probe: Probe, model: nn.Module, rounds: int = 5, tokens: int = 16) -> PruneReceipt:
    """Compares a pruned model with its probe, and with itself as it was.

    The probe goes on holding the weights that were replaced: delete it when the receipt is there.

    Args:
        probe: From `take_probe` of the same model before.
        model: The pruned model itself, never a reload by name.
        rounds: How often the original and the pruned model are timed in turns, at least 5; 0 measures no time.
        tokens: Decoded tokens of each timing, at least 2.

    Raises:
        InjectionError: The model has no pruned heads, as many parameters as before, or its output is the same to
            the last bit.
        RecipeError: An option cannot be used, the output is not finite or of another shape than before, or the
            original cannot be put back to be timed, see `measure_speed`.
    """
    if rounds:
        check_rounds(rounds, tokens)
    pruned = pruned_of(model)
    plan, base = pruned.plan, plain_model(model)
    now = {path: read_geometry(path, base.get_submodule(path)) for path in plan.num_heads}
    heads = {path: (plan.num_heads[path], value.num_heads) for path, value in now.items()}
    kv_heads = {path: (plan.num_kv_heads[path], value.num_kv_heads) for path, value in now.items()}
    cached = [path for path in now if hasattr(base.get_submodule(path), "layer_idx")]
    channels = [2 * sum(kv_heads[path][side] * now[path].head_dim for path in cached) for side in (0, 1)]

    after = output_of(model, probe.inputs)
    if after.shape != probe.output.shape:
        raise RecipeError(
            f"The probe gave {list(probe.output.shape)}, the model now {list(after.shape)}: not the same."
        )
    change = (after - probe.output).abs()
    parameters = sum(parameter.numel() for parameter in model.parameters())
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
        measure_speed(probe, model, rounds, tokens) if rounds else None,
    )
