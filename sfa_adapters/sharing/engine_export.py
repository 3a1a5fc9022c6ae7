"""`export_for_engine`: writes a trained model for an inference engine: plain weights, and the bias beside them.

An engine loads a model by its folder, and takes the bias from an adapter (docs/serving.md). What else a run has trained
(projector, LoRA, parts of the tower) must be in the weights, under their ordinary names.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sfa_adapters.compat import plain_model
from sfa_adapters.errors import InjectionError, RecipeError
from sfa_adapters.heads.metadata import pruned_metadata
from sfa_adapters.hooks import features_of
from sfa_adapters.inject import save_sfa
from sfa_adapters.saved import BESIDE
from sfa_adapters.sharing.folders import new_folder
from sfa_adapters.sharing.weights import floating_dtype, plain_state_dict
from sfa_adapters.tuner import injected_layers

__all__ = ["EngineExport", "export_for_engine"]


@dataclass(frozen=True)
class EngineExport:
    """What was written.

    Attributes:
        folder: The model, as `save_pretrained` writes it.
        adapter: The bias, as `save_sfa` writes it.
        layers: Attention layers with a bias.
    """

    folder: Path
    adapter: Path
    layers: int

    def __str__(self) -> str:
        option = f'--additional-config \'{{"sfa": "{self.adapter}"}}\''
        return f"{self.layers} layers with a bias. Serve it:\n    vllm serve {self.folder} {option}"


def export_for_engine(
    host: Any,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    processor: Any = None,
    max_shard_size: int | str = "5GB",
) -> EngineExport:
    """Writes a model with SFA for an inference engine; the model stays as it is. For towers of every kind.

    Args:
        host: A `Host`, or a whole model of transformers with SFA.
        folder: The new folder; must not exist, or be empty. The bias is in `sfa` in it.
        dtype: Of the weights; that of the model by default. The bias stays fp32.
        processor: Written beside the model; that of the `Host` by default.
        max_shard_size: As for `save_pretrained`.

    Raises:
        RecipeError: The model has parts that no engine has, or is not a class of transformers.
        InjectionError: The model has no active SFA, or several adapters at once.
    """
    model: Any = plain_model(host if isinstance(host, nn.Module) else host.model)
    recipe = None if isinstance(host, nn.Module) else host.recipe
    processor = processor or (None if isinstance(host, nn.Module) else host.processor)
    if recipe is not None:
        dtype = dtype or getattr(torch, recipe.dtype)
    name, layers = _check(model)
    dtype = floating_dtype(model, dtype)
    with new_folder(folder) as partial:
        config = copy.deepcopy(model.config)
        model.save_pretrained(partial, state_dict=plain_state_dict(model, dtype), max_shard_size=max_shard_size)
        config.dtype = str(dtype).removeprefix("torch.")
        config.architectures = [type(model).__name__]
        config.save_pretrained(partial)
        if processor is not None:
            processor.save_pretrained(partial)
        save_sfa(model, partial / BESIDE, name)
    return EngineExport(Path(folder), Path(folder) / BESIDE, layers)


def _check(model: Any) -> tuple[str, int]:
    """Name of the one active adapter, and its number of layers."""
    layers = [layer for _, _, layer in injected_layers(model) if layer.active]
    names = sorted({name for layer in layers for name in layer.active})
    if len(names) != 1:
        raise InjectionError(
            f"{type(model).__name__} has {len(names)} active SFA adapters {names}; an engine serves one. Without any, "
            "use model.save_pretrained."
        )
    if not isinstance(model, PreTrainedModel):
        raise RecipeError(
            f"{type(model).__name__} is not a class of transformers, so an engine cannot load what it would write. "
            "Take the -HF variant of the model."
        )
    if pruned_metadata(model) is not None:
        raise RecipeError(f"{type(model).__name__} lost attention heads; engines load layers of one shape only.")
    others = sorted(set(features_of(model)) & {"adat", "dymu", "fastv"})
    if others:
        raise RecipeError(
            f"{', '.join(others)} changes which tokens the model sees, by hooks that an engine does not have: it would "
            "answer otherwise. Eject it first, and evaluate again."
        )
    return names[0], len(layers)
