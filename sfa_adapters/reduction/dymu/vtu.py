"""Virtual token unmerging: attention as the full sequence would have it, computed from merged keys and values.

The full sequence has the state of token map(m) at position m. With q1, q2 and k1, k2 the halves that a rotary embedding
turns and th_m the angles of position m,

    A[m, n] = (q1 k1 + q2 k2) cos(th_m - th_n) + (q1 k2 - q2 k1) sin(th_m - th_n),

summed over frequencies, q of token map(m) and k of token map(n) (DyMU, arXiv 2504.17040, section 3.2). The output of a
merged token is the mean over its positions. Nothing but the angles depends on m and n, so a cache holds **merged** keys
from before the rotation: q.R(n)k is the same number, and what is expanded lives for one layer only. (The authors' code
puts expanded keys into the cache, with sines and cosines per layer, and saves no memory.)

Two hooks per attention layer: q and k get an identity rotation, and the mask argument carries the rest.

Shape letters: B samples, H query heads, G key heads, P merged tokens of this forward, L of its positions, S cache
slots, C columns of the full text, d head width.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfa_adapters.errors import InjectionError, LayoutError, UnsupportedAttentionError
from sfa_adapters.hooks import state_of
from sfa_adapters.mask import LazyMask
from sfa_adapters.mask_argument import give_mask, unused_mask
from sfa_adapters.reduction.dymu.tower import DYMU

__all__ = ["Unmerged", "UnmergedMask", "full_rotation", "unmerged_logits"]


def check_language_model(module: nn.Module) -> None:
    """Checks that virtual unmerging can be computed in a language model.

    Raises:
        InjectionError: Its rotary embedding is of an unknown kind.
        UnsupportedAttentionError: Its attention has sliding windows, or is not sdpa.
    """
    config: Any = module.config
    if not _turns_halves(module):
        raise InjectionError(
            f"language='vtu' is for language models that rotate the first half of the channels against the second, as "
            f"Llama, Mistral, Qwen2 and Qwen3 do; {type(module).__name__} is none of them. Use language='logical_rope'."
        )
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise UnsupportedAttentionError("language='vtu' has no sliding windows. Use language='logical_rope'.")
    kind = getattr(config, "_attn_implementation", "sdpa")
    if kind != "sdpa":
        raise UnsupportedAttentionError(
            f"language='vtu' needs sdpa attention in the language model; it has {kind!r}. Call "
            "model.set_attn_implementation('sdpa'), or use language='logical_rope'."
        )


def _turns_halves(module: nn.Module) -> bool:
    """Whether the rotary embedding of a language model rotates halves; its own code is tried on numbers."""
    home = sys.modules[type(module).__module__]
    rotate_half: Any = getattr(home, "rotate_half", None)
    config: Any = getattr(module, "config", None)
    if rotate_half is None or not hasattr(module, "rotary_emb") or getattr(config, "attn_logit_softcapping", None):
        return False
    numbers = torch.arange(8.0)
    return torch.equal(rotate_half(numbers), torch.cat((-numbers[4:], numbers[:4])))


def full_rotation(module: nn.Module, embeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the new positions, dropped ones included, `[B, L, d]` each.

    Args:
        module: The language model.
        embeds: Its input; only device, dtype and B are used.
        positions: `[1 or B, L]`, or `[3 or 4, B, L]` (with four rows the first is the one of the text).
    """
    model: Any = module
    if positions.ndim == 3 and len(positions) == 4:
        positions = positions[1:]
    elif positions.ndim == 2 and hasattr(model.rotary_emb, "mrope_section"):
        positions = positions[None].expand(3, -1, -1)
    cos, sin = model.rotary_emb(embeds, positions)
    return cos.expand(len(embeds), -1, -1), sin.expand(len(embeds), -1, -1)


@dataclass(frozen=True, eq=False)
class Unmerged:
    """The full text as an attention layer needs it for virtual unmerging.

    Attributes:
        slots: S.
        owner: Cache slot of each column, int64 `[B, C]`.
        full_mask: 1 for columns that are no padding, `[B, C]`.
        query_owner: Which merged token of this forward each of its positions is part of, int64 `[B, L]`.
        merged: P.
        rotation: Cosine and sine of every column, `[B, C, d]`.
    """

    slots: int
    owner: Tensor
    full_mask: Tensor
    query_owner: Tensor
    merged: int
    rotation: tuple[Tensor, Tensor]


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `[B, H, n, d]` by `[B, 1, n, e]`, of the first e channels."""
    width = cos.shape[-1]
    turned, rest = states[..., :width], states[..., width:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def unmerged_logits(query: Tensor, key: Tensor, angles: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The formula at the head of this file, for one sample: the reference for everything else here.

    Args:
        query: Merged queries before rotation, `[H, P, d]`.
        key: Merged keys before rotation, `[H, S, d]`.
        angles: Angles of each position, `[C, d / 2]`.
        rows: Merged token of each position as a query, int64 `[C]`.
        columns: Merged token of each position as a key, int64 `[C]`.

    Returns:
        A, unscaled and unmasked, `[H, C, C]`.
    """
    q1, q2 = query.chunk(2, dim=-1)
    k1, k2 = key.chunk(2, dim=-1)
    dot = q1[:, :, None] * k1[:, None] + q2[:, :, None] * k2[:, None]  # [H, P, S, d / 2], merged tokens only
    cross = q1[:, :, None] * k2[:, None] - q2[:, :, None] * k1[:, None]
    turn = angles[:, None] - angles
    dot, cross = (part[:, rows][:, :, columns] for part in (dot, cross))
    return (dot * turn.cos() + cross * turn.sin()).sum(-1)


