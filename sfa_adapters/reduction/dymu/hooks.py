"""The hooks with which DyMU merges tokens inside a vision tower. No forward is changed.

Before layer i >= 1 tokens merge by the keys of layer i - 1: between the layers, whereas ToMe and DyMU merge inside each
layer, between its attention and its MLP. So no residual connection has to be taken apart, and nothing merges after the
last layer that the host reads.

Hooks: (1) the tower's input gives its grid (`TowerState.record_input`); (2) the output of a projection gives the keys;
(3) tokens merge before each layer; (4) its attention gets sizes through its mask argument; (5) after the layers, and
after the tower for recorded hidden states, tokens are scattered back to the regular grid. They find their state in
the module, so that copies of a model have their own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sfa_adapters.errors import BiasNotAppliedError, InjectionError, LayoutError
from sfa_adapters.hooks import attachment_of, features_of, state_of
from sfa_adapters.mask import SegmentedMask
from sfa_adapters.mask_argument import give_mask, given_mask, unused_mask
from sfa_adapters.packing import PackedMask
from sfa_adapters.reduction.dymu.merging import Merged
from sfa_adapters.reduction.dymu.size_attention import SizedPackedMask, SizedSegmentedMask
from sfa_adapters.reduction.dymu.tokens import TowerTokens
from sfa_adapters.reduction.dymu.tower import DYMU, TowerState, follow_flat, follow_packed

# -- 2: keys ----------------------------------------------------------------------------------------------------------


def keys_hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    """Forward hook of the module whose output is (or holds) the keys of an attention layer."""
    state: TowerState = state_of(module, DYMU)
    layer, kind = attachment_of(module, DYMU).place
    if not state.merges_at(layer):
        return
    keys = output.detach()
    if kind == "qkv":
        keys = keys.chunk(3, dim=-1)[1]
    elif keys.ndim == 4:  # normalised head by head, [B, H, N, d]
        keys = keys.transpose(1, 2).flatten(2)
    state.keys = keys


# -- 3: before a layer ------------------------------------------------------------------------------------------------


def layer_hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of a layer: merges tokens, and shortens the arguments that go with them.

    Raises:
        InjectionError: The layer runs under gradient checkpointing.
        LayoutError: It runs outside its tower.
    """
    state: TowerState = state_of(layer, DYMU)
    number, attention = attachment_of(layer, DYMU).place
    if getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled():
        raise InjectionError(
            "DyMU under gradient checkpointing would merge other tokens in the recomputation. Call eject_dymu(model), "
            "or model.gradient_checkpointing_disable()."
        )
    states: Tensor = args[0] if args else kwargs["hidden_states"]
    if number == 0:
        state.begin(attention, states)
    tokens = state.tokens
    if tokens is None:
        raise LayoutError("A layer of a tower with DyMU ran outside its tower; call the tower with images.")
    new = states if number == 0 else state.merge(number - 1, states)
    tokens.history.append(tokens.merged)
    if tokens.merged is None:
        return None
    follow = follow_flat if state.flat else follow_packed
    kwargs = follow(state, kwargs)
    return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})


# -- 4: attention -----------------------------------------------------------------------------------------------------


def attention_hook(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of an attention layer: merged tokens are attended to in proportion to their size.

    Raises:
        InjectionError: The layer got a mask that does not fit merged tokens.
    """
    state: TowerState = state_of(attention, DYMU)
    tokens = state.tokens
    if tokens is None or tokens.merged is None:
        return give_mask(attention, DYMU, None, args, kwargs)
    given = given_mask(attention, DYMU, args, kwargs)
    if state.flat:
        bounds = kwargs.get("cu_seqlens", args[1] if len(args) > 1 else None)
        inner = given if isinstance(given, SegmentedMask) else None
        mask: Any = SizedSegmentedMask(bounds.diff().tolist(), tokens.log_size, inner)  # pyright: ignore[reportOptionalMemberAccess]
    else:
        if given is not None and not isinstance(given, PackedMask):
            raise InjectionError(f"{type(attention).__name__} got a mask of its own, which fits no merged tokens.")
        fits = isinstance(given, PackedMask) and given.lengths == tokens.token_lengths
        mask = SizedPackedMask(
            tokens.token_lengths,
            tokens.log_size,
            given.biases if fits else None,  # pyright: ignore[reportOptionalMemberAccess]
            given.backend if fits else "auto",  # pyright: ignore[reportOptionalMemberAccess]
            replaced=given,
        )
    return give_mask(attention, DYMU, mask, args, kwargs)


def attended_hook(attention: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of an attention layer: checks that its mask was used.

    Raises:
        BiasNotAppliedError: The attention implementation dropped the mask, or another hook exchanged it.
    """
    if unused_mask(attention, DYMU) is not None:
        raise BiasNotAppliedError(
            f"{type(attention).__name__} dropped the sizes of merged tokens. Load the model with "
            "attn_implementation='sdpa', or call tower.set_attn_implementation('sdpa'); on Qwen2.5-VL call inject_sfa "
            "before inject_dymu."
        )


# -- 5: after the layers ----------------------------------------------------------------------------------------------


def scatter_back_hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of the module whose output is the token sequence: every token of the grid gets a state again."""
    tokens = state_of(module, DYMU).tokens
    if tokens is None or tokens.merged is None:
        return None
    if isinstance(output, Tensor):
        return tokens.scatter_back(output, tokens.merged)
    if isinstance(output, tuple):
        return (tokens.scatter_back(output[0], tokens.merged), *output[1:])
    output["last_hidden_state"] = tokens.scatter_back(output["last_hidden_state"], tokens.merged)
    return output


def merger_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of Qwen's patch merger: it gets the whole sequence again."""
    tokens = state_of(module, DYMU).tokens
    if tokens is None or tokens.merged is None:
        return None
    return (tokens.scatter_back(args[0], tokens.merged), *args[1:]), kwargs


def tower_hook(tower: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of the tower: recorded hidden states have the shape that they have without merging."""
    state: TowerState = state_of(tower, DYMU)
    tokens = state.tokens
    if (sfa := state_of(tower, "sfa")) is not None and not state.flat:
        sfa.packing = getattr(features_of(tower).get("adat"), "packing", None)
    if tokens is None or tokens.merged is None or not isinstance(output, dict):
        return None
    final = output.get("last_hidden_state")
    if state.flat and final is not None and len(final) != sum(tokens.lengths) * tokens.unit:
        output["last_hidden_state"] = tokens.scatter_back(final, tokens.merged)
    if output.get("hidden_states") is not None:
        maps = [None, *tokens.history]  # entry k is the output of layer k - 1
        output["hidden_states"] = tuple(
            states
            if states is None or not _is_merged(states, layer_states, tokens)
            else tokens.scatter_back(states, layer_states)
            for states, layer_states in zip(output["hidden_states"], maps, strict=False)
        )
    return output


def _is_merged(states: Tensor, merged: Merged | None, tokens: TowerTokens) -> bool:
    if merged is None:
        return False
    count = sum(merged.lengths) * tokens.unit + tokens.prefix * len(merged.lengths)
    return math.prod(states.shape[:-1]) == count
