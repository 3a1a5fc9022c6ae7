"""`inject_adat` and `eject_adat`: adaptive tokens for the vision tower of a model, in place."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sfa_adapters.adat.embed import LargePatchResidual, PatchEmbedder
from sfa_adapters.adat.plan import PatchPlan
from sfa_adapters.adat.policy import PatchPolicy
from sfa_adapters.adat.tokenizer import (
    ADAT,
    RESIDUAL_NAME,
    AdaptiveTokenizer,
    AdatState,
    attended_hook,
    attention_hook,
    exchange_hook,
    lay_out_hook,
    tower_hook,
)
from sfa_adapters.errors import InjectionError
from sfa_adapters.forward_hooks import watch_forwards
from sfa_adapters.hooks import attach, detach_all, features_of, state_of
from sfa_adapters.mask_argument import attach_to_attention
from sfa_adapters.tower_input import watch_input
from sfa_adapters.tower_search import FoundTower, find_tower
from sfa_adapters.vlm.records import check_allowed

__all__ = ["eject_adat", "inject_adat", "latest_plans", "token_padding"]

Model = TypeVar("Model", bound=nn.Module)


def inject_adat(model: Model, tokenizer: AdaptiveTokenizer | PatchPolicy | None = None) -> Model:
    """Makes the vision tower of a model use small patches where the text is and large ones where the page is empty.

    Works with SFA injected before or after, whose bias then uses the places of the adaptive tokens. Parameters are only
    added by `AdaptiveTokenizer(residual=True)`.

    Args:
        model: A tower, or a vision-language model with one.
        tokenizer: How images are cut into patches; a policy stands for `AdaptiveTokenizer(policy=policy)`.

    Returns:
        The same model.

    Raises:
        NoMatchingBackboneError: No tower was found.
        InjectionError: The tower cannot take adaptive tokens, has some already, or an option does not fit.

    Example:
        >>> from transformers import SiglipVisionConfig, SiglipVisionModel
        >>> tower = SiglipVisionModel(SiglipVisionConfig(num_hidden_layers=2, vision_use_head=False))
        >>> _ = inject_adat(tower, PatchPolicy(scorer="edges", budget=0.5))
    """
    if isinstance(tokenizer, PatchPolicy):
        tokenizer = AdaptiveTokenizer(policy=tokenizer)
    tokenizer = tokenizer or AdaptiveTokenizer()
    check_allowed(model, "adat", InjectionError)
    located = find_tower(model)
    _check(located, tokenizer)
    tower, seam = located.tower, located.backbone.patches
    assert seam is not None
    projection: Any = tower.get_submodule(seam.projection)
    geometry = located.backbone.geometry(tower)
    assert geometry.grid is not None
    state = AdatState(
        tower,
        tokenizer,
        located.backbone,
        seam,
        geometry.prefix_tokens,
        geometry.grid,
        PatchEmbedder(projection),
    )
    if tokenizer.residual:
        width, weight = projection.out_channels, projection.weight
        tower.add_module(RESIDUAL_NAME, LargePatchResidual(width, weight.device, weight.dtype))
    above = len(located.name) + 1 if located.name else 0
    watch_forwards(tower, [name[above:] for name, _ in located.attentions], ADAT, state)
    watch_input(tower, located.backbone, ADAT, state, seam.images)
    attach(tower.get_submodule(seam.tokens_in), ADAT, state, pre=exchange_hook)
    for _, attention in located.attentions:
        attach_to_attention(
            attention, ADAT, state, located.backbone.argument_of(attention).name, attention_hook, attended_hook
        )
    attach(tower.get_submodule(seam.tokens_out), ADAT, state, post=lay_out_hook)
    if tower is not tower.get_submodule(seam.tokens_out):
        attach(tower, ADAT, state, post=tower_hook)
    return model


def _check(located: FoundTower, tokenizer: AdaptiveTokenizer) -> None:
    tower, backbone, seam = located.tower, located.backbone, located.backbone.patches
    where = located.name or type(tower).__name__
    if seam is None:
        raise InjectionError(
            f"{where} is a {backbone.name} tower; adaptive tokens need a fixed grid with absolute position embeddings. "
            "For Qwen2.5-VL there is drop_blank_groups."
        )
    if ADAT in features_of(tower):
        raise InjectionError(f"{where} has adaptive tokens already; call eject_adat(model) first.")
    if seam.check is not None:
        seam.check(tower)
    projection: Any = tower.get_submodule(seam.projection)
    sizes = {*projection.kernel_size, *projection.stride}
    if len(sizes) != 1 or any(projection.padding if isinstance(projection.padding, tuple) else ()):
        raise InjectionError(
            f"{where} embeds patches of {projection.kernel_size} px at steps of {projection.stride}; adaptive tokens "
            "need square patches that do not overlap."
        )
    if tokenizer.output == "tokens" and seam.pools is not None and seam.pools(tower):
        raise InjectionError(
            f"{where} pools over all tokens, and would pool over padding with output='tokens'. Use output='grid', or "
            "build the tower without its pooling head."
        )


def eject_adat(model: Model) -> Model:
    """Removes adaptive tokens from a model, which is then as it was, bit for bit.

    Args:
        model: What `inject_adat` was called on, or a part of it that holds the tower.

    Returns:
        The same model.

    Raises:
        InjectionError: The model has no adaptive tokens.
    """
    tower = _state(model).tower
    detach_all(tower, ADAT)
    if (sfa := state_of(tower, "sfa")) is not None:
        sfa.packing = None
    if RESIDUAL_NAME in tower._modules:
        delattr(tower, RESIDUAL_NAME)
    return model


def _state(model: nn.Module) -> AdatState:
    state: AdatState | None = features_of(model).get(ADAT)
    if state is None:
        raise InjectionError(f"{type(model).__name__} has no adaptive tokens; call inject_adat(model) first.")
    return state


def latest_plans(model: nn.Module) -> tuple[PatchPlan, ...]:
    """The patch plans of the latest forward, one per image: counts, boxes and levels of the tokens.

    Args:
        model: A model with adaptive tokens.

    Raises:
        InjectionError: The model has no adaptive tokens, or has not seen an image yet.
    """
    plans = _state(model).plans
    if not plans:
        raise InjectionError(f"{type(model).__name__} has not seen an image since inject_adat.")
    return plans


def token_padding(model: nn.Module) -> Tensor:
    """Where the latest output of a tower with `output="tokens"` is padding, bool `[batch, prefix + longest]`.

    Args:
        model: A model with adaptive tokens.

    Raises:
        InjectionError: As `latest_plans`.
    """
    prefix = _state(model).prefix_tokens
    lengths = torch.tensor([prefix + plan.num_tokens for plan in latest_plans(model)])
    return torch.arange(int(lengths.max())) >= lengths[:, None]
