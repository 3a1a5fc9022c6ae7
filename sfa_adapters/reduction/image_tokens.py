"""Where the image tokens of a prompt stand, sample by sample.

Nothing here counts on one image, one length or a start index: places come from the placeholder ids that the host's own
configuration names. Counts are copied to the host while the tower still runs, so nobody waits for them later.

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
