"""Exact attention under a structural bias: one function, six backends.

* `dense` adds phi as a matrix, `[B, H, N, N]`. The reference.
* `folded` writes phi into q and k, so that plain scaled-dot-product attention computes it exactly, in its fastest
  kernels and with memory linear in N. With one-hot keys z over row and column kinds, phi(i, j) = z_i R z_j + z_i C z_j
  + e_i e_j, so q' = [q, z_i R / scale, z_i C / scale, e_i / scale] and k' = [k, z_j, z_j, e_j]. (The idea of folding a
  low-rank bias into q and k: FlashBias, arXiv 2505.12044, section 3; that SFA's tables make it exact is this
  library's.) Adding a constant per query changes no softmax, so the last kind of each table is subtracted and dropped,
  and prefix keys get one channel that puts the constant back: 31 + 31 + 1 + 1 = 64 channels for a 32x32 grid with a CLS
  token.
* `blocked` computes phi and the scores tile by tile, see `sfa_adapters.blocked`: memory linear in N for any grid.
* `lines` corrects plain attention along rows and columns, see `sfa_adapters.lines`: least work, but for the terms row
  and col only, on whole grids. Elsewhere it is `folded`.
* `triton` computes phi inside of a flash kernel from the places of tokens, see `sfa_adapters.triton_attention`: on
  CUDA, for any grid, memory linear in N. Elsewhere it is `folded`. `auto` does not choose it: it was not measured yet.
* `auto` chooses by the measurements in `benchmarks/results`, see `choose_backend`.

Shape letters: B batch, H heads, N tokens, D head width, E extra channels, A active adapters.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from sfa_adapters.bias import BiasFactors, look_up
from sfa_adapters.blocked import blocked_attention, blocked_is_fast
from sfa_adapters.errors import InjectionError, LayoutError
from sfa_adapters.lines import lines_attention, lines_fit
from sfa_adapters.triton_attention import triton_attention, triton_misfit

__all__ = ["Backend", "attend", "check_backend", "choose_backend", "dense_mask", "fold_channels", "folded_attention"]

Backend = Literal["auto", "dense", "folded", "blocked", "lines", "triton"]

# Added to the logits of keys that are padding by the folded backend. Far beyond any real logit, and representable in
# fp16: exp() of it is exactly zero next to any key that is not padding, and a row of padding alone stays finite.
PADDING_LOGIT = -3.0e4
# Widths at which fused kernels have a native tile; in between they run at the cost of the next one or leave the fast
# path.
HEAD_WIDTHS = (32, 64, 96, 128, 192, 256)
# Up to about this many tokens a dense mask costs a CPU less than the extra channels do
# (benchmarks/results/attention_*).
SHORT_SEQUENCE = 320


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: BiasFactors | None,
    *,
    attention_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: Backend = "auto",
) -> Tensor:
    """Scaled-dot-product attention with phi added to the logits.

    Args:
        query: `[B, H, N, D]`.
        key: `[B, H, N, D]`.
        value: `[B, H, N, D]`.
        bias: The tables of phi, or None for plain attention.
        attention_mask: A further mask, boolean (True = attend) or additive in logits, broadcastable to `[B, H, N, N]`.
        scale: Factor on q.k; 1 / sqrt(D) by default.
        dropout_p: Dropout probability on the attention weights.
        backend: `dense`, `folded`, `blocked`, `lines`, `triton` or `auto`. With dropout `blocked`, `lines` and `triton`
            are `folded`; `lines` and `triton` are, too, where they do not apply (`lines_fit`, `triton_misfit`) or there
            is a further mask.

    Returns:
        `[B, H, N, D]`, in the dtype of `query`.

    Raises:
        InjectionError: There is no such backend.
        LayoutError: The bias is for another number of tokens, heads or images.
    """
    check_backend(backend)
    if bias is None:
        return F.scaled_dot_product_attention(query, key, value, attention_mask, dropout_p=dropout_p, scale=scale)
    check_fit(query, bias)
    if backend == "auto":
        backend = choose_backend(query, bias, attention_mask)
    if backend == "dense":
        mask = merge_masks(dense_mask(bias, query), attention_mask)
        return F.scaled_dot_product_attention(query, key, value, mask, dropout_p=dropout_p, scale=scale)
    if backend == "blocked" and not dropout_p:  # a tile that is computed twice would have to be dropped out alike
        return blocked_attention(query, key, value, bias, attention_mask, scale)
    if backend == "lines" and not dropout_p and attention_mask is None and lines_fit(query, bias):
        return lines_attention(query, key, value, bias, scale)
    if backend == "triton" and not dropout_p and attention_mask is None and triton_misfit(query) is None:
        return triton_attention(query, key, value, bias, scale)
    return folded_attention(query, key, value, bias, attention_mask, scale, dropout_p)


def check_backend(backend: object) -> None:
    """Checks the name of a backend.

    Raises:
        InjectionError: There is none of that name; lists those that there are.
    """
    if not isinstance(backend, str) or backend not in get_args(Backend):
        raise InjectionError(f"backend={backend!r} must be one of {list(get_args(Backend))}.")


def choose_backend(
    query: Tensor, bias: BiasFactors, attention_mask: Tensor | None = None
) -> Literal["dense", "folded", "blocked", "lines"]:
    """What `auto` does, from the measurements in `benchmarks/results` (CPU) and docs/performance.md.

    * Short sequences on a CPU: dense. The matrix is small, and the extra channels are most of the work.
    * A real mask beside a bias without gradients: dense. There is a matrix in any case, so the bias joins it.
    * A bias of the terms row and col on a CPU: lines, where they apply.
    * Another bias on whole grids, on a CPU: blocked.
    * Else: folded. A matrix that needs gradients loses the fused kernels on every device, and on CUDA the flash
      kernel takes no matrix at all.
    """
    if query.device.type == "cpu" and query.shape[-2] <= SHORT_SEQUENCE:
        return "dense"
    if attention_mask is not None and not bias.requires_grad:
        return "dense"
    if attention_mask is None and lines_fit(query, bias):
        return "lines"
    return "blocked" if blocked_is_fast(query, bias) else "folded"


def check_fit(query: Tensor, bias: BiasFactors) -> None:
    """Checks that a bias is for these tokens, heads and images.

    Raises:
        LayoutError: It says which of the three differs.
    """
    batch, heads, tokens, _ = query.shape
    layout = bias.layout
    if layout.num_tokens != tokens:
        raise LayoutError(
            f"The layout has {layout.num_tokens} tokens (grid {layout.grid}, {layout.prefix_tokens} prefix), but the "
            f"attention sees {tokens}. Pass the layout of these tokens, or check image size and patch size."
        )
    if bias.num_heads != heads:
        raise LayoutError(f"The bias has {bias.num_heads} heads, but the attention has {heads}.")
    if layout.batch_size not in (None, batch):
        raise LayoutError(f"The layout describes {layout.batch_size} images, but the batch has {batch}.")


def dense_mask(bias: BiasFactors, query: Tensor) -> Tensor:
    """Phi as an additive 4-D mask in the dtype of the query (a 3-D mask loses the fused CPU kernel)."""
    with torch.autocast(query.device.type, enabled=False):
        return bias.dense().to(query.dtype)


def merge_masks(mask: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Adds a model's own mask to the bias; boolean masks say where to attend."""
    if attention_mask is None:
        return mask
    if attention_mask.dtype == torch.bool:
        return mask.masked_fill(~attention_mask, float("-inf"))
    return mask + attention_mask.to(mask.dtype)


