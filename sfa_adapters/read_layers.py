"""Counts the layers of its vision tower that a host reads.

LLaVA-1.5 reads the hidden states of layer -2, so its last layer is unused: a parameter there never gets a gradient, and
distributed data parallel fails on it. Hosts name the layer in their configuration, or in an attribute.
"""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["count_read_layers"]


def count_read_layers(model: nn.Module, tower_path: str, num_layers: int) -> int:
    """The number of layers of a tower, from the first, that its host reads.

    Args:
        model: A host, or the tower itself.
        tower_path: Path of the tower in the model, "" for the model itself.
        num_layers: Layers of the tower.

    Returns:
        From 0 to `num_layers`; `num_layers` where the host does not name a layer.
    """
    names = tower_path.split(".") if tower_path else []
    paths = [".".join(names[:depth]) for depth in range(len(names), -1, -1)]
    # The module that holds the tower reads it; the tower's own configuration counts only if no holder names a layer.
    holders = [model.get_submodule(path) for path in (*paths[1:], paths[0])]
    selected = next((layers for holder in holders if (layers := _selected_layers(holder))), None)
    if selected is None:
        return num_layers
    # hidden_states has num_layers + 1 entries: entry k is the output of layer k - 1.
    entries = [layer if layer >= 0 else num_layers + 1 + layer for layer in selected]
    return min(max(entries), num_layers)


def _selected_layers(holder: nn.Module) -> list[int]:
    """The entries of `hidden_states` that a module reads from its tower; empty if it does not name them."""
    config = getattr(holder, "config", None)
    # Granite 4 Vision: pairs (vision layer, language layer) and one more; its `vision_feature_layer` is not read.
    pairs, spatial = (getattr(config, name, None) for name in ("deepstack_layer_map", "spatial_vision_layer"))
    if pairs is not None or spatial is not None:
        return _integers([*(pair[0] for pair in pairs or ()), spatial])
    # Code that comes with InternVL and LLaVA checkpoints reads the attribute, which people change there.
    for value in (
        getattr(holder, "select_layer", None),
        getattr(config, "vision_feature_layer", None),
        getattr(config, "vision_feature_layers", None),
        getattr(config, "select_layer", None),
    ):
        layers = _integers(value if isinstance(value, (list, tuple)) else [value])
        if layers:
            return layers
    return []


def _integers(values: Any) -> list[int]:
    return [value for value in values if isinstance(value, int) and not isinstance(value, bool)]
