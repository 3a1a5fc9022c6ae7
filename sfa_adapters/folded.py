"""`folded_attention`: phi as extra channels of q and k, so that plain scaled-dot-product attention computes it exactly.

It runs in the fastest kernels, with memory linear in N. With one-hot keys z over row and column kinds, phi(i, j) =
z_i R z_j + z_i C z_j + e_i e_j, so q' = [q, z_i R / scale, z_i C / scale, e_i / scale] and k' = [k, z_j, z_j, e_j].
(The idea of folding a low-rank bias into q and k: FlashBias, arXiv 2505.12044, section 3; that SFA's tables make it
exact is this library's.) Adding a constant per query changes no softmax, so the last kind of each table is subtracted
and dropped, and prefix keys get one channel that puts the constant back: 31 + 31 + 1 + 1 = 64 channels for a 32x32
grid with a CLS token.

Shape letters: B batch, H heads, N tokens, D head width, E extra channels, A active adapters.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sfa_adapters.bias import BiasFactors, look_up

__all__ = ["HEAD_WIDTHS", "PADDING_LOGIT", "fold_channels", "folded_attention", "native_width", "widen"]

# Added to the logits of keys that are padding by the folded backend. Far beyond any real logit, and representable in
# fp16: exp() of it is exactly zero next to any key that is not padding, and a row of padding alone stays finite.
PADDING_LOGIT = -3.0e4
# Widths at which fused kernels have a native tile; in between they run at the cost of the next one or leave the fast
# path.
HEAD_WIDTHS = (32, 64, 96, 128, 192, 256)


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
    value_width = value.shape[-1]
    scale = float(query.shape[-1] ** -0.5) if scale is None else scale
    query, key = widen(query, key, bias, scale, value_width)
    if not _takes_narrow_values(query, key, value, attention_mask, dropout_p):
        value = F.pad(value, (0, query.shape[-1] - value_width))
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        attention_mask = attention_mask.to(query.dtype)
    out = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout_p=dropout_p, scale=scale)
    return out[..., :value_width]


def widen(query: Tensor, key: Tensor, bias: BiasFactors, scale: float, least: int = 0) -> tuple[Tensor, Tensor]:
    """Writes phi into further channels of q and k, up to a width that kernels support natively.

    Args:
        query: `[B, H, N, D]`.
        key: `[B, H, N, D]`.
        bias: The tables of phi.
        scale: What attention will multiply q.k with.
        least: Width that the result must have at least.
    """
    with torch.autocast(query.device.type, enabled=False):  # the tables stay fp32 until the last cast
        queries, keys = fold_channels(bias, scale, torch.float32 if bias.requires_grad else query.dtype)
    total = query.shape[-1] + sum(part.shape[-1] for part in queries)
    pad = native_width(max(total, least)) - total
    return _joined(query, queries, pad), _joined(key, keys, pad)


def _joined(states: Tensor, parts: list[Tensor], pad: int) -> Tensor:
    shape = states.shape[:-1]
    wide = [part.to(states.dtype).expand(*shape, -1) for part in parts]
    if pad:
        wide.append(states.new_zeros(1).expand(*shape, pad))
    return torch.cat((states, *wide), dim=-1)


def native_width(width: int) -> int:
    """The smallest head width at or above this one that kernels support natively, or a multiple of 8."""
    return next((native for native in HEAD_WIDTHS if native >= width), -(-width // 8) * 8)


def _takes_narrow_values(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout_p: float
) -> bool:
    """Whether v may stay narrower than q and k: where no kernel that needs equal widths would run in any case.

    On a CPU the fused kernel takes equal widths only; without it attention takes twice as long (torch 2.15, 577 to
    2,304 tokens). On CUDA flash takes equal widths only, up to 256, in half precision; where it is out of the question,
    cuDNN and the memory-efficient kernel take any v, and zeros would only cost them time.
    """
    if not query.is_cuda or torch.compiler.is_compiling() or type(query) is not Tensor:  # fake, distributed, ...
        return False
    cuda = torch.backends.cuda
    wide = F.pad(value, (0, query.shape[-1] - value.shape[-1]))
    if cuda.can_use_flash_attention(cuda.SDPAParams(query, key, wide, attention_mask, dropout_p, False, False)):
        return False
    narrow = cuda.SDPAParams(query, key, value, attention_mask, dropout_p, False, False)
    return cuda.can_use_cudnn_attention(narrow) or cuda.can_use_efficient_attention(narrow)
