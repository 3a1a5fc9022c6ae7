"""Where the image tokens of a prompt stand, sample by sample, and which modules of a host read them.

Nothing here counts on one image, one length or a start index: places come from the placeholder ids that the host's own
configuration names. Counts are copied to the host while the tower still runs, so nobody waits for them later.

Shape letters: B samples, L tokens of a prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sfa_adapters.errors import InjectionError

__all__ = ["Counts", "Decoder", "arguments", "find_decoder", "image_places", "image_token_ids"]

ID_NAMES = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


@dataclass(frozen=True, eq=False)
class Decoder:
    """The language model of a host.

    Attributes:
        module: It; its forward takes `inputs_embeds` and a cache.
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

    Raises:
        InjectionError: There is none with a list of decoder layers.
    """
    host: Any = model
    while hasattr(host, "get_base_model"):
        host = host.get_base_model()
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


def image_token_ids(host: nn.Module) -> tuple[int, ...]:
    """The placeholder ids of images and videos that the host's configuration names.

    Raises:
        InjectionError: It names none.
    """
    config: Any = getattr(host, "config", None)
    found: set[int] = set()
    for name in ID_NAMES:
        value = getattr(config, name, None)
        if value is not None:
            found |= {int(v) for v in value} if isinstance(value, Iterable) else {int(value)}
    if not found:
        raise InjectionError(
            f"The config of {type(host).__name__} names no image token ({', '.join(ID_NAMES[:2])}), so the places of "
            "its image tokens are not known."
        )
    return tuple(sorted(found))


def image_places(input_ids: Tensor, ids: tuple[int, ...]) -> Tensor:
    """Which tokens stand for a part of an image, bool `[B, L]`."""
    places = input_ids == ids[0]
    for other in ids[1:]:
        places = places | (input_ids == other)
    return places


def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a forward was called with, by name."""
    if not args:
        return dict(kwargs)
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}


class Counts:
    """A few whole numbers on their way from the device to the host.

    On CUDA they are copied into pinned memory behind the work that is queued so far, and the host goes on. By the time
    that somebody reads them, layers later, they have long arrived: reading waits for that copy and for nothing else.

    Args:
        values: int64 `[n]`.
    """

    def __init__(self, values: Tensor) -> None:
        self.event: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.values = values.to("cpu")

    def read(self) -> list[int]:
        """The numbers."""
        if self.event is not None:
            self.event.synchronize()
            self.event = None
        return [int(value) for value in self.values.numpy()]
