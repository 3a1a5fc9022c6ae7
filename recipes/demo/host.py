"""The host of the demo: loading, saving of its trained weights, and loading of these."""

from __future__ import annotations

import copy
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from sfa_adapters import load_sfa, save_sfa
from sfa_adapters.errors import WeightsError
from sfa_adapters.recipes.demo.options import DemoConfig
from sfa_adapters.recipes.nano.models import NanoHost, load_nano

__all__ = ["RELOADED", "load_host", "reloaded", "save_trained"]

RELOADED = 32  # test questions that the reloaded model must answer in the same words


def load_host(config: DemoConfig) -> NanoHost:
    """Loads the pretrained host.

    Args:
        config: Options of the demo.

    Raises:
        WeightsError: Its weights are missing or damaged; says how to get them.
    """
    try:
        return load_nano(config.host, path=config.weights)  # pyright: ignore[reportArgumentType]
    except WeightsError as error:
        if config.weights is not None:
            raise
        raise WeightsError(f"{error} Then give them with: sfa demo --host {config.host} --weights FILE") from error


def save_trained(host: NanoHost, folder: Path) -> None:
    """Saves the adapter, and the tower and projector that were trained with it.

    Args:
        host: The trained host.
        folder: Folder of the demo.
    """
    trained: dict[str, Tensor] = {
        name: parameter.detach().contiguous()
        for name, parameter in host.model.named_parameters()
        if parameter.requires_grad and ".sfa." not in name
    }
    save_sfa(host.model, folder / "adapter")
    save_file(trained, folder / "base.safetensors", metadata={"format": "pt"})


def reloaded(original: NanoHost, folder: Path) -> NanoHost:
    """A copy of the pretrained host with the weights of `save_trained`.

    Args:
        original: The pretrained host.
        folder: Folder of the demo.
    """
    again = copy.deepcopy(original)
    keys = again.model.load_state_dict(load_file(folder / "base.safetensors"), strict=False)
    assert not keys.unexpected_keys, keys.unexpected_keys
    load_sfa(again.model, folder / "adapter")
    return again
