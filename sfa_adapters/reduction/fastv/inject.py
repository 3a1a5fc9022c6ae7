"""`inject_fastv` and `eject_fastv`: drop image tokens after the first layers of a language model, in place.

FastV (An Image is Worth 1/2 Tokens After Layer 2, arXiv 2403.06764): from layer K on, keep the image tokens that the
question attends to most in layer K - 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import nn

from sfa_adapters.errors import InjectionError, PlanError, UnsupportedAttentionError
from sfa_adapters.hooks import attach, attachment_of, detach_all, features_of, state_of, watch_method
from sfa_adapters.normalisation import image_statistics
from sfa_adapters.reduction.fastv.hooks import FASTV, FastVState
from sfa_adapters.reduction.fastv.prune_at_input import enter_decoder
from sfa_adapters.reduction.fastv.selectors import Selector, check_selector, needs_attention
from sfa_adapters.reduction.fastv.token_density import PACK, density_packer
from sfa_adapters.reduction.image_tokens import DENSITY_BESIDE_DYMU
from sfa_adapters.tower_input import watch_input
from sfa_adapters.tower_search import FoundTower, find_tower
from sfa_adapters.vlm.parts import Decoder, find_decoder, image_token_ids
from sfa_adapters.vlm.records import check_allowed, find_spec

__all__ = ["FastVConfig", "eject_fastv", "inject_fastv"]

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class FastVConfig:
    """Options of FastV: which image tokens are dropped, and before which layer.

    Attributes:
        layer: K: tokens are dropped before this layer, counted from 0, and the attention of layer K - 1 decides.
        k: Image tokens that each prompt keeps; a prompt that has no more of them keeps all.
        ratio: Share of a prompt's image tokens that is dropped, in [0, 1); round(n * (1 - ratio)) of n stay, at least
            one. 0.5 where `k` is not given.
        query: Whose attention counts: the last token of the question, or the mean of all text tokens.
        selector: By what tokens are chosen, see `sfa_adapters.reduction.fastv.selectors`.
        prune_at: "layer" prunes before layer K. "input" prunes before layer 0, so that all layers hold equally many
            tokens; scores of layer K - 1 then cost a first pass over K layers.
        balance: Of `importance+diversity`: 1 counts importance only, 0 diversity only.
        seed: Of `random`.
        image_mean: Mean that images were normalised with, by channel, for `density`; None takes that of the tower.
        image_std: Standard deviation, by channel, as `image_mean`.

    Raises:
        PlanError: A field cannot be used.
    """

    layer: int = 2
    k: int | None = None
    ratio: float | None = None
    query: Literal["last", "mean"] = "last"
    selector: Selector = "attention"
    prune_at: Literal["layer", "input"] = "layer"
    balance: float = 0.5
    seed: int = 0
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.k is not None and self.ratio is not None:
            raise PlanError(f"k={self.k} and ratio={self.ratio}: give one of them.")
        if self.k is None and self.ratio is None:
            object.__setattr__(self, "ratio", 0.5)
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 1:
            raise PlanError(
                f"layer={self.layer!r} must be a whole number from 1 on; prune_at='input' prunes before layer 0."
            )
        if self.k is not None and (isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1):
            raise PlanError(f"k={self.k!r} must be a whole number of tokens, at least 1.")
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise PlanError(f"ratio={self.ratio} must lie in [0, 1): the share of image tokens that goes.")
        if self.query not in ("last", "mean"):
            raise PlanError(f"query={self.query!r} must be 'last' or 'mean'.")
        if self.prune_at not in ("layer", "input"):
            raise PlanError(f"prune_at={self.prune_at!r} must be 'layer' or 'input'.")
        check_selector(self.selector, self.balance)
        for name in ("image_mean", "image_std"):
            value = getattr(self, name)
            if value is not None and len(value) != 3:
                raise PlanError(f"{name}={value} must have one number for each of three channels.")

    def budget(self, count: int) -> int:
        """How many of the image tokens of a prompt stay.

        Args:
            count: Image tokens of the prompt.
        """
        if self.k is not None:
            return min(self.k, count)
        assert self.ratio is not None
        return min(count, max(1, round(count * (1 - self.ratio))))


def inject_fastv(model: Model, config: FastVConfig | None = None) -> Model:
    """Makes a vision-language model drop image tokens after its first layers.

    Hooks do it: no forward is replaced, and every layer keeps its attention kernel. Prompts in a batch may
    have images of any number and size, and padding. With SFA, ADAT and LoRA, injected before or after.

    Args:
        model: A vision-language model of transformers, also inside a `PeftModel`.
        config: Options; `FastVConfig()` by default.

    Returns:
        The same model.

    Raises:
        InjectionError: The model has no language model that this works on, too few layers, FastV already, or DyMU that
            shortens the prompts of `selector="density"`; or the selector is `density`, and the tower takes patches of a
            form that is not known.
        UnsupportedAttentionError: The selector needs attention scores, which flash and flex attention do not show.

    Example:
        >>> from sfa_adapters.recipes.nano.models import load_nano
        >>> model = inject_fastv(load_nano().model, FastVConfig(layer=2, ratio=0.5))
    """
    config = config or FastVConfig()
    check_allowed(model, "fastv", InjectionError)
    decoder = find_decoder(model)
    ids = image_token_ids(decoder.host)
    _check(decoder, config)
    tower = _tower(model, config)
    spec, options = find_spec(decoder.host), getattr(decoder.host, "config", None)
    side = 1 if spec is None or spec.image_tokens is None else spec.image_tokens.side(options)
    state = FastVState(config, ids, len(decoder.layers), _statistics(config, tower), side)
    for module in decoder.outer:
        attach(module, FASTV, state, pre=_note, post=_forget, always_call=True)
    attach(decoder.module, FASTV, state, pre=_enter_decoder, post=_forget, always_call=True)
    for number, layer in enumerate(decoder.layers):
        if number in (0, config.layer - 1) or number >= config.layer:
            attach(layer, FASTV, state, place=number, pre=_enter_layer, post=_leave_layer, always_call=True)
    if tower is not None:
        watch_input(tower.tower, tower.backbone, FASTV, state)
        core = next((module for module in reversed(decoder.outer) if hasattr(module, PACK)), None)
        if core is not None:
            watch_method(core, FASTV, PACK, _pack)
    return model


def eject_fastv(model: Model) -> Model:
    """Removes FastV; the model is as it was, bit for bit.

    Caches that were filled with it hold fewer tokens in some layers and are of no use to the model any more.

    Args:
        model: What `inject_fastv` was called on.

    Returns:
        The same model.

    Raises:
        InjectionError: The model has no FastV.
    """
    if not detach_all(model, FASTV):
        raise InjectionError(f"{type(model).__name__} has no FastV; call inject_fastv(model) first.")
    return model


def _check(decoder: Decoder, config: FastVConfig) -> None:
    name, count = type(decoder.module).__name__, len(decoder.layers)
    if FASTV in features_of(decoder.module):
        raise InjectionError(f"{type(decoder.host).__name__} has FastV already; call eject_fastv(model) first.")
    if config.selector == "density" and "dymu" in features_of(decoder.module):  # attached there if it shortens prompts
        raise InjectionError(DENSITY_BESIDE_DYMU)
    if config.layer > count - (config.prune_at == "layer"):
        raise InjectionError(
            f"layer={config.layer}, but {name} has {count} layers, 0 to {count - 1}: no layer follows the pruning."
        )
    options: Any = getattr(decoder.module, "config", None)
    kinds = set(getattr(options, "layer_types", None) or ())
    if kinds - {"full_attention"} or (not kinds and getattr(options, "sliding_window", None) is not None):
        raise InjectionError(
            f"{name} has layers of {', '.join(sorted(kinds - {'full_attention'})) or 'sliding_attention'}, "
            "which count on every token being there: a window would reach further back once some are gone, and a state "
            "would miss them. FastV is for full attention."
        )
    vision: Any = getattr(getattr(decoder.host, "config", None), "vision_config", None)
    deep = len(getattr(vision, "deepstack_visual_indexes", None) or ())
    if deep and (config.prune_at == "input" or config.layer < deep):
        raise InjectionError(
            f"{type(decoder.host).__name__} adds image features after each of its first {deep} layers; tokens can go "
            f"from layer {deep} on: FastVConfig(layer={deep})."
        )
    kind = str(getattr(options, "_attn_implementation", ""))
    if "flex" in kind or ("flash" in kind and needs_attention(config.selector)):
        raise UnsupportedAttentionError(
            f"The attention implementation {kind!r} does not show what selector={config.selector!r} needs. Call "
            "model.set_attn_implementation('sdpa'), whose kernels are as fast, or choose another selector (flash only)."
        )


def _tower(model: nn.Module, config: FastVConfig) -> FoundTower | None:
    if config.selector != "density":
        return None
    located = find_tower(model)
    groups = located.backbone.patch_groups_of(located.tower)
    if located.backbone.joined not in ("batch", "packed") and groups is None:
        raise InjectionError(
            f"selector='density' reads text off the pixels, and how the patches of {type(located.tower).__name__} "
            f"({located.backbone.name}) hold their pixels is not known. Choose another selector, e.g. 'attention'."
        )
    return located


def _statistics(config: FastVConfig, located: FoundTower | None) -> tuple[Any, Any] | None:
    if located is None:
        return None
    return image_statistics(located.backbone, located.tower, config.image_mean, config.image_std)


# -- hooks ------------------------------------------------------------------------------------------------------------


def _note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    state_of(module, FASTV).note(module, args, kwargs)


def _forget(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    state_of(module, FASTV).forget()


def _enter_decoder(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return enter_decoder(state_of(module, FASTV), module, args, kwargs)


def _enter_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return state_of(module, FASTV).enter_layer(attachment_of(module, FASTV).place, module, args, kwargs)


def _leave_layer(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return state_of(module, FASTV).leave_layer(attachment_of(module, FASTV).place, module, output)


def _pack(core: nn.Module, method: Callable[..., Any], called: dict[str, Any]) -> None:
    state_of(core, FASTV).pack(density_packer(core, method, called))
