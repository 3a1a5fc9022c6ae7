"""A small timm ViT as a host of `starts`: it is trained to read digits, and learns to look headers up.

It is pretrained here, once per seed, on the pictures of the lookup study, with the reading loss alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sfa_adapters import calibrate_axial, sfa_parameter_groups
from sfa_adapters.errors import DataError
from sfa_adapters.install import install_command
from sfa_adapters.recipes.studies.lookup_pictures import BLANK, CELL, Lookups, digit_bank, draw_lookups
from sfa_adapters.recipes.studies.starts import attach
from sfa_adapters.recipes.studies.training import NONE, Stepper, picture_scores

__all__ = ["TimmStart", "build", "to_images"]

GRID = (8, 8)
READING = 0.5
CALIBRATION, VALIDATION, TEST = 6, 17, 18  # seeds of pictures


class _Reader(nn.Module):
    """timm's VisionTransformer; every cell predicts its own digit and those of its headers."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        if find_spec("timm") is None:
            raise DataError(f"timm is missing. Run: {install_command('timm')}")
        from timm.models.vision_transformer import VisionTransformer

        size = (GRID[0] * CELL, GRID[1] * CELL)
        self.tower = VisionTransformer(
            img_size=size, patch_size=CELL, embed_dim=width, depth=3, num_heads=4, num_classes=0, global_pool=""
        )
        self.read, self.header = nn.Linear(width, BLANK + 1), nn.Linear(width, 20)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `[batch, cells, 11]` and `[batch, cells, 2, 10]`."""
        states = self.tower(images)[:, 1:]
        return self.read(states), self.header(states).unflatten(-1, (2, 10))


class TimmStart:
    """A host of `starts`.

    Args:
        options: `pretraining` (steps), `steps`, `batch`, `lr`, `sfa_lr`, `warmup`, `validation`, `pictures`, `pages`,
            and the arm's.
        seed: Of weights, pictures and scalars.
    """

    def __init__(self, options: Mapping[str, Any], seed: int) -> None:
        self.options, self.seed = options, seed
        self.model = copy.deepcopy(_pretrained(seed, options["pretraining"], options["batch"], options["lr"]))
        generator = torch.Generator().manual_seed(CALIBRATION)
        pages = to_images(draw_lookups(digit_bank("train"), options["pages"], GRID, generator))
        attach(self.model, options, seed, lambda by: calibrate_axial(self.model, pages, by=by))

    def known(self) -> np.ndarray:
        """Share of cells of the table with the right digit, by picture."""
        return self._scores("test", self.options["pictures"], TEST)[0]

    def new(self, split: str) -> np.ndarray:
        """Share of right answers about headers, by picture; see `StartHost`."""
        if split == "val":
            return self._scores("val", self.options["validation"], VALIDATION)[1]
        return self._scores("test", self.options["pictures"], TEST)[1]

    def learn(self, after_step: Callable[[int], None]) -> None:
        """Trains everything on headers, with reading as auxiliary task; see `StartHost`."""
        options = self.options
        groups: list[dict[str, Any]] = [{"params": list(self.model.parameters()), "lr": options["lr"]}]
        if options["bias"] != "none":
            groups = sfa_parameter_groups(self.model, options["lr"], options["sfa_lr"])
        _learn(self.model, groups, options, 3000 + self.seed, headers=True, after_step=after_step)

    @torch.no_grad()
    def _scores(self, split: Any, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        batch = draw_lookups(digit_bank(split), count, GRID, torch.Generator().manual_seed(seed))
        read, header = self.model(to_images(batch))
        digits = torch.where(batch.digits == BLANK, NONE, batch.digits)
        return picture_scores(read.argmax(-1), digits), picture_scores(header.argmax(-1), batch.headers)


def build(options: Mapping[str, Any], seed: int) -> TimmStart:
    """The pretrained reader with the arm's bias; arguments as for `TimmStart`."""
    return TimmStart(options, seed)


@lru_cache(maxsize=1)
def _pretrained(seed: int, steps: int, batch: int, lr: float) -> _Reader:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _Reader()
    groups = [{"params": list(model.parameters()), "lr": lr}]
    _learn(model, groups, {"steps": steps, "batch": batch, "warmup": 50}, 2000 + seed, headers=False)
    return model


def _learn(
    model: _Reader,
    groups: list[dict[str, Any]],
    options: Mapping[str, Any],
    seed: int,
    headers: bool,
    after_step: Callable[[int], None] | None = None,
) -> None:
    stepper = Stepper(groups, options["steps"], options["warmup"])
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, options["steps"] + 1):
        batch = draw_lookups(digit_bank("train"), options["batch"], GRID, generator)
        read, header = model(to_images(batch))
        loss = READING * functional.cross_entropy(read.flatten(0, 1), batch.digits.flatten())
        if headers:
            loss = loss + functional.cross_entropy(header.flatten(0, 2), batch.headers.flatten(), ignore_index=NONE)
        stepper.step(loss)
        if after_step is not None:
            after_step(step)


def to_images(batch: Lookups) -> Tensor:
    """Joins cells to pictures, `[batch, 3, 64, 64]`.

    Args:
        batch: Pictures as cells.
    """
    cells = batch.patches.unflatten(-1, (3, CELL, CELL)).unflatten(1, GRID)  # [B, rows, columns, 3, 8, 8]
    return cells.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
