"""Density maps of pages, and figures of them: the page on the left, its heat map on the right."""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch

from sfa_adapters.adat.density import STRIDE, DensityEstimator
from sfa_adapters.adat.labels import density_labels
from sfa_adapters.errors import DataError

__all__ = ["MapSource", "density_map", "density_targets", "draw_density"]

MapSource = Literal["density", "edges", "ocr"]


@cache
def _estimator(weights: Path | None) -> Any:
    return DensityEstimator.pretrained(weights).fused()


def density_map(
    picture: np.ndarray, source: str = "density", size: int = 896, weights: Path | None = None
) -> np.ndarray:
    """Text density of a page.

    Args:
        picture: uint8 `[H, W, 3]`.
        source: "density", "edges" or "ocr".
        size: longer side in px to which the page is resized first; 0 keeps its size.
        weights: of the estimator; those of the package by default.

    Returns:
        float32, one value per 16 x 16 px of the resized page, in [0, 1].

    Raises:
        DataError: unknown source or a size that is too small or too large.
        WeightsError: the weights cannot be read.
    """
    import cv2

    if source not in get_args(MapSource):
        raise DataError(f"--source {source!r} must be one of {', '.join(get_args(MapSource))}.")
    if size and not STRIDE <= size <= 8192:
        raise DataError(f"--size {size} must be 0 or lie in {STRIDE}..8192.")
    height, width = picture.shape[:2]
    scale = size / max(height, width) if size else 1.0
    grid = (max(1, round(height * scale / STRIDE)), max(1, round(width * scale / STRIDE)))
    if source != "density":
        return density_labels(picture, grid, cast(Literal["edges", "ocr"], source))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    seen = cv2.resize(picture, (grid[1] * STRIDE, grid[0] * STRIDE), interpolation=method)
    with torch.inference_mode():
        return _estimator(weights)(torch.from_numpy(seen).permute(2, 0, 1)[None].float() / 255)[0].numpy()


def density_targets(images: Sequence[Path], out: Path | None = None) -> dict[Path, Path]:
    """The file for the figure of each page, so that none overwrites another one or a page.

    Args:
        images: The pages; one that is named twice is drawn once.
        out: Folder of the figures; by default each goes beside its page.

    Returns:
        `NAME_density.png` by page; `NAME_jpg_density.png` and the like where pages differ in their ending only.

    Raises:
        DataError: Two pictures would still have one path, or a picture that of a page.
    """
    pages = list({path.resolve(): path for path in images}.values())
    short = {path: (out or path.parent) / f"{path.stem}_density.png" for path in pages}
    counts = Counter(target.resolve() for target in short.values())
    targets: dict[Path, Path] = {}
    owners: dict[Path, Path] = {path.resolve(): path for path in pages}
    for path, target in short.items():
        if counts[target.resolve()] > 1:
            target = target.with_name(f"{path.stem}_{path.suffix.removeprefix('.')}_density.png")
        if (other := owners.get(target.resolve())) is not None:
            raise DataError(f"The picture of {path} would overwrite {other} or its picture; draw it alone, into "
                            "another folder with --out.")  # fmt: skip
        owners[target.resolve()] = path
        targets[path] = target
    return targets


def draw_density(picture: np.ndarray, density: np.ndarray, path: Path, title: str = "") -> Path:
    """Writes the page and its density side by side.

    Args:
        picture: uint8 `[H, W, 3]`.
        density: `[rows, columns]` in [0, 1].
        path: the file to write; its ending chooses the format.
        title: title of the page.

    Returns:
        The file.
    """
    from matplotlib.figure import Figure

    aspect = picture.shape[0] / picture.shape[1]
    figure = Figure(figsize=(11, max(3.0, min(14.0, 4.7 * aspect + 0.8))), dpi=120, layout="constrained")
    left, right = cast(Any, figure.subplots(1, 2))
    left.imshow(picture)
    left.set_title(title or "page", fontsize=18)
    extent = (-0.5, picture.shape[1] - 0.5, picture.shape[0] - 0.5, -0.5)
    shown = right.imshow(density, cmap="inferno", vmin=0, vmax=1, extent=extent, interpolation="nearest")
    right.set_title(f"text density, mean {density.mean():.2f}", fontsize=18)
    for axis in (left, right):
        axis.set(xticks=[], yticks=[])
    bar = figure.colorbar(shown, ax=right, shrink=0.85, aspect=22)
    bar.ax.tick_params(labelsize=16)
    figure.savefig(path)
    return path
