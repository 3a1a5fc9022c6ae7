"""Exact attention under a structural bias: one function, five backends.

* `dense` adds phi as a matrix, `[B, H, N, N]`. The reference.
* `folded` writes phi into extra channels of q and k, see `sfa_adapters.folded`: plain attention in its fastest kernels.
* `blocked` computes phi and the scores tile by tile, see `sfa_adapters.blocked`: memory linear in N for any grid.
* `lines` corrects plain attention along rows and columns, see `sfa_adapters.lines`: least work, but for the terms row
  and col only, on whole grids. Elsewhere it is `folded`.
* `auto` chooses by the measurements in `benchmarks/results`, see `choose_backend`.

Shape letters: B batch, H heads, N tokens, D head width.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from sfa_adapters.bias import BiasFactors
from sfa_adapters.blocked import blocked_attention, blocked_is_fast
from sfa_adapters.errors import InjectionError, LayoutError
from sfa_adapters.folded import fold_channels, folded_attention
from sfa_adapters.lines import lines_attention, lines_fit

__all__ = ["Backend", "attend", "check_backend", "choose_backend", "dense_mask", "fold_channels", "folded_attention"]

Backend = Literal["auto", "dense", "folded", "blocked", "lines"]

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
        value: `[B, H, N, D]`; another width than that of q and k is computed by `dense`, `folded` or `blocked`.
        bias: The tables of phi, or None for plain attention.
        attention_mask: A further mask, boolean (True = attend) or additive in logits, broadcastable to `[B, H, N, N]`.
        scale: Factor on q.k; 1 / sqrt(D) by default.
        dropout_p: Dropout probability on the attention weights.
        backend: `dense`, `folded`, `blocked`, `lines` or `auto`. With dropout `blocked` and `lines` are `folded`, and
            `lines` is, too, where it does not apply (`lines_fit`), beside a further mask, and for v of another width.

    Returns:
        As `value`, in the dtype of `query`.

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
    fit = not dropout_p and attention_mask is None and query.shape == value.shape
    if backend == "lines" and fit and lines_fit(query, bias):
        return lines_attention(query, key, value, bias, scale)
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
