"""`blocked_attention`: exact attention under phi with memory linear in the tokens, for any grid and any device.

Query rows are taken in tiles that stay in the cache. Phi of a tile is written by broadcasting (`PhiTiles`), q.k is
added to it by one matrix product, and softmax and the product with v follow in place: all keys of a query are in its
tile, so no running maximum is needed. The backward pass computes the tiles again, and sums their gradient into the
small tables of phi. At most `[heads, tile, keys]` numbers of phi exist at a time.

The folded backend widens q and k by rows + columns channels, which is cheap on a tile of 32 x 32 patches and doubles
the work on a page of 72 x 80; here the work on phi does not depend on the size of the grid.
(Tiles and recomputation in the backward pass: FlashAttention, arXiv 2205.14135.)

Shape letters: B batch, H heads, N tokens, K keys, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sfa_adapters.bias import BiasFactors
from sfa_adapters.phi_tiles import PhiTiles, TableSums

__all__ = ["blocked_attention"]

# Of the scores of one tile. Two tiles should fit into the cache that the cores share.
TILE_BYTES = 3 * 2**20
# Below so many queries a matrix product is not efficient: rather fewer heads at a time.
TILE_QUERIES = 128


def blocked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: BiasFactors,
    attention_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention with phi, tile by tile; see the head of this file.

    Arguments as in `attend`; a query that may see no key gets zeros.
    """
    scale = float(query.shape[-1] ** -0.5) if scale is None else scale
    tables = (bias.row_table, bias.column_table, bias.block_value)
    return _Blocked.apply(query, key, value, *tables, bias, attention_mask, scale)  # pyright: ignore[reportReturnType]


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, row_table: Tensor, column_table: Tensor,
        block_value: Tensor, bias: BiasFactors, mask: Tensor | None, scale: float,
    ) -> Tensor:  # fmt: skip
        dtype = torch.promote_types(query.dtype, torch.float32)
        out = torch.empty(*query.shape[:-1], value.shape[-1], dtype=query.dtype, device=query.device)
        with torch.autocast(query.device.type, enabled=False):
            for image in range(len(query)):
                phi = PhiTiles(bias, image, dtype)
                left = query[image].to(dtype).contiguous()
                keys, values = (phi.arrange(states[image]).to(dtype).contiguous() for states in (key, value))
                buffer = left.new_empty(_size(phi, left))
                for heads, queries in _tiles(phi, left):
                    weights = _weights(phi, left, keys, mask, scale, image, heads, queries, buffer)
                    out[image, heads, queries] = torch.bmm(weights, values[heads]).to(out.dtype)
        ctx.save_for_backward(query, key, value, out, mask, row_table, column_table, block_value)
        ctx.bias, ctx.scale = bias, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient: Tensor = grad_outputs[0]
        query, key, value, out, mask, row_table, column_table, block_value = ctx.saved_tensors
        bias, scale = ctx.bias, ctx.scale
        dtype = torch.promote_types(query.dtype, torch.float32)
        of_query, of_key, of_value = (
            torch.zeros(states.shape, dtype=states.dtype, device=states.device) for states in (query, key, value)
        )
        of_rows, of_columns, of_blocks = (torch.zeros_like(table) for table in (row_table, column_table, block_value))
        with_tables = any(ctx.needs_input_grad[3:6])
        with torch.autocast(query.device.type, enabled=False):
            for image in range(len(query)):
                phi = PhiTiles(bias, image, dtype)
                left, upper = (states[image].to(dtype).contiguous() for states in (query, gradient))
                keys, values = (phi.arrange(states[image]).to(dtype).contiguous() for states in (key, value))
                # The sum over keys of weight times its gradient.
                middle = (upper * out[image].to(dtype)).sum(-1, keepdim=True)
                blocks = of_blocks if bias.layout.batch_size is None else of_blocks[:, image]
                sums = TableSums(of_rows, of_columns, blocks)
                key_sum, value_sum = torch.zeros_like(keys), torch.zeros_like(values)
                first, second = (left.new_empty(_size(phi, left)) for _ in range(2))
                for heads, queries in _tiles(phi, left):
                    weights = _weights(phi, left, keys, mask, scale, image, heads, queries, first)
                    above = upper[heads, queries]
                    value_sum[heads].baddbmm_(weights.transpose(1, 2), above)
                    logits = second[: weights.numel()].view_as(weights)
                    torch.bmm(above, values[heads].transpose(1, 2), out=logits)
                    logits.sub_(middle[heads, queries]).mul_(weights)  # now the gradient of the logits
                    of_query[image, heads, queries] = (torch.bmm(logits, keys[heads]) * scale).to(of_query.dtype)
                    key_sum[heads].baddbmm_(logits.transpose(1, 2), left[heads, queries], alpha=scale)
                    if with_tables:
                        phi.add_gradient(heads, queries, logits, sums)
                where = slice(None) if phi.keys.index is None else phi.keys.index
                of_key[image, :, where] = key_sum.to(of_key.dtype)
                of_value[image, :, where] = value_sum.to(of_value.dtype)
        return of_query, of_key, of_value, of_rows, of_columns, of_blocks, None, None, None


