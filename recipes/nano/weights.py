"""Weights of the nano hosts: read from a file with a checked hash, and loaded into a model that they fit."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sfa_adapters.errors import WeightsError

__all__ = ["put_weights", "read_weights"]


def read_weights(file: Path, command: str, sha256: str | None = None) -> dict[str, Tensor]:
    """Reads weights of the package, or others.

    Args:
        file: the file.
        command: the command that makes them, for errors.
        sha256: hash that the file must have; None checks none.

    Raises:
        WeightsError: the file is missing, has another hash, or is no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not file.is_file():
        raise WeightsError(f"No weights of the nano host at {file}. Train them: {command}")
    raw = file.read_bytes()
    if sha256 is not None:
        digest = hashlib.sha256(raw).hexdigest()
        if digest != sha256:
            raise WeightsError(
                f"{file} has sha256 {digest}, expected {sha256}: the file is damaged or another one. "
                f"Install the package again, or train the weights: {command}"
            )
    try:
        return load(raw)
    except SafetensorError as error:
        raise WeightsError(
            f"{file} is not a readable safetensors file ({error}). Train the weights: {command}"
        ) from error


def put_weights(model: nn.Module, stored: Mapping[str, Tensor], file: Path) -> None:
    """Loads weights into a module that has exactly their names and shapes.

    Args:
        model: the module.
        stored: the weights.
        file: their file, for errors.

    Raises:
        WeightsError: they do not fit; the module is as it was.
    """
    wanted = {name: p.shape for name, p in model.named_parameters()}
    wrong = sorted(n for n in wanted.keys() | stored.keys() if n not in stored or wanted.get(n) != stored[n].shape)
    if wrong:
        raise WeightsError(
            f"{file} does not fit {type(model).__name__} of the nano host: {len(wrong)} tensors differ, first "
            f"{wrong[0]!r}."
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(stored[name])
