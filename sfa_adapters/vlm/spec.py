"""`VLMSpec`: what the library must know about one kind of vision-language model, in one record.

Where its parts are, the options of its processor, which image tokens the patches become, and which features it refuses,
with the reason. What can be read from a live model is read; a record names it where reading it would go wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from torch import nn

from sfa_adapters.errors import RecipeError
from sfa_adapters.vlm.page import Page
from sfa_adapters.vlm.places import Places, read_places
from sfa_adapters.vlm.sizes import MemoryRules

__all__ = ["FEATURES", "Feature", "ImageRules", "ImageTokens", "VLMSpec"]

# What a record may refuse. "train" is all that recipes do: images, training, evaluation. "text_density" is the density
# of text as evidence for the grounding term of SCR.
Feature = Literal["train", "adat", "dymu", "fastv", "heads", "text_density", "memory"]
FEATURES: tuple[Feature, ...] = ("train", "adat", "dymu", "fastv", "heads", "text_density", "memory")


def _no_options(processor: Any, limit: int) -> dict[str, Any]:
    return {}


def _unchanged(image: np.ndarray, processor: Any, limit: int) -> Page:
    return Page.unchanged(image)


@dataclass(frozen=True, kw_only=True)
class ImageRules:
    """How images are prepared for a host's processor, and the options of that processor.

    Attributes:
        setting: The setting of a recipe that limits an image: the most tiles that it is cut into, its most pixels, or
            None where every image becomes one picture of the same size.
        options: Options of the image processor, from it and the limit. May raise a `RecipeError`.
        page: The image that the processor gets, from uint8 `[H, W, 3]`, the image processor and the limit.
        token_grids: Rows and columns of image tokens of each page, from a batch and the processor, where pages have a
            grid each and the batch has no `image_grid_thw`.
    """

    setting: Literal["max_tiles", "max_pixels"] | None = None
    options: Callable[[Any, int], dict[str, Any]] = _no_options
    page: Callable[[np.ndarray, Any, int], Page] = _unchanged
    token_grids: Callable[[Mapping[str, Any], Any], list[tuple[int, int]]] | None = None


def _one(config: Any) -> int:
    return 1


@dataclass(frozen=True, kw_only=True)
class ImageTokens:
    """How the tokens of the tower become image tokens of the language model.

    Attributes:
        kind: "patches": one image token per patch. "packed_tiles": the same, with tiles `[B, tiles, 3, H, W]` packed
            into a page by the host's `pack_image_features`, and newline tokens. "pixel_shuffle": one per `side` x
            `side` patches, with joined channels or their mean. "merged_groups": the same, in a tower that permutes one
            sequence by windows.
        side: Patches along one side of an image token, from the configuration.
        page_first: Whether the tokens of the whole page are before those of its tiles, not behind them.
        apart: Whether text stands between the tiles of a page.
    """

    kind: Literal["patches", "packed_tiles", "pixel_shuffle", "merged_groups"]
    side: Callable[[Any], int] = _one
    page_first: bool = False
    apart: bool = False


@dataclass(frozen=True, kw_only=True)
class VLMSpec:
    """The record of one kind of vision-language model.

    All parts are full module names; those left out are read from the model.

    Attributes:
        name: Unique name, `family` in recipes and in what is saved.
        title: Its name in messages.
        model_type: `model_type` in the configuration of such a checkpoint.
        model_class: Its class in `transformers`, which `AutoModelForImageTextToText` builds.
        classes: Patterns over `module.Class`, as in `fnmatch`, of the model and of the core inside that joins tower
            and language model.
        tower: The vision tower.
        projector: The modules between tower and language model; one may lie inside the tower, or be a parameter.
        language_model: The language model without its head.
        lm_head: The head.
        layer_classes: Classes of the tower's and the language model's layers, for wrapping and checkpointing.
        unread: Children of the tower that the host never reads, because it takes the hidden states before them. A
            parameter there gets no gradient, so it must not train.
        unused: Modules that images never reach, such as a tower for audio. They stay frozen and out of 4-bit.
        joins_in_own_dtype: Whether the core casts image features to the dtype of its first weight, not to that of the
            text, so that a tower in float32 needs embeddings in float32.
        images: How images are prepared; None where that is not written, so that only adapters can be used.
        image_tokens: How patches become image tokens; None where it is not known.
        memory: Rules to predict memory; None where they are not known.
        nano: Builds a small model of this kind with its processor, for `--nano` and the contract suite.
        nano_settings: Settings of a recipe on it that differ from those of the other small models.
        refuses: Features that do not work with this kind of model -> why, and what to do instead.
    """

    name: str
    title: str
    model_type: str
    model_class: str
    classes: tuple[str, ...]
    tower: str | None = None
    projector: tuple[str, ...] | None = None
    language_model: str | None = None
    lm_head: str | None = None
    layer_classes: tuple[str, ...] | None = None
    unread: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    joins_in_own_dtype: bool = False
    images: ImageRules | None = None
    image_tokens: ImageTokens | None = None
    memory: MemoryRules | None = None
    nano: Callable[[], tuple[Any, Any]] | None = None
    nano_settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    refuses: Mapping[Feature, str] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def family(self) -> str:
        """The name, as recipes call it."""
        return self.name

    def refusal(self, feature: Feature) -> str | None:
        """Why a feature does not work with this kind of model, in one line; None where it does.

        Args:
            feature: The feature.
        """
        reason = self.refuses.get(feature)
        if reason is None and feature == "train" and self.images is None:
            reason = "its record has no rules for images."
        if reason is None and feature == "memory" and self.memory is None:
            reason = "its record has no rules for memory."
        if reason is None and feature == "dymu" and self.image_tokens is None:
            reason = "its record does not say which image tokens the patches become."
        return None if reason is None else f"{self.title}: {reason}"

    def require(self, feature: Feature) -> None:
        """Raises where a feature does not work with this kind of model.

        Args:
            feature: The feature.

        Raises:
            RecipeError: It does not; gives the reason of the record.
        """
        reason = self.refusal(feature)
        if reason is not None:
            raise RecipeError(reason)

    def places(self, model: nn.Module) -> Places:
        """Finds the parts of a model of this kind, and checks those that the record names.

        Args:
            model: The model, on any device, with adapters or without.

        Raises:
            RecipeError: It is of another class, a part is missing, or a parameter lies in no part.
        """
        kind = type(model).__name__.removeprefix("FSDP")
        if kind != self.model_class:
            raise RecipeError(f"family={self.name!r} is {self.model_class}, but the model is a {kind}.")
        names = ("tower", "projector", "language_model", "lm_head", "layer_classes", "unread", "unused")
        return read_places(model, {name: getattr(self, name) for name in names})
