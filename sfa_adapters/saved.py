"""Reads and writes the scalars of SFA: adapter folders, folders of a whole model, single safetensors files."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sfa_adapters.adapter_folder import WEIGHTS_NAME
from sfa_adapters.config import SFAConfig
from sfa_adapters.errors import AdapterMismatchError, InjectionError, SFAError, WeightsError
from sfa_adapters.state_fit import parameter_name
from sfa_adapters.state_keys import PEFT_PREFIX, ScalarKey, plain_path, record_keys, scalar_keys
from sfa_adapters.state_record import read_record
from sfa_adapters.tuner import injected_layers

__all__ = [
    "BESIDE",
    "CONFIG_NAME",
    "WEIGHTS_NAME",
    "SavedScalars",
    "folder_beside",
    "read_scalars",
    "write_scalars",
]

CONFIG_NAME = "adapter_config.json"
MODEL_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
BESIDE = "sfa"  # folder of SFA inside the folder of another PEFT method


@dataclass(frozen=True)
class SavedScalars:
    """One adapter as it was saved.

    Attributes:
        config: Its configuration.
        tensors: Its scalars by key of the file.
        keys: The same keys, parsed.
        source: Where they were read, for errors.
        other_method: PEFT method of another adapter in the same folder (`LORA`), or None.
    """

    config: SFAConfig
    tensors: dict[str, Tensor]
    keys: dict[str, ScalarKey]
    source: str
    other_method: str | None = None


def folder_beside(folder: str | Path, adapter_name: str) -> Path:
    """The folder of SFA inside that of another PEFT adapter: `sfa`, or `sfa-NAME` if its name is not `default`."""
    return Path(folder) / (BESIDE if adapter_name == "default" else f"{BESIDE}-{adapter_name}")


def read_scalars(path: str | Path, adapter_name: str = "default", config: SFAConfig | None = None) -> SavedScalars:
    """Reads one SFA adapter from an adapter folder, the folder of a model, or a safetensors file.

    Args:
        path: An adapter folder (of `save_sfa` or PEFT), the folder of a model or of another PEFT adapter that was
            saved with SFA in it (`model.save_pretrained`, a checkpoint of a Trainer), or one safetensors file.
        adapter_name: Which adapter, where the state dict of a model holds several.
        config: The configuration, for files that do not hold it.

    Returns:
        The adapter.

    Raises:
        WeightsError: Nothing there can be read, or it holds no SFA, or the configuration is missing.
        AdapterMismatchError: A folder of another PEFT method holds no SFA, or the format is newer.
    """
    path = Path(path)
    if path.is_file():
        return _from_files([path], adapter_name, config)
    method = _method_of(path) if (path / CONFIG_NAME).is_file() else None
    if method == "SFA":
        return _from_adapter(path)
    beside = next((x for x in (folder_beside(path, adapter_name), path / BESIDE) if (x / CONFIG_NAME).is_file()), None)
    if beside is not None:
        saved = _from_adapter(beside)
        return SavedScalars(saved.config, saved.tensors, saved.keys, saved.source, method)
    files = [path / name for name in (WEIGHTS_NAME, MODEL_NAME) if (path / name).is_file()] or _shards(path)
    if not files:
        raise WeightsError(
            f"{path} has no {CONFIG_NAME} with {WEIGHTS_NAME}, no {BESIDE} folder and no {MODEL_NAME}; it is not a "
            "saved adapter, nor a model that was saved with one."
        )
    try:
        saved = _from_files(files, adapter_name, config)
    except WeightsError as error:
        if method is None or "holds no SFA" not in str(error):
            raise
        raise AdapterMismatchError(f"{path} holds a {method} adapter, not SFA.") from None
    return SavedScalars(saved.config, saved.tensors, saved.keys, saved.source, method)


def write_scalars(
    model: nn.Module, folder: Path, adapter_name: str, state_dict: dict[str, Tensor] | None = None
) -> None:
    """Writes one adapter of a model as PEFT does; the weights file appears only when everything was written.

    Args:
        model: A model with SFA. Sharded parameters are gathered, in which every process must take part.
        folder: Where to write.
        adapter_name: Which adapter.
        state_dict: Values to write, for callers that have gathered them already.

    Raises:
        InjectionError: The model has no such adapter.
        WeightsError: The folder cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    config: SFAConfig | None = None
    for name, _, layer in injected_layers(model):
        if adapter_name in layer.configs:
            config = layer.configs[adapter_name]
            weights = layer.weights(adapter_name)
            for attribute in layer.tensors(adapter_name):
                value = getattr(weights, attribute.removeprefix("sfa_"))
                if state_dict is not None:
                    value = state_dict.get(parameter_name(name, attribute, adapter_name), value)
                assert value is not None
                whole = value.detach()
                if isinstance(whole, DTensor):
                    whole = whole.full_tensor()
                # For a wrapped model the file holds paths without the wrappers.
                tensors[f"{PEFT_PREFIX}{parameter_name(plain_path(name), attribute, '')}"] = whole.cpu().contiguous()
    if config is None:
        raise InjectionError(f"{type(model).__name__} has no SFA adapter named {adapter_name!r} to save.")
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    saved = copy.deepcopy(config)
    saved.inference_mode = True
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{WEIGHTS_NAME}.part"
        save_file(tensors, partial, metadata={"format": "pt"})
        saved.save_pretrained(str(folder))
        partial.replace(folder / WEIGHTS_NAME)
    except (OSError, SafetensorError, AssertionError) as error:
        raise WeightsError(
            f"The adapter cannot be written to {folder}: {error or 'it is a file'}. Name a folder that can be made."
        ) from error


