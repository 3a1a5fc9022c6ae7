"""`calibrate_axial`: which heads of a trained tower should start as row and column heads."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from sfa_adapters.attention_contract import head_count
from sfa_adapters.axial import AXES, LayerHeads
from sfa_adapters.errors import DataError, InjectionError
from sfa_adapters.eval_mode import evaluating
from sfa_adapters.heads.axis_affinity import axis_affinity
from sfa_adapters.heads.gate_energy import gate_energy
from sfa_adapters.hooks import state_of
from sfa_adapters.tower_search import FoundTower, find_tower

__all__ = ["By", "calibrate_axial"]

By = Literal["affinity", "gate"]


def calibrate_axial(
    model: nn.Module,
    pages: Tensor | Sequence[Mapping[str, Any]],
    *,
    by: By = "affinity",
    layers: Sequence[int] | None = None,
    tower: str | None = None,
    projections: int = 4,
    seed: int = 0,
) -> dict[int, LayerHeads]:
    """Chooses the heads that `SFAConfig(init="axial")` starts strong, from a few pages without labels.

        heads = calibrate_axial(model, pages)
        inject_sfa(model, SFAConfig(init="axial", init_heads=heads))

    On a trained tower the initial strength overrides what a head has learned, so the choice of heads matters. Per layer
    max(1, heads // 3) become row heads and as many others column heads, a head never both; layers with a single head
    are left out.

    * `affinity`: heads whose attention already lies along rows or columns. Per head, the mean attention mass of a
      spatial token on the other tokens of its row, divided by that of uniform attention, and the same for columns.
      Heads are assigned in descending order of these ratios, until both kinds are complete.
    * `gate`: the heads that matter least for the output of the tower: the smallest diagonal entries of J^T J, J the
      derivative of the output by a factor 1 on each head, estimated with random projections. The least important head
      becomes a row head, the next a column head, and so on in turns.

    The model is not changed, even by an error, and neither is the random state of torch.

    Args:
        model: A tower or a host, usually before SFA is injected.
        pages: Images as the tower gets them, `[pages, 3, height, width]`, or one mapping of keyword arguments of the
            tower's forward per page (Qwen2.5-VL: `hidden_states` and `grid_thw`).
        by: `affinity` or `gate`.
        layers: Numbers of attention layers; by default all that the host reads.
        tower: Path of the tower, for hosts with several.
        projections: Random projections per page, for `gate`.
        seed: Seed of the projections.

    Returns:
        `{layer: {"row": [heads], "col": [heads]}}`, heads in ascending order, for `init_heads`.

    Raises:
        InjectionError: An option is unknown or out of range, or no layer has two heads.
        DataError: There are no pages, they are too small to distinguish rows from columns, or their form does not fit
            the tower.
        NoMatchingBackboneError: No tower was found.
        ObservationError: Attention cannot be read (flash attention, a compiled tower).
        LayoutError: The tower's tokens lie on no grid (adaptive or merged tokens).
        RecipeError: `gate` does not know the output projection of an attention module.
    """
    if by not in get_args(By):
        raise InjectionError(f"by={by!r} must be one of {list(get_args(By))}.")
    if isinstance(projections, bool) or projections < 1:
        raise InjectionError(f"projections={projections!r} must be at least 1.")
    vision = find_tower(model, tower)
    chosen = _layers(vision, layers)
    batches = _pages(vision, pages)
    with evaluating(vision.tower), _state_kept(vision.tower):
        if by == "affinity":
            return {layer: _strongest(ratios) for layer, ratios in axis_affinity(vision, batches, chosen).items()}
        energies = gate_energy(vision, batches, chosen, projections, seed)
    return {layer: _weakest(energy) for layer, energy in energies.items()}


def _layers(vision: FoundTower, wanted: Sequence[int] | None) -> list[int]:
    total = len(vision.attentions)
    numbers = range(vision.used_layers) if wanted is None else sorted(set(wanted))
    wrong = [layer for layer in numbers if isinstance(layer, bool) or not 0 <= layer < total]
    if wrong:
        raise InjectionError(f"layers={wanted} names layer {wrong[0]}; the tower has layers 0..{total - 1}.")
    several = [n for n in numbers if head_count(vision.attentions[n][1], vision.tower) > 1]
    if not several:
        raise InjectionError(
            f"No layer of {list(numbers)} has two heads, so none can be shared between rows and columns."
        )
    return several


def _pages(vision: FoundTower, pages: Tensor | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Keyword arguments of the tower for each page, on its device and in its dtype."""
    if isinstance(pages, Tensor):
        if vision.backbone.joined != "batch" or pages.ndim != 4:
            raise DataError(
                f"pages {tuple(pages.shape)} must be images [pages, 3, height, width]; a {vision.backbone.name} tower "
                "takes a list with the keyword arguments of its forward."
            )
        name = next(iter(inspect.signature(vision.tower.forward).parameters))  # pixel_values; x in timm
        pages = [{name: page[None]} for page in pages]
    if not len(pages) or not all(isinstance(page, Mapping) for page in pages):
        raise DataError("pages must be images [pages, 3, height, width] or a list of keyword arguments, at least one.")
    like = next(parameter for parameter in vision.tower.parameters() if parameter.is_floating_point())
    return [{name: _placed(value, like) for name, value in page.items()} for page in pages]


def _placed(value: Any, like: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(like.device, like.dtype) if value.is_floating_point() else value.to(like.device)


@contextmanager
def _state_kept(tower: nn.Module) -> Iterator[None]:
    """Context that restores what SFA in the tower has recorded of its inputs."""
    state = state_of(tower, "sfa")
    before = None if state is None else (dict(state.seen), dict(state.layouts))
    try:
        yield
    finally:
        if state is not None and before is not None:
            state.seen, state.layouts = before


def _strongest(ratios: Tensor) -> LayerHeads:
    """Assigns heads in descending order of their ratios, `[2, heads]`; ties go to rows, then to the lower head."""
    count = max(1, ratios.shape[1] // 3)
    heads: LayerHeads = {axis: [] for axis in AXES}
    for place in torch.argsort(ratios.flatten(), descending=True, stable=True).tolist():
        axis, head = AXES[place // ratios.shape[1]], place % ratios.shape[1]
        if len(heads[axis]) < count and head not in heads["row"] + heads["col"]:
            heads[axis].append(head)
    return {axis: sorted(chosen) for axis, chosen in heads.items()}


def _weakest(energy: Tensor) -> LayerHeads:
    """Assigns heads to rows and columns in turns, in ascending order of energy, `[heads]`; ties to the lower head."""
    count = max(1, len(energy) // 3)
    order = torch.argsort(energy, stable=True)[: 2 * count].tolist()
    return {"row": sorted(order[::2]), "col": sorted(order[1::2])}
