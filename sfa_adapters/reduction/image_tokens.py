"""Places of the image tokens in a prompt, sample by sample.

Nothing here assumes one image, one length or a start index: places come from the placeholder ids that the configuration
of the host names. Counts are copied to the CPU while the tower still runs, so that nothing waits for them later.

Shape letters: B samples, L tokens of a prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sfa_adapters.moved import know_old_names

__all__ = ["DENSITY_BESIDE_DYMU", "Counts", "arguments", "image_places"]

know_old_names(__name__)

# Why FastV's selector `density` and a shortened prompt refuse each other, whichever is injected second.
DENSITY_BESIDE_DYMU = (
    "FastV with selector='density' needs every image token of the prompt, because it knows the density of each; DyMU "
    "takes the merged ones out. Choose another selector, or DyMUConfig(language='off')."
)


def image_places(input_ids: Tensor, ids: tuple[int, ...]) -> Tensor:
    """Which tokens stand for a part of an image, bool `[B, L]`.

    Args:
        input_ids: `[B, L]`.
        ids: Placeholder ids.
    """
    places = input_ids == ids[0]
    for other in ids[1:]:
        places = places | (input_ids == other)
    return places


def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a forward, by name.

    Args:
        module: The module.
        args: Its arguments by position.
        kwargs: Its arguments by name.
    """
    if not args:
        return dict(kwargs)
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}


class Counts:
    """A few whole numbers that are copied from the device to the CPU without waiting.

    On CUDA they are copied into pinned memory after the work that is queued so far, and the CPU goes on. When they are
    read, layers later, they have arrived: reading waits for that copy and for nothing else.

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
