"""Finds the parts of a live vision-language model that several packages need.

The model inside PEFT, its language model, its image token ids, and the arguments of its forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from sfa_adapters.compat import plain_model
from sfa_adapters.errors import InjectionError

__all__ = [
    "ID_NAMES",
    "Decoder",
    "find_decoder",
    "forward_names",
    "image_token_ids",
    "image_token_side",
    "plain_model",
    "still_image_id",
]

STILL_NAMES = ("image_token_id", "image_token_index")
ID_NAMES = (*STILL_NAMES, "video_token_id", "video_token_index")


@dataclass(frozen=True, eq=False)
class Decoder:
    """The language model of a host.

    Attributes:
        module: The language model; its forward takes `inputs_embeds` and a cache.
        layers: Its decoder layers in order of execution.
        outer: The modules around it, outermost first; some of them see the ids of a prompt, labels or pixels.
        host: The model of transformers, without wrappers of PEFT.
    """

    module: nn.Module
    layers: tuple[nn.Module, ...]
    outer: tuple[nn.Module, ...]
    host: nn.Module


def find_decoder(model: nn.Module) -> Decoder:
    """Finds the language model of a vision-language model.

    Args:
        model: A host of transformers, also inside a `PeftModel`.

    Returns:
        The language model and what is around it.

    Raises:
        InjectionError: There is none with a list of decoder layers.
    """
    host: Any = plain_model(model)
    module = host.get_decoder() if hasattr(host, "get_decoder") else None
    layers: Any = getattr(module, "layers", None)
    if module is None or module is host or not isinstance(layers, nn.ModuleList) or not len(layers):
        raise InjectionError(
            f"{type(host).__name__} has no language model with decoder layers behind a vision tower. Pass a "
            "vision-language model of transformers, such as LlavaForConditionalGeneration."
        )
    path = next(name for name, child in model.named_modules() if child is module)
    parts = path.split(".")
    outer = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
    return Decoder(module, tuple(layers), tuple(outer), host)


def image_token_ids(model: nn.Module) -> tuple[int, ...]:
    """The placeholder ids of images and videos that a host's configuration names.

    Args:
        model: A host, also inside a `PeftModel`.

    Raises:
        InjectionError: It names none.
    """
    host = plain_model(model)
    config: Any = getattr(host, "config", None)
    ids: set[int] = set()
    for name in ID_NAMES:
        value = getattr(config, name, None)
        if value is not None:
            ids |= {int(v) for v in value} if isinstance(value, Iterable) else {int(value)}
    if not ids:
        raise InjectionError(
            f"The config of {type(host).__name__} names no image token ({', '.join(STILL_NAMES)}), so the places of "
            "its image tokens are not known."
        )
    return tuple(sorted(ids))


def still_image_id(config: Any) -> int | None:
    """The placeholder id of a still image that a configuration names; None where it names none.

    Args:
        config: Configuration of a host.
    """
    values = (getattr(config, name, None) for name in STILL_NAMES)
    return next((value for value in values if isinstance(value, int)), None)


def image_token_side(config: Any, grid: tuple[int, int]) -> int:
    """Patches along one side of an image token, from the usual fields of a configuration; for hosts without a record.

    Args:
        config: Of the host.
        grid: Rows and columns of patches of one picture.
    """
    ratio, tokens = (getattr(config, name, None) for name in ("downsample_ratio", "mm_tokens_per_image"))
    if ratio is not None:
        return round(1 / ratio)
    if tokens is not None:
        return round((grid[0] * grid[1] / tokens) ** 0.5)
    return int(getattr(config, "scale_factor", 1))


def forward_names(model: nn.Module) -> frozenset[str]:
    """Names of the arguments of a model's forward, wrappers of PEFT aside."""
    return frozenset(inspect.signature(plain_model(model).forward).parameters)
