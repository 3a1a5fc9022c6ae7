"""`AttentionCall`: one attention computation of a model, and its logits a few rows at a time.

Statistics of attention need the softmax of every row, but never all rows at once. A call holds what the model computed
with (q, k, scale and mask, or the finished scores of an eager implementation) and gives the logits of any rows in fp32.
They are differentiable where q and k are, so that losses can be built from the same numbers.

Shape letters: B batch, H query heads, G key/value heads, Q queries, K keys, D head width, R chosen rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from sfa_adapters.errors import ObservationError

__all__ = ["HIDDEN", "AttentionCall", "Rows", "row_blocks"]

# The logit of a key that a query may not see: exp() of it is exactly zero beside any key that it sees, and products
# with it are finite.
HIDDEN = -1.0e30


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One attention computation.

    Either `query` and `key` are there, or `scores`, the masked logits of an eager implementation. Under SFA's folded
    backend q and k have extra channels and the logits are those of the model plus a constant per query, which changes
    no softmax.

    Attributes:
        layer: Path of the attention module in the observed model.
        index: Number of that module among the observed ones.
        segment: Running number of this computation inside one forward of the module: 0, except in towers that compute
            windows or images one after the other.
        past: Tokens that stood in the cache before this forward; the first query has this position.
        query: `[B, H, Q, D]`.
        key: `[B, G, K, D]`, H a multiple of G.
        scale: Factor on q.k.
        mask: Boolean (True = visible) or additive in logits, broadcastable to `[B, H, Q, K]`, or None.
        is_causal: Whether query i sees only the keys 0..i, as SDPA means it.
        scores: `[B, H, Q, K]` logits with scale and mask.
    """

    layer: str
    index: int = 0
    segment: int = 0
    past: int = 0
    query: Tensor | None = None
    key: Tensor | None = None
    scale: float = 1.0
    mask: Tensor | None = None
    is_causal: bool = False
    scores: Tensor | None = None

    def __post_init__(self) -> None:
        assert (self.scores is None) == (self.query is not None and self.key is not None)

    @property
    def _left(self) -> Tensor:
        source = self.query if self.scores is None else self.scores
        assert source is not None
        return source

    @property
    def batch_size(self) -> int:
        """B."""
        return self._left.shape[0]

    @property
    def num_heads(self) -> int:
        """H."""
        return self._left.shape[1]

    @property
    def num_queries(self) -> int:
        """Q."""
        return self._left.shape[2]

    @property
    def num_keys(self) -> int:
        """K."""
        return self.scores.shape[-1] if self.key is None and self.scores is not None else self._key.shape[-2]

    @property
    def first_key(self) -> int:
        """Position of the first key: above 0 where a cache has dropped what fell out of its sliding window."""
        return max(0, self.past + self.num_queries - self.num_keys) if self.past else 0

    @property
    def device(self) -> torch.device:
        """Where the computation ran."""
        return self._left.device

    @property
    def _key(self) -> Tensor:
        assert self.key is not None
        return self.key

    @cached_property
    def _key_columns(self) -> Tensor:
        """Keys as fp32 (fp64 stays) columns, `[B, G, D, K]`, made once for all blocks of rows."""
        return _at_least_fp32(self._key).transpose(-1, -2)

    def detach(self) -> AttentionCall:
        """The same call without gradients."""
        names = ("query", "key", "mask", "scores")
        return replace(self, **{n: t.detach() for n in names if (t := getattr(self, n)) is not None})

    def logits(self, rows: slice | Tensor, keys: int | None = None) -> Tensor:
        """Logits of chosen rows, `[B, H, R, K]`, at least fp32; `HIDDEN` where the query may not see the key.

        Args:
            rows: Which queries of this call, a slice or int64 `[R]`.
            keys: Only the first so many keys; all by default.
        """
        keys = self.num_keys if keys is None else keys
        with torch.autocast(self.device.type, enabled=False):
            if self.scores is not None:
                return _hide_minimum(self.scores[:, :, rows, :keys])
            assert self.query is not None
            query = _at_least_fp32(self.query[:, :, rows]) * self.scale
            groups = self._key.shape[1]
            if groups != self.num_heads:  # grouped-query attention: the heads of a group share their key head
                query = query.unflatten(1, (groups, -1)).flatten(2, 3)
            logits = query @ self._key_columns[..., :keys]
            logits = logits.reshape(self.batch_size, self.num_heads, -1, keys)
            return self._masked(logits, rows)

    def _masked(self, logits: Tensor, rows: slice | Tensor) -> Tensor:
        hidden: Tensor | None = None
        if self.mask is not None:
            mask = self.mask[(None,) * (4 - self.mask.ndim)]
            mask = mask if mask.shape[-2] == 1 else mask[:, :, rows]
            mask = mask if mask.shape[-1] == 1 else mask[..., : logits.shape[-1]]
            if mask.dtype == torch.bool:
                hidden = ~mask
            else:
                hidden = mask <= torch.finfo(mask.dtype).min / 2
                logits = logits + mask.to(logits.dtype)
        if self.is_causal:  # aligned at the upper left, as in SDPA
            places = torch.arange(self.num_queries, device=self.device)[rows]
            later = torch.arange(logits.shape[-1], device=self.device) > places[:, None]
            hidden = later if hidden is None else hidden | later
        if hidden is None:
            return logits
        return logits.masked_fill(hidden, HIDDEN) if logits.requires_grad else logits.masked_fill_(hidden, HIDDEN)


