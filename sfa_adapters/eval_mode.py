"""`evaluating`: a model in eval mode for a while, without gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["evaluating"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context with the model in eval mode, without gradients; afterwards every module has its old mode again."""
    modes = {module: module.training for module in model.modules()}
    try:
        # A model that is in eval mode is left alone: eval() would make SFA forget the mask that it keeps.
        if any(modes.values()):
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