def _from_adapter(folder: Path) -> SavedScalars:
    if not (folder / WEIGHTS_NAME).is_file():
        raise WeightsError(f"{folder} has no {WEIGHTS_NAME}; it is not a saved adapter.")
    with _readable(folder / CONFIG_NAME):
        config: Any = SFAConfig.from_pretrained(str(folder))
    tensors = _read(folder / WEIGHTS_NAME)
    # Files of PEFT before 0.21 may also hold other adapters, whose keys have a name.
    keys = {name: key for name, key in scalar_keys(tensors).items() if key.adapter is None}
    return SavedScalars(config, tensors, keys, str(folder / WEIGHTS_NAME))


def _from_files(files: list[Path], adapter_name: str, config: SFAConfig | None) -> SavedScalars:
    source = str(files[0])
    tensors: dict[str, Tensor] = {}
    configs: dict[str, SFAConfig] = {}
    for file in files:
        with _readable(file), safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            tensors.update({name: opened.get_tensor(name) for name in scalar_keys(names)})
            for record in record_keys(names)[:1]:
                configs = read_record(opened.get_tensor(record), str(file))
    keys = scalar_keys(tensors)
    adapters = sorted({key.adapter or "default" for key in keys.values()})
    if not keys:
        raise WeightsError(f"{source} holds no SFA scalars; the model that was saved there had no SFA.")
    wanted = adapters[0] if len(adapters) == 1 else adapter_name
    if wanted not in adapters:
        raise WeightsError(f"{source} holds the SFA adapters {adapters}; say which one with adapter_name=.")
    config = configs.get(wanted, config)
    if config is None:
        raise WeightsError(
            f"{source} holds SFA scalars of {len({key.path for key in keys.values()})} layers, but not their "
            "configuration, without which their blocks are not known. Pass the one that they were trained with: "
            "load_sfa(model, path, config=SFAConfig(...))."
        )
    keys = {name: key for name, key in keys.items() if (key.adapter or "default") == wanted}
    return SavedScalars(copy.deepcopy(config), {name: tensors[name] for name in keys}, keys, source)


def _shards(folder: Path) -> list[Path]:
    if not (folder / INDEX_NAME).is_file():
        return []
    with _readable(folder / INDEX_NAME):
        weights = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
        ours = {*scalar_keys(weights), *record_keys(weights)}
        files = sorted({folder / file for name, file in weights.items() if name in ours})
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise WeightsError(f"{missing[0]} is missing, which {INDEX_NAME} says holds SFA scalars.")
    return files or [folder / min(weights.values())]


def _method_of(folder: Path) -> str | None:
    with _readable(folder / CONFIG_NAME):
        return str(json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")).get("peft_type"))


def _read(file: Path) -> dict[str, Tensor]:
    with _readable(file), safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except SFAError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{file} cannot be read: {error}. Copy or save the adapter again.") from error
