"""The language model sees merged tokens only: each one keeps the position id of its representative.

The prompt stays as long as the processor made it. Before the language model the image tokens that were merged into
others are taken out, with their columns of the mask and their position ids; after it every position of the prompt gets
the state of the token that it is part of, so that logits, labels and losses keep their shapes. All layers hold the same
tokens, so a cache is simply shorter.

The record of what a cache holds is stored on it (`CacheRecord`): copies, beams, cropping and later turns find it there.

Shape letters: B samples, L tokens of a prompt, P tokens of it that are left, S cache slots, C columns of the full text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sfa_adapters.compat import cache_of, cache_of_output, encoded_images
from sfa_adapters.errors import LayoutError, UnsupportedAttentionError
from sfa_adapters.hooks import features_of, state_of
from sfa_adapters.reduction.dymu.cache_record import (
    CacheRecord,
    KeptOfPrompt,
    choose_kept,
    chosen_rows,
    grown,
    visible_tokens,
)
from sfa_adapters.reduction.dymu.host_tokens import HostTokens, ImageKeys, packed_keys
from sfa_adapters.reduction.dymu.tower import DYMU, TowerState
from sfa_adapters.reduction.dymu.vtu import Unmerged, full_rotation
from sfa_adapters.reduction.image_tokens import arguments
from sfa_adapters.reduction.kept_tokens import KEPT, keep_positions, keep_states
from sfa_adapters.vlm.parts import still_image_id

__all__ = ["LanguageState", "latest_kept"]

RECORD, PICTURES = "_dymu_record", "_dymu_pictures"


@dataclass(eq=False)
class Pictures:
    """Which tokens of the pictures of one pass through the tower were merged; stored on the tower's output."""

    keys: ImageKeys | None


@dataclass(eq=False)
class LanguageState:
    """State of DyMU in the language model of a host whose tower merges tokens.

    Attributes:
        tower: The state of the tower.
        host: The host.
        vtu: Whether attention is computed as the full sequence would have it.
        inputs: Arguments of the core, until its language model runs.
        pictures: One entry for each pass through the tower since the core was called.
        kept: Tokens that are left of the prompt of the current or latest forward; None where nothing was dropped.
        record: What the cache holds after this forward.
        unmerged: What the attention layers need for virtual unmerging, while they run.
        fed_again: How many of the new tokens the cache holds already.
    """

    tower: TowerState
    host: HostTokens
    vtu: bool
    inputs: dict[str, Any] | None = None
    pictures: list[Pictures] = field(default_factory=list)
    kept: KeptOfPrompt | None = None
    record: CacheRecord | None = None
    unmerged: Unmerged | None = None
    fed_again: int = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, **dict.fromkeys(("inputs", "kept", "record", "unmerged")), "pictures": []}

    def pack(self, packed: Callable[[ImageKeys], ImageKeys]) -> None:
        """Turns the keys of the pictures that the tower saw last into those of packed image tokens."""
        if self.pictures and self.pictures[-1].keys is not None:
            self.pictures[-1].keys = packed(self.pictures[-1].keys)

    def image_keys(self) -> ImageKeys | None:
        """The keys of the image tokens of this forward; None where nothing merged."""
        assert self.inputs is not None
        encoded = encoded_images(self.inputs)
        if encoded is not None:  # `generate` runs the tower by itself
            pictures = getattr(encoded, PICTURES, None)
            return None if pictures is None else pictures.keys
        if self.inputs.get("pixel_values") is None or not self.pictures:
            return None
        return self.pictures[0].keys  # a second pass is of videos, whose tokens stay


def latest_kept(language_model: nn.Module) -> KeptOfPrompt | None:
    """The tokens that DyMU left of the prompt of the current or latest forward.

    Args:
        language_model: The language model of a host.

    Returns:
        The tokens, or None where nothing was dropped or there is no DyMU.
    """
    state = state_of(language_model, DYMU)
    return None if state is None else state.language.kept


# -- hooks ------------------------------------------------------------------------------------------------------------


