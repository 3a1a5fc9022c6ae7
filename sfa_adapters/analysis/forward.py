"""Runs a model for an analysis: eval mode, device, choice of layers and heads, and the inputs of its tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sfa_adapters.errors import DataError, ObservationError
from sfa_adapters.moved import know_old_names
from sfa_adapters.observe import CallReader, Modules, attention_modules, observe
from sfa_adapters.readers import Reader
from sfa_adapters.tower_input import TowerInput, watching_input
from sfa_adapters.tower_search import FoundTower, find_tower

__all__ = [
    "Heads",
    "Inputs",
    "Layers",
    "TowerPass",
    "chosen_layers",
    "fixed_tower",
    "over_heads",
    "run_tower",
    "to_device",
    "tower_layers",
]

know_old_names(__name__)  # `evaluating`

# Keyword arguments of the model, or images alone, [..., 3, H, W], as the tower takes them.
Inputs = Mapping[str, Any] | Tensor
Heads = Literal["mean"] | int
Layers = int | Sequence[int] | None


@dataclass(frozen=True, eq=False)
class TowerPass:
    """One forward of a tower.

    Attributes:
        images: Its input, `[n, 3, H, W]`.
        grid: Rows and columns of its patches.
        prefix: Leading tokens without a place on the page (CLS, registers).
        real: False for patches that lie in padding, bool `[n, rows, columns]`.
    """

    images: Tensor
    grid: tuple[int, int]
    prefix: int
    real: Tensor


def to_device(inputs: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Moves the tensors among keyword arguments to the device of the model's first parameter."""
    device = next(model.parameters()).device
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def fixed_tower(model: nn.Module) -> FoundTower:
    """Finds the vision tower of a model whose patches lie on one grid.

    Raises:
        NoMatchingBackboneError: No tower was found.
        ObservationError: The tower attends within windows of images of any size (Qwen-type).
    """
    located = find_tower(model)
    if located.backbone.joined != "batch":
        raise ObservationError(
            f"A {located.backbone.name} tower attends within windows, image after image, and its patches have no fixed "
            "grid: this analysis reads towers with one grid per image (SigLIP, CLIP, InternViT, Idefics, timm). "
            "observe(model, RowEntropy()) gives the rows of every window."
        )
    return located


def tower_layers(model: nn.Module, modules: Modules = "vision") -> tuple[str, ...]:
    """Paths of the tower's attention modules; for "vision", those that the host reads.

    Raises:
        ObservationError: No module fits, or one lies outside of the tower.
    """
    located = fixed_tower(model)
    inside = [name for name, _ in located.attentions]
    if modules == "vision":
        return tuple(inside[: located.used_layers])
    chosen = tuple(attention_modules(model, modules))
    outside = [name for name in chosen if name not in inside]
    if outside:
        raise ObservationError(f"modules={modules!r}: {outside[0]} is no attention module of the vision tower.")
    return chosen


def run_tower(
    model: nn.Module, inputs: Inputs, readers: Sequence[Reader | CallReader], layers: Sequence[str]
) -> list[TowerPass]:
    """Runs a model and reads the attention of its vision tower.

    Args:
        model: A tower or a whole model; it should be `evaluating`.
        inputs: Keyword arguments of the model. Images alone go straight to the tower, which saves the language model.
        readers: As in `observe`.
        layers: Paths of attention modules of the tower.

    Returns:
        One entry for each forward of the tower; each reader has as many results per layer.

    Raises:
        DataError: There are no images among the inputs.
        ObservationError: The tower's tokens are not its grid of patches (adaptive or merged ones), or as in `observe`.
    """
    located = fixed_tower(model)
    geometry = located.backbone.geometry(located.tower)
    seen: list[TowerPass] = []

    def record(given: TowerInput) -> None:
        images, grid = given.images, given.grid
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise DataError(f"The tower takes images [n, 3, H, W]; it got {tuple(getattr(images, 'shape', ()))}.")
        assert grid is not None
        real = given.kwargs.get("patch_attention_mask")
        real = torch.ones(len(images), *grid, dtype=torch.bool) if real is None else real.bool().reshape(-1, *grid)
        seen.append(TowerPass(images.detach(), grid, geometry.prefix_tokens, real.to(images.device)))

    counted: list[tuple[int, int]] = []

    def count(call: Any) -> None:
        if call.layer == layers[0]:
            counted.append((call.batch_size, call.num_queries))

    watching = watching_input(located.tower, located.backbone, "analysis", record)
    with watching, observe(model, [*readers, count], modules=layers):
        _call(model, located.tower, inputs)
    expected = [(len(s.images), s.prefix + s.grid[0] * s.grid[1]) for s in seen]
    if counted != expected:
        raise ObservationError(
            f"{layers[0]} attended over (images, tokens) {counted}, but the tower was given {expected}: its tokens are "
            "not its own grid of patches. Adaptive or merged tokens have no fixed place; eject them first."
        )
    return seen


def _call(model: nn.Module, tower: nn.Module, inputs: Inputs) -> None:
    if isinstance(inputs, Mapping) and set(inputs) != {"pixel_values"}:
        if not any(isinstance(value, Tensor) and value.is_floating_point() for value in inputs.values()):
            raise DataError(f"There are no images among the inputs: {list(inputs)}.")
        model(**to_device(inputs, model))
        return
    images = inputs["pixel_values"] if isinstance(inputs, Mapping) else inputs
    if not isinstance(images, Tensor) or images.ndim < 3 or images.shape[-3] != 3 or not images.is_floating_point():
        described = f"{tuple(images.shape)} {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
        raise DataError(
            f"Images must be floating point [..., 3, height, width], normalised for the tower; got {described}."
        )
    weight = next(tower.parameters())
    tower(images.reshape(-1, *images.shape[-3:]).to(weight.device, weight.dtype))


def chosen_layers(names: Sequence[str], layers: Layers) -> tuple[str, ...]:
    """Selects layers by number; all by default.

    Raises:
        DataError: A layer does not exist.
    """
    numbers = range(len(names)) if layers is None else [layers] if isinstance(layers, int) else list(layers)
    if not numbers or not all(0 <= n < len(names) for n in numbers):
        raise DataError(f"layers={layers!r}: there are the layers 0 to {len(names) - 1}.")
    return tuple(names[n] for n in numbers)


def over_heads(rows: Tensor, heads: Heads) -> Tensor:
    """Mean over heads, or one head: `[heads, keys]` to `[keys]`.

    Raises:
        DataError: The head does not exist.
    """
    if heads == "mean":
        return rows.mean(0)
    if not isinstance(heads, int) or not 0 <= heads < len(rows):
        raise DataError(f"heads={heads!r} must be 'mean' or a number from 0 to {len(rows) - 1}.")
    return rows[heads]
