"""Grids of patches of images and of towers: what records of backbones are written with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sfa_adapters.arrangement import ImageTokens

__all__ = ["config_grid", "image_grid", "pair", "pixel_grid", "pixel_layouts"]


def image_grid(pixel_values: Any, patch_size: Any) -> tuple[int, int] | None:
    """Grid of an image tensor `[..., height, width]` cut into patches.

    Args:
        pixel_values: The images, or anything else, which gives None.
        patch_size: One side, or height and width, in pixels.
    """
    if not isinstance(pixel_values, Tensor) or pixel_values.ndim < 3:
        return None
    height, width = pair(patch_size)
    return pixel_values.shape[-2] // height, pixel_values.shape[-1] // width


def pair(value: Any) -> tuple[int, int]:
    """One number as a pair, a pair (or longer sequence) as its last two entries."""
    return (int(value), int(value)) if isinstance(value, int) else (int(value[-2]), int(value[-1]))


def pixel_grid(tower: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
    """Grid of the `pixel_values` that a transformers tower or its embedding gets first, by its `patch_size`."""
    size: Any = getattr(tower, "patch_size", None)
    size = tower.config.patch_size if size is None else size  # pyright: ignore[reportAttributeAccessIssue]
    return image_grid(args[0] if args else kwargs.get("pixel_values"), size)


def pixel_layouts(tower: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ImageTokens | None:
    """`layouts` of transformers towers and their embeddings: one grid for all `pixel_values`, row by row."""
    grid = pixel_grid(tower, args, kwargs)
    return None if grid is None else ImageTokens(grid)


def config_grid(tower: nn.Module) -> tuple[int, int]:
    """Grid at the tower's own image size, from `config.image_size` and `config.patch_size`."""
    config: Any = tower.config
    (height, width), (patch_height, patch_width) = pair(config.image_size), pair(config.patch_size)
    return height // patch_height, width // patch_width
