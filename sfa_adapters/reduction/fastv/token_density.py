"""Text density at the place of every image token, from ADAT's density map of the images.

The map is estimated from the pixels that the tower was given, and reduced to the grid of tokens that the host makes of
them: as many as patches, or fewer after a pixel shuffle or a 2x2 merge. Where a host packs the crops of an image into
one run of tokens, the map is packed by the same method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sfa_adapters.adat.density import DensityEstimator
from sfa_adapters.adat.scorers import STRIDE, to_cells
from sfa_adapters.errors import PlanError
from sfa_adapters.normalisation import Statistics
from sfa_adapters.patch_groups import PatchGroups
from sfa_adapters.tower_input import TowerInput

__all__ = ["PACK", "TowerImages", "density_packer", "token_density", "tower_images"]

PACK = "pack_image_features"  # the method of LLaVA-NeXT and LLaVA-OneVision


@dataclass(frozen=True, eq=False)
class TowerImages:
    """The images that a tower was given.

    Attributes:
        pixels: Normalised images `[tiles, 3, H, W]`; or patches in rows, with their grids (Qwen).
        grids: Frames, rows and columns of patches of each image, for patches, and for pages that fill a part of their
            canvas.
        groups: The form of the patches, for patches.
        merge: Patches along the side of an image token, for canvases.
        patch: Side of a patch in pixels.
        packed: Density at each image token, where the host packed it.
    """

    pixels: Tensor
    grids: tuple[tuple[int, int, int], ...] | None = None
    groups: PatchGroups | None = None
    merge: int = 1
    patch: int = 1
    packed: Tensor | None = None


def tower_images(given: TowerInput, side: int = 1) -> TowerImages | None:
    """The images of a tower's forward, or None where it was called without any.

    Args:
        given: What the tower is called with.
        side: Patches along the side of an image token, from the record of the host.
    """
    pixels, config = given.images, getattr(given.tower, "config", None)
    if not isinstance(pixels, Tensor):
        return None
    groups = given.patch_groups
    if groups is None:
        size: Any = getattr(config, "patch_size", 1)
        patch = int(size[-1] if isinstance(size, list | tuple) else size)
        arrangement = given.arrangement() if pixels.ndim == 4 else None
        if arrangement is not None and arrangement.joined == "packed":
            pages = tuple((1, *image.grid) for image in arrangement.images)
            return TowerImages(pixels.detach(), pages, merge=side, patch=patch)
        return TowerImages(pixels.detach(), patch=patch) if pixels.ndim == 4 else None
    grid = given.argument("grid_thw", 1)
    if grid is None:
        return None
    # Read here, where the tower itself reads it. PaddleOCR-VL puts a dimension in front of its patches.
    grids = tuple((int(t), int(h), int(w)) for t, h, w in grid.cpu().numpy())
    patches = pixels.detach().flatten(0, 1) if pixels.ndim == 5 else pixels.detach()
    return TowerImages(patches, grids, groups, patch=groups.patch)


def density_packer(core: nn.Module, method: Callable[..., Any], called: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """Packs the densities of tiles, `[tiles, patches]`, into those of image tokens the way a host packs its features.

    Args:
        core: The host's core.
        method: Its packing method.
        called: Its arguments by name, the core included.

    Returns:
        The function that packs.
    """

    def packed(density: Tensor) -> Tensor:
        tiles = [len(part) for part in called["image_features"]]
        maps = list(density[:, :, None].split(tiles))
        newline = None if called.get("image_newline") is None else density.new_zeros(1)
        return torch.cat(list(method(**{**called, "image_features": maps, "image_newline": newline})[0])).flatten()

    return packed


@torch.no_grad()
def pack_density(images: TowerImages, statistics: Statistics | None, pack: Callable[[Tensor], Tensor]) -> TowerImages:
    """The images with the density of each image token, for a host that packs its crops.

    Args:
        images: The images of the tower.
        statistics: Mean and deviation that they were normalised with.
        pack: From `density_packer`.
    """
    count = images.pixels.shape[-1] // images.patch
    mean, std = _known(statistics)
    density = _map(images.pixels, mean, std, images.pixels.shape[-1] / count, (count, count)).flatten(1)
    return replace(images, packed=pack(density))


@torch.no_grad()
def token_density(
    images: TowerImages | None, counts: Sequence[int], most: int, statistics: Statistics | None = None
) -> Tensor:
    """Text density at each image token.

    Args:
        images: The images that the tower was given for these prompts.
        counts: Image tokens of each sample; samples may be repeated, as beams are.
        most: The largest of these counts.
        statistics: Mean and deviation that the images were normalised with.

    Returns:
        `[B, most]` in [0, 1]; zero after a sample's last token.

    Raises:
        PlanError: The tower has not seen the images, or their tokens lie on no grid that is known here.
    """
    if images is None:
        raise PlanError(
            "selector='density' needs the images of this prompt, but the tower has not run since the last one (were "
            "its features computed before?). Pass pixels to the model, or choose another selector."
        )
    total = sum(counts)
    if images.packed is not None:
        values = images.packed
    else:
        of = _of_tiles if images.grids is None else _of_canvases if images.groups is None else _of_patches
        values = of(images, counts, statistics)
    repeats = max(1, total // len(values))
    if repeats * len(values) != total:
        raise PlanError(f"The images have {len(values)} places, but the prompts {total} image tokens.")
    starts, begin = [], 0
    for count in counts[::repeats]:
        starts += [begin] * repeats
        begin += count
    place = torch.arange(most)
    index = (torch.tensor(starts)[:, None] + place).clamp(max=len(values) - 1)
    real = place < torch.tensor(list(counts))[:, None]
    return values[index.to(values.device)] * real.to(values.device)


def _of_tiles(images: TowerImages, counts: Sequence[int], statistics: Statistics | None) -> Tensor:
    """Densities of images that are tiles: tile after tile, row by row."""
    tiles, total = len(images.pixels), sum(counts)
    height, width = images.pixels.shape[-2:]
    side = _side(tiles, counts, height // images.patch) if height == width else 0
    if not side:
        raise PlanError(
            f"selector='density' finds the places of tokens on square tiles with one token for each place; here are "
            f"{tiles} tiles of {height}x{width} px and {total} image tokens. Choose another selector."
        )
    mean, std = _known(statistics)
    return _map(images.pixels, mean, std, height / side, (side, side)).flatten()


def _side(tiles: int, counts: Sequence[int], patches: int) -> int:
    """Side of the grid of tokens of a tile of `patches` x `patches`; 0 where nothing fits.

    Samples may be repeated (beams), but a tile belongs to one of them: each has whole tiles.
    """
    total = sum(counts)
    for side in range(patches, 0, -1):
        each = side * side
        if not (patches % side or total % (tiles * each) or any(count % each for count in counts)):
            return side
    return 0


def _of_canvases(images: TowerImages, counts: Sequence[int], statistics: Statistics | None) -> Tensor:
    """Densities of pages that fill the upper left part of their canvas (Pixtral), row by row, page after page."""
    mean, std = _known(statistics)
    assert images.grids is not None
    merge, patch = images.merge, images.patch
    densities = []
    for canvas, (_, rows, columns) in zip(images.pixels, images.grids, strict=True):
        cells = rows // merge, columns // merge
        page = canvas[None, :, : cells[0] * merge * patch, : cells[1] * merge * patch]
        densities.append(_map(page, mean, std, merge * patch, cells).flatten())
    return torch.cat(densities)


def _of_patches(images: TowerImages, counts: Sequence[int], statistics: Statistics | None) -> Tensor:
    """Densities of images that are patches (Qwen): groups row by row, image after image."""
    mean, std = _known(statistics)
    groups, grids = images.groups, images.grids
    assert groups is not None
    assert grids is not None
    if any(frames > 1 for frames, _, _ in grids):
        raise PlanError("selector='density' reads still images, but the prompt holds a video. Choose another selector.")
    densities = []
    side = groups.side
    for part, (_, rows, columns) in zip(images.pixels.split([h * w for _, h, w in grids]), grids, strict=True):
        page = groups.page(part, (rows, columns))[None]
        densities.append(_map(page, mean, std, side * groups.patch, (rows // side, columns // side)).flatten())
    return torch.cat(densities)


def _known(statistics: Statistics | None) -> Statistics:
    if statistics is None:
        raise PlanError(
            "selector='density' must undo the normalisation of the images, and the record of this tower does not say "
            "what it is. Give FastVConfig(image_mean=..., image_std=...)."
        )
    return statistics


def _map(images: Tensor, mean: Sequence[float], std: Sequence[float], cell: float, cells: tuple[int, int]) -> Tensor:
    """`[tiles, *cells]`: the largest density that each cell touches, so that a lone digit is not averaged away."""
    centre, scale = (torch.tensor(v, dtype=torch.float32).view(3, 1, 1).to(images.device) for v in (mean, std))
    with torch.autocast(images.device.type, enabled=False):
        pixels = (images.float() * scale + centre).clamp(0, 1)
        density = _estimator(str(images.device))(pixels).float()
    # In units of 1 / rows px, in which all edges are whole numbers.
    unit = cells[0]
    covered = (density.shape[-2] * STRIDE * unit, density.shape[-1] * STRIDE * unit)
    return to_cells(density, covered, round(cell * unit), cells, "max")


@cache
def _estimator(device: str) -> nn.Module:
    return DensityEstimator.pretrained().fused().to(device)
