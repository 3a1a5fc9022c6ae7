"""Stores the configuration of SFA as a tensor, so that every state dict holds it.

Scalars alone do not say how the page is divided into blocks: sixteen numbers may be 4x4 or 2x8 blocks. Trainers save a
state dict and no further files of this library. So every adapted layer puts its configuration into the state dict, as
its `extra_state`: JSON in a uint8 tensor, which every file format takes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor

from sfa_adapters.config import FORMAT_VERSION, SFAConfig
from sfa_adapters.errors import AdapterMismatchError, WeightsError

__all__ = ["check_same_meaning", "read_record", "write_record"]

# The fields of PEFT's base class (base model, revision, inference mode) are not part of the adapter.
_OWN = tuple(f.name for f in fields(SFAConfig) if f.name not in {base.name for base in fields(PeftConfig)})
# Options that change what the same scalars mean.
_MEANING = ("num_blocks", "block_grid", "block_map", "terms")


def write_record(configs: Mapping[str, SFAConfig]) -> Tensor:
    """Writes the configurations of named adapters to a tensor, `[bytes]`, uint8."""
    adapters = {name: {key: asdict(config)[key] for key in _OWN} for name, config in configs.items()}
    text = json.dumps({"format_version": FORMAT_VERSION, "adapters": adapters}, sort_keys=True)
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def read_record(record: Tensor, source: str) -> dict[str, SFAConfig]:
    """Reads the configurations that `write_record` wrote, by adapter name.

    Args:
        record: `[bytes]`, uint8.
        source: Where it comes from, for errors.

    Raises:
        WeightsError: It is not such a record.
        AdapterMismatchError: It was written by a newer version of this library.
    """
    try:
        content = json.loads(bytes(record.to("cpu", torch.uint8).tolist()).decode())
        version, adapters = content["format_version"], content["adapters"]
        if version > FORMAT_VERSION:
            raise AdapterMismatchError(
                f"{source}: the SFA configuration has format_version={version}; this version of sfa-adapters reads up "
                f"to {FORMAT_VERSION}. Upgrade sfa-adapters."
            )
        return {name: SFAConfig(**options) for name, options in adapters.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, AdapterMismatchError):
            raise
        raise WeightsError(f"{source}: the SFA configuration in it cannot be read ({error}).") from error


def check_same_meaning(saved: Mapping[str, SFAConfig], live: Mapping[str, SFAConfig], source: str) -> None:
    """Checks that saved scalars mean the same in a model: adapters of the same name have equal blocks and terms.

    Raises:
        AdapterMismatchError: Blocks or terms differ, so that the same scalars would be another bias.
    """
    for name in saved.keys() & live.keys():
        for key in _MEANING:
            first, second = _comparable(saved[name], key), _comparable(live[name], key)
            if first != second:
                raise AdapterMismatchError(
                    f"{source}: the SFA adapter {name!r} was saved with {key}={first!r}, but the model has "
                    f"{key}={second!r}: the same numbers would be another bias. Call eject_sfa(model), then "
                    "load_sfa(model, FOLDER), which takes the saved configuration."
                )


def _comparable(config: SFAConfig, key: str) -> Any:
    value = getattr(config, key)
    return list(value) if isinstance(value, tuple) else value
