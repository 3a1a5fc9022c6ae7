"""Which layers of its vision tower a host really reads.

LLaVA-1.5 takes the hidden states of layer -2, so its last layer is dead: a parameter there never gets a gradient, and
distributed data parallel stops on it. Hosts say it in their configuration, or in an attribute of theirs.
"""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["count_read_layers"]


def count_read_layers(model: nn.Module, tower_path: str, num_layers: int) -> int:
    """How many layers of a tower its host reads, counted from the first.

    Args:
        model: A host, or the tower itself.
        tower_path: Path of the tower in the model, "" for the model itself.
        num_layers: Layers of the tower.
    """
    names = tower_path.split(".") if tower_path else []
    paths = [".".join(names[:depth]) for depth in range(len(names), -1, -1)]
    # The module that holds the tower reads it; what the tower says itself counts if nobody else says anything.
    holders = [model.get_submodule(path) for path in (*paths[1:], paths[0])]
    selected = next((layers for holder in holders if (layers := _selected_layers(holder))), None)
    if selected is None:
        return num_layers
    # hidden_states has num_layers + 1 entries: entry k is the output of layer k - 1.
    entries = [layer if layer >= 0 else num_layers + 1 + layer for layer in selected]
    return min(max(entries), num_layers)


def _selected_layers(holder: nn.Module) -> list[int]:
    """The entries of `hidden_states` that a module reads from its tower; none if it does not say."""
    config = getattr(holder, "config", None)
    # Granite 4 Vision: pairs (vision layer, language layer) and one more; its `vision_feature_layer` is not read.
    pairs, spatial = (getattr(config, name, None) for name in ("deepstack_layer_map", "spatial_vision_layer"))
    if pairs is not None or spatial is not None:
        return _integers([*(pair[0] for pair in pairs or ()), spatial])
    # The attribute is what the code that comes with InternVL and LLaVA checkpoints reads; people change it there.
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