class UnmergedMask(LazyMask):
    """Takes the place of the mask of one attention layer, and computes its attention over the full text.

    Args:
        full: The full text.
        length: Number of queries of the layer.

    Raises:
        LayoutError: It is not the number of merged tokens.
    """

    def __init__(self, full: Unmerged, length: int) -> None:
        if length != full.merged:
            raise LayoutError(
                f"An attention layer got {length} tokens where {full.merged} were left. Something else drops tokens "
                "inside the language model (FastV, say): use language='logical_rope' beside it."
            )
        self.full, self.length = full, length
        self.attention_mask = None
        self.used = False

    @property
    def shape(self) -> torch.Size:
        """`[B, 1, P, S]`."""
        return torch.Size((len(self.full.owner), 1, self.length, self.full.slots))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout_p: float) -> Tensor:
        """Attention of merged tokens.

        Args:
            query: `[B, H, P, d]`; at a decoding step perhaps `[B, G, H / G, d]`, the heads of a group side by side.
            key: `[B, G or H, S or more, d]`.
            value: As `key`.
            scale: Factor on q.k.
            dropout_p: Dropout probability on the attention weights.
        """
        self.used = True
        full = self.full
        scale = float(query.shape[-1] ** -0.5) if scale is None else scale
        cos, sin = (part[:, None].to(query.dtype) for part in full.rotation)
        columns = full.owner.shape[1]
        new = full.query_owner.shape[1]
        wide_key = rotate(_take(key, full.owner), cos, sin)
        wide_value = _take(value, full.owner)
        place = torch.arange(columns, device=query.device)
        allowed = full.full_mask[:, None, None, :].bool()
        if query.shape[2] != self.length:  # one token, the heads of a group packed as queries of it
            wide_query = rotate(query, cos[:, :, -1:], sin[:, :, -1:])
            return F.scaled_dot_product_attention(
                wide_query, wide_key, wide_value, allowed, dropout_p=dropout_p, scale=scale
            )
        wide_query = rotate(_take(query, full.query_owner), cos[:, :, -new:], sin[:, :, -new:])
        rows = place[columns - new :, None]
        allowed = (allowed & (place <= rows)) | (place == rows)  # padding sees itself, so that no row is empty
        out = F.scaled_dot_product_attention(
            wide_query, wide_key, wide_value, allowed, dropout_p=dropout_p, scale=scale
        )
        if new == self.length:
            return out
        into = full.query_owner[:, None, :, None].expand_as(out)
        total = torch.zeros_like(out[:, :, : self.length]).scatter_add(2, into, out)
        count = torch.zeros(len(out), self.length, device=out.device, dtype=out.dtype)
        count = count.scatter_add(1, full.query_owner, torch.ones_like(full.query_owner, dtype=out.dtype))
        return total / count.clamp(min=1)[:, None, :, None]

    def tensor(self, like: Tensor | None = None) -> Tensor:
        """Refused: what is computed here is no sum of scores and a mask.

        Raises:
            UnsupportedAttentionError: Always.
        """
        raise UnsupportedAttentionError(
            "language='vtu' needs sdpa attention in the language model. Call model.set_attn_implementation('sdpa')."
        )


def _take(states: Tensor, index: Tensor) -> Tensor:
    """`[B, H, S, d]` and `[B, C]` to `[B, H, C, d]`."""
    return states.gather(2, index[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[-1]))


def rotary_hook(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of an attention layer of the language model: keys stay unrotated, and the mask rotates them."""
    full = state_of(attention, DYMU).language.unmerged
    if full is None:
        return give_mask(attention, DYMU, None, args, kwargs)
    states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    mask = UnmergedMask(full, states.shape[1])
    cos, sin = kwargs["position_embeddings"]
    same = (torch.ones_like(cos), torch.zeros_like(sin))
    return give_mask(attention, DYMU, mask, args, {**kwargs, "position_embeddings": same})


def rotated_hook(attention: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of an attention layer: checks that its mask was used.

    Raises:
        UnsupportedAttentionError: The attention implementation dropped the mask.
    """
    if unused_mask(attention, DYMU) is not None:
        raise UnsupportedAttentionError(
            f"{type(attention).__name__} dropped its mask: language='vtu' needs sdpa attention in the language model. "
            "Call model.set_attn_implementation('sdpa')."
        )
