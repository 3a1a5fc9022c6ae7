"""Check of the option `--device`, before a model is loaded."""

from __future__ import annotations

import torch

from sfa_adapters.errors import DataError

__all__ = ["require_device"]


def require_device(name: str) -> None:
    """Checks that a model can be placed on a device.

    Args:
        name: `cpu`, `cuda`, or `cuda:1` and the like.

    Raises:
        DataError: The name is not one of these, or this machine has no such GPU.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise DataError(f"--device {name} must be cpu, cuda, or cuda:1 and the like.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DataError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs here. Use --device cpu.")
