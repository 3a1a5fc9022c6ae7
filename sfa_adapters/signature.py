"""Checks the tower signature of a saved adapter against the tower of a model, with advice where they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sfa_adapters.errors import AdapterMismatchError

__all__ = ["check_same_tower", "one_or_each"]


def one_or_each(counts: Sequence[int]) -> int | list[int]:
    """One number where all layers have the same, else one number for each layer."""
    return counts[0] if len(set(counts)) == 1 else list(counts)


def check_same_tower(saved: Mapping[str, Any], live: Mapping[str, Any]) -> None:
    """Checks that a model has the tower that a saved adapter was made for.

    Args:
        saved: The signature that was saved with the adapter.
        live: The signature of the model's tower.

    Raises:
        AdapterMismatchError: They differ; names the first layer that does, and what to do.
    """
    # The bias does not depend on resolution, so the grid may differ.
    differences = [
        f"{key}: adapter {saved.get(key)!r}, model {live[key]!r}"
        for key in ("backbone", "num_layers", "prefix_tokens")
        if saved.get(key) != live[key]
    ]
    advice = "Load the adapter on the model it was trained with, or inject with a fresh SFAConfig."
    heads, live_counts = (
        _each_layer(counts, live["num_layers"]) for counts in (saved.get("num_heads"), live["num_heads"])
    )
    if heads is None or live_counts is None:
        differences.append(f"num_heads: adapter {saved.get('num_heads')!r}, model {live['num_heads']!r}")
    elif heads != live_counts:
        advice = advice if differences else _advice(heads, live_counts)
        differences.append(_other_heads(heads, live_counts))
    if differences:
        raise AdapterMismatchError(f"This SFAConfig belongs to another tower ({'; '.join(differences)}). {advice}")


def _each_layer(counts: Any, num_layers: int) -> list[int] | None:
    """Head counts of a signature for every layer, or None where it has none."""
    each = [counts] * num_layers if isinstance(counts, int) else counts
    fits = isinstance(each, list) and len(each) == num_layers and all(isinstance(count, int) for count in each)
    return each if fits else None


def _other_heads(saved: list[int], live: list[int]) -> str:
    if len({*saved}) == len({*live}) == 1:
        return f"num_heads: adapter {saved[0]}, model {live[0]}"
    wrong = [index for index, counts in enumerate(zip(saved, live, strict=True)) if counts[0] != counts[1]]
    difference = f"num_heads of layer {wrong[0]}: adapter {saved[wrong[0]]}, model {live[wrong[0]]}"
    return difference + (f"; {len(wrong)} of {len(saved)} layers differ" if len(wrong) > 1 else "")


def _advice(saved: list[int], live: list[int]) -> str:
    """Advice where only head counts differ, so that heads may have been pruned from one of the two."""
    pairs = list(zip(saved, live, strict=True))
    if all(model <= adapter for adapter, model in pairs):
        return (
            "If heads were removed from this model since, load the adapter first, on the model with all its heads: "
            "prune_heads and load_pruned cut an adapter together with its tower."
        )
    if all(model >= adapter for adapter, model in pairs):
        return (
            "If heads were removed before the adapter was trained, remove the same ones first: load_pruned with the "
            "folder of save_pruned, or prune_heads with the same plan."
        )
    return "If heads were removed, they are not those of the model that the adapter was trained with."