def fold_channels(
    bias: BiasFactors, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Tensor]]:
    """The extra channels that carry phi, in parts that are broadcast when they are joined to q and k.

    Args:
        bias: The tables of phi.
        scale: What attention will multiply q.k with; the query channels are divided by it.
        dtype: Of the looked-up channels. The tables are built in fp32 and rounded once; ask for less than fp32 only
            where no gradient is needed, since it would be summed over tokens in that dtype.

    Returns:
        Query parts and key parts, each `[1 or B, 1 or H, N, e]`; `scale` times the product of the joined parts is
        phi plus a constant per query, and `PADDING_LOGIT` at keys that are padding.
    """
    layout = bias.layout
    queries = [look_up(layout.one_hot.to(dtype), (_shifted_tables(bias) / scale).to(dtype))]
    keys = [layout.key_channels.unsqueeze(-3)]
    for value in bias.block_value:  # one rank-1 term per active adapter
        queries.append(value.unsqueeze(-1) / scale)
        keys.append(value.unsqueeze(-1))
    if layout.padding is not None:
        # The root on either side: over the scale of a usual head the logit itself is beyond fp16, and infinity times
        # the zero of a real key is NaN.
        padded = layout.padding[..., None, :, None].to(dtype)
        root = math.sqrt(abs(PADDING_LOGIT / scale))
        queries.append(torch.full_like(padded, PADDING_LOGIT / scale / root))
        keys.append(padded * root)
    if layout.batch_size is None:
        queries, keys = [part.unsqueeze(0) for part in queries], [part.unsqueeze(0) for part in keys]
    return queries, keys


def _shifted_tables(bias: BiasFactors) -> Tensor:
    """Both tables in one, `[H, U + V, E]`, in the order of `TokenLayout.key_channels`, minus each row's last entry."""
    rows, columns = bias.row_table, bias.column_table
    last_row, last_column = rows[..., -1:], columns[..., -1:]
    upper = [rows[..., :-1] - last_row, rows.new_zeros(*rows.shape[:-1], columns.shape[-1] - 1)]
    lower = [columns.new_zeros(*columns.shape[:-1], rows.shape[-1] - 1), columns[..., :-1] - last_column]
    if bias.layout.has_off_page:  # keys without a place have phi = 0: relative to others, minus what was subtracted
        upper.append(-last_row)
        lower.append(-last_column)
    return torch.cat((torch.cat(upper, dim=-1), torch.cat(lower, dim=-1)), dim=-2)


def folded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: BiasFactors,
    attention_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Plain attention on widened q, k and v; see the head of this file. Arguments as in `attend`."""
    width = query.shape[-1]
    scale = float(width**-0.5) if scale is None else scale
    with torch.autocast(query.device.type, enabled=False):  # the tables stay fp32 until the last cast
        queries, keys = fold_channels(bias, scale, torch.float32 if bias.requires_grad else query.dtype)
    total = width + sum(part.shape[-1] for part in queries)
    # v must be as wide as q and k for the fused kernels.
    padded = _native_width(total)
    query, key = _widen(query, queries, padded - total), _widen(key, keys, padded - total)
    value = F.pad(value, (0, padded - value.shape[-1]))
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        attention_mask = attention_mask.to(query.dtype)
    out = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout_p=dropout_p, scale=scale)
    return out[..., :width]


def _widen(states: Tensor, parts: list[Tensor], pad: int) -> Tensor:
    shape = states.shape[:-1]
    wide = [part.to(states.dtype).expand(*shape, -1) for part in parts]
    if pad:
        wide.append(states.new_zeros(1).expand(*shape, pad))
    return torch.cat((states, *wide), dim=-1)


def _native_width(width: int) -> int:
    return next((native for native in HEAD_WIDTHS if native >= width), -(-width // 8) * 8)
