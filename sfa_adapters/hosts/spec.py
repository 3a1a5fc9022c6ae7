"""`HostSpec`: where the parts of a host family are, as `transformers` names them; checked against the live model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from sfa_adapters.errors import RecipeError
from sfa_adapters.hosts.recipe import Family
from sfa_adapters.layer import CHILD_NAME

__all__ = ["HOSTS", "HostSpec", "Part", "check_spec"]

Part = Literal["sfa", "lora", "vision", "projector", "llm"]


@dataclass(frozen=True)
class HostSpec:
    """Where a family of hosts keeps its parts; all names are full module names.

    Attributes:
        family: The family.
        model_type: What the configuration of such a checkpoint says.
        model_class: Its class in `transformers`.
        tower: The vision tower.
        projector: What stands between tower and language model; may lie inside the tower, or be a parameter.
        language_model: The language model without its head.
        lm_head: The head.
        layer_classes: Classes of the tower's and the language model's layers, for wrapping and checkpointing.
        unread: Children of the tower that the host never reads, because it takes the hidden states before them. A
            parameter there gets no gradient, so it must not train.
    """

    family: Family
    model_type: str
    model_class: str
    tower: str
    projector: tuple[str, ...]
    language_model: str
    lm_head: str
    layer_classes: tuple[str, ...]
    unread: tuple[str, ...] = ()

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
        if _inside(name, self.language_model, self.lm_head):
            return "llm"
        raise RecipeError(f"{name!r} is in no part of {self.model_class}: {', '.join(self.places)}.")

    @property
    def places(self) -> tuple[str, ...]:
        """Tower, projector, language model and head, by name; with them every parameter is covered."""
        return (self.tower, *self.projector, self.language_model, self.lm_head)


def _inside(name: str, *places: str) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


HOSTS: Mapping[Family, HostSpec] = {
    "internvl": HostSpec(
        family="internvl",
        model_type="internvl",
        model_class="InternVLForConditionalGeneration",
        tower="model.vision_tower",
        projector=("model.multi_modal_projector",),
        language_model="model.language_model",
        lm_head="lm_head",
        layer_classes=("InternVLVisionLayer", "Qwen3DecoderLayer"),
    ),
    "llava_onevision": HostSpec(
        family="llava_onevision",
        model_type="llava_onevision",
        model_class="LlavaOnevisionForConditionalGeneration",
        tower="model.vision_tower",
        # The token that ends a row of tiles is a bare parameter of the model.
        projector=("model.multi_modal_projector", "model.image_newline"),
        language_model="model.language_model",
        lm_head="lm_head",
        layer_classes=("SiglipEncoderLayer", "Qwen2DecoderLayer"),
        unread=("post_layernorm", "head"),
    ),
    "llava": HostSpec(
        family="llava",
        model_type="llava",
        model_class="LlavaForConditionalGeneration",
        tower="model.vision_tower",
        projector=("model.multi_modal_projector",),
        language_model="model.language_model",
        lm_head="lm_head",
        layer_classes=("CLIPEncoderLayer", "LlamaDecoderLayer"),
        unread=("post_layernorm", "head"),
    ),
    "qwen2_5_vl": HostSpec(
        family="qwen2_5_vl",
        model_type="qwen2_5_vl",
        model_class="Qwen2_5_VLForConditionalGeneration",
        tower="model.visual",
        projector=("model.visual.merger",),
        language_model="model.language_model",
        lm_head="lm_head",
        layer_classes=("Qwen2_5_VLVisionBlock", "Qwen2_5_VLDecoderLayer"),
    ),
}


def check_spec(model: nn.Module, spec: HostSpec) -> None:
    """Checks class and names of a model, built or on the meta device, against its family.

    Raises:
        RecipeError: It is of another class, a part is missing, or a parameter lies in no part; names what was found.
    """
    found = type(model).__name__
    if found != spec.model_class:
        raise RecipeError(f"family={spec.family!r} is {spec.model_class}, but the model is a {found}.")
    missing = [place for place in spec.places if not _has(model, place)]
    if missing:
        children = [name for name, _ in model.named_modules() if 0 < name.count(".") + bool(name) <= 2]
        raise RecipeError(f"{found} has no {', '.join(missing)}; it has {', '.join(children)}.")
    for name, _ in model.named_parameters(remove_duplicate=False):
        spec.part_of(name)


def _has(model: nn.Module, place: str) -> bool:
    parent, _, leaf = place.rpartition(".")
    try:
        value = getattr(model.get_submodule(parent), leaf, None)
    except AttributeError:
        return False
    return isinstance(value, nn.Module | torch.Tensor)
