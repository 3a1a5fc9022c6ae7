"""The weights of a host under the names of the model without adapters: SFA left out, LoRA merged."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from sfa_adapters.errors import RecipeError
from sfa_adapters.layer import SFALayer

__all__ = ["floating_dtype", "plain_state_dict"]


def floating_dtype(model: nn.Module, dtype: torch.dtype | None = None) -> torch.dtype:
    """The one dtype that a copy of the model is written in.

    Args:
        model: A model in 16 or 32 bits.
        dtype: Requested dtype; by default that of all weights.

    Raises:
        RecipeError: Weights are in 4 or 8 bits, or have several dtypes and none was requested.
    """
    parameters = {name: p for name, p in model.named_parameters() if ".sfa_" not in name and "lora_" not in name}
    packed = [name for name, p in parameters.items() if not p.is_floating_point() or hasattr(p, "quant_state")]
    if packed:
        raise RecipeError(
            f"{len(packed)} weights are quantised, e.g. {packed[0]}. Load the base in 16 bits (plan='bf16') and put "
            "the trained tensors on it: what is written must load without a quantisation library."
        )
    dtypes = {p.dtype for p in parameters.values()}
    if dtype is None and len(dtypes) > 1:
        names = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in dtypes))
        raise RecipeError(f"The weights have several dtypes ({names}); say which one to write with dtype=.")
    return dtype or dtypes.pop()


def plain_state_dict(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state dict under the names that the model has without adapters; the model itself stays as it is.

    Tensors are shared with the model, but for those that a LoRA adds to or that are of another dtype: with a LoRA on
    every layer of a language model that is a second copy of it.

    Args:
        model: A model with SFA, LoRA (`peft`), `modules_to_save`, any of them or none.
        dtype: Of floating-point tensors.

    Raises:
        RecipeError: A LoRA is of a kind that is more than a sum of matrices (DoRA, with a bias, ...), or adds to one of
            several tied weights.
    """
    parts = {name: module for name, module in model.named_modules() if _is_adapter(module)}
    owners: dict[int, list[str]] = {}
    plain: dict[str, Tensor] = {}
    converted: dict[tuple[int, torch.Size], Tensor] = {}  # tied weights must stay one tensor
    for key, tensor in model.state_dict().items():
        name = _plain_name(key, parts)
        if name is None:
            continue
        owners.setdefault(tensor.data_ptr(), []).append(name)
        layer = parts.get(name.rpartition(".")[0])
        delta = _delta(name, layer) if isinstance(layer, LoraLayer) and name.endswith(".weight") else None
        if delta is not None:
            owners[tensor.data_ptr()].append("")
            tensor = (tensor.float() + delta.float()).to(dtype)
        elif tensor.is_floating_point() and tensor.dtype != dtype:
            place = (tensor.data_ptr(), tensor.shape)
            tensor = converted.setdefault(place, tensor.to(dtype))
        plain[name] = tensor
    tied = next((names for names in owners.values() if "" in names and len(names) > 2), None)
    if tied:
        shared = ", ".join(name for name in tied if name)
        raise RecipeError(f"A LoRA adds to one of several tied weights ({shared}); they cannot stay tied. Untie them.")
    return plain


def _is_adapter(module: nn.Module) -> bool:
    return isinstance(module, SFALayer | LoraLayer | ModulesToSaveWrapper)


def _plain_name(key: str, parts: dict[str, nn.Module]) -> str | None:
    """The key in a model without adapters; None for a tensor of an adapter."""
    for name, module in parts.items():
        if not key.startswith(f"{name}."):
            continue
        rest = key.removeprefix(f"{name}.")
        if isinstance(module, SFALayer):
            return None
        if isinstance(module, LoraLayer):
            return f"{name}.{rest.removeprefix('base_layer.')}" if rest.startswith("base_layer.") else None
        kept = f"modules_to_save.{module.active_adapter}."  # pyright: ignore[reportAttributeAccessIssue]
        return f"{name}.{rest.removeprefix(kept)}" if rest.startswith(kept) else None
    return key


def _delta(name: str, layer: LoraLayer) -> Tensor | None:
    """What the active LoRAs add to the weight; None where they are off or merged already."""
    active = [adapter for adapter in layer.active_adapters if adapter in layer.scaling]
    active = [adapter for adapter in active if adapter not in layer.merged_adapters]
    if not active or layer.disable_adapters:
        return None
    for adapter in active:
        if adapter in layer.lora_variant or layer.lora_bias.get(adapter):
            raise RecipeError(
                f"{name} has a LoRA of more than two matrices (DoRA, lora_bias, ...). Merge it with PEFT's own "
                "merge_adapter() before the export."
            )
    with torch.no_grad():
        kind: Any = layer  # every subclass has the method, their base does not
        deltas: list[Tensor] = [kind.get_delta_weight(adapter) for adapter in active]
    return torch.stack(deltas).sum(0) if len(deltas) > 1 else deltas[0]
