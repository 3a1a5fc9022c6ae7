"""The host of the demo: loaded, saved with what it learned, and loaded again."""

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

RELOADED = 32  # test questions that the reloaded adapter must answer in the same words


def load_host(config: DemoConfig) -> NanoHost:
    """The pretrained host.

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
    """Saves the adapter, and the tower and projector that were trained with it."""
    trained: dict[str, Tensor] = {
        name: parameter.detach().contiguous()
        for name, parameter in host.model.named_parameters()
        if parameter.requires_grad and ".sfa." not in name
    }
    save_sfa(host.model, folder / "adapter")
    save_file(trained, folder / "base.safetensors", metadata={"format": "pt"})


def reloaded(original: NanoHost, folder: Path) -> NanoHost:
    """A copy of the pretrained host with what `save_trained` left."""
    again = copy.deepcopy(original)
    keys = again.model.load_state_dict(load_file(folder / "base.safetensors"), strict=False)
    assert not keys.unexpected_keys, keys.unexpected_keys
    load_sfa(again.model, folder / "adapter")
    return again