def _weights(
    phi: PhiTiles, query: Tensor, keys: Tensor, mask: Tensor | None, scale: float, image: int, heads: slice,
    queries: slice, buffer: Tensor,
) -> Tensor:  # fmt: skip
    """Attention weights of a tile, `[h, T, K]`, in the buffer; zero where a query may see no key."""
    shape = (len(query[heads]), query[:, queries].shape[1], phi.num_keys)
    tile = buffer[: shape[0] * shape[1] * shape[2]].view(shape)
    phi.write(heads, queries, tile)
    blind: Tensor | None = None
    if mask is not None:
        part = _mask_tile(mask, image, heads, queries, phi)
        tile.masked_fill_(~part, float("-inf")) if part.dtype == torch.bool else tile.add_(part)
        blind = tile.amax(-1, keepdim=True) == float("-inf")
        tile.masked_fill_(blind, 0.0)
    tile.baddbmm_(query[heads, queries], keys[heads].transpose(1, 2), alpha=scale)
    torch.softmax(tile, -1, out=tile)
    return tile if blind is None else tile.masked_fill_(blind, 0.0)


def _mask_tile(mask: Tensor, image: int, heads: slice, queries: slice, phi: PhiTiles) -> Tensor:
    """The part of a mask that a tile needs, broadcastable to `[h, T, K]`."""
    mask = mask[(None,) * (4 - mask.ndim)]
    mask = mask[image if mask.shape[0] > 1 else 0]
    mask = mask if mask.shape[0] == 1 else mask[heads]
    mask = mask if mask.shape[1] == 1 else mask[:, queries]
    return mask if mask.shape[2] == 1 or phi.keys.index is None else mask[..., phi.keys.index]


def _steps(phi: PhiTiles, query: Tensor) -> tuple[int, int]:
    """Heads and queries of a tile."""
    heads, tokens = query.shape[:2]
    numbers = max(1, TILE_BYTES // query.element_size() // max(phi.num_keys, 1))  # rows of scores
    if numbers >= heads * TILE_QUERIES:
        return heads, min(tokens, numbers // heads)
    return max(1, min(heads, numbers // TILE_QUERIES)), min(tokens, TILE_QUERIES)


def _size(phi: PhiTiles, query: Tensor) -> int:
    heads, queries = _steps(phi, query)
    return heads * queries * phi.num_keys


def _tiles(phi: PhiTiles, query: Tensor) -> Iterator[tuple[slice, slice]]:
    heads, queries = _steps(phi, query)
    for head in range(0, query.shape[0], heads):
        for first in range(0, query.shape[1], queries):
            yield slice(head, head + heads), slice(first, first + queries)