def core_hook(core: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the module that holds tower and language model: notes its arguments."""
    state: LanguageState = state_of(core, DYMU).language
    state.inputs = arguments(core, args, kwargs)
    state.pictures = []


def pack_watcher(core: nn.Module, method: Callable[..., Any], called: dict[str, Any]) -> None:
    """Watcher of the packing method of a host: keys of pictures become those of packed image tokens."""
    state: LanguageState = state_of(core, DYMU).language
    state.pack(lambda keys: packed_keys(core, keys, method, called))


def pictures_hook(tower: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of the tower: stores on its output which tokens were merged."""
    state: LanguageState = state_of(tower, DYMU).language
    pictures = Pictures(state.host.picture_keys(state.tower))
    state.pictures = [*state.pictures[-7:], pictures]
    if hasattr(output, "last_hidden_state"):
        setattr(output, PICTURES, pictures)


def shorten_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of the language model: takes out the tokens that were merged into others.

    Raises:
        UnknownInterfaceError: A cache is in use under a name that is not known.
        UnsupportedAttentionError: Virtual unmerging got a mask `[batch, heads, tokens, tokens]`.
        LayoutError: The number of image tokens in the prompts is not that of the tower.
    """
    state: LanguageState = state_of(module, DYMU).language
    inputs, embeds = state.inputs, kwargs.get("inputs_embeds")
    if inputs is None or embeds is None:  # it was called without its host, or again inside its own forward
        return None
    state.kept = state.record = state.unmerged = None
    state.fed_again = 0
    cache = cache_of(module, kwargs)
    before = _record_of(module, cache, len(embeds))
    keys = state.image_keys()
    state.inputs, state.pictures = None, []
    if before is None and keys is None:
        return None
    new = dict(kwargs)
    mask = kwargs.get("attention_mask")
    if before is not None:
        state.fed_again = _fed_again(state, before, mask, embeds.shape[1], kwargs.get("position_ids"))
    embeds = embeds[:, state.fed_again :]
    batch, length = embeds.shape[:2]
    past = 0 if before is None else before.full_mask.shape[1]
    square = isinstance(mask, Tensor) and mask.ndim == 4 and before is None and mask.shape[-1] == length
    if square and state.vtu:
        raise UnsupportedAttentionError("language='vtu' takes masks [batch, tokens]; use language='logical_rope'.")
    visible = visible_tokens(mask, batch, length, embeds.device, before is None)
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(past, past + length, device=embeds.device)[None]
    positions = positions[..., -length:]
    rotation = full_rotation(module, embeds, positions) if state.vtu else None
    state.kept = None if keys is None else choose_kept(_image_places(state, inputs, embeds, length), keys)
    every_token = torch.arange(length, device=embeds.device).expand(batch, -1)
    short = visible
    if state.kept is not None:
        every_token = state.kept.owner
        short = visible.gather(1, state.kept.index) * state.kept.live
        positions = keep_positions(positions, state.kept.index, channels=False)
        embeds = keep_states(embeds, state.kept.index)
    elif before is None:
        return None
    if state.kept is not None or state.fed_again:
        fastv = features_of(module).get("fastv")
        if fastv is not None:  # it prunes further inside, and finds image tokens by the arguments of the host
            fastv.keep_noted(state.fed_again, None if state.kept is None else state.kept.index)
    state.record = grown(before, short, visible, every_token, rotation)
    new |= {"inputs_embeds": embeds, "position_ids": positions, "attention_mask": state.record.mask}
    if square:  # a mask of the caller: which token sees which
        assert isinstance(mask, Tensor)
        new["attention_mask"] = mask if state.kept is None else chosen_rows(mask, state.kept)
    if kwargs.get("cache_position") is not None:
        slots = state.record.mask.shape[1]
        new["cache_position"] = torch.arange(slots - embeds.shape[1], slots, device=embeds.device)
    if state.vtu:
        state.unmerged = Unmerged(state.record.mask.shape[1], state.record.owner, state.record.full_mask, every_token,
                                  embeds.shape[1], state.record.rotation)  # pyright: ignore[reportArgumentType]  # fmt: skip
    return args, new


def expand_hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of the language model: gives every position of the prompt a state, and its cache the record.

    Raises:
        UnknownInterfaceError: A cache is returned under a name that is not known.
    """
    state: LanguageState = state_of(module, DYMU).language
    state.unmerged = None
    if state.record is None:
        return None
    states = output[0]
    if state.kept is not None:
        states = keep_states(states, state.kept.owner)
    if state.fed_again:  # their states are not read
        states = torch.cat((states[:, :1].expand(-1, state.fed_again, -1), states), 1)
    cache = cache_of_output(output)
    if cache is not None:
        setattr(cache, RECORD, state.record)
    state.record = None
    if isinstance(output, tuple):
        return (states, *output[1:])
    output["last_hidden_state"] = states
    return output


def _record_of(module: nn.Module, cache: Any, batch: int) -> CacheRecord | None:
    record = getattr(cache, RECORD, None)
    if record is None:
        return None
    slots = cache.get_seq_length()
    if isinstance(slots, int):  # of a static cache it is a tensor, and that cannot be cropped
        if slots == 0:
            return None
        pruned = getattr(cache, KEPT, None)
        if pruned is not None:
            fastv = features_of(module).get("fastv")
            slots += pruned.dropped if fastv is not None and fastv.at_input else 0
        record = record.without(max(0, record.mask.shape[1] - slots))
    return record.of_batch(batch)


def _fed_again(state: LanguageState, before: CacheRecord, mask: Any, length: int, positions: Any) -> int:
    """How many of the new tokens the cache holds already.

    A later turn of `generate` skips as many tokens of the text as the cache has slots, but it has fewer slots than it
    holds tokens.
    """
    past = before.full_mask.shape[1]
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return max(0, past + length - mask.shape[1])
    if length == 1 or positions is None or (positions.ndim == 3 and len(positions) == 3):
        return 0
    text = positions[0] if positions.ndim == 3 else positions
    if positions.ndim == 3 and len(positions) == 1:  # of Qwen, for text after an image
        core: Any = state.host.core
        text = text - core.rope_deltas.to(text.device)
    column = text[0, 0] + (before.full_mask[0] == 0).sum()  # positions do not count padding
    return max(0, past - int(column))


def _image_places(state: LanguageState, inputs: dict[str, Any], embeds: Tensor, length: int) -> Tensor:
    """Which new tokens stand for a part of a still image, bool `[B, length]`."""
    core: Any = state.host.core
    ids, number = inputs.get("input_ids"), still_image_id(core.config)
    if ids is not None:
        if ids.shape[1] != length + state.fed_again:
            raise LayoutError(
                f"The prompt has {ids.shape[1]} tokens and the language model got {length}: something else has taken "
                "tokens out before. Call inject_dymu before inject_fastv."
            )
        return ids[:, -length:] == number
    mark = core.get_input_embeddings()(torch.tensor(number, device=embeds.device))
    return (inputs["inputs_embeds"][:, -length:] == mark).all(-1)
