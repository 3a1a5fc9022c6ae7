"""`Channels`: phi of one layer as further channels of q and k, for the tokens that an engine's attention is given.

An engine computes attention in kernels of its own, which take no bias. The fold (`sfa_adapters.folded`) needs nothing
of them but wider heads: q' . k' = q . k + phi / scale.

Shape letters: B images, N tokens of a sequence, H heads of this rank, D head width, E channels of phi, S segments of n
tokens each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor

from sfa_adapters.attention import attend
from sfa_adapters.bias import StructuralWeights, bias_factors
from sfa_adapters.errors import LayoutError, ServingError
from sfa_adapters.folded import fold_channels, native_width
from sfa_adapters.layout import TokenLayout
from sfa_adapters.serving.places import SegmentGroup

__all__ = ["attend_groups", "heads_of_rank", "phi_width", "widen_groups", "widen_images"]


def heads_of_rank(weights: StructuralWeights, total: int, here: int, rank: int, ranks: int) -> StructuralWeights:
    """The scalars of the heads that one rank computes; heads that an engine adds to divide them evenly have none.

    Args:
        weights: Scalars of all heads of a layer.
        total: Heads that the adapter was trained with.
        here: Heads of the layer on this rank.
        rank: Number of this rank.
        ranks: How many ranks share the heads; a layer with all of its heads on every rank is not cut.

    Raises:
        ServingError: The heads cannot be those that the adapter was trained with.
    """
    if here == total:
        return weights
    if not (ranks > 1 and here * ranks >= total):
        raise ServingError(
            f"A layer has {here} heads on each of {ranks} ranks, but the adapter was trained with {total} heads."
        )

    def cut(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        added = values.new_zeros(max(here * ranks - total, 0), *values.shape[1:])
        return torch.cat((values, added))[rank * here : (rank + 1) * here]

    return StructuralWeights(*(cut(getattr(weights, field.name)) for field in fields(weights)))


def phi_width(layouts: Sequence[TokenLayout], weights: StructuralWeights) -> int:
    """E, the channels that phi needs over these layouts."""
    prefix = any(layout.has_off_page for layout in layouts)
    kinds = max(layout.rows.num_kinds + layout.columns.num_kinds - 2 for layout in layouts)
    return kinds + int(prefix) + int(weights.block is not None)


def _channels(
    layout: TokenLayout, weights: StructuralWeights, like: Tensor, scale: float, width: int
) -> tuple[Tensor, Tensor]:
    """Channels of q and of k, `[1 or S, H, N, width]` each, zeros behind those that this layout needs."""
    heads = like.shape[-2]
    with torch.autocast(like.device.type, enabled=False):
        queries, keys = fold_channels(bias_factors([weights], layout, heads), scale, like.dtype)

    def joined(parts: list[Tensor]) -> Tensor:
        shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts), (1, heads, 1))
        wide = torch.cat([part.to(like.dtype).expand(*shape, -1) for part in parts], dim=-1)
        return F.pad(wide, (0, width - wide.shape[-1]))

    return joined(queries), joined(keys)


def widen_images(
    query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, weights: StructuralWeights, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes phi into further channels of q and k, and zeros behind v, for images in a batch.

    Args:
        query: `[B, N, H, D]`.
        key: Likewise.
        value: Likewise.
        layout: Where the tokens of each image lie.
        weights: Scalars of the H heads, on the device of `query`.
        scale: What attention will multiply q.k with.

    Returns:
        q, k and v of one width that kernels support natively.

    Raises:
        LayoutError: The images have another number of tokens.
    """
    batch, tokens, _, width = query.shape
    if tokens != layout.num_tokens:
        raise LayoutError(
            f"The attention got {tokens} tokens for each image, but a grid of {layout.grid} patches with "
            f"{layout.prefix_tokens} prefix tokens has {layout.num_tokens}."
        )
    extra = native_width(width + phi_width([layout], weights)) - width
    queries, keys = (part.transpose(1, 2) for part in _channels(layout, weights, query, scale, extra))
    wide = [torch.cat((x, part.expand(batch, -1, -1, -1)), -1) for x, part in ((query, queries), (key, keys))]
    return wide[0], wide[1], F.pad(value, (0, extra))


def widen_groups(
    query: Tensor, key: Tensor, value: Tensor, groups: Sequence[SegmentGroup], weights: StructuralWeights, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `widen_images`, for a flat sequence that is cut into segments.

    Args:
        query: `[1, N, H, D]`.
        key: Likewise.
        value: Likewise.
        groups: All segments of the sequence.
        weights: As there.
        scale: As there.

    Raises:
        LayoutError: The sequence has another number of tokens.
    """
    check_tokens(query, groups)
    width = query.shape[-1]
    extra = native_width(width + phi_width([group.layout for group in groups], weights)) - width
    wide_query, wide_key = F.pad(query, (0, extra)), F.pad(key, (0, extra))
    for group in groups:
        queries, keys = _channels(group.layout, weights, query, scale, extra)
        for wide, part in ((wide_query, queries), (wide_key, keys)):
            wide[0, group.tokens, :, width:] = part.transpose(1, 2).expand(len(group.tokens), -1, -1, -1)
    return wide_query, wide_key, F.pad(value, (0, extra))


def attend_groups(
    query: Tensor, key: Tensor, value: Tensor, groups: Sequence[SegmentGroup], weights: StructuralWeights, scale: float
) -> Tensor:
    """Attention by this library rather than by the engine, for pages whose grid makes heads too wide for its kernels.

    Args:
        query: `[1, N, H, D]`.
        key: Likewise.
        value: Likewise.
        groups: All segments of the sequence.
        weights: As in `widen_images`.
        scale: As there.

    Returns:
        `[1, N, H, D]`.
    """
    check_tokens(query, groups)
    out = torch.empty_like(value)
    for group in groups:
        parts = [x[0, group.tokens].transpose(1, 2) for x in (query, key, value)]
        bias = bias_factors([weights], group.layout, query.shape[-2])
        out[0, group.tokens] = attend(parts[0], parts[1], parts[2], bias, scale=scale).transpose(1, 2)
    return out


def check_tokens(query: Tensor, groups: Sequence[SegmentGroup]) -> None:
    """Checks that the segments hold the tokens of a sequence.

    Raises:
        LayoutError: They do not.
    """
    covered = sum(group.tokens.numel() for group in groups)
    if query.shape[0] != 1 or covered != query.shape[1]:
        raise LayoutError(f"The attention got {tuple(query.shape[:2])} tokens, but its segments have {covered}.")
