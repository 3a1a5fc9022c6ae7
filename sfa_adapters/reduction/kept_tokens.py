"""Which tokens a pruned layer holds, and the masks, positions and states of exactly these.

A layer after the pruning holds fewer tokens than the ones before it. `KeptTokens` says which column of the full
sequence each of its cache slots is; it is stored on the cache, so copies, beams and later turns find it there. Samples
of a batch keep different numbers of tokens: shorter ones begin with dead slots, to which nothing attends. How many a
sample has depends on counts alone, so beams of one prompt may be reordered freely.

Shape letters: B samples, Q queries, L tokens of a prompt, P of them kept, S cache slots, C columns of the full
sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sfa_adapters.errors import PlanError, UnsupportedAttentionError

__all__ = ["KeptTokens", "keep_positions", "keep_states", "pruned_mask", "visible_tokens"]

KEPT = "_fastv_kept"  # attribute of a cache


@dataclass(frozen=True, eq=False)
class KeptTokens:
    """The cache slots of a pruned layer after the latest prompt; later tokens follow one by one.

    Attributes:
        columns: Column of the full sequence of each slot, int64 `[B, S]`.
        live: False for dead slots, bool `[B, S]`.
        full: Number of columns of the full sequence.
        all_live: Whether no slot is dead.
        loose: How many of the last slots may be removed again: the tokens after the last image, which have no gaps.
    """

    columns: Tensor
    live: Tensor
    full: int
    all_live: bool
    loose: int = 0

    @property
    def slots(self) -> int:
        """S."""
        return self.columns.shape[1]

    @property
    def dropped(self) -> int:
        """Number of columns that have no slot."""
        return self.full - self.slots

    def of_batch(self, batch: int) -> KeptTokens:
        """The same for a batch of another size, where one sample was repeated.

        Args:
            batch: Samples of the new batch.

        Raises:
            PlanError: The cache was filled by another batch.
        """
        size = self.columns.shape[0]
        if size == batch:
            return self
        if size != 1:
            raise PlanError(
                f"The cache was filled with {size} samples and is used with {batch}: which of them kept which image "
                "tokens is not known. Fill a new cache with this batch."
            )
        columns, live = self.columns.expand(batch, -1), self.live.expand(batch, -1)
        return replace(self, columns=columns, live=live)

    def cut_to(self, slots: int, full: int | None) -> KeptTokens:
        """The same after the last tokens were removed, as assisted generation does with rejected candidates.

        Args:
            slots: Tokens that a pruned layer holds now.
            full: Tokens that layer 0 holds now, or None where that is one of the pruned ones.

        Raises:
            PlanError: Image tokens are among those that were removed, or the cache is not the one that was filled.
        """
        less = max(0, self.slots - slots)
        if less > self.loose or (full is not None and full - slots != self.dropped):
            held = "" if full is None else f", layer 0 {full}"
            raise PlanError(
                f"A pruned layer holds {slots} tokens{held}, but {self.slots} of {self.full} were kept at the prompt: "
                "the cache was cut into its prompt, and which tokens are left is not known. Begin with an empty cache."
            )
        if not less:
            return self
        columns, live = self.columns[:, :-less], self.live[:, :-less]
        return replace(self, columns=columns, live=live, full=self.full - less, loose=self.loose - less)

    def followed_by(
        self, start: int, index: Tensor, live: Tensor, length: int, all_live: bool, loose: int
    ) -> KeptTokens:
        """The slots after one more prompt.

        Args:
            start: Column of its first token.
            index: Which of its tokens were kept, `[B, P]`, counted from 0.
            live: `[B, P]`.
            length: How many tokens it had.
            all_live: Whether `live` is True all over.
            loose: How many of its last tokens may be removed again.
        """
        between = torch.arange(self.full, start, device=index.device).expand(len(index), -1)
        columns = torch.cat((self.columns, between, start + index), 1)
        alive = torch.cat((self.live, torch.ones_like(between, dtype=torch.bool), live), 1)
        return KeptTokens(columns, alive, start + length, self.all_live and all_live, loose)


def nothing_before(batch: int, start: int, device: torch.device) -> KeptTokens:
    """A cache that holds `start` tokens of which none was dropped."""
    columns = torch.arange(start, device=device).expand(batch, -1)
    return KeptTokens(columns, torch.ones_like(columns, dtype=torch.bool), start, True, start)


# -- masks ------------------------------------------------------------------------------------------------------------


def visible_tokens(mask: Any, batch: int, queries: int, past: int | Tensor, device: torch.device) -> Tensor:
    """Which tokens of a prompt are not padding, bool `[B, Q]`: a real token sees itself under every mask.

    Args:
        mask: As a decoder layer gets it: None, `[B, C]`, or `[1 or B, heads, Q, C]` boolean or additive.
        batch: B.
        queries: Q.
        past: Tokens in the cache before this prompt; a tensor on the device for a static cache.
        device: Of the prompt.
    """
    if mask is None:
        return torch.ones(batch, queries, dtype=torch.bool, device=device)
    place = torch.arange(queries, device=device)
    if mask.ndim == 2:
        return mask[:, -queries:].bool().expand(batch, -1).to(device)
    query_places = (place + past).view(1, queries, 1).to(mask.device)
    diagonal = mask[:, 0].gather(2, query_places.expand(mask.shape[0], -1, -1)).squeeze(-1)
    return _seen(diagonal).expand(batch, -1).to(device)


def pruned_mask(mask: Any, kept: KeptTokens, rows: Tensor | None, queries: int, slots: int, kind: str) -> Any:
    """The mask of a pruned layer.

    Args:
        mask: The mask of the earlier layers: None, `[B, C]`, or `[1 or B, heads, Q, C]` boolean or additive.
        kept: The slots of the layer; with `rows` those of this prompt are the last ones among them.
        rows: Which rows of the mask stay, `[B, P]`, at a prompt; None while decoding, where all do.
        queries: Rows of the new mask.
        slots: Keys that the layer's attention will see.
        kind: Name of the attention implementation.

    Raises:
        UnsupportedAttentionError: The mask is of another kind (flex attention).
    """
    device, batch = kept.columns.device, kept.columns.shape[0]
    if mask is None:
        if kept.all_live:
            return None  # causal, nothing hidden: kernels need no mask
        live = _all_slots(kept, slots)
        if "flash" in kind:
            return live
        place = torch.arange(slots, device=device)
        first = slots - queries if rows is None else kept.slots - queries
        query_places = place[first : first + queries, None]
        causal, itself = place[None, :] <= query_places, place[None, :] == query_places
        return (causal & live[:, None, None, :]) | itself
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        raise UnsupportedAttentionError(
            f"FastV prunes masks that are tensors; the attention implementation {kind!r} passes "
            f"{type(mask).__name__}. Call model.set_attn_implementation('sdpa')."
        )
    known = mask.shape[-1] - kept.dropped  # columns that have a slot
    follow = torch.arange(kept.full, kept.full + known - kept.slots, device=device).expand(batch, -1)
    columns = torch.cat((kept.columns, follow), 1).to(mask.device)
    live = _all_slots(kept, known).to(mask.device)
    if mask.ndim == 2:
        return mask.expand(batch, -1).gather(1, columns) * live.to(mask.dtype)
    mask = mask.expand(batch, -1, -1, -1)
    heads = mask.shape[1]
    if rows is not None:
        rows = rows.to(mask.device)
        mask = mask.gather(2, rows[:, None, :, None].expand(-1, heads, -1, mask.shape[-1]))
    mask = mask.gather(3, columns[:, None, None, :].expand(-1, heads, mask.shape[2], -1))
    hidden = ~live[:, None, None, :].expand_as(mask)
    if rows is not None and not kept.all_live:
        # The row of a dead slot must see something: itself.
        itself = torch.eye(queries, dtype=torch.bool, device=mask.device)
        itself = torch.nn.functional.pad(itself, (kept.slots - queries, known - kept.slots))
        dead = ~kept.live[:, None, -queries:, None].to(mask.device) & itself
        mask = _shown(mask, dead)
        hidden = hidden & ~dead
    if not kept.all_live:
        mask = _hidden(mask, hidden)
    if known < slots:  # a static cache has room for more
        mask = torch.nn.functional.pad(mask, (0, slots - known), value=_closed(mask))
    return mask.contiguous()


def _all_slots(kept: KeptTokens, slots: int) -> Tensor:
    """`live` with the slots after the prompt."""
    return torch.nn.functional.pad(kept.live, (0, slots - kept.slots), value=True)


def _closed(mask: Tensor) -> float:
    return 0.0 if mask.dtype == torch.bool else torch.finfo(mask.dtype).min


def _hidden(mask: Tensor, where: Tensor) -> Tensor:
    return mask & ~where if mask.dtype == torch.bool else mask.masked_fill(where, torch.finfo(mask.dtype).min)


def _shown(mask: Tensor, where: Tensor) -> Tensor:
    return mask | where if mask.dtype == torch.bool else mask.masked_fill(where, 0.0)


def _seen(entries: Tensor) -> Tensor:
    return entries if entries.dtype == torch.bool else entries > torch.finfo(entries.dtype).min / 2


# -- states and positions ---------------------------------------------------------------------------------------------


def keep_states(states: Tensor, index: Tensor) -> Tensor:
    """The states of the kept tokens, `[B, L, D]` to `[B, P, D]`."""
    return states.gather(1, index.to(states.device)[:, :, None].expand(-1, -1, states.shape[-1]))


def keep_positions(values: Any, index: Tensor, channels: bool) -> Any:
    """Position ids or position embeddings of the kept tokens; each keeps the ones that it had.

    Args:
        values: `[1 or B, L]`, `[rows, 1 or B, L]`, the same with a last dimension of channels, several of these, or
            None.
        index: `[B, P]`.
        channels: Whether there is a dimension of channels.
    """
    if values is None:
        return None
    if isinstance(values, tuple | list):
        return type(values)(keep_positions(value, index, channels) for value in values)
    index = index.to(values.device)
    width = values.shape[-1:] if channels else ()
    if values.ndim == 1 + channels:
        values = values[None]
    lead = values.shape[: values.ndim - 2 - channels]
    wide = values.expand(*lead, index.shape[0], values.shape[values.ndim - 1 - channels], *width)
    place = index.view(*(1,) * len(lead), *index.shape, *(1,) * channels).expand(*lead, *index.shape, *width)
    return wide.gather(wide.ndim - 1 - channels, place)
