"""A gallery of real pages with their density: upright, in other scripts, turned, coloured, scanned, photographed.

    sfa density pages --out real-pages
    sfa analyze tokens --pages real-pages --pictures

It shows single pages; the numbers are in docs/density.md.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import torch

from sfa_adapters.adat import DensityEstimator
from sfa_adapters.errors import DataError
from sfa_adapters.recipes.analyze.tokens_report import ScoredPage, plot_gallery
from sfa_adapters.recipes.density.real_pages import read_part
from sfa_adapters.recipes.density.views import view_of

__all__ = ["draw_real_gallery"]

SHOWN = 896  # px of the longer side in the figure
# Title, script of the page, its number among the pages of that script, and view.
CASES = (
    ("Latin", "latin", 0.55, "upright"),
    ("Chinese", "chinese", 0.4, "upright"),
    ("Japanese", "japanese", 0.4, "dark mode"),
    ("Arabic", "arabic", 0.5, "upright"),
    ("turned by 90", "latin", 0.3, "turned by 90"),
    ("red on yellow", "cyrillic", 0.5, "red on yellow"),
    ("scan, 600 dpi", "latin", 0.0, "scan, 600 dpi"),
    ("photograph", "latin", 0.85, "photograph"),
)


def draw_real_gallery(folder: Path, path: Path) -> Path:
    """Draws pages of the test part, and below each what the shipped estimator sees.

    Args:
        folder: Folder of `sfa density pages`.
        path: The file to write.

    Returns:
        The file.

    Raises:
        DataError: There are no pages, or no page of a script.
    """
    pages = read_part(folder, "test")
    estimator = DensityEstimator.pretrained().fused()
    drawn = []
    for title, script, place, view in CASES:
        of_script = [page for page in pages if page.script == script]
        start = int(place * len(of_script))
        views = (view_of(page, view, number) for number, page in enumerate(of_script) if number >= start)
        seen = next((each for each in views if each is not None), None)
        if seen is None:
            raise DataError(f"{folder} has no {script} page for the test part that can be shown as {view!r}.")
        pixels = torch.from_numpy(seen.picture).permute(2, 0, 1)[None].float() / 255
        scale = min(1.0, SHOWN / max(seen.picture.shape[:2]))
        small = cv2.resize(seen.picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        drawn.append(ScoredPage(title, small, estimator(pixels)[0]))
    return plot_gallery(drawn, path)
