"""Attention of each head to the row and to the column of the query token, relative to uniform attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sfa_adapters.attention_call import HIDDEN, AttentionCall, Rows
from sfa_adapters.errors import DataError
from sfa_adapters.heads.page_layouts import layouts_of
from sfa_adapters.layout import TokenLayout
from sfa_adapters.observe import observe
from sfa_adapters.readers import Reader
from sfa_adapters.tower_search import FoundTower

__all__ = ["AxisMass", "axis_affinity"]


class AxisMass(Reader):
    """Reader of the attention of tokens to the others in their row and column, summed over tokens, `[2, 2, H]`.

    The first index is 0 for the attention mass and 1 for that of uniform attention over the same visible keys; the
    second is 0 for rows and 1 for columns. Tokens without a place on the page (CLS, registers) and masked tokens
    (padding) are left out as queries, and are in no row. A token's attention to itself is in neither. Tokens of
    different sizes share a row by the overlap of their extents, as in the bias. Memory is linear in tokens.

    Args:
        layout_of: Function from an attention call to the layout of its tokens.
    """

    def __init__(self, layout_of: Callable[[AttentionCall], TokenLayout]) -> None:
        super().__init__()
        self.layout_of = layout_of

    def begin(self, call: AttentionCall) -> tuple[TokenLayout, Tensor]:
        """The layout of the call, and zeros for the sums."""
        return self.layout_of(call), torch.zeros(2, 2, call.num_heads, dtype=torch.float64, device=call.device)

    def block(self, state: tuple[TokenLayout, Tensor], call: AttentionCall, rows: Rows) -> None:
        """Adds a block of rows."""
        layout, sums = state
        visible = (rows.logits > HIDDEN / 2).float()
        itself = rows.index[:, None].expand(*rows.logits.shape[:-1], 1)
        counted = layout.spatial[rows.index] * visible.gather(-1, itself)[..., 0]  # [B, H, R]
        chance = visible / visible.sum(-1, keepdim=True).clamp(min=1)
        shares = torch.split(layout.one_hot, [layout.rows.num_kinds, layout.columns.num_kinds], dim=-1)
        for axis, (kinds, member) in enumerate(zip((layout.rows, layout.columns), shares, strict=True)):
            beside = kinds.overlap()[kinds.index[rows.index]]  # [R, U]
            for which, weights in enumerate((rows.probabilities, chance)):
                mass = ((weights @ member) * beside).sum(-1) - weights.gather(-1, itself)[..., 0]
                sums[which, axis] += (mass * counted).sum((0, 2)).double()

    def end(self, state: tuple[TokenLayout, Tensor], call: AttentionCall) -> Tensor:
        """The sums."""
        return state[1]


def axis_affinity(vision: FoundTower, pages: Sequence[Mapping[str, Any]], layers: Sequence[int]) -> dict[int, Tensor]:
    """Mean attention of spatial tokens to their own row and column, divided by that of uniform attention.

    Args:
        vision: The tower, in eval mode.
        pages: Keyword arguments of its forward.
        layers: Numbers of attention layers.

    Returns:
        By layer `[2, heads]`, fp64: rows, then columns; 1 for uniform attention.

    Raises:
        DataError: No page has two tokens in a row and two in a column.
        ObservationError: The attention cannot be read.
        LayoutError: The tokens are not those of a grid.
    """
    prefix = len(vision.name) + 1 if vision.name else 0
    names = {layer: vision.attentions[layer][0][prefix:] for layer in layers}
    sums: dict[int, Tensor] = {}
    with layouts_of(vision) as layout_of:
        for page in pages:
            reader = AxisMass(layout_of)
            with observe(vision.tower, reader, list(names.values())):
                vision.tower(**page)
            for layer, name in names.items():
                sums[layer] = sums.get(layer, 0) + torch.stack(reader.results[name]).sum(0).cpu()
    if not all(bool((chance > 0).all()) for _, chance in sums.values()):
        raise DataError(
            "Rows and columns cannot be told apart on these pages: no page has two tokens in one row and two in one "
            "column. Give larger pages."
        )
    return {layer: mass / chance for layer, (mass, chance) in sums.items()}
