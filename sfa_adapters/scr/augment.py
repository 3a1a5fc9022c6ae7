"""Augmentations that keep every answer true: small shifts, brightness, blur, JPEG. No flips and no crops.

All pages of a batch are changed in the same way, so that the tiles of one page still fit together; each step draws new
changes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sfa_adapters.errors import DataError
from sfa_adapters.install import install_command
from sfa_adapters.scr.config import Fill, SCRConfig

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Statistics", "change", "change_pixels", "shift", "to_pages"]

Statistics = tuple[Sequence[float], Sequence[float]]


def to_pages(pixels: Tensor, statistics: Statistics) -> Tensor:
    """Undoes the normalisation of a processor.

    Args:
        pixels: `[..., 3, H, W]`.
        statistics: Mean and standard deviation by channel.

    Returns:
        RGB in [0, 1], fp32, without gradients.

    Raises:
        DataError: These are no images, or they were normalised with other statistics.
    """
    if pixels.ndim < 4 or pixels.shape[-3] != 3:
        raise DataError(
            f"pixel_values {tuple(pixels.shape)} must be [..., 3, height, width]: towers that take flattened patches "
            "(Qwen-type) have no image to look at here."
        )
    mean, std = (torch.tensor(s, device=pixels.device).view(3, 1, 1) for s in statistics)
    pages = pixels.detach().float() * std + mean
    low, high = float(pages.min()), float(pages.max())
    if not (low > -0.05 and high < 1.05):  # rounding in bfloat16, but no other statistics; NaN fails both
        raise DataError(
            f"Undone with image_mean={list(statistics[0])} and image_std={list(statistics[1])}, the images reach from "
            f"{low:.3g} to {high:.3g} instead of 0 to 1. Say in SCRConfig what they were normalised with."
        )
    return pages.clamp_(0, 1)


def change_pixels(pixels: Tensor, statistics: Statistics, config: SCRConfig, generator: torch.Generator) -> Tensor:
    """Augments normalised images.

    Args:
        pixels: `[N, 3, H, W]`, or in tiles `[B, tiles, 3, H, W]`.
        statistics: Mean and standard deviation by channel.
        config: Which changes, and how large.
        generator: Draws them; on the CPU.

    Returns:
        Of the shape and dtype of `pixels`, normalised, without gradients.

    Raises:
        DataError: As in `to_pages`.
    """
    pages = to_pages(pixels, statistics)
    changed = change(pages.flatten(0, -4), config, generator).view_as(pages)
    mean, std = (torch.tensor(s, device=pixels.device).view(3, 1, 1) for s in statistics)
    normalised = ((changed - mean) / std).to(pixels.dtype)
    if pixels.ndim == 5:  # tiles of zeros pad a sample, and hosts know them by their zeros
        normalised[(pixels == 0).flatten(2).all(-1)] = 0
    return normalised


def change(pages: Tensor, config: SCRConfig, generator: torch.Generator) -> Tensor:
    """Applies at least one of the changes that the configuration allows, each with a probability of one half.

    Args:
        pages: RGB in [0, 1], `[N, 3, H, W]`.
        config: Which changes, and how large.
        generator: Draws them; on the CPU.

    Returns:
        Pages of the same shape, in [0, 1].

    Raises:
        ModuleNotFoundError: Pillow is missing and blur or JPEG is drawn; the text says how to install it.
    """
    allowed = list(config.augmentations)
    drawn = torch.rand(len(allowed), generator=generator)
    chosen = {name for name, chance in zip(allowed, drawn.tolist(), strict=True) if chance < 0.5}
    chosen = chosen or {allowed[int(drawn.argmin())]}
    strength = torch.rand(5, generator=generator).tolist()  # always five, so that later draws do not depend on `chosen`
    if "shift" in chosen:
        span = 2 * config.max_shift + 1
        place = int(strength[0] * (span**2 - 1))
        place += place >= span**2 // 2  # the one in the middle would be no shift at all
        pages = shift(pages, place // span - config.max_shift, place % span - config.max_shift, config.fill)
    if "brightness" in chosen:
        pages = (pages * (1 + config.max_brightness * (2 * strength[1] - 1))).clamp(0, 1)
    blur = config.max_blur * (0.25 + 0.75 * strength[2]) if "blur" in chosen else 0.0
    low, high = config.jpeg_quality
    quality = low + round((high - low) * strength[3]) if "jpeg" in chosen else None
    return _through_pillow(pages, blur, quality) if blur or quality is not None else pages


def shift(pages: Tensor, down: int, right: int, fill: Fill = "edge") -> Tensor:
    """Moves pages by whole pixels.

    Args:
        pages: `[N, 3, H, W]`.
        down: Pixels; negative ones go up.
        right: Pixels; negative ones go left.
        fill: What appears at the border: copies of the last row or column, or white.
    """
    most = max(abs(down), abs(right))
    padding = (most,) * 4
    canvas = F.pad(pages, padding, mode="replicate") if fill == "edge" else F.pad(pages, padding, value=1.0)
    height, width = pages.shape[-2:]
    return canvas[..., most - down : most - down + height, most - right : most - right + width]


def _through_pillow(pages: Tensor, blur: float, quality: int | None) -> Tensor:
    """Gaussian blur and JPEG, 8 bits per channel."""
    try:
        from PIL import Image, ImageFilter
    except ModuleNotFoundError as error:
        message = f"Pillow is not installed; blur and JPEG need it. Run: {install_command('vision')}"
        raise ModuleNotFoundError(message, name=error.name) from error
    changed = []
    for page in (pages * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy():
        picture = Image.fromarray(page)
        picture = picture.filter(ImageFilter.GaussianBlur(blur)) if blur else picture
        changed.append(np.asarray(picture if quality is None else _jpeg(picture, quality)))
    return torch.from_numpy(np.stack(changed)).to(pages.device).permute(0, 3, 1, 2).float() / 255


def _jpeg(picture: Image.Image, quality: int) -> Image.Image:
    from PIL import Image

    stored = io.BytesIO()
    picture.save(stored, "JPEG", quality=quality)
    return Image.open(stored).convert("RGB")
