"""Validation of the density estimator on real pages: upright, turned, coloured, scanned, photographed, large and small.

The pages are those of the validation part; views and effects are fixed by the number of the page.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from sfa_adapters.adat.density import DensityEstimator
from sfa_adapters.recipes.density.batches import halvings
from sfa_adapters.recipes.density.crops import Crop, cut, place
from sfa_adapters.recipes.density.degrade import random_effects
from sfa_adapters.recipes.density.real_pages import RealPage, read_part

__all__ = ["RealCheck"]

SEED = 20261130
VIEWS = 6  # of each page: one upright and as it is, the others as in training


class RealCheck:
    """Mean squared error on fixed crops of the validation pages, where print has a size that the network can see.

    Args:
        folder: Folder of `sfa density pages`.

    Raises:
        DataError: It has no pages for validation.
    """

    def __init__(self, folder: Path) -> None:
        self.crops = [crop for number, page in enumerate(read_part(folder, "val")) for crop in _views(number, page)]

    @torch.no_grad()
    def __call__(self, model: DensityEstimator) -> float:
        """The error of a model, which keeps its mode."""
        training = model.training
        model.eval()
        total = weight = 0.0
        for start in range(0, len(self.crops), 32):
            part = self.crops[start : start + 32]
            pictures = torch.from_numpy(np.stack([crop.picture for crop in part])).permute(0, 3, 1, 2).float() / 255
            estimate = model.logits(pictures).sigmoid().numpy()
            counts = np.stack([crop.weight for crop in part])
            total += float((counts * (estimate - np.stack([crop.density for crop in part])) ** 2).sum())
            weight += float(counts.sum())
        model.train(training)
        return total / weight


def _views(number: int, page: RealPage) -> list[Crop]:
    rng = np.random.default_rng((SEED, number))
    levels = halvings(page.picture())
    typical = float(np.median(page.boxes[:, 3] - page.boxes[:, 1]))
    crops = []
    for view in range(VIEWS):
        height = float(np.exp(rng.uniform(np.log(6), np.log(60)))) if view else 14.0
        box = page.boxes[int(rng.integers(len(page.boxes)))]
        matrix = place(rng, page.size, height / typical, (box[:2] + box[2:]) / 2)
        if view == 0:
            scale = height / typical
            matrix = np.array([[scale, 0, 128 - scale * box[0]], [0, scale, 128 - scale * box[1]], [0, 0, 1.0]])
        crop = cut(levels, page.boxes, matrix)
        crops.append(Crop(random_effects(crop.picture, rng, height < 9), crop.density, crop.weight) if view else crop)
    return crops
