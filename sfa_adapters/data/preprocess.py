"""Prepares an image for the host's own processor, and makes the options of that processor.

The rules are in the record of the host (`sfa_adapters.vlm.spec.ImageRules`); here the limits of a recipe are applied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sfa_adapters.errors import RecipeError
from sfa_adapters.vlm.page import Page
from sfa_adapters.vlm.spec import ImageRules, VLMSpec

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from sfa_adapters.hosts.recipe import Recipe

__all__ = ["Page", "page_of", "processor_options"]


def processor_options(processor: ProcessorMixin, spec: VLMSpec, recipe: Recipe) -> dict[str, Any]:
    """Makes the options of the host's image processor from the recipe.

    Args:
        processor: The host's processor.
        spec: The record of the host.
        recipe: The recipe; `max_tiles` or `max_pixels` is used.

    Returns:
        Keyword arguments of the image processor.

    Raises:
        RecipeError: The processor cannot keep to `max_tiles` or `max_pixels`, or the record has no rules for images.
    """
    image_processor: Any = getattr(processor, "image_processor", None)
    if image_processor is None:
        raise RecipeError(f"{type(processor).__name__} has no image processor; load it from the host.")
    return _rules(spec).options(image_processor, recipe.image_limit)


def page_of(image: np.ndarray, processor: Any, spec: VLMSpec, recipe: Recipe) -> Page:
    """Prepares an image for the host's processor.

    Args:
        image: uint8 `[H, W, 3]`.
        processor: The host's processor.
        spec: The record of the host.
        recipe: The recipe; `max_tiles` or `max_pixels` is used.

    Returns:
        The prepared image, with the mapping of boxes onto it.

    Raises:
        RecipeError: The record has no rules for images.
    """
    return _rules(spec).page(image, processor.image_processor, recipe.image_limit)


def _rules(spec: VLMSpec) -> ImageRules:
    spec.require("train")
    assert spec.images is not None
    return spec.images
