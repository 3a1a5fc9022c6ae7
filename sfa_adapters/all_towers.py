"""All towers of a host at once: one adapter for each, named after its tower, in folders beside each other."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from sfa_adapters.saved import CONFIG_NAME
from sfa_adapters.state_keys import plain_path
from sfa_adapters.tower_search import tower_paths
from sfa_adapters.tuner import injected_layers

__all__ = ["ALL_TOWERS", "adapters_of_towers", "folders_of_towers", "names_of_towers"]

ALL_TOWERS = "all"


def names_of_towers(model: nn.Module) -> dict[str, str]:
    """Short name of each tower of a host, by path: the last part of its path where that is enough."""
    paths = tower_paths(model)
    last = [path.rpartition(".")[2] for path in paths]
    if len(set(last)) < len(last):
        last = [plain_path(path).replace(".", "_") for path in paths]
    return dict(zip(paths, last, strict=True))


def adapters_of_towers(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """The adapters that were injected into several towers together, by the short name of the tower.

    Args:
        model: A model with SFA.
        adapter_name: The name that they were injected under.

    Returns:
        Empty where they were not injected together.
    """
    names = {name for _, _, layer in injected_layers(model) for name in layer.configs}
    wanted = {short: f"{adapter_name}_{short}" for short in names_of_towers(model).values()}
    return {short: name for short, name in wanted.items() if name in names}


def folders_of_towers(folder: Path) -> list[Path]:
    """The folders of the adapters that were saved together in one folder; empty if it holds an adapter or a model."""
    if (folder / CONFIG_NAME).exists() or any(folder.glob("*.safetensors*")):
        return []
    return sorted(path.parent for path in folder.glob(f"*/{CONFIG_NAME}"))
