"""The lazy mask: a structural bias that travels through a model's own mask argument.

Every attention module of transformers and timm hands its mask to `scaled_dot_product_attention` or adds it to the
scores. The objects here implement `__torch_function__` (the pattern of `torch.nn.attention.bias.CausalBias`), so they
are asked in both cases: SDPA gets the attention computed by `sfa_adapters.attention.attend`, anything else gets a dense
tensor. Each mask remembers that it was asked: a mask that no operation touched means an attention backend that drops
it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfa_adapters.attention import Backend, attend, check_fit, dense_mask, merge_masks
from sfa_adapters.bias import BiasFactors

__all__ = ["DenseCache", "LazyMask", "SegmentedMask", "StructuralMask"]

# Gives the bias as a dense mask in the dtype of the tensor, from a cache, or None where a cached mask is no gain.
DenseCache = Callable[[Tensor], Tensor | None]


class LazyMask(ABC):
    """What both masks share: being asked by torch functions, and looking like a tensor to code that inspects masks."""

    num_heads: int
    attention_mask: Tensor | None
    used: bool

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answers SDPA with biased attention and every other function with a dense mask."""
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            return _dispatch(*args, **kwargs)
        like = next((arg for arg in args if isinstance(arg, Tensor)), None)
        return func(
            *[_dense(arg, like) for arg in args],
            **{name: _dense(value, like) for name, value in kwargs.items()},
        )

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout_p: float) -> Tensor:
        """Attention under this mask."""

    @abstractmethod
    def tensor(self, like: Tensor | None = None) -> Tensor:
        """The mask as a matrix, `[1 or B, H, N, N]`, in the dtype of `like`."""

    # Code that only looks at a mask (its rank, its dtype) must not count as having used it.
    @property
    def dtype(self) -> torch.dtype:
        """Additive, hence floating point."""
        return torch.float32

    @property
    def ndim(self) -> int:
        """Masks are 4-D: `[batch, heads, query, key]`."""
        return 4

    def dim(self) -> int:
        """As `Tensor.dim`."""
        return 4

    def contiguous(self) -> LazyMask:
        """As `Tensor.contiguous`; a lazy mask has no memory layout yet."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> LazyMask:
        """As `Tensor.to`; device and dtype are taken from the tensor that the mask meets."""
        return self

    def __getitem__(self, index: Any) -> Tensor:
        return self.tensor()[index]


def _dispatch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: LazyMask,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Takes the arguments of `F.scaled_dot_product_attention`."""
    assert not is_causal, "SDPA refuses is_causal beside a mask; no vision tower asks for it"
    if enable_gqa and key.shape[1] != query.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return attn_mask.attend(query, key, value, scale, dropout_p)


def _dense(argument: Any, like: Tensor | None) -> Any:
    return argument.tensor(like) if isinstance(argument, LazyMask) else argument


class StructuralMask(LazyMask):
    """The bias of one layer for tokens `[B, N]`, on top of the model's own mask.

    Args:
        bias: The tables of phi.
        attention_mask: The mask that the model passed itself, or None.
        backend: How to compute, see `sfa_adapters.attention`.
        dense_cache: Where a dense mask may be kept between forwards.
    """

    def __init__(
        self,
        bias: BiasFactors,
        attention_mask: Tensor | None = None,
        backend: Backend = "auto",
        dense_cache: DenseCache | None = None,
    ) -> None:
        self.bias = bias
        self.attention_mask = attention_mask
        self.backend: Backend = backend
        self.dense_cache = dense_cache
        self.used = False

    @property
    def shape(self) -> torch.Size:
        """`[1 or B, H, N, N]`."""
        tokens = self.bias.layout.num_tokens
        return torch.Size((self.bias.layout.batch_size or 1, self.bias.num_heads, tokens, tokens))

    def size(self, dim: int | None = None) -> Any:
        """As `Tensor.size`."""
        return self.shape if dim is None else self.shape[dim]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout_p: float) -> Tensor:
        """Attention under the bias and the model's mask; shapes as in `sfa_adapters.attention.attend`."""
        self.used = True
        cached = self.dense_cache(query) if self.dense_cache is not None and self.backend in ("auto", "dense") else None
        if cached is not None:
            check_fit(query, self.bias)
            mask = merge_masks(cached, self.attention_mask)
            return F.scaled_dot_product_attention(query, key, value, mask, dropout_p=dropout_p, scale=scale)
        return attend(
            query,
            key,
            value,
            self.bias,
            attention_mask=self.attention_mask,
            scale=scale,
            dropout_p=dropout_p,
            backend=self.backend,
        )

    def tensor(self, like: Tensor | None = None) -> Tensor:
        """The mask as a matrix, `[1 or B, H, N, N]`."""
        self.used = True
        if like is not None and like.ndim == 4 and like.shape[-2:] == self.shape[-2:]:
            check_fit(like, self.bias)
        mask = self.bias.dense() if like is None else dense_mask(self.bias, like)
        return merge_masks(mask, self.attention_mask)


class SegmentedMask(LazyMask):
    """The biases of consecutive segments (windows, images) of one flat sequence, served in order, one per SDPA call.

    Args:
        segments: One entry per segment: its tables, or its dense mask `[1, H, n, n]` where that was built already.
        backend: How to compute the segments that come as tables.
    """

    def __init__(self, segments: Sequence[BiasFactors | Tensor], backend: Backend = "auto") -> None:
        self.segments = segments
        self.backend: Backend = backend
        self.attention_mask = None
        self.served = 0

    @property
    def used(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether every segment was served."""
        return self.served == len(self.segments)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout_p: float) -> Tensor:
        """Attention of the next segment under its bias, `[1, H, n, D]`."""
        segment = self.segments[self.served]
        self.served += 1
        if isinstance(segment, Tensor):
            mask = segment.to(query.dtype)
            return F.scaled_dot_product_attention(query, key, value, mask, dropout_p=dropout_p, scale=scale)
        return attend(query, key, value, segment, scale=scale, dropout_p=dropout_p, backend=self.backend)

    def tensor(self, like: Tensor | None = None) -> Tensor:
        """The next segment's mask as a matrix."""
        segment = self.segments[self.served]
        self.served += 1
        phi = segment if isinstance(segment, Tensor) else segment.dense()
        return phi if like is None else phi.to(like.dtype)