@dataclass(frozen=True, eq=False)
class Rows:
    """The softmax of some rows of a call.

    K is the number of keys of the call, or fewer: keys at its end that no row of the block may see can be left out.

    Attributes:
        index: Which queries of the call, int64 `[R]`.
        positions: Their places in the whole sequence, cache included, int64 `[R]`.
        logits: `[B, H, R, K]`; `HIDDEN` where the key is not visible.
        probabilities: `[B, H, R, K]`; a row that sees no key is all zero.
        blind: Rows that see no key, `[B, H, R]`, or None where nothing is hidden.
    """

    index: Tensor
    positions: Tensor
    logits: Tensor
    probabilities: Tensor
    blind: Tensor | None

    def choose(self, wanted: Tensor) -> Rows | None:
        """Only the rows that a mask `[R]` names, None where it names none."""
        if bool(wanted.all()):
            return self
        if not bool(wanted.any()):
            return None
        blind = None if self.blind is None else self.blind[:, :, wanted]
        per_row = (self.logits[:, :, wanted], self.probabilities[:, :, wanted])
        return Rows(self.index[wanted], self.positions[wanted], *per_row, blind)


def rows_of(call: AttentionCall, index: Tensor, keys: int | None = None) -> Rows:
    """Logits and softmax of chosen rows, over the first `keys` keys or all.

    Raises:
        ObservationError: A logit is NaN or infinite; names the layer.
    """
    logits = call.logits(index, keys)
    # Not exp() of a difference: where it rounds to zero, exp() is ten times as slow on a CPU; the softmax is not.
    probabilities = logits.softmax(-1)
    if not bool(probabilities[..., 0].isfinite().all()):  # one logit that is no number spoils its whole row
        raise ObservationError(
            f"{call.layer}: attention logits are NaN or infinite, so nothing can be said about this input. Check the "
            "input and the weights (torch.isfinite), or load the model in bfloat16 or float32 instead of float16."
        )
    blind = None
    if call.mask is not None or call.scores is not None:
        blind = logits.amax(-1) <= HIDDEN / 2
        if bool(blind.any()):
            probabilities = probabilities.masked_fill(blind.unsqueeze(-1), 0.0)
    return Rows(index, index + call.past, logits, probabilities, blind)


def row_blocks(
    call: AttentionCall, index: Tensor | None = None, block_bytes: int = 2**23, trim: bool = False
) -> Iterator[Rows]:
    """The softmax of the rows of a call, block by block: memory grows with the keys, not with their square.

    Args:
        call: What to read.
        index: Which queries, int64 `[R]`; all by default.
        block_bytes: Size of the logits of one block; about three times as much is in use.
        trim: Leave out the keys behind the last row of a block where attention is causal: half of the work.

    Yields:
        Consecutive blocks of rows.
    """
    index = torch.arange(call.num_queries, device=call.device) if index is None else index
    row_bytes = 4 * call.batch_size * call.num_heads * call.num_keys
    for chosen in index.split(max(1, block_bytes // max(row_bytes, 1))):
        keys = min(call.num_keys, int(chosen.max()) + 1) if trim and call.is_causal and len(chosen) else None
        yield rows_of(call, chosen, keys)


def _at_least_fp32(states: Tensor) -> Tensor:
    return states if states.dtype == torch.float64 else states.float()


def _hide_minimum(scores: Tensor) -> Tensor:
    """Eager masks add the lowest number of the dtype, or minus infinity."""
    hidden = scores <= torch.finfo(scores.dtype).min / 2
    return _at_least_fp32(scores).masked_fill(hidden, HIDDEN)
