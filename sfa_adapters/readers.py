"""Readers: what `observe` can tell about attention without keeping a matrix of it.

Each reader gets the softmax of a few rows at a time and keeps something small: a number per row, per key, per pair of
groups. All results are fp32 on the device of the model, one tensor per layer and attention computation, in `results`.

Shape letters: B batch, H heads (1 where `heads="mean"`), Q queries that were chosen, K keys, G groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sfa_adapters.attention_call import HIDDEN, AttentionCall, Rows
from sfa_adapters.errors import ObservationError

__all__ = ["GroupMass", "KeyMass", "MeanPerKey", "Queries", "Reader", "RowEntropy", "RowProbabilities", "TopKeys"]

Heads = Literal["each", "mean"]
# Which queries: positions int64 [R]; truth values [N] or [B, N]; those of decoding steps; the last of each forward;
# all.
Queries = Tensor | Sequence[int] | Literal["generated", "last"] | None


class Reader(ABC):
    """Reads rows of attention block by block.

    Args:
        queries: Which rows: positions in the whole sequence `[R]`, a mask `[N]` or `[B, N]`, "generated" (queries of
            decoding steps), "last" (the last query of every forward) or None for all. Calls without one of them are
            not read.
        heads: "each" keeps heads apart, "mean" averages them.

    Attributes:
        results: For each layer, one tensor per attention computation that had one of the queries, in order.

    Raises:
        ObservationError: An option is unknown.
    """

    def __init__(self, queries: Queries = None, heads: Heads = "each") -> None:
        if heads not in get_args(Heads):
            raise ObservationError(f"heads={heads!r} must be 'each' or 'mean'.")
        if isinstance(queries, str):
            if queries not in ("generated", "last"):
                raise ObservationError(f"queries={queries!r} must be positions, a mask, 'generated', 'last' or None.")
        elif queries is not None:
            queries = torch.as_tensor(queries)
        self.queries = queries
        self.heads = heads
        self.results: dict[str, list[Tensor]] = {}

    def chosen(self, call: AttentionCall) -> Tensor | None:
        """Which queries of a call are read, bool `[Q]`; None for all of them."""
        wanted = self.queries
        if wanted is None:
            return None
        rows = torch.arange(call.num_queries, device=call.device)
        if isinstance(wanted, str):
            if wanted == "last":
                return rows == call.num_queries - 1
            return (rows >= 0) & (call.past > 0)
        wanted = wanted.to(call.device)
        if wanted.dtype != torch.bool:
            return torch.isin(rows + call.past, wanted)
        return (
            fitted(wanted, call.past + call.num_queries, False)[..., call.past :].reshape(-1, call.num_queries).any(0)
        )

    def row_weights(self, call: AttentionCall, rows: Rows) -> Tensor:
        """1 for rows that count, 0 for others, `[1 or B, R]`: a mask may differ between the images of a batch."""
        wanted = self.queries
        ones = torch.ones(1, len(rows.index), device=call.device)
        if not isinstance(wanted, Tensor) or wanted.dtype != torch.bool:
            return ones
        wanted = fitted(wanted.to(call.device), call.past + call.num_queries, False)
        return wanted.reshape(-1, wanted.shape[-1])[:, rows.positions].float()

    @abstractmethod
    def begin(self, call: AttentionCall) -> Any:
        """State for a call; given back to `block` and `end`."""

    @abstractmethod
    def block(self, state: Any, call: AttentionCall, rows: Rows) -> None:
        """Takes some rows; all of them are chosen ones."""

    @abstractmethod
    def end(self, state: Any, call: AttentionCall) -> Tensor:
        """The result of a call."""

    def keep(self, call: AttentionCall, result: Tensor) -> None:
        """Stores the result of a call."""
        self.results.setdefault(call.layer, []).append(result)

    def over_heads(self, values: Tensor) -> Tensor:
        """Averages dimension 1 where heads are not kept apart."""
        return values if self.heads == "each" else values.mean(1, keepdim=True)


class _PerRow(Reader):
    """A reader that keeps something of every row."""

    def begin(self, call: AttentionCall) -> list[Tensor]:
        return []

    def end(self, state: list[Tensor], call: AttentionCall) -> Tensor:
        return torch.cat(state, dim=2)


class RowEntropy(_PerRow):
    """Entropy of every row in nats, `[B, H, Q]`; NaN for rows that see no key.

    H = -sum p log p. With `keys`, the entropy of the row renormalised over these keys.

    Args:
        queries: As in `Reader`.
        heads: As in `Reader`.
        keys: Which keys, bool `[N]` or `[B, N]`; those behind its end (generated tokens) do not count.
        normalize: Divide by the log of the number of visible keys, so that a uniform row has 1.
    """

    def __init__(
        self, queries: Queries = None, heads: Heads = "each", keys: Tensor | None = None, normalize: bool = False
    ) -> None:
        super().__init__(queries, heads)
        self.keys, self.normalize = keys, normalize

    def block(self, state: list[Tensor], call: AttentionCall, rows: Rows) -> None:
        """Adds `[B, H, R]`."""
        state.append(self.over_heads(row_entropy(call, rows, self.keys, self.normalize)))


def row_entropy(call: AttentionCall, rows: Rows, keys: Tensor | None = None, normalize: bool = False) -> Tensor:
    """Entropy of rows in nats, `[B, H, R]`; differentiable; see `RowEntropy`."""
    probabilities, logits, blind = rows.probabilities, rows.logits, rows.blind
    visible = logits > HIDDEN / 2 if normalize else None
    if keys is not None:
        among = fitted_to_keys(keys, call, False).reshape(-1, 1, 1, call.num_keys)[..., : logits.shape[-1]]
        # Anew over these keys, not from the softmax over all: their mass may round to zero.
        logits = logits.masked_fill(~among, HIDDEN)
        probabilities, blind = logits.softmax(-1), logits.amax(-1) <= HIDDEN / 2
        visible = None if visible is None else visible & among
    entropy = -(probabilities * logits.log_softmax(-1)).sum(-1)
    if visible is not None:
        entropy = entropy / visible.sum(-1).clamp(min=2).to(entropy.dtype).log()
    return entropy if blind is None else entropy.masked_fill(blind, float("nan"))


class KeyMass(_PerRow):
    """Attention mass of every row on each group of keys, `[B, H, Q, G]`.

    Args:
        groups: Group of each key, int64 `[N]` or `[B, N]`; -1 belongs to none, and so do keys behind its end.
        queries: As in `Reader`.
        heads: As in `Reader`.

    Raises:
        ObservationError: `groups` is not integer, or all -1.
    """

    def __init__(self, groups: Tensor, queries: Queries = None, heads: Heads = "each") -> None:
        super().__init__(queries, heads)
        self.groups = checked_groups(groups)

    def block(self, state: list[Tensor], call: AttentionCall, rows: Rows) -> None:
        """Adds `[B, H, R, G]`."""
        state.append(self.over_heads(_mass(self.groups, call, rows)))


class GroupMass(Reader):
    """Mean attention mass from each group of queries to each group of keys, `[B, H, G queries, G keys]`.

    NaN for a group that has no query in the call.

    Args:
        query_groups: Group of each query by position, int64 `[N]` or `[B, N]`; -1 is left out.
        key_groups: As in `KeyMass`.
        heads: As in `Reader`.

    Raises:
        ObservationError: Groups are not integers, or all -1.
    """

    def __init__(self, query_groups: Tensor, key_groups: Tensor, heads: Heads = "each") -> None:
        self.query_groups, self.groups = checked_groups(query_groups), checked_groups(key_groups)
        super().__init__(self.query_groups >= 0, heads)

    def begin(self, call: AttentionCall) -> list[Tensor]:
        """Sums and counts."""
        return []

    def block(self, state: list[Tensor], call: AttentionCall, rows: Rows) -> None:
        """Adds sums and counts."""
        groups = fitted(self.query_groups.to(call.device), call.past + call.num_queries, -1)[..., rows.positions]
        number = int(self.query_groups.max()) + 1
        member = (groups.unsqueeze(-2) == torch.arange(number, device=call.device)[:, None]).float()  # [(B,) G, R]
        member = member.reshape(-1, 1, *member.shape[-2:])
        mass = self.over_heads(_mass(self.groups, call, rows))
        values = [member @ mass, member.sum(-1, keepdim=True)]
        state[:] = [old + new for old, new in zip(state, values, strict=True)] if state else values

    def end(self, state: list[Tensor], call: AttentionCall) -> Tensor:
        """Means; zero over zero is NaN."""
        return state[0] / state[1]


class MeanPerKey(Reader):
    """Mean attention that every key gets from the chosen queries, `[B, H, K]`; NaN where an image has none of them."""

    def begin(self, call: AttentionCall) -> list[Tensor]:
        """Sums and counts."""
        return []

    def block(self, state: list[Tensor], call: AttentionCall, rows: Rows) -> None:
        """Adds sums and counts."""
        weights = self.row_weights(call, rows)[:, None, None]  # [1 or B, 1, 1, R]
        attended = (weights @ self.over_heads(rows.probabilities)).squeeze(2)
        values = [fitted(attended, call.num_keys, 0.0), weights.sum(-1)]
        state[:] = [old + new for old, new in zip(state, values, strict=True)] if state else values

    def end(self, state: list[Tensor], call: AttentionCall) -> Tensor:
        """Means; zero over zero is NaN."""
        return state[0] / state[1]


class TopKeys(MeanPerKey):
    """The keys with most attention from the chosen queries: `[B, H, 2, k]`, positions above their mean attention.

    Of keys with equal attention the first ones count.

    Args:
        count: k; fewer where there are fewer keys.
        queries: As in `Reader`.
        heads: As in `Reader`.
    """

    def __init__(self, count: int, queries: Queries = None, heads: Heads = "each") -> None:
        super().__init__(queries, heads)
        self.count = count

    def end(self, state: list[Tensor], call: AttentionCall) -> Tensor:
        """Positions are exact in fp32 up to 16 million."""
        # Not topk: it breaks ties as its kernel likes.
        values, places = super().end(state, call).sort(dim=-1, descending=True, stable=True)
        values, places = values[..., : self.count], places[..., : self.count]
        return torch.stack(((places + call.first_key).to(values.dtype), values), dim=-2)


class RowProbabilities(_PerRow):
    """Whole rows of the chosen queries, `[B, H, Q, K]`: name few queries, or this is the matrix itself."""

    def block(self, state: list[Tensor], call: AttentionCall, rows: Rows) -> None:
        """Adds `[B, H, R, K]`."""
        state.append(fitted(self.over_heads(rows.probabilities), call.num_keys, 0.0))


def checked_groups(groups: Tensor) -> Tensor:
    """Groups as int64.

    Raises:
        ObservationError: They are not integers, or all -1.
    """
    groups = torch.as_tensor(groups)
    if groups.is_floating_point() or groups.is_complex() or groups.ndim not in (1, 2) or groups.numel() == 0:
        raise ObservationError(f"Groups must be integers [N] or [B, N]; got {groups.dtype} {tuple(groups.shape)}.")
    if int(groups.max()) < 0:
        raise ObservationError("Every entry of the groups is -1: no token belongs to a group, nothing would be read.")
    return groups.long()


def fitted(values: Tensor, length: int, fill: Any) -> Tensor:
    """Cuts or extends the last dimension to a length: sequences grow while a model generates."""
    missing = length - values.shape[-1]
    if missing <= 0:
        return values[..., :length]
    return torch.cat((values, values.new_full((*values.shape[:-1], missing), fill)), dim=-1)


def fitted_to_keys(values: Tensor, call: AttentionCall, fill: Any) -> Tensor:
    """What belongs to the keys of a call, by position."""
    return fitted(values.to(call.device), call.first_key + call.num_keys, fill)[..., call.first_key :]


def _mass(groups: Tensor, call: AttentionCall, rows: Rows) -> Tensor:
    """Mass of each row on each group of keys, `[B, H, R, G]`."""
    return rows.probabilities @ one_hot(groups, call)[..., : rows.probabilities.shape[-1], :]


def one_hot(groups: Tensor, call: AttentionCall) -> Tensor:
    """Membership of the keys of a call, `[1 or B, 1, K, G]`, fp32."""
    fit = fitted_to_keys(groups, call, -1)
    member = (fit.unsqueeze(-1) == torch.arange(int(groups.max()) + 1, device=call.device)).float()
    return member.reshape(-1, 1, *member.shape[-2:])
