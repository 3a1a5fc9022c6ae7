"""`recipe.json`: the record in a checkpoint: recipe, host, tensors, and versions of the packages."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sfa_adapters.errors import RecipeError
from sfa_adapters.files import MANIFEST, what_is_missing
from sfa_adapters.hosts.recipe import Recipe

if TYPE_CHECKING:
    from sfa_adapters.hosts.load import Host

__all__ = ["RECORD", "check_host", "read_record", "record_of", "saved_recipe", "signature"]

RECORD = "recipe.json"
FORMAT = 1


def saved_recipe(folder: str | Path) -> Recipe:
    """The recipe that a checkpoint was trained with.

    Args:
        folder: A checkpoint or the result of a run.

    Raises:
        RecipeError: There is none, or of a newer version of this library.
    """
    folder = Path(folder)
    known = {field.name for field in dataclasses.fields(Recipe)}
    settings = read_record(folder)["recipe"]
    if unknown := sorted(set(settings) - known):
        raise RecipeError(f"{folder / RECORD} has settings that this version does not know: {', '.join(unknown)}.")
    return Recipe(**settings)


def model_class(model: nn.Module) -> str:
    """The name of a model's class, which sharding changes (`FSDPLlava...`)."""
    return type(model).__name__.removeprefix("FSDP")


def signature(model: nn.Module) -> str:
    """A hash of the base model's class, and of the names and shapes of its weights without adapters.

    Args:
        model: The model, with adapters or without.

    Returns:
        16 hexadecimal digits.
    """
    record: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        if ".sfa." not in f".{name}" and "lora_" not in name:
            packed = getattr(parameter, "quant_state", None)  # 4-bit weights have a shape of their own
            shape = parameter.shape if packed is None else packed.shape
            record[name.replace(".base_layer.", ".")] = tuple(shape)
    lines = [model_class(model), *(f"{name} {shape}" for name, shape in sorted(record.items()))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def record_of(host: Host, files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """The content of `recipe.json`.

    Args:
        host: The host.
        files: Tensors of each file of the checkpoint, by key.
    """
    return {
        "format": FORMAT,
        "host": {
            "family": host.spec.family,
            "model_class": model_class(host.model),
            "signature": signature(host.model),
        },
        "recipe": dataclasses.asdict(host.recipe),
        "versions": {name: version(name) for name in ("sfa-adapters", "torch", "transformers", "peft")},
        "tensors": {
            file: {key: [str(tensor.dtype).removeprefix("torch."), *tensor.shape] for key, tensor in tensors.items()}
            for file, tensors in files.items()
        },
    }


def read_record(folder: Path) -> dict[str, Any]:
    """Reads the record of a checkpoint.

    Args:
        folder: The checkpoint.

    Raises:
        RecipeError: The folder is not whole, or of a newer version.
    """
    if not (folder / RECORD).is_file():
        raise RecipeError(f"{folder} has no {RECORD}; it is not a checkpoint or the result of a run.")
    if (folder / MANIFEST).is_file() and (missing := what_is_missing(folder)):
        raise RecipeError(f"{folder} is not whole: {', '.join(missing[:5])} missing. Take another checkpoint.")
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if not 1 <= int(record["format"]) <= FORMAT:
            raise RecipeError(
                f"{folder / RECORD} has format {record['format']}; this version reads up to {FORMAT}. Upgrade "
                "sfa-adapters."
            )
        assert {"host", "recipe", "tensors"} <= set(record)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"{folder / RECORD} cannot be read: {error or 'a field is missing'}.") from error
    return record


def check_host(host: Host, record: Mapping[str, Any], folder: Path) -> None:
    """Checks that a checkpoint belongs to this host.

    Args:
        host: The host.
        record: From `read_record`.
        folder: The checkpoint, for the error.

    Raises:
        RecipeError: It belongs to another one; names both.
    """
    saved = record["host"]
    here = {
        "family": host.spec.family,
        "model_class": model_class(host.model),
        "signature": signature(host.model),
    }
    if saved != here:
        raise RecipeError(
            f"{folder} is a checkpoint of another host: {saved['model_class']} with weights {saved['signature']} "
            f"({record['recipe'].get('model')}); this one is {here['model_class']} with weights {here['signature']} "
            f"({host.recipe.model})."
        )
