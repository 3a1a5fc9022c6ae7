"""`Places`: where the parts of a live vision-language model are, by full module name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from sfa_adapters.errors import RecipeError, SFAError
from sfa_adapters.layer import CHILD_NAME
from sfa_adapters.tower_search import find_tower
from sfa_adapters.vlm.parts import find_decoder

__all__ = ["Part", "Places", "read_places"]

Part = Literal["sfa", "lora", "vision", "projector", "llm"]


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the parts of a model are; all names are full module names.

    Attributes:
        model_class: Class name of the model.
        tower: The vision tower.
        projector: The modules between tower and language model; one may lie inside the tower, or be a parameter.
        language_model: The language model without its head.
        lm_head: The head.
        layer_classes: Classes of the tower's and the language model's layers, for wrapping and checkpointing.
        unread: Children of the tower that the host never reads.
        unused: Modules that images never reach, such as a tower for audio. They belong to the language model's part,
            and neither train nor go into 4-bit.
    """

    model_class: str
    tower: str
    projector: tuple[str, ...]
    language_model: str
    lm_head: str
    layer_classes: tuple[str, ...]
    unread: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        """Tower, projector, language model, head and what is beside them, by name; every parameter is covered."""
        return (self.tower, *self.projector, self.language_model, self.lm_head, *self.unused)

    def is_unused(self, name: str) -> bool:
        """Whether a parameter or a module lies where images never come, by its full name."""
        return _inside(name.removeprefix("module."), *self.unused)

    def part_of(self, name: str) -> Part:
        """Which part a parameter or a module belongs to, by its full name.

        Args:
            name: As `named_parameters` or `named_modules` give it; prefixes of wrappers (`module.`) are skipped.

        Raises:
            RecipeError: The name is in none of the parts, e.g. a module that holds several of them.
        """
        name = name.removeprefix("module.")
        segments = name.split(".")
        if CHILD_NAME in segments:
            return "sfa"
        if any(segment.startswith("lora_") for segment in segments):
            return "lora"
        # The projector first: Qwen's merger is a child of the tower.
        if _inside(name, *self.projector):
            return "projector"
        if _inside(name, self.tower):
            return "vision"
        if _inside(name, self.language_model, self.lm_head, *self.unused):
            return "llm"
        raise RecipeError(f"{name!r} is in no part of {self.model_class}: {', '.join(self.all)}.")


def read_places(model: nn.Module, known: Mapping[str, Any]) -> Places:
    """Finds the parts of a model, on any device; those that a record names are checked instead.

    Args:
        model: A vision-language model of transformers with a head.
        known: Fields of `Places` that a record names; None for those that it leaves to the model.

    Raises:
        RecipeError: A part is missing, or a parameter lies in no part; names what there is.
    """
    kind = type(model).__name__
    named = {name: value for name, value in known.items() if value is not None}
    parts = ("tower", "projector", "language_model", "lm_head")
    # A checkpoint may come without them, as the larger ones of Gemma 4 come without the tower for audio.
    unused = tuple(place for place in named.get("unused", ()) if _has(model, place))
    _check_there(model, [p for name in parts if name in named for p in _tuple(named[name])])
    try:
        tower = named.get("tower") or find_tower(model).name
        language_model = named.get("language_model") or _path_of(model, find_decoder(model).module)
    except SFAError as error:
        raise RecipeError(f"{kind} is no vision-language model that this library can take apart: {error}") from error
    head: Any = model
    lm_head = named.get("lm_head") or _path_of(model, head.get_output_embeddings())
    projector = named.get("projector") or _between(model, (tower, language_model, lm_head, *unused))
    layers = named.get("layer_classes") or _layer_classes(model, tower)
    read = Places(
        model_class=kind,
        tower=tower,
        projector=tuple(projector),
        language_model=language_model,
        lm_head=lm_head,
        layer_classes=tuple(layers),
        unread=tuple(named.get("unread", ())),
        unused=unused,
    )
    for name, _ in model.named_parameters(remove_duplicate=False):
        read.part_of(name)
    return read


def _tuple(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _check_there(model: nn.Module, places: list[str]) -> None:
    missing = [place for place in places if not _has(model, place)]
    if missing:
        children = [name for name, _ in model.named_modules() if 0 < name.count(".") + bool(name) <= 2]
        raise RecipeError(f"{type(model).__name__} has no {', '.join(missing)}; it has {', '.join(children)}.")


def _has(model: nn.Module, place: str) -> bool:
    parent, _, leaf = place.rpartition(".")
    try:
        value = getattr(model.get_submodule(parent), leaf, None)
    except AttributeError:
        return False
    return isinstance(value, nn.Module | torch.Tensor)


def _path_of(model: nn.Module, module: nn.Module | None) -> str:
    path = next((name for name, child in model.named_modules() if child is module), None)
    if not path:
        raise RecipeError(f"{type(model).__name__} has no head for words; it is no model that answers.")
    return path


def _between(model: nn.Module, others: tuple[str, ...]) -> tuple[str, ...]:
    """The largest modules (or bare parameters) that hold parameters and nothing of the other parts."""
    parts: dict[str, None] = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        if _inside(name, *others):
            continue
        segments = name.split(".")
        prefixes = [".".join(segments[:depth]) for depth in range(1, len(segments) + 1)]
        parts[next(p for p in prefixes if not any(_inside(other, p) for other in others))] = None
    return tuple(parts)


def _layer_classes(model: nn.Module, tower: str) -> tuple[str, ...]:
    attentions = [name for name, _ in find_tower(model, tower).attentions]
    layers = [model.get_submodule(name.rpartition(".")[0]) for name in attentions] + list(find_decoder(model).layers)
    return tuple(dict.fromkeys(type(layer).__name__ for layer in layers))


def _inside(name: str, *places: str) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)
