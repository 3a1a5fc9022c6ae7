"""`find_tower`: the vision tower of a model, or the reason why there is none that a record fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from sfa_adapters.class_names import qualified_name
from sfa_adapters.errors import InjectionError, NoMatchingBackboneError
from sfa_adapters.hooks import state_of
from sfa_adapters.read_layers import count_read_layers
from sfa_adapters.refusals import refusal_of
from sfa_adapters.registry import Backbone, registered_backbones

__all__ = ["FoundTower", "find_tower", "tower_paths"]


@dataclass(frozen=True)
class FoundTower:
    """A tower inside a model.

    Attributes:
        name: Its path in the model, "" for the model itself.
        tower: The tower.
        backbone: Its record.
        attentions: Its attention modules in order of execution, by path in the model.
        used_layers: How many of them the host really reads, counted from the first.
        several: Whether the model has more towers than this one.
    """

    name: str
    tower: nn.Module
    backbone: Backbone
    attentions: tuple[tuple[str, nn.Module], ...]
    used_layers: int
    several: bool = False


def find_tower(model: nn.Module, path: str | None = None) -> FoundTower:
    """Finds the vision tower of a model; text towers are left alone.

    Args:
        model: A tower, or a host with one or several.
        path: Path of the tower in the model, for hosts with several. By default the only one, or the only one that
            carries SFA already.

    Raises:
        NoMatchingBackboneError: No registered backbone fits; says why where the model is known to carry no bias, else
            lists the attention modules that were seen.
        InjectionError: Several towers fit, or none at the path.
    """
    backbones = registered_backbones()
    towers = _towers_of(model, backbones)
    if not towers:
        raise NoMatchingBackboneError(_nothing_found(model, backbones))
    name, tower, backbone = _choose_tower(model, towers, path)
    prefix = f"{name}." if name else ""
    attentions = tuple((prefix + path, module) for path, module in backbone.attentions_of(tower))
    if not attentions:
        raise NoMatchingBackboneError(
            f"{name or type(model).__name__} is a {backbone.name} tower, but none of its modules is one of "
            f"{list(backbone.attentions)}.\n{_nothing_found(tower, backbones)}"
        )
    used = min(count_read_layers(model, name, len(attentions)), len(attentions) - backbone.unread_layers)
    return FoundTower(name, tower, backbone, attentions, used, several=len(towers) > 1)


def tower_paths(model: nn.Module) -> list[str]:
    """Paths of the vision towers of a model that are known, "" for the model itself."""
    return [name for name, _, _ in _towers_of(model, registered_backbones())]


def _towers_of(model: nn.Module, backbones: Mapping[str, Backbone]) -> list[tuple[str, nn.Module, Backbone]]:
    """Path, module and record of each tower; a tower inside another one is a part of it."""
    towers: list[tuple[str, nn.Module, Backbone]] = []
    for name, module in model.named_modules():
        if any(not outer or name.startswith(outer + ".") for outer, _, _ in towers):
            continue
        backbone = next((record for record in backbones.values() if record.is_tower(module)), None)
        if backbone is not None:
            towers.append((name, module, backbone))
    return towers


def _choose_tower(
    model: nn.Module, towers: list[tuple[str, nn.Module, Backbone]], path: str | None
) -> tuple[str, nn.Module, Backbone]:
    names = ", ".join(f"{name or '(the model)'} ({record.name})" for name, _, record in towers)
    if path is not None:
        # A PeftModel puts names of its own in front of the paths of the model that it wraps.
        fitting = [entry for entry in towers if entry[0] == path or entry[0].endswith(f".{path}")]
        if len(fitting) != 1:
            raise InjectionError(
                f"tower={path!r} is not the path of a vision tower of {type(model).__name__}; its towers: {names}."
            )
        return fitting[0]
    if len(towers) > 1:
        adapted = [entry for entry in towers if state_of(entry[1], "sfa") is not None]
        if len(adapted) != 1:
            raise InjectionError(
                f"{type(model).__name__} has several vision towers{', all with SFA' if adapted else ''}: {names}. Say "
                f"which one is meant, e.g. inject_sfa(model, tower={towers[0][0]!r}), describe(model, tower=...) or "
                "SFAConfig(tower_path=...); inject_sfa(model, tower='all') takes all of them. Elsewhere pass the tower "
                "itself."
            )
        return adapted[0]
    return towers[0]


def _nothing_found(model: nn.Module, backbones: Mapping[str, Backbone]) -> str:
    known = refusal_of(model)
    if known is not None:
        return f"No registered backbone fits {type(model).__name__}. {known}"
    seen: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if "attention" in type(module).__name__.lower() or "attn" in name.rpartition(".")[2].lower():
            seen.setdefault(qualified_name(module), []).append(name)
    lines = [f"  {kind}: {len(names)} modules, e.g. {names[0]}" for kind, names in seen.items()] or ["  none"]
    return (
        f"No registered backbone fits {type(model).__name__}. Registered: {', '.join(sorted(backbones)) or 'none'}.\n"
        "Attention modules in the model:\n" + "\n".join(lines) + "\nTo add a tower, describe it in a "
        "sfa_adapters.registry.Backbone and pass that to register_backbone (see docs/adding_a_backbone.md)."
    )
