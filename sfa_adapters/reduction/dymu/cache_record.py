"""Which tokens of a prompt reach the language model after merging, and what its cache then holds.

Shape letters: B samples, L tokens of a prompt, P tokens of it that are left, S cache slots, C columns of the full text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfa_adapters.errors import LayoutError
from sfa_adapters.reduction.dymu.host_tokens import ImageKeys

__all__ = ["CacheRecord", "KeptOfPrompt", "choose_kept", "chosen_rows", "visible_tokens"]


@dataclass(frozen=True, eq=False)
class KeptOfPrompt:
    """Which tokens of a prompt are left.

    Attributes:
        index: Their places in the prompt, ascending, int64 `[B, P]`. Samples with fewer tokens left begin with places
            that are not `live`.
        live: False for places that only fill up a shorter sample, bool `[B, P]`.
        owner: Which of the P tokens each token of the prompt is part of, int64 `[B, L]`.
    """

    index: Tensor
    live: Tensor
    owner: Tensor


@dataclass(frozen=True, eq=False)
class CacheRecord:
    """Which tokens the slots of a cache stand for.

    Attributes:
        mask: 1 for slots that may be attended to, `[B, S]`.
        full_mask: 1 for columns of the full text that are not padding, `[B, C]`.
        owner: Slot of each column, int64 `[B, C]`.
        rotation: Cosine and sine of every column, `[B, C, d]`, kept for virtual unmerging only.
    """

    mask: Tensor
    full_mask: Tensor
    owner: Tensor
    rotation: tuple[Tensor, Tensor] | None = None

    def without(self, slots: int) -> CacheRecord:
        """The record without the last tokens, which were generated and never merged.

        Args:
            slots: How many tokens to remove.
        """
        if not slots:
            return self
        turned = None if self.rotation is None else (self.rotation[0][:, :-slots], self.rotation[1][:, :-slots])
        return CacheRecord(self.mask[:, :-slots], self.full_mask[:, :-slots], self.owner[:, :-slots], turned)

    def of_batch(self, batch: int) -> CacheRecord:
        """The record with each sample repeated, as beam search does.

        Args:
            batch: Samples of the new batch.

        Raises:
            LayoutError: The batch is not a multiple of the one that filled the cache.
        """
        size = len(self.mask)
        if size == batch:
            return self
        if batch % size:
            raise LayoutError(f"The cache was filled with {size} samples and is used with {batch}; fill a new one.")
        parts = (self.mask, self.full_mask, self.owner, *(self.rotation or ()))
        grown = [part.repeat_interleave(batch // size, 0) for part in parts]
        return CacheRecord(grown[0], grown[1], grown[2], (grown[3], grown[4]) if self.rotation else None)


def choose_kept(image: Tensor, keys: ImageKeys) -> KeptOfPrompt | None:
    """Which tokens of a batch of prompts are left when image tokens that were merged become one.

    Args:
        image: Which tokens of the prompts are image tokens, bool `[B, L]`.
        keys: Their keys after merging, in order.

    Returns:
        The tokens that are left, or None where all of them are.

    Raises:
        LayoutError: The number of image tokens in the prompts is not that of the tower.
    """
    batch, length = image.shape
    place = image.flatten().nonzero()[:, 0]
    keys = _repeated(image, keys, len(place))
    if len(place) != len(keys.key):
        raise LayoutError(f"The prompts hold {len(place)} image tokens, the pictures give {len(keys.key)}.")
    key, far = keys.key.to(image.device), batch * length
    # Where the representative was cut away (any-resolution tiles), the first of the others takes its place.
    rank = place + far * (~keys.is_represented.to(image.device)).long()
    first = rank.new_full((keys.count,), 2 * far).scatter_reduce(0, key, rank, "amin")
    chosen = first[key] % far
    keep = torch.ones_like(image).flatten().index_copy(0, place, chosen == place).view_as(image)
    column = torch.arange(length, device=image.device).expand(batch, -1)
    into = column.flatten().index_copy(0, place, chosen % length).view_as(column)
    counts = keep.sum(-1)
    left = int(counts.max())
    if bool(keep.all()):
        return None
    # Dropped tokens first, then the others in their order; every sample takes its last P.
    index = keep.long().argsort(dim=1, stable=True)[:, length - left :]
    slot = torch.zeros_like(column).scatter(1, index, torch.arange(left, device=image.device).expand(batch, -1))
    return KeptOfPrompt(index, keep.gather(1, index), slot.gather(1, into))


def _repeated(image: Tensor, keys: ImageKeys, wanted: int) -> ImageKeys:
    """The keys of samples that `generate` has repeated for beams, the copies of a sample in a row."""
    repeats = wanted // max(len(keys.key), 1)
    if repeats < 2 or wanted != repeats * len(keys.key) or len(image) % repeats:
        return keys
    counts = image[::repeats].sum(-1).tolist()
    if sum(counts) != len(keys.key):
        return keys
    parts = keys.key.split(counts)
    shifted = [part + again * keys.count for part in parts for again in range(repeats)]
    represented = [part for part in keys.is_represented.split(counts) for _ in range(repeats)]
    return ImageKeys(torch.cat(shifted), torch.cat(represented), keys.count * repeats)


def chosen_rows(mask: Tensor, kept: KeptOfPrompt) -> Tensor:
    """Rows and columns of a mask `[1 or B, heads, L, L]` for the tokens that are left, `[B, heads, P, P]`."""
    index, left = kept.index, kept.index.shape[1]
    mask = mask.expand(len(index), -1, -1, -1)
    heads, length = mask.shape[1:3]
    mask = mask.gather(2, index[:, None, :, None].expand(-1, heads, -1, length))
    mask = mask.gather(3, index[:, None, None, :].expand(-1, heads, left, -1))
    hidden = ~kept.live[:, None, None, :] & ~torch.eye(left, dtype=torch.bool, device=mask.device)
    return mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


def visible_tokens(mask: Any, batch: int, length: int, device: torch.device, prefill: bool) -> Tensor:
    """Which of the new tokens are not padding, int64 `[B, length]`."""
    if isinstance(mask, dict):
        mask = next((value for value in mask.values() if value is not None), None)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask[:, -length:].long().expand(batch, -1)
    if isinstance(mask, Tensor) and prefill:  # what the last token sees is no padding, or what each sees of itself
        square = mask.shape[-1] == length
        last = mask[:, 0].diagonal(dim1=-2, dim2=-1) if square else mask[:, 0, -1, :length]  # or of a static cache
        seen = last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
        return seen.long().expand(batch, -1)
    return torch.ones(batch, length, dtype=torch.long, device=device)


def grown(
    before: CacheRecord | None, short: Tensor, full: Tensor, new: Tensor, rotation: tuple[Tensor, Tensor] | None
) -> CacheRecord:
    """The record of a cache after a prompt or a decoding step is added to it."""
    if before is None:
        return CacheRecord(short, full, new, rotation)
    turned = rotation
    if rotation is not None and before.rotation is not None:
        turned = (torch.cat((before.rotation[0], rotation[0]), 1), torch.cat((before.rotation[1], rotation[1]), 1))
    return CacheRecord(
        torch.cat((before.mask, short), 1),
        torch.cat((before.full_mask, full), 1),
        torch.cat((before.owner, new + before.mask.shape[1]), 1),
        turned,
    )
