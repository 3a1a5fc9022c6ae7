"""`inject_dymu` and `eject_dymu`: merge similar tokens of a tower, and give the language model only what is left.

DyMU (arXiv 2504.17040): the number of tokens follows the image, because tokens merge above a threshold of similarity.
Thresholds come from `calibrate_dymu`; `save_dymu` writes them beside an adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from sfa_adapters.attention_contract import head_count
from sfa_adapters.errors import AdapterMismatchError, InjectionError
from sfa_adapters.hooks import attach, detach_all, features_of, watch_method
from sfa_adapters.mask_argument import attach_to_attention
from sfa_adapters.reduction.dymu.config import DyMUConfig
from sfa_adapters.reduction.dymu.hooks import (
    attended_hook,
    attention_hook,
    keys_hook,
    layer_hook,
    merger_hook,
    scatter_back_hook,
    tower_hook,
)
from sfa_adapters.reduction.dymu.host_tokens import PACK, HostTokens, find_host
from sfa_adapters.reduction.dymu.logical_rope import (
    LanguageState,
    core_hook,
    expand_hook,
    pack_watcher,
    pictures_hook,
    shorten_hook,
)
from sfa_adapters.reduction.dymu.tower import DYMU, TowerState
from sfa_adapters.reduction.dymu.vtu import check_language_model, rotary_hook, rotated_hook
from sfa_adapters.reduction.image_tokens import DENSITY_BESIDE_DYMU
from sfa_adapters.tower_input import watch_input
from sfa_adapters.tower_search import FoundTower, find_tower
from sfa_adapters.vlm.records import check_allowed

__all__ = ["TokenCounts", "dymu_state", "eject_dymu", "inject_dymu", "token_counts", "tower_signature"]

Model = TypeVar("Model", bound=nn.Module)


def inject_dymu(model: Model, config: DyMUConfig | None = None) -> Model:
    """Merges similar tokens inside the vision tower of a model, in place, and shortens what the language model sees.

    Prompts, processors and `generate` stay as they are: the prompt has as many image tokens as before, and those that
    were merged into others are taken out before the language model. Works with SFA and with ADAT, in any order (on
    Qwen2.5-VL `inject_sfa` comes first).

    Args:
        model: A tower, or a vision-language model with one.
        config: Options; `DyMUConfig()` by default, whose thresholds are not calibrated.

    Returns:
        The same model.

    Raises:
        NoMatchingBackboneError: No tower was found.
        InjectionError: The tower or the host is of a kind that cannot merge, merges already, or an option does not fit
            it or the FastV that is injected.
        AdapterMismatchError: The thresholds were calibrated for another tower.
        UnsupportedAttentionError: `language="vtu"` and the language model's attention cannot carry it.

    Example:
        >>> from transformers import SiglipVisionConfig, SiglipVisionModel
        >>> tower = SiglipVisionModel(SiglipVisionConfig(num_hidden_layers=2, vision_use_head=False))
        >>> _ = inject_dymu(tower, DyMUConfig(thresholds=0.9))
    """
    config = config or DyMUConfig()
    check_allowed(model, "dymu", InjectionError)
    located = find_tower(model)
    _check_kind(located)
    host = None if config.language == "off" else find_host(model, located)
    state = _plan(located, config, find_host(model, located, strict=False))
    if host is not None:
        state.language = LanguageState(state, host, config.language == "vtu")
        if state.language.vtu:
            check_language_model(host.language_model)
        fastv = features_of(host.language_model).get("fastv")
        if fastv is not None and fastv.config.selector == "density":
            raise InjectionError(DENSITY_BESIDE_DYMU)
        if fastv is not None and fastv.at_input:
            raise InjectionError("FastV with prune_at='input' works on what DyMU leaves: call inject_dymu first.")
    try:
        _hook_tower(located, state)
        if state.language is not None:
            _hook_language(state)
    except BaseException:
        detach_all(model, DYMU)
        raise
    return model


def _plan(located: FoundTower, config: DyMUConfig, host: HostTokens | None) -> TowerState:
    """Checks everything that can be wrong with the tower, without touching it."""
    tower, backbone = located.tower, located.backbone
    where = located.name or type(tower).__name__
    flat = backbone.joined == "segments"
    if DYMU in features_of(tower):
        raise InjectionError(f"{where} merges tokens already; call eject_dymu(model) first.")
    places = _places(located, host)
    signature = {"backbone": backbone.name, "num_layers": len(located.attentions), "places": places}
    if config.tower is not None and any(config.tower.get(k) != v for k, v in signature.items()):
        raise AdapterMismatchError(f"These thresholds were calibrated for {config.tower}; {where} is {signature}.")
    needed = 2 if flat else 1 if host is None else host.side
    side = needed if config.side is None else config.side
    if side < needed:
        raise InjectionError(f"side={side}: the host makes one token of {needed}x{needed}, which must merge whole.")
    heads = {head_count(module, tower) for _, module in located.attentions}
    if len(heads) != 1:
        raise InjectionError(
            f"The layers of {where} have {sorted(heads)} heads: tokens merge by heads of equal number."
        )
    geometry = backbone.geometry(tower)
    return TowerState(
        tower, backbone, config.per_place(places), side, geometry.prefix_tokens, _first_read(located, host), heads.pop()
    )


def _check_kind(located: FoundTower) -> None:
    """Refuses towers in which tokens cannot merge."""
    tower, backbone = located.tower, located.backbone
    flat = backbone.joined == "segments"
    if backbone.patches is None and not (flat and backbone.token_reduction):
        why = (
            "its order of tokens and what merges them behind its layers are not those that DyMU knows"
            if flat
            else "it has masks or attention of its own"
        )
        raise InjectionError(
            f"{located.name or type(tower).__name__} is a {backbone.name} tower ({type(tower).__name__}), in which "
            f"tokens cannot merge: {why}. DyMU takes CLIP, SigLIP, Idefics3, InternViT, timm and Qwen2.5-VL towers."
        )


def _places(located: FoundTower, host: HostTokens | None) -> int:
    return max(0, located.used_layers - 1)


def _first_read(located: FoundTower, host: HostTokens | None) -> int:
    """The first layer whose output the host reads; later ones have merged more."""
    layers = [] if host is None else host.feature_layers
    total = len(located.attentions)
    return min([total - 1, *((layer if layer >= 0 else total + 1 + layer) - 1 for layer in layers)])


def tower_signature(model: nn.Module) -> dict[str, Any]:
    """What a saved configuration says of the tower that it is for: kind, layers, and places between layers.

    Args:
        model: A tower, or a model with one.
    """
    located = find_tower(model)
    places = _places(located, find_host(model, located, strict=False))
    return {"backbone": located.backbone.name, "num_layers": len(located.attentions), "places": places}


def _hook_tower(located: FoundTower, state: TowerState) -> None:
    tower, backbone = located.tower, located.backbone
    watch_input(tower, backbone, DYMU, state)
    for number, (path, attention) in enumerate(located.attentions):
        local = path[len(located.name) + 1 :] if located.name else path
        layer = tower.get_submodule(local.rpartition(".")[0])
        attach(layer, DYMU, state, pre=layer_hook, place=(number, attention))
        attach_to_attention(attention, DYMU, state, backbone.argument_of(attention).name, attention_hook, attended_hook)
        keys, kind = _keys_module(attention)
        attach(keys, DYMU, state, post=keys_hook, place=(number, kind))
    if state.flat:
        attach(tower.get_submodule("merger"), DYMU, state, pre=merger_hook)
    else:
        assert backbone.patches is not None
        # Before ADAT's hooks, which expect the tokens that they made.
        attach(tower.get_submodule(backbone.patches.tokens_out), DYMU, state, post=scatter_back_hook, prepend=True)
    attach(tower, DYMU, state, post=tower_hook, prepend=True)


def _keys_module(attention: nn.Module) -> tuple[nn.Module, str]:
    """The last module that computes keys: the norm of keys, if there is one."""
    norm = getattr(attention, "k_norm", None)
    if isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity):
        return norm, "keys"
    for name, kind in (("k_proj", "keys"), ("qkv", "qkv")):
        module = getattr(attention, name, None)
        if isinstance(module, nn.Module):
            return module, kind
    raise InjectionError(f"{type(attention).__name__} has no k_proj or qkv; its keys cannot be compared.")


def _hook_language(state: TowerState) -> None:
    language: LanguageState = state.language
    host = language.host
    attach(host.tower, DYMU, state, post=pictures_hook)
    attach(host.core, DYMU, state, pre=core_hook)
    if host.kind == "packed_tiles":
        watch_method(host.core, DYMU, PACK, pack_watcher)
    attach(host.language_model, DYMU, state, pre=shorten_hook, post=expand_hook, prepend=True)
    if language.vtu:
        for module in host.language_model.modules():
            if hasattr(module, "q_proj") and hasattr(module, "k_proj"):
                attach_to_attention(module, DYMU, state, "attention_mask", rotary_hook, rotated_hook)


def dymu_state(model: nn.Module) -> TowerState:
    """The state of DyMU in a model.

    Args:
        model: A model with DyMU.

    Raises:
        InjectionError: The model merges no tokens.
    """
    state: TowerState | None = features_of(model).get(DYMU)
    if state is None:
        raise InjectionError(f"{type(model).__name__} merges no tokens; call inject_dymu(model) first.")
    return state


def eject_dymu(model: Model) -> Model:
    """Removes DyMU; the model is as it was, bit for bit.

    Args:
        model: What `inject_dymu` was called on.

    Returns:
        The same model.

    Raises:
        InjectionError: The model merges no tokens.
    """
    dymu_state(model)
    detach_all(model, DYMU)
    return model


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of the latest forward of a tower.

    Attributes:
        before: Tokens of each image without merging, prefix tokens not counted.
        after: Tokens of each image after the last merge.
        layers: Tokens of all images in each layer.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    layers: tuple[int, ...]


def token_counts(model: nn.Module) -> TokenCounts:
    """How many tokens the images of the latest forward had in the tower.

    Args:
        model: A model with DyMU.

    Raises:
        InjectionError: The model merges no tokens, or has not seen an image yet.
    """
    tokens = dymu_state(model).tokens
    if tokens is None or not tokens.history:
        raise InjectionError(f"{type(model).__name__} has not seen an image since inject_dymu.")
    before = tuple(tokens.unit * length for length in tokens.lengths)
    in_layers = tuple(sum(before) if m is None else tokens.unit * sum(m.lengths) for m in tokens.history)
    final = tokens.history[-1]
    after = before if final is None else tuple(tokens.unit * length for length in final.lengths)
    return TokenCounts(before, after, in_layers)
