"""The steps of an injection, shared by `inject_sfa` and the PEFT method (`sfa_adapters.peft_tuner`).

All checks come first (`plan_injection`), all changes after them (`prepare_tower`, `add_adapter`), so an error leaves
the model unchanged.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from sfa_adapters.attention_contract import head_count
from sfa_adapters.axial import check_heads
from sfa_adapters.config import SFAConfig
from sfa_adapters.errors import InjectionError, NoMatchingBackboneError
from sfa_adapters.hooks import state_of
from sfa_adapters.layer import (
    CHILD_NAME,
    SFALayer,
    attach_layer,
    detach_layer,
)
from sfa_adapters.registry import Geometry, registered_backbones
from sfa_adapters.scalars import execution_device
from sfa_adapters.signature import check_same_tower, one_or_each
from sfa_adapters.state_keys import plain_path
from sfa_adapters.tower import SFA, TowerState
from sfa_adapters.tower_hooks import hook_tower, unhook_idle_towers
from sfa_adapters.tower_search import FoundTower, find_tower

__all__ = [
    "LOAD_HOOK",
    "METHODS",
    "InjectionPlan",
    "all_or_nothing",
    "detach_all",
    "injected_layers",
    "note_head_counts",
    "plan_injection",
]

logger = logging.getLogger(__name__)

ORIGINAL_IMPLEMENTATION = "_sfa_attn_implementation"
# Set on a model by `state_fit` and by `beside_peft`, and removed with the last adapter.
LOAD_HOOK, METHODS = "_sfa_load_hook_id", frozenset({"save_pretrained", "load_adapter"})


@dataclass(frozen=True)
class InjectionPlan:
    """What an injection would do to a model.

    Attributes:
        located: The tower, and where it is in the model.
        geometry: Its grid and prefix.
        num_heads: Heads of each of its attention layers; they differ where heads were removed.
        layers: Indices of the layers that get a bias.
    """

    located: FoundTower
    geometry: Geometry
    num_heads: tuple[int, ...]
    layers: tuple[int, ...]

    @property
    def targets(self) -> list[tuple[int, str, nn.Module]]:
        """Index, path and module of the attention layers that get a bias."""
        return [(index, *self.located.attentions[index]) for index in self.layers]

    @property
    def tower_path(self) -> str | None:
        """Path of the tower without wrappers, saved with the adapter if the model has several towers; else None."""
        return plain_path(self.located.name) if self.located.several else None

    def signature(self) -> dict[str, Any]:
        """The signature of the tower, saved with the adapter and checked when it is loaded."""
        return {
            "backbone": self.located.backbone.name,
            "num_layers": len(self.located.attentions),
            "num_heads": one_or_each(self.num_heads),
            "prefix_tokens": self.geometry.prefix_tokens,
            "grid": list(self.geometry.grid) if self.geometry.grid else None,
        }


def plan_injection(model: nn.Module, config: SFAConfig, adapter_name: str = "default") -> InjectionPlan:
    """Finds the tower and checks the whole injection, without changing the model.

    Args:
        model: A tower or a host.
        config: The options.
        adapter_name: Name of the new adapter.

    Returns:
        The injection plan.

    Raises:
        NoMatchingBackboneError: No tower was found.
        UnsupportedAttentionError: The tower's attention cannot carry a bias.
        InjectionError: An option does not fit the tower, or the adapter name is taken.
        AdapterMismatchError: The configuration was saved with an adapter of another tower.
    """
    check_adapter_name(adapter_name)
    located = find_tower(model, config.tower_path)
    if located.backbone.check is not None:
        located.backbone.check(located.tower)
    heads = tuple(head_count(module, located.tower, name) for name, module in located.attentions)
    if located.backbone.wrap_attention is None:
        for _, module in located.attentions:  # one without a mask argument is refused before anything changes
            located.backbone.argument_of(module)
    geometry = located.backbone.geometry(located.tower)
    plan = InjectionPlan(located, geometry, heads, _choose_layers(located, config.layers_to_transform))
    if config.init == "axial" and config.tower is None:  # a saved adapter brings its values
        check_heads(config.init_heads, config.terms, plan.num_heads, plan.layers)
    for name, _, layer in injected_layers(model):
        elsewhere = bool(located.name) and not name.startswith(f"{located.name}.")
        if elsewhere and adapter_name in layer.configs:
            raise InjectionError(
                f"{layer.state.tower_name} has an SFA adapter named {adapter_name!r}: choose another adapter_name for "
                f"{located.name}, so that each is saved in a folder of its own."
            )
    for _, name, module in plan.targets:
        layer = getattr(module, CHILD_NAME, None)
        if isinstance(layer, SFALayer) and adapter_name in layer.configs:
            raise InjectionError(
                f"{name} already has an SFA adapter named {adapter_name!r}. Choose another adapter_name, or call "
                "eject_sfa(model) first."
            )
        if layer is not None and not isinstance(layer, SFALayer):
            raise InjectionError(f"{name} already has a child named {CHILD_NAME!r} of {type(layer).__name__}.")
    if config.tower is not None:
        check_same_tower(config.tower, plan.signature())
    for wanted in config.modules_to_save or []:
        # PEFT would copy the tower, with its hooks, and one of the two copies would get no gradient.
        inside = [name for _, name, _ in plan.targets if wanted in _names_of_parents(name)]
        if inside:
            raise InjectionError(
                f"modules_to_save={config.modules_to_save}: {wanted!r} holds {inside[0]}, which gets a bias; PEFT "
                "cannot copy a module that carries an adapter. Train it in place (requires_grad_(True)) and save it "
                "yourself, or name modules outside of the attention layers."
            )
    return plan


def _names_of_parents(path: str) -> set[str]:
    """All suffixes of the paths of a module and its parents, which PEFT compares modules_to_save with."""
    parts = path.split(".")
    return {".".join(parts[start:end]) for end in range(1, len(parts) + 1) for start in range(end)}


def check_adapter_name(name: Any) -> None:
    """Refuses names that a `ParameterDict` cannot hold.

    Raises:
        InjectionError: It is not a text, contains a dot, or is an attribute of `ParameterDict`.
    """
    if not isinstance(name, str) or "." in name or hasattr(nn.ParameterDict(), name):
        raise InjectionError(
            f"adapter_name={name!r} cannot name an adapter; use a text without dots that is no attribute of a "
            "ParameterDict, e.g. 'default'."
        )


def _choose_layers(located: FoundTower, wanted: list[int] | int | None) -> tuple[int, ...]:
    total, used = len(located.attentions), located.used_layers
    if wanted is None:
        return tuple(range(used))
    indices = [wanted] if isinstance(wanted, int) else list(wanted)
    wrong = [index for index in indices if isinstance(index, bool) or not -total <= index < total]
    if wrong or not indices:
        raise InjectionError(
            f"layers_to_transform={wanted} must name layers of the tower, 0..{total - 1} (or -{total}..-1); "
            f"wrong: {wrong}."
        )
    chosen = sorted({index % total for index in indices})
    if len(chosen) < len(indices):
        raise InjectionError(f"layers_to_transform={wanted} names a layer twice.")
    dead = [index for index in chosen if index >= used]
    if dead:
        raise InjectionError(
            f"layers_to_transform={wanted} names layer {dead[0]}, but the host reads only layers 0..{used - 1} "
            "(vision_feature_layer, or what this tower gives): a bias there would never get a gradient."
        )
    return tuple(chosen)


def note_head_counts(model: nn.Module) -> None:
    """Updates the head counts in the configurations of all adapters, after heads of a model with SFA were pruned."""
    by_tower: dict[str, list[SFALayer]] = {}
    for _, _, layer in injected_layers(model):
        by_tower.setdefault(layer.state.tower_name, []).append(layer)
    for path, layers in by_tower.items():
        _note_head_counts(model, path if len(by_tower) > 1 else None, layers)


def _note_head_counts(model: nn.Module, path: str | None, layers: list[SFALayer]) -> None:
    try:
        located = find_tower(model, path)
        attentions = enumerate(located.attentions)
        counts = {number: head_count(module, located.tower) for number, (_, module) in attentions}
    except NoMatchingBackboneError:  # a part of a tower
        counts = {layer.index: layer.num_heads for layer in layers}
    for config in (config for layer in layers for config in layer.configs.values()):
        if config.tower is not None:
            saved_counts = config.tower["num_heads"]
            heads: list[int] = (
                [saved_counts] * config.tower["num_layers"] if isinstance(saved_counts, int) else saved_counts
            )
            heads = [counts.get(number, count) for number, count in enumerate(heads)]
            config.tower = {**config.tower, "num_heads": one_or_each(heads)}


def prepare_tower(plan: InjectionPlan) -> TowerState:
    """Attaches the shared state to the tower, once, and moves it from flash attention, which drops masks, to sdpa."""
    located = plan.located
    tower = located.tower
    if (there := state_of(tower, SFA)) is not None:
        return there
    state = TowerState(located.backbone, plan.geometry, located.name)
    implementation = getattr(getattr(tower, "config", None), "_attn_implementation", None)
    if isinstance(implementation, str) and "flash" in implementation:
        logger.warning(
            "%s ran on %s, which takes no bias; it is moved to sdpa, where the folded bias uses the same flash kernel.",
            located.name or type(tower).__name__,
            implementation,
        )
        tower.set_attn_implementation("sdpa")  # pyright: ignore[reportCallIssue]
        tower.__dict__[ORIGINAL_IMPLEMENTATION] = implementation
    above = len(located.name) + 1 if located.name else 0
    hook_tower(tower, [name[above:] for name, _ in located.attentions], state)
    return state


def wrap_targets(model: nn.Module, plan: InjectionPlan) -> InjectionPlan:
    """Replaces attention modules without a mask argument by wrappers that have one; returns the plan for these."""
    wrap = plan.located.backbone.wrap_attention
    if wrap is None:
        return plan
    for _, name, module in plan.targets:
        wrapped = wrap(module)
        if wrapped is not module:
            model.set_submodule(name, wrapped)
    return InjectionPlan(find_tower(model, plan.located.name), plan.geometry, plan.num_heads, plan.layers)


def add_adapter(
    attention: nn.Module, index: int, name: str, plan: InjectionPlan, state: TowerState, config: SFAConfig, adapter: str
) -> SFALayer:
    """Adds one adapter to one attention module; returns its SFA layer."""
    layer = getattr(attention, CHILD_NAME, None)
    if layer is None:
        layer = SFALayer(plan.num_heads[index], index, name, state)
        layer.train(attention.training)
        attach_layer(attention, layer)
    layer.update_layer(adapter, config, len(plan.layers), execution_device(attention))
    return layer


def injected_layers(model: nn.Module) -> list[tuple[str, nn.Module, SFALayer]]:
    """Path, attention module and SFA layer of every adapted layer of a model, in order."""
    children = [(name, module, module._modules.get(CHILD_NAME)) for name, module in model.named_modules()]
    return [(name, module, layer) for name, module, layer in children if isinstance(layer, SFALayer)]


def detach_all(model: nn.Module, adapter_name: str | None = None) -> None:
    """Removes one adapter, or all of them; after the last one also all hooks and state of SFA."""
    for _, attention, layer in injected_layers(model):
        if adapter_name is not None and set(layer.configs) - {adapter_name}:
            if adapter_name in layer.configs:
                layer.delete_adapter(adapter_name)
            continue
        detach_layer(attention)
    # Wrappers without an SFA layer: of the layers just removed, and those that an error left before they got one.
    for unwrap in [record.unwrap_attention for record in registered_backbones().values() if record.unwrap_attention]:
        for name, module in list(model.named_modules()):
            original = unwrap(module) if name and CHILD_NAME not in module._modules else module
            if original is not module:
                model.set_submodule(name, original)
    for module in unhook_idle_towers(model):
        implementation = module.__dict__.pop(ORIGINAL_IMPLEMENTATION, None)
        if implementation is not None:
            module.set_attn_implementation(implementation)  # pyright: ignore[reportCallIssue]
    for module in [] if injected_layers(model) else model.modules():
        if LOAD_HOOK in module.__dict__:
            module._load_state_dict_pre_hooks.pop(module.__dict__.pop(LOAD_HOOK), None)
        for method in METHODS:
            if getattr(module.__dict__.get(method), "belongs_to_sfa", False):
                del module.__dict__[method]


@contextmanager
def all_or_nothing(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Context that removes a half-added adapter on any error; others stay as active and as trainable as before."""
    active = [(layer, layer._active_adapter) for _, _, layer in injected_layers(model)]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for layer, names in active:
            layer._active_adapter = names
        detach_all(model, adapter_name)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        raise
