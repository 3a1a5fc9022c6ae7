"""`ServedAdapter`: an adapter read for an engine that has a tower of its own, checked against the model it serves.

An engine such as vLLM does not build the tower of transformers, so nothing can be injected into its model. But its
towers have the same layers, in the same order, and see the same tokens. So the model of transformers is built once
without weights (on the device `meta`): the records of this library then check the adapter against it, and say where
the tokens lie.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfa_adapters.bias import TERMS, StructuralWeights
from sfa_adapters.config import SFAConfig
from sfa_adapters.errors import ServingError, SFAError
from sfa_adapters.inject import load_sfa
from sfa_adapters.saved import CONFIG_NAME, read_scalars
from sfa_adapters.state_fit import fit_scalars, parameter_name
from sfa_adapters.tower_search import FoundTower, find_tower
from sfa_adapters.tuner import injected_layers

__all__ = ["ServedAdapter", "adapter_folder", "read_adapter", "with_scalars_only"]

NAME = "default"
# What `sfa train` writes beside an adapter: weights that the base model does not have.
TRAINED_BESIDE = ("tuned.safetensors", "lora")


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter that fits the model that an engine serves.

    Attributes:
        folder: Where it was read.
        config: Its configuration.
        located: The tower of the model of transformers, without weights, and its record.
        layers: The scalars of each adapted layer, fp32 on the CPU, by number of the layer in the tower.
        heads: Attention heads of each adapted layer, over all ranks.
    """

    folder: Path
    config: SFAConfig
    located: FoundTower
    layers: Mapping[int, StructuralWeights]
    heads: Mapping[int, int]

    def __str__(self) -> str:
        return f"{self.folder} ({'+'.join(self.config.terms)}, tower {self.located.backbone.name})"

    @property
    def largest(self) -> float:
        """The largest scalar of the terms row, col and dist, in logits; of the block term the largest product."""
        values = [0.0]
        for weights in self.layers.values():
            values += [float(v.abs().max()) for v in (weights.row, weights.col, weights.dist) if v is not None]
            values += [float(weights.block.abs().max()) ** 2] if weights.block is not None else []
        return max(values)


def adapter_folder(folder: str | Path) -> Path:
    """The folder of the adapter in what a user named: itself, `sfa` in it, or `final` of a run.

    Raises:
        ServingError: There is no adapter, or weights were trained beside it that the base model does not have.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ServingError(f"{folder} is no folder. Name the folder of an SFA adapter, with {CONFIG_NAME} in it.")
    places = (folder, folder / "sfa", folder / "final")
    chosen = next((place for place in places if (place / CONFIG_NAME).is_file()), None)
    if chosen is None:
        raise ServingError(
            f"{folder} holds no SFA adapter: there is no {CONFIG_NAME} in it, in sfa/ or in final/. Name the folder "
            "that save_sfa or `sfa train` wrote, or `sfa export --engine`."
        )
    beside = [name for name in TRAINED_BESIDE if (chosen / name).exists()]
    if beside:
        raise ServingError(
            f"{chosen} holds {' and '.join(beside)} beside the bias: weights that the base model does not have. Write "
            f"a model with them first: sfa export {folder} --engine --out served; then serve `served`."
        )
    return chosen


def with_scalars_only(folder: str | Path, model: nn.Module) -> dict[str, Tensor]:
    """The scalars in a folder by the names of their parameters in a model that carries the adapter.

    Raises:
        AdapterMismatchError: They do not fit.
    """
    saved = read_scalars(folder, NAME)
    return fit_scalars(model, saved.tensors, NAME, saved.keys, saved.source)


def read_adapter(folder: str | Path, model: str | Path, revision: str | None = None) -> ServedAdapter:
    """Reads an adapter and checks it against a model, of which only the configuration is read.

    Args:
        folder: An adapter, or a folder with one; see `adapter_folder`.
        model: Hub id or folder of the model that is served.
        revision: Its revision on the hub.

    Raises:
        ServingError: There is no adapter, the model has a tower that transformers does not know, or the adapter
            belongs to another tower.
    """
    chosen = adapter_folder(folder)
    host = model_without_weights(str(model), revision)
    try:
        load_sfa(host, chosen)
        tensors = with_scalars_only(chosen, host)
        located = find_tower(host)
    except SFAError as error:
        raise ServingError(f"The adapter {chosen} does not fit {model}: {_one_line(error)}") from error
    layers: dict[int, StructuralWeights] = {}
    heads: dict[int, int] = {}
    config: SFAConfig | None = None
    for path, _, layer in injected_layers(host):
        names = [parameter_name(path, f"sfa_{term}", NAME) for term in TERMS]
        layers[layer.index] = StructuralWeights(*(_float(tensors.get(name)) for name in names))
        heads[layer.index] = layer.num_heads
        config = layer.configs[NAME]
    assert config is not None
    return ServedAdapter(chosen, config, located, layers, heads)


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().float()


def _one_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()


def model_without_weights(model: str, revision: str | None) -> Any:
    """The model of transformers by its configuration, on the device `meta`."""
    import transformers

    pinned: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False, **pinned)
    except (OSError, ValueError) as error:
        raise ServingError(f"The configuration of {model} cannot be read: {_one_line(error)[:300]}") from error
    name = next(iter(config.architectures or ()), None)
    kind = getattr(transformers, name, None) if name else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ServingError(
            f"{model} is a {name or config.model_type}, which transformers {transformers.__version__} has no class "
            "for, so what is served cannot be checked. Serve the variant of the model that needs no code of "
            "its own (its name often ends in -HF)."
        )
    builder: Any = kind
    level = logging.getLogger("transformers").level
    with torch.device("meta"):
        logging.getLogger("transformers").setLevel(logging.ERROR)
        try:
            return builder._from_config(config).eval()
        finally:
            logging.getLogger("transformers").setLevel(level)
