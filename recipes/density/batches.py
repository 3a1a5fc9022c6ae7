"""`CropBatches`: batches of crops for training on real pages, a pure function of the seed and the number of the step.

| share | crops of | for |
|---|---|---|
| about a half | real pages (`sfa density pages`), in print of 2 to 37 px x-height | print as it is |
| a quarter | rendered pages (`synthetic.pages`): tables, charts, blank scans, hatching | figures, blank paper |
| a twelfth | lines drawn in fonts of all scripts and of handwriting | large and odd print |
| a sixth | photographs, textures, maps without text | what is not print |

With `figures`, that share is taken from the real pages.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sfa_adapters.errors import DataError
from sfa_adapters.images import as_image
from sfa_adapters.recipes.density.crops import SIDE, Crop, cut, place
from sfa_adapters.recipes.density.degrade import random_effects
from sfa_adapters.recipes.density.drawn_text import draw_lines, letters_of
from sfa_adapters.recipes.density.negatives import draw_curves, draw_map
from sfa_adapters.recipes.density.real_pages import RealPage, read_part
from sfa_adapters.recipes.synthetic.pages import mixture
from sfa_adapters.recipes.synthetic.scans import photograph

__all__ = ["CropBatches", "halvings"]

PER_PAGE = 4  # crops of one real page: reading a page takes as long as cutting ten crops
WITHIN = 0.75  # share of crops of real pages that have a word in them
LITTLE = 0.06  # share of a page under words, below which it is a figure or nearly empty
NONE = np.zeros((0, 4), dtype=np.float32)


def halvings(picture: np.ndarray, smallest: int = 200) -> list[np.ndarray]:
    """A picture and its halvings, down to about `smallest` px on the shorter side."""
    import cv2

    levels = [picture]
    while min(levels[-1].shape[:2]) >= 2 * smallest:
        height, width = levels[-1].shape[:2]
        levels.append(cv2.resize(levels[-1], (width // 2, height // 2), interpolation=cv2.INTER_AREA))
    return levels


@lru_cache(maxsize=64)
def _photograph(path: Path) -> np.ndarray:
    return halvings(as_image(path), 400)[-1]


class CropBatches(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Batch number k of a run.

    Args:
        folder: Folder of `sfa density pages`.
        batch: Crops of a batch, at least 16.
        seed: Of everything random.
        figures: Share of the crops that are of figures: half drawn curves without text, half parts of real pages with
            little text.

    Raises:
        DataError: The folder has no pages, fonts or photographs for training.
    """

    def __init__(self, folder: Path, batch: int, seed: int, figures: float = 0.0) -> None:
        self.pages = read_part(folder, "train")
        self.fonts = [p for p in _files(folder / "train" / "fonts") if letters_of(p)]
        self.photographs = _files(folder / "train" / "photographs")
        self.batch, self.seed, self.figures = batch, seed, round(figures * batch)
        self.sparse = [page for page in self.pages if _text_share(page) < LITTLE]
        # Half of the pages are Latin. A script with a quarter of the pages of another is drawn half as often.
        scripts = Counter(page.script for page in self.pages)
        weights = np.array([scripts[page.script] ** -0.5 for page in self.pages])
        self.shares = weights / weights.sum()

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures in [0, 1], float32 `[B, 3, 256, 256]`; densities and weights, `[B, 16, 16]`."""
        rng = np.random.default_rng((self.seed, step))
        part = self.batch // 8
        crops = self._rendered(rng, part) + self._rendered(rng, part) + self._drawn(rng, self.batch // 12)
        crops += [self._without_text(rng) for _ in range(self.batch // 6)]
        if self.figures:
            curves = self.figures // 2
            crops += [_affected(cut([draw_curves(rng, SIDE)], NONE, np.eye(3)), rng, False) for _ in range(curves)]
            crops += self._real(rng, self.sparse)[: self.figures - curves]
        while len(crops) < self.batch:
            crops += self._real(rng, None)
        crops = crops[: self.batch]
        pictures = np.stack([crop.picture for crop in crops]).transpose(0, 3, 1, 2)
        return (
            torch.from_numpy(np.ascontiguousarray(pictures)).float() / 255,
            torch.from_numpy(np.stack([crop.density for crop in crops])).float(),
            torch.from_numpy(np.stack([crop.weight for crop in crops])).float(),
        )

    def _real(self, rng: np.random.Generator, figures: list[RealPage] | None) -> list[Crop]:
        """Crops of one page: of any, most of them near a word, or of one of the figures, anywhere on it."""
        if figures:
            page = figures[int(rng.integers(len(figures)))]
        else:
            page = self.pages[int(rng.choice(len(self.pages), p=self.shares))]
        levels = halvings(page.picture())
        typical = float(np.median(page.boxes[:, 3] - page.boxes[:, 1]))
        crops = []
        for _ in range(PER_PAGE):
            # Height of the typical word box in the crop; small print is more frequent, as on pages that towers see.
            height = float(np.exp(rng.uniform(np.log(5.5), np.log(70)))) if rng.random() < 0.6 else rng.uniform(6, 24)
            box = page.boxes[int(rng.integers(len(page.boxes)))]
            near = (box[:2] + box[2:]) / 2 if not figures and rng.random() < WITHIN else None
            view = place(rng, page.size, height / typical, near)
            crops.append(_affected(cut(levels, page.boxes, view), rng, height < 9))
        return crops

    def _rendered(self, rng: np.random.Generator, count: int) -> list[Crop]:
        page = mixture(int(rng.integers(2**31)), "train")
        crops = []
        for _ in range(count):
            scale = float(np.exp(rng.uniform(np.log(0.7), np.log(2.0))))
            crop = cut([page.image], page.boxes, place(rng, page.image.shape[:2], scale))
            crops.append(_affected(crop, rng, True))
        return crops

    def _drawn(self, rng: np.random.Generator, count: int) -> list[Crop]:
        font = self.fonts[int(rng.integers(len(self.fonts)))]
        x_height = float(np.exp(rng.uniform(np.log(3), np.log(38))))
        paper = np.full((2 * SIDE, 2 * SIDE, 3), 255, np.uint8)
        page, boxes = draw_lines(paper, rng, font, x_height, (0, 0, 0))
        return [_affected(cut([page], boxes, place(rng, page.shape[:2], 1.0)), rng, x_height < 5) for _ in range(count)]

    def _without_text(self, rng: np.random.Generator) -> Crop:
        pick = rng.random()
        if pick < 0.35:
            picture = draw_map(rng, SIDE)
        elif pick < 0.6:
            picture = photograph(rng, "train", SIDE, SIDE, textures=0.3)
        else:
            whole = _photograph(self.photographs[int(rng.integers(len(self.photographs)))])
            scale = float(np.exp(rng.uniform(np.log(0.4), np.log(1.5))))
            picture = cut(halvings(whole), NONE, place(rng, whole.shape[:2], scale)).picture
        crop = cut([picture], NONE, np.eye(3))
        return _affected(crop, rng, False)


def _affected(crop: Crop, rng: np.random.Generator, fine: bool) -> Crop:
    return Crop(random_effects(crop.picture, rng, fine), crop.density, crop.weight)


def _files(folder: Path) -> list[Path]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".json")
    if not files:
        raise DataError(f"{folder} is empty. Make the set of real pages: sfa density pages --part train")
    return files


def _text_share(page: RealPage) -> float:
    """Share of a page under the boxes of its words; where boxes overlap, a little too much."""
    sides = page.boxes[:, 2:] - page.boxes[:, :2]
    return float(sides.prod(axis=1).sum() / (page.size[0] * page.size[1]))
