"""The hooks with which DyMU merges tokens inside a vision tower. No forward is changed.

In front of layer i >= 1 tokens merge by the keys of layer i - 1: between the layers, where ToMe and DyMU merge inside
each layer, between its attention and its MLP. So no residual connection has to be taken apart, and nothing merges
behind the last layer that the host reads.

Hooks: (1) the tower notes its grid; (2) a projection hands over its keys; (3) each layer merges in front of itself;
(4) its attention gets sizes through its mask argument; (5) behind the layers, and behind the tower for recorded hidden
states, tokens are laid back onto the regular grid. They find their state in the module, so that copies of a model have
their own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sfa_adapters.adat.tokenizer import ADAT_STATE
from sfa_adapters.errors import BiasNotAppliedError, InjectionError, LayoutError
from sfa_adapters.mask import SegmentedMask
from sfa_adapters.packing import PackedMask
from sfa_adapters.reduction.dymu.merging import Merged
from sfa_adapters.reduction.dymu.size_attention import SizedPackedMask, SizedSegmentedMask
from sfa_adapters.reduction.dymu.tokens import TowerTokens
from sfa_adapters.reduction.dymu.tower import DYMU_STATE, INDEX, TowerState, follow_flat, follow_packed
from sfa_adapters.tower import STATE_NAME

__all__ = ["MASK"]

MASK = "_dymu_mask"


def state_of(module: nn.Module) -> tuple[TowerState, nn.Module]:
    """The state of the tower that a hooked module is part of, and the tower."""
    return module.__dict__[DYMU_STATE]


# -- 1: in front of the tower -----------------------------------------------------------------------------------------


def grid_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the module that sees the images."""
    state, tower = state_of(module)
    state.tokens = state.keys = None
    backbone = state.backbone
    if backbone.grid_of_input is not None:
        state.grid = backbone.grid_of_input(module, args, kwargs) or backbone.geometry(tower).grid
        return
    from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

    config: Any = tower.config
    merge = int(config.spatial_merge_size)
    grid_thw = args[1] if len(args) > 1 else kwargs["grid_thw"]
    index = kwargs.get("window_index")
    if index is None:
        index, _ = get_vision_window_index(grid_thw, merge, int(config.window_size), int(config.patch_size))
    places = kwargs.get("position_ids")
    places = get_vision_position_ids(grid_thw, merge) if places is None else places
    index = index.to(places.device)
    state.window_index = index
    state.flat_input = {
        "lengths": tuple((grid_thw.prod(-1) // merge**2).tolist()),
        "places": places.view(len(index), merge**2, 2)[index],
        "pages": kwargs.get("page_grids", grid_thw[:, 1:]),
    }


# -- 2: keys ----------------------------------------------------------------------------------------------------------


def keys_hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    """Forward hook of the module whose output is (or holds) the keys of an attention layer."""
    state, _ = state_of(module)
    layer, kind = module.__dict__[INDEX]
    if not state.merges_at(layer):
        return
    keys = output.detach()
    if kind == "qkv":
        keys = keys.chunk(3, dim=-1)[1]
    elif keys.ndim == 4:  # normalised head by head, [B, H, N, d]
        keys = keys.transpose(1, 2).flatten(2)
    state.keys = keys


# -- 3: in front of a layer -------------------------------------------------------------------------------------------


def layer_hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of a layer: tokens merge, and what goes with them follows."""
    state, tower = state_of(layer)
    number, attention = layer.__dict__[INDEX]
    if getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled():
        raise InjectionError(
            "DyMU under gradient checkpointing would merge other tokens in the recomputation. Call eject_dymu(model), "
            "or model.gradient_checkpointing_disable()."
        )
    states: Tensor = args[0] if args else kwargs["hidden_states"]
    if number == 0:
        state.begin(tower, attention, states)
    tokens = state.tokens
    if tokens is None:
        raise LayoutError("A layer of a tower with DyMU ran outside its tower; call the tower with images.")
    new = states if number == 0 else state.merge(number - 1, states)
    tokens.history.append(tokens.merged)
    if tokens.merged is None:
        return None
    follow = follow_flat if state.flat else follow_packed
    kwargs = follow(state, tower, kwargs)
    return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})


# -- 4: attention -----------------------------------------------------------------------------------------------------


def attention_hook(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of an attention layer: merged tokens are attended to in proportion to their size."""
    state, _ = state_of(attention)
    tokens = state.tokens
    if tokens is None or tokens.merged is None:
        return None
    name = state.backbone.mask_argument
    given = kwargs.get(name)
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
    attention.__dict__[MASK] = mask
    return args, {**kwargs, name: mask}


def attended_hook(attention: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of an attention layer.

    Raises:
        BiasNotAppliedError: The attention implementation dropped the mask, or another hook exchanged it.
    """
    mask = attention.__dict__.pop(MASK, None)
    if mask is not None and not mask.used:
        raise BiasNotAppliedError(
            f"{type(attention).__name__} dropped the sizes of merged tokens. Load the model with "
            "attn_implementation='sdpa', or call tower.set_attn_implementation('sdpa'); on Qwen2.5-VL call inject_sfa "
            "before inject_dymu."
        )


# -- 5: behind the layers ---------------------------------------------------------------------------------------------


def lay_back_hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of the module whose output is the sequence."""
    state, _ = state_of(module)
    tokens = state.tokens
    if tokens is None or tokens.merged is None:
        return None
    if isinstance(output, Tensor):
        return tokens.lay_back(output, tokens.merged)
    if isinstance(output, tuple):
        return (tokens.lay_back(output[0], tokens.merged), *output[1:])
    output["last_hidden_state"] = tokens.lay_back(output["last_hidden_state"], tokens.merged)
    return output


def merger_hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
    """Forward pre-hook of Qwen's merger: it sees the whole sequence again."""
    tokens = state_of(module)[0].tokens
    if tokens is None or tokens.merged is None:
        return None
    return (tokens.lay_back(args[0], tokens.merged), *args[1:])


def tower_hook(tower: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of the tower: recorded hidden states leave it as they would without merging."""
    state = state_of(tower)[0]
    tokens = state.tokens
    if STATE_NAME in tower.__dict__ and not state.flat:
        adat = next((m.__dict__[ADAT_STATE][0] for m in tower.modules() if ADAT_STATE in m.__dict__), None)
        tower.__dict__[STATE_NAME].packing = getattr(adat, "packing", None)
    if tokens is None or tokens.merged is None or not isinstance(output, dict):
        return None
    final = output.get("last_hidden_state")
    if state.flat and final is not None and len(final) != sum(tokens.lengths) * tokens.unit:
        output["last_hidden_state"] = tokens.lay_back(final, tokens.merged)
    if output.get("hidden_states") is not None:
        maps = [None, *tokens.history]  # entry k is the output of layer k - 1
        output["hidden_states"] = tuple(
            states if states is None or not _is_merged(states, own, tokens) else tokens.lay_back(states, own)
            for states, own in zip(output["hidden_states"], maps, strict=False)
        )
    return output


def _is_merged(states: Tensor, own: Merged | None, tokens: TowerTokens) -> bool:
    if own is None:
        return False
    count = sum(own.lengths) * tokens.unit + tokens.prefix * len(own.lengths)
    return math.prod(states.shape[:-1]) == count
