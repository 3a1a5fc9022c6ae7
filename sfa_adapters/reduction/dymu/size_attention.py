"""Attention in proportion to size: a token that stands for s tokens is attended to like s of them.

ToMe (arXiv 2210.09461, section 3, "tracking token size") uses softmax(q.k * scale + log s). With one more channel,
q' = [q, 1 / scale] and k' = [k, log s], this is plain scaled-dot-product attention: exact, and computed by the fused
kernels, which take no mask (flash) or are slower with one. SFA's bias folds into further channels in the same way. On a
CPU the channel costs more than a mask of one row, which is then used instead; both are exact.

Shape letters: B batch, H heads, N tokens, D head width, T tokens of all images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfa_adapters.attention import Backend, attend
from sfa_adapters.bias import BiasFactors
from sfa_adapters.folded import native_width
from sfa_adapters.mask import LazyMask, SegmentedMask
from sfa_adapters.packing import PackedMask

__all__ = ["SizedPackedMask", "SizedSegmentedMask", "add_size_channel", "sized_attention"]


def add_size_channel(
    query: Tensor, key: Tensor, value: Tensor, log_size: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes sizes into one more channel of q and k.

    Args:
        query: `[B, H, N, D]`.
        key: `[B, H, N, D]`.
        value: `[B, H, N, D]`; padded to the same width, which fused kernels need.
        log_size: Log of the size of each token, `[N]` or `[B, N]`.
        scale: Factor of the attention on q.k.

    Returns:
        q, k and v of width D + 1.
    """
    sizes = log_size.to(key.dtype)[..., None, :, None] if log_size.ndim == 2 else log_size.to(key.dtype)[:, None]
    wide_query = torch.cat((query, query.new_full((1,), 1.0 / scale).expand(*query.shape[:-1], 1)), dim=-1)
    return wide_query, torch.cat((key, sizes.expand(*key.shape[:-1], 1)), dim=-1), F.pad(value, (0, 1))


def sized_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_size: Tensor,
    bias: BiasFactors | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: Backend = "auto",
) -> Tensor:
    """Attention in proportion to size, with or without SFA's bias.

    Args:
        query: `[B, H, N, D]`.
        key: `[B, H, N, D]`.
        value: `[B, H, N, D]`.
        log_size: `[N]` or `[B, N]`.
        bias: The tables of phi, or None.
        scale: Factor on q.k; 1 / sqrt(D) by default.
        dropout_p: Dropout probability on the attention weights.
        backend: `dense` adds a mask, `folded` the channel, `auto` the mask on a CPU and the channel elsewhere.

    Returns:
        `[B, H, N, D]`.
    """
    width = query.shape[-1]
    scale = float(width**-0.5) if scale is None else scale
    if backend == "dense" or (backend == "auto" and query.device.type == "cpu"):
        mask = log_size.to(query.dtype).reshape(-1, 1, 1, log_size.shape[-1])
        return attend(query, key, value, bias, attention_mask=mask, scale=scale, dropout_p=dropout_p, backend=backend)
    query, key, value = add_size_channel(query, key, value, log_size, scale)
    if bias is None:
        missing = native_width(width + 1) - width - 1
        query, key, value = (F.pad(states, (0, missing)) for states in (query, key, value))
    return attend(query, key, value, bias, scale=scale, dropout_p=dropout_p, backend=backend)[..., :width]


class SizedPackedMask(PackedMask):
    """The mask of a packed sequence of merged tokens: every image attends to itself, in proportion to size.

    Args:
        lengths: Tokens of each image.
        log_size: Of all tokens, `[T]`.
        biases: The tables of phi of each image; SFA may set them later.
        backend: As for `sized_attention`.
        replaced: The mask that this one replaces; it counts as used when this one is.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        log_size: Tensor,
        biases: Sequence[BiasFactors] | None = None,
        backend: Backend = "auto",
        replaced: Any = None,
    ) -> None:
        # Never None: readers of attention (`observe`) must see what is computed here, per image and with sizes.
        super().__init__(lengths, biases or [], backend)
        self.log_size, self.replaced = log_size, replaced

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout_p: float) -> Tensor:
        """Attention inside each image; shapes `[1, H, T, D]`."""
        self._mark()
        width = query.shape[-1]
        scale = float(width**-0.5) if scale is None else scale
        if not self.biases and query.is_cuda and dropout_p == 0.0 and query.dtype != torch.float32:
            wide = add_size_channel(query, key, value, self.log_size, scale)
            wide = [F.pad(states, (0, native_width(width + 1) - width - 1)) for states in wide]
            return self._flash(wide[0], wide[1], wide[2], scale)[..., :width]
        parts = [states.split(self.lengths, dim=-2) for states in (query, key, value)]
        sizes = self.log_size.split(self.lengths)
        biases = self.biases or [None] * len(self.lengths)
        out = [
            sized_attention(q, k, v, size, bias, scale=scale, dropout_p=dropout_p, backend=self.backend)
            for q, k, v, size, bias in zip(*parts, sizes, biases, strict=True)
        ]
        return out[0] if len(out) == 1 else torch.cat(out, dim=-2)

    def tensor(self, like: Tensor | None = None) -> Tensor:
        """The mask as a matrix, `[1, 1 or H, T, T]`."""
        self._mark()
        plain = PackedMask(self.lengths, self.biases or None, self.backend).tensor(like)
        return plain + self.log_size.to(plain)

    def _mark(self) -> None:
        self.used = True
        if self.replaced is not None:
            self.replaced.used = True


class SizedSegmentedMask(LazyMask):
    """The mask of consecutive segments of one flat sequence of merged tokens, served in order, one per SDPA call.

    Args:
        lengths: Tokens of each segment.
        log_size: Of all tokens, `[T]`.
        inner: SFA's mask of the same segments, or None.
    """

    def __init__(self, lengths: Sequence[int], log_size: Tensor, inner: SegmentedMask | None = None) -> None:
        self.sizes = log_size.split(list(lengths))
        self.inner = inner
        self.attention_mask = None
        self.served = 0

    @property
    def used(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether every segment was served."""
        return self.served == len(self.sizes)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout_p: float) -> Tensor:
        """Attention of the next segment, `[1, H, n, D]`."""
        log_size = self.sizes[self.served]
        self.served += 1
        if self.inner is None:
            return sized_attention(query, key, value, log_size, scale=scale, dropout_p=dropout_p)
        width = query.shape[-1]
        scale = float(width**-0.5) if scale is None else scale
        wide = add_size_channel(query, key, value, log_size, scale)
        return self.inner.attend(*wide, scale, dropout_p)[..., :width]

    def tensor(self, like: Tensor | None = None) -> Tensor:
        """The next segment's mask as a matrix."""
        log_size = self.sizes[self.served]
        self.served += 1
        mask = log_size.expand(1, 1, len(log_size), -1)
        mask = mask if self.inner is None else mask + self.inner.tensor()
        return mask if like is None else mask.to(like.dtype)
