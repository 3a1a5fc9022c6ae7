"""Maps of attention over a page: from one patch of the tower, from one answer token, or rolled out through all layers.

Rollout (Abnar & Zuidema 2020, arXiv 2005.00928, section 3) multiplies the layers' mean maps A, each mixed with the
identity for the residual stream. Here only a row vector r of the chosen queries is propagated from the last layer to
the first, r <- r (0.5 A + 0.5 I), so no N x N matrix is kept: q and k of the layers are, and rows of A are computed
from them block by block.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from sfa_adapters.analysis.answer_rows import answer_attention
from sfa_adapters.analysis.forward import (
    Heads,
    Inputs,
    Layers,
    TowerPass,
    chosen_layers,
    over_heads,
    run_tower,
    tower_layers,
)
from sfa_adapters.analysis.report import Report, Row, Skips
from sfa_adapters.attention_call import AttentionCall, row_blocks
from sfa_adapters.errors import DataError
from sfa_adapters.eval_mode import evaluating

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["AttentionMap", "attention_map", "attention_rollout"]


@dataclass(frozen=True, eq=False)
class AttentionMap(Report):
    """Attention of one query over a page.

    Attributes:
        values: Share of the attention on each patch, `[rows, columns]`.
        elsewhere: Share on tokens without a place on the page: CLS and registers, or the text of a prompt.
        patch: Row and column of the query, where it is a patch.
        how: The query and the options.
        skipped: Empty; for the interface of `Report`.
    """

    values: np.ndarray
    elsewhere: float
    patch: tuple[int, int] | None
    how: dict[str, Any]
    skipped: Skips = field(default_factory=Skips)

    def table(self) -> list[Row]:
        """One row per patch: `row`, `column`, `attention` (a share; all of them and `elsewhere` add up to 1)."""
        places = np.ndindex(*self.values.shape)
        return [{"row": r, "column": c, "attention": float(self.values[r, c])} for r, c in places]

    def options(self) -> dict[str, Any]:
        """The query and the options, and the share of attention without a place."""
        return self.how | {"elsewhere": self.elsewhere, "grid": list(self.values.shape)}

    def figure(self, image: np.ndarray | None = None) -> Figure:
        """Draws the map over the page.

        Args:
            image: The page as the tower sees it, uint8 `[H, W, 3]`; without one the map is drawn alone.
        """
        from sfa_adapters.analysis.map_figures import plot_map

        return plot_map(self, image)


def attention_map(
    model: nn.Module,
    inputs: Inputs,
    *,
    patch: tuple[int, int] | None = None,
    answer_token: int | None = None,
    layers: Layers = None,
    heads: Heads = "mean",
    index: int = 0,
    grid: tuple[int, int] | None = None,
    image_token_id: int | Collection[int] | None = None,
) -> AttentionMap:
    """Measures the attention of one patch, or of one token of the answer, over the page.

    Args:
        model: A model with a vision tower; for `answer_token` a vision-language model of transformers.
        inputs: Keyword arguments of the model; for `patch` also images alone.
        patch: Row and column of a query patch of the vision tower.
        answer_token: Number of a token of the greedy answer, from 0. The query is the token before it, which predicts
            it; for the first one that is the last token of the prompt.
        layers: Numbers of the layers whose rows are averaged; all by default.
        heads: "mean", or the number of one head.
        index: Which image of the tower, or which prompt of the batch.
        grid: For `answer_token`: rows and columns of the image tokens on the page; by default the tower's grid, perhaps
            merged.
        image_token_id: For `answer_token`: as in `modality_dominance`.

    Returns:
        The map.

    Raises:
        DataError: Not exactly one of `patch` and `answer_token` is given, or a number does not exist.
        NoMatchingBackboneError: No tower was found.
        ObservationError: The tokens have no fixed place, or attention cannot be read.
    """
    if (patch is None) == (answer_token is None):
        raise DataError("Say whose attention to draw: either patch=(row, column) or answer_token=number.")
    if answer_token is not None:
        if not isinstance(inputs, Mapping):
            raise DataError("answer_token=... needs the inputs of the model as keyword arguments, with input_ids.")
        page, how = answer_attention(model, inputs, answer_token, layers, heads, index, grid, image_token_id)
        return AttentionMap(page, 1.0 - float(page.sum()), None, how)
    assert patch is not None
    with evaluating(model):
        names = chosen_layers(tower_layers(model), layers)
        seen, calls = _tower_calls(model, inputs, names, index)
        rows = [next(row_blocks(call, _places(seen, patch))).probabilities[0, :, 0] for call in calls]
        row = over_heads(torch.stack(rows).mean(0), heads)
    how = {"query": "patch", "patch": list(patch), "layers": list(names), "heads": heads}
    return _page_map(row, seen, patch, how)


def attention_rollout(
    model: nn.Module,
    inputs: Inputs,
    *,
    patch: tuple[int, int] | None = None,
    residual: float = 0.5,
    index: int = 0,
) -> AttentionMap:
    """Attention rollout of a vision tower: attention of its output to each input patch through all layers.

    Args:
        model: A tower with one grid per image, or a model with one; layers that the host does not read are left out.
        inputs: Keyword arguments of the model, or images alone.
        patch: Row and column of the output patch; the mean over all of them by default.
        residual: Weight of the identity (the residual stream) in every layer, from 0 to 1.
        index: Which image of the tower.

    Returns:
        The map. Memory: q and k of every layer with sdpa; the whole maps of all layers with eager attention.

    Raises:
        DataError: `patch` or `index` does not exist, or `residual` is out of range.
        NoMatchingBackboneError: No tower was found.
        ObservationError: The tokens have no fixed place, or attention cannot be read.
    """
    if not 0 <= residual <= 1:
        raise DataError(f"residual={residual} must lie between 0 and 1.")
    with evaluating(model):
        names = tower_layers(model)
        seen, calls = _tower_calls(model, inputs, names, index)
        places = _places(seen, patch)
        row = torch.zeros(calls[0].num_queries, device=calls[0].device)
        row[places] = 1 / len(places)
        for call in reversed(calls):
            blocks = row_blocks(call)
            attended = torch.stack([row[rows.index] @ rows.probabilities[0].mean(0) for rows in blocks]).sum(0)
            row = residual * row + (1 - residual) * attended
    how = {"query": "rollout", "patch": None if patch is None else list(patch), "residual": residual}
    return _page_map(row, seen, patch, how | {"layers": list(names), "heads": "mean"})


def _tower_calls(
    model: nn.Module, inputs: Inputs, names: Sequence[str], index: int
) -> tuple[TowerPass, list[AttentionCall]]:
    """The forward that held image `index`, and the attention call of that image alone in every layer."""
    kept: dict[str, list[AttentionCall]] = {name: [] for name in names}
    passes = run_tower(model, inputs, [lambda call: kept[call.layer].append(call.detach())], names)
    place = index
    for forward, seen in enumerate(passes):
        if 0 <= place < len(seen.images):
            return seen, [_alone(kept[name][forward], place) for name in names]
        place -= len(seen.images)
    raise DataError(f"index={index}: the tower saw {sum(len(seen.images) for seen in passes)} images.")


def _alone(call: AttentionCall, image: int) -> AttentionCall:
    """The part of an attention call that belongs to one image."""
    inputs_of_one: dict[str, Tensor] = {}
    for name in ("query", "key", "mask", "scores"):
        tensor = getattr(call, name)
        if tensor is not None and tensor.ndim == 4 and len(tensor) == call.batch_size:
            inputs_of_one[name] = tensor[image : image + 1]
    return replace(call, **inputs_of_one)


def _places(seen: TowerPass, patch: tuple[int, int] | None) -> Tensor:
    """Token numbers of a patch, or of all patches."""
    rows, columns = seen.grid
    if patch is None:
        return torch.arange(rows * columns, device=seen.images.device) + seen.prefix
    row, column = patch
    if not (0 <= row < rows and 0 <= column < columns):
        raise DataError(f"patch={patch}: the page has {rows} rows and {columns} columns of patches, from 0.")
    return torch.tensor([seen.prefix + row * columns + column], device=seen.images.device)


def _page_map(row: Tensor, seen: TowerPass, patch: tuple[int, int] | None, how: dict[str, Any]) -> AttentionMap:
    values = row.double().cpu().numpy()
    return AttentionMap(values[seen.prefix :].reshape(seen.grid), float(values[: seen.prefix].sum()), patch, how)
