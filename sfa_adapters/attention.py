"""Exact attention under a structural bias: one function, six backends.

* `dense` adds phi as a matrix, `[B, H, N, N]`. The reference.
* `folded` writes phi into extra channels of q and k, see `sfa_adapters.folded`: plain attention in its fastest kernels.
* `blocked` computes phi and the scores tile by tile, see `sfa_adapters.blocked`: memory linear in N for any grid.
* `lines` corrects plain attention along rows and columns, see `sfa_adapters.lines`: least work, but for the terms row
  and col only, on whole grids. Elsewhere it is `folded`.
* `triton` computes phi inside of a flash kernel from the places of tokens, see `sfa_adapters.triton_attention`: on
  CUDA, for any grid, memory linear in N. Elsewhere it is `folded`.
* `auto` chooses by measured times, see `sfa_adapters.backend_choice`.

Shape letters: B batch, H heads, N tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from sfa_adapters.backend_choice import choose_backend
from sfa_adapters.bias import BiasFactors
from sfa_adapters.blocked import blocked_attention
from sfa_adapters.errors import InjectionError, LayoutError
from sfa_adapters.folded import fold_channels, folded_attention, widen
from sfa_adapters.lines import lines_attention, lines_fit
from sfa_adapters.triton_attention import triton_attention, triton_misfit

__all__ = [
    "BACKENDS",
    "Backend",
    "attend",
    "being_read",
    "check_backend",
    "choose_backend",
    "dense_mask",
    "fold_channels",
    "folded_attention",
    "shown_to",
]

Backend = Literal["auto", "dense", "folded", "blocked", "lines", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
ReadAttention = Callable[[Tensor, Tensor, Tensor | None, float], None]
_readers: list[ReadAttention] = []


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
        backend: `dense`, `folded`, `blocked`, `lines`, `triton` or `auto`. With dropout `blocked`, `lines` and `triton`
            are `folded`. So are `lines` and `triton` where they do not apply (`lines_fit`, `triton_misfit`), beside a
            further mask, and for v of another width.

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
        _show(query, key, bias, attention_mask, scale)
        return blocked_attention(query, key, value, bias, attention_mask, scale)
    fit = not dropout_p and attention_mask is None and query.shape == value.shape
    if backend == "lines" and fit and lines_fit(query, bias):
        _show(query, key, bias, attention_mask, scale)
        return lines_attention(query, key, value, bias, scale)
    if backend == "triton" and fit and triton_misfit(query) is None:
        _show(query, key, bias, attention_mask, scale)
        return triton_attention(query, key, value, bias, scale)
    return folded_attention(query, key, value, bias, attention_mask, scale, dropout_p)


@contextmanager
def shown_to(reader: ReadAttention) -> Generator[None]:
    """Shows a reader the attention that backends compute without `scaled_dot_product_attention`, while it is open.

    Args:
        reader: Gets q and k with phi in further channels, the further mask, and the scale: plain attention of these is
            what the backend computes. Gradients go through them, and the result of the backend stays the same bit for
            bit.
    """
    _readers.append(reader)
    try:
        yield
    finally:
        _readers.remove(reader)


def being_read() -> bool:
    """Whether there are readers (`shown_to`), so that attention must go through `attend`, image by image."""
    return bool(_readers)


def _show(query: Tensor, key: Tensor, bias: BiasFactors, attention_mask: Tensor | None, scale: float | None) -> None:
    if not _readers:
        return
    scale = float(query.shape[-1] ** -0.5) if scale is None else scale
    wide_query, wide_key = widen(query, key, bias, scale)
    for reader in _readers:
        reader(wide_query, wide_key, attention_mask, scale)


def check_backend(backend: object) -> None:
    """Checks the name of a backend.

    Raises:
        InjectionError: There is none of that name; lists those that there are.
    """
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise InjectionError(f"backend={backend!r} must be one of {list(BACKENDS)}.")


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
