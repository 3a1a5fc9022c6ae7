"""Optimizer parameter groups with a separate learning rate for the structural scalars, and the size of these scalars.

A scalar is added to logits and starts near zero. Under Adam it moves by at most about its learning rate per step, so at
the rate of the weights around it (1e-5 to 1e-3) it stays where it started, without any sign of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sfa_adapters.bias import TERMS, StructuralWeights
from sfa_adapters.choices import DEFAULT_SFA_LR
from sfa_adapters.errors import InjectionError, TrainingError
from sfa_adapters.layer import SFALayer
from sfa_adapters.tuner import injected_layers

__all__ = [
    "DEFAULT_SFA_LR",
    "SFA_GROUP",
    "has_active_sfa",
    "largest_scalars",
    "largest_weights",
    "sfa_parameter_groups",
    "structural_layers",
]

SFA_GROUP = "sfa"  # name of the parameter group of the scalars


def sfa_parameter_groups(
    model: nn.Module, lr: float, sfa_lr: float = DEFAULT_SFA_LR, weight_decay: float = 0.01
) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer of torch: `AdamW(sfa_parameter_groups(model, lr=1e-4))`.

    Args:
        model: A model with SFA, wrapped by PEFT or not.
        lr: Learning rate of everything but the structural scalars.
        sfa_lr: Learning rate of the structural scalars, in logits per step under Adam.
        weight_decay: Of matrices; vectors (norms, biases) and structural scalars get none.

    Returns:
        Up to three groups, with a `name`: `model` (matrices), `model (no decay)` (vectors), `sfa`. They hold the
        parameters that require gradients, in an order that depends on the model only, so that a saved optimizer state
        fits.

    Raises:
        InjectionError: The model has no SFA, or a rate or the decay is out of range.
        TrainingError: All parameters are frozen, or all scalars.
    """
    _check_number("lr", lr, above=True)
    _check_number("sfa_lr", sfa_lr, above=True)
    _check_number("weight_decay", weight_decay, above=False)
    scalars = [parameter for layer in structural_layers(model) for parameter in layer.parameters()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise TrainingError(
            f"Nothing trains: every parameter of {type(model).__name__} is frozen. Unfreeze what should learn with "
            "requires_grad_(True)."
        )
    ours = {id(parameter) for parameter in scalars}
    groups = (
        ("model", lr, weight_decay, [p for p in trained if id(p) not in ours and p.ndim > 1]),
        ("model (no decay)", lr, 0.0, [p for p in trained if id(p) not in ours and p.ndim <= 1]),
        (SFA_GROUP, sfa_lr, 0.0, [p for p in trained if id(p) in ours]),
    )
    if not groups[-1][-1]:
        raise TrainingError(
            f"All {len(scalars)} tensors of structural scalars are frozen, so the bias would stay as it is. Unfreeze "
            "the adapter (model.set_adapter(NAME) with PEFT, requires_grad_(True) without), or use an optimizer of "
            "your own."
        )
    return [
        {"name": name, "params": parameters, "lr": rate, "weight_decay": decay}
        for name, rate, decay, parameters in groups
        if parameters
    ]


def largest_scalars(model: nn.Module) -> dict[str, float]:
    """The largest effect of each term of the active adapters, over all layers and heads, in logits.

    For `row`, `col` and `dist` it is the largest |w|. For `block` it is the largest product |e_i * e_j| of two scalars
    of a head, which is the square of its largest |e|, since phi contains products.

    Args:
        model: A model with SFA. Sharded scalars are gathered, which every process must take part in.

    Returns:
        The size by term, only for terms that are on.

    Raises:
        InjectionError: The model has no SFA, or none of its adapters is active.
    """
    largest = largest_weights(layer.weights(name) for layer in structural_layers(model) for name in layer.active)
    if not largest:
        raise InjectionError(f"No SFA adapter of {type(model).__name__} is active, so no scalar acts.")
    return largest


def largest_weights(weights: Iterable[StructuralWeights]) -> dict[str, float]:
    """As `largest_scalars`, from the given weights, e.g. `StructuralBias.weights`; empty where there are none."""
    largest: dict[str, float] = {}
    for each in weights:
        for term in TERMS:
            values = getattr(each, term)
            if values is not None and values.numel():
                largest[term] = max(largest.get(term, 0.0), _size(values.detach(), term))
    return {term: largest[term] for term in TERMS if term in largest}


def _size(values: Tensor, term: str) -> float:
    size = values.float().abs().amax()
    if isinstance(size, DTensor):
        size = size.full_tensor()
    return float(size.square() if term == "block" else size)


def structural_layers(model: nn.Module) -> list[SFALayer]:
    """The SFA layers of a model.

    Raises:
        InjectionError: It has none.
    """
    layers = [layer for _, _, layer in injected_layers(model)]
    if not layers:
        raise InjectionError(
            f"{type(model).__name__} has no SFA. Call inject_sfa(model), or get_peft_model(model, SFAConfig()), first."
        )
    return layers


def has_active_sfa(model: nn.Module) -> bool:
    """Whether a model has an active SFA adapter."""
    return any(layer.active for _, _, layer in injected_layers(model))


def _check_number(name: str, value: object, above: bool) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
    if not number or (above and value == 0):
        raise InjectionError(f"{name}={value!r} must be a number {'above 0' if above else 'of at least 0'}.")
