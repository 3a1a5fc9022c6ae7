"""`prune_at="input"`: the language model never sees the dropped tokens, so all its layers hold equally many.

Scores still come from layer K - 1: a first pass over the whole prompt runs up to there and stops. Then the prompt runs
again with the kept tokens only. They keep their position ids, so the cache is shorter than the positions say, and the
mask and the positions of all that follows are given to the language model here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sfa_adapters.compat import cache_of, with_cache
from sfa_adapters.errors import PlanError
from sfa_adapters.reduction.fastv.hooks import FastVState, Scored
from sfa_adapters.reduction.fastv.selectors import needs_attention
from sfa_adapters.reduction.image_tokens import Counts, arguments
from sfa_adapters.reduction.kept_tokens import KeptTokens, keep_positions, keep_states, pruned_mask

__all__ = ["enter_decoder"]

AGAIN = (
    "With prune_at='input', give a later turn as its new tokens only, and the attention mask of the whole conversation."
)


def enter_decoder(state: FastVState, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pre-hook of the language model: prunes a prompt, and corrects mask and positions of what follows one.

    Args:
        state: State of FastV.
        decoder: The language model.
        args: Its arguments by position.
        kwargs: Its arguments by name.

    Returns:
        The new arguments, or None where they stay.

    Raises:
        PlanError: The tokens do not go on where the cache ends.
        UnknownInterfaceError: A cache is in use under a name that is not known.
    """
    if not state.at_input or state.scoring:
        return None
    given = arguments(decoder, args, kwargs)
    states, cache = given.get("inputs_embeds"), cache_of(decoder, given)
    if states is None:
        return None
    state.begin(states, cache, given.get("attention_mask"))
    if state.kept is not None and states.shape[1] > 1:
        _check_positions(state.kept, cache, state.noted.get("position_ids"))
    kind = str(getattr(decoder.config, "_attn_implementation", "unknown"))
    if state.prompt is not None:
        if needs_attention(state.config.selector):
            _score(state, decoder, given)
        if state.choose(states):
            state.settle(cache)
            return (), {**given, **_kept_inputs(state, given, cache, kind)}
        state.remember(cache)
    if state.kept is not None:
        return (), {**given, **_following_inputs(state, given, cache, kind)}
    return None


def _check_positions(kept: KeptTokens, cache: Any, positions: Any) -> None:
    """`generate` cuts the ids of a whole conversation by the length of the cache, which is too short here."""
    if not isinstance(positions, Tensor) or (positions.ndim == 3 and positions.shape[0] != 4) or not kept.dropped:
        return
    plain = positions[0] if positions.ndim == 3 else positions  # before those of time, height and width
    past = torch.as_tensor(cache.get_seq_length(), device=plain.device)
    # Padding at the beginning of all samples, if there is any, is missing in every position.
    padding = torch.where(kept.live, kept.columns, kept.full).amin().to(plain.device)
    wrong = plain[:, 0].amax() + padding == past
    if any(Counts(wrong.long().reshape(1)).read()):
        raise PlanError(f"The positions of this turn begin {kept.dropped} too early. {AGAIN}")


def _score(state: FastVState, decoder: nn.Module, given: dict[str, Any]) -> None:
    """Runs the first layers over the whole prompt, without a cache."""
    prompt = state.prompt
    assert prompt is not None
    if not state.drops(prompt):
        return
    length = prompt.image.shape[1]

    def prompt_mask(mask: Any) -> Any:  # without the room of a static cache
        return mask[..., :length] if isinstance(mask, Tensor) and mask.ndim == 4 else mask

    mask = _each(given.get("attention_mask"), prompt_mask)
    state.scoring = True
    try:
        with torch.no_grad():
            decoder(**{**with_cache(decoder, given, None), "attention_mask": mask, "use_cache": False})
    except Scored:
        pass
    finally:
        state.scoring = False


def _kept_inputs(state: FastVState, given: dict[str, Any], cache: Any, kind: str) -> dict[str, Any]:
    prompt, kept = state.prompt, state.kept
    assert prompt is not None
    assert prompt.index is not None
    assert kept is not None
    index = prompt.index
    positions, made = given.get("position_ids"), isinstance(given.get("attention_mask"), dict)
    slots = cache.layers[0].max_cache_len if _is_static(cache) else kept.slots

    def kept_mask(mask: Any) -> Any:
        if mask is None and not made:  # positions with gaps and no mask would be taken for several packed sequences
            return kept.live.long()
        rows = None if isinstance(mask, Tensor) and mask.ndim == 2 else index
        return pruned_mask(mask, kept, rows, kept.slots, slots, kind)

    return {
        "inputs_embeds": keep_states(given["inputs_embeds"], index),
        "position_ids": index if positions is None else keep_positions(positions, index, channels=False),
        "attention_mask": _each(given.get("attention_mask"), kept_mask),
    }


def _following_inputs(state: FastVState, given: dict[str, Any], cache: Any, kind: str) -> dict[str, Any]:
    """Mask and positions of decoding steps and of later turns."""
    kept = state.kept
    assert kept is not None
    past, queries, static = cache.get_seq_length(), given["inputs_embeds"].shape[1], _is_static(cache)
    place = torch.arange(queries, device=given["inputs_embeds"].device)
    made = isinstance(given.get("attention_mask"), dict)

    def step_mask(mask: Any) -> Any:
        if mask is None:
            if kept.all_live or made:  # masks that were made already: None hides nothing
                return None
            room = cache.layers[0].max_cache_len if static else past + queries
            return torch.nn.functional.pad(kept.live, (0, room - kept.slots), value=True).long()
        if mask.ndim == 4 and static:
            return _static_mask(mask, kept, place + past)
        if isinstance(past, int) and mask.shape[-1] - kept.dropped != past + queries:
            raise PlanError(
                f"The mask has {mask.shape[-1]} columns and the cache {past} tokens with {kept.dropped} dropped ones "
                f"missing, so there should be {mask.shape[-1] - kept.dropped - past} new tokens, not {queries}. {AGAIN}"
            )
        return pruned_mask(mask, kept, None, queries, mask.shape[-1] - kept.dropped, kind)

    new: dict[str, Any] = {"attention_mask": _each(given.get("attention_mask"), step_mask)}
    if "position_ids" not in state.noted:  # else the caller knows better; here they were counted from the cache
        positions = given.get("position_ids")
        new["position_ids"] = (place + past)[None] + kept.dropped if positions is None else positions + kept.dropped
    return new


def _static_mask(mask: Tensor, kept: KeptTokens, query_places: Tensor) -> Tensor:
    """A causal mask over the slots of a static cache; the given one also has columns that were dropped."""
    slots = mask.shape[-1]
    live = torch.nn.functional.pad(kept.live, (0, slots - kept.slots), value=True).to(mask.device)
    seen = (torch.arange(slots, device=mask.device) <= query_places.to(mask.device)[:, None]) & live[:, None, None, :]
    if mask.dtype == torch.bool:
        return seen
    return torch.zeros_like(seen, dtype=mask.dtype).masked_fill(~seen, torch.finfo(mask.dtype).min)


def _is_static(cache: Any) -> bool:
    return bool(getattr(cache, "is_compileable", False))


def _each(mask: Any, change: Callable[[Any], Any]) -> Any:
    """A mask, or one for each kind of layer."""
    return {name: change(value) for name, value in mask.items()} if isinstance(mask, dict) else change(mask)
