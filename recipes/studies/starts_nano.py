"""The nano LLaVA-OneVision as a host of `starts`: it knows charts, and learns tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from sfa_adapters import calibrate_axial
from sfa_adapters.recipes.nano.encode import pixel_values
from sfa_adapters.recipes.nano.finetune import FinetuneConfig, finetune, train_tower_and_projector
from sfa_adapters.recipes.nano.models import PIXELS, load_nano
from sfa_adapters.recipes.nano.teacher_forcing import exact_matches
from sfa_adapters.recipes.studies.starts import attach
from sfa_adapters.recipes.synthetic.charts import Chart, draw, kinds_for
from sfa_adapters.recipes.synthetic.real_tables import load_tables
from sfa_adapters.recipes.synthetic.table_pictures import TablePicture, TableSize, ask_all, table_pictures

__all__ = ["NanoStart", "build"]

TRAINING, VALIDATION, TEST = 20_000, 17, 18  # seeds of pictures
QUESTIONS = 8  # about a picture, at most
SIZE = TableSize((3, 5), (2, 3))


class NanoStart:
    """A host of `starts`.

    Args:
        options: `training_tables`, `validation`, `pictures`, `pages`, `steps`, `batch`, `lr`, `sfa_lr`, and the arm's.
        seed: Of pictures, order and scalars.
    """

    def __init__(self, options: Mapping[str, Any], seed: int) -> None:
        self.options, self.seed = options, seed
        self.host = load_nano("llava_onevision")
        self.model = self.host.model
        self.tables = _tables("train", options["training_tables"], TRAINING + seed)
        pages = pixel_values([table.image for table in self.tables[: options["pages"]]], PIXELS)
        attach(self.model, options, seed, lambda by: calibrate_axial(self.model, pages, by=by))
        train_tower_and_projector(self.model)

    def known(self) -> np.ndarray:
        """Exact match on charts of unseen tables, by picture."""
        return self._exact(_charts(self.options["pictures"]))

    def new(self, split: str) -> np.ndarray:
        """Exact match on tables of unseen countries, by picture; see `StartHost`."""
        if split == "val":
            return self._exact(_tables("val", self.options["validation"], VALIDATION))
        return self._exact(_tables("test", self.options["pictures"], TEST))

    def learn(self, after_step: Callable[[int], None]) -> None:
        """Trains tower and projector on tables; see `StartHost`."""
        options = self.options
        settings = FinetuneConfig(
            steps=options["steps"],
            batch_size=options["batch"],
            questions=(5.0, 0.0, 0.0),
            lr=options["lr"],
            bias_lr=options["sfa_lr"],
            seed=self.seed,
        )
        finetune(self.host, self.tables, settings, "starts", after_step=after_step)

    def _exact(self, pictures: Sequence[TablePicture | Chart]) -> np.ndarray:
        right = exact_matches(self.host, [picture.image for picture in pictures], ask_all(pictures, QUESTIONS, TEST))
        return np.array([answers.mean() for answers in right])


def build(options: Mapping[str, Any], seed: int) -> NanoStart:
    """The pretrained host with the arm's bias; arguments as for `NanoStart`."""
    return NanoStart(options, seed)


@lru_cache(maxsize=4)
def _tables(split: Any, count: int, seed: int) -> tuple[TablePicture, ...]:
    return tuple(table_pictures(split, count, seed, SIZE))


@lru_cache(maxsize=2)
def _charts(count: int) -> tuple[Chart, ...]:
    rng, tables = np.random.default_rng(TEST), load_tables("test")
    chosen = [tables[number] for number in rng.permutation(len(tables))[:count]]
    return tuple(draw(table, kinds_for(table)[int(rng.integers(len(kinds_for(table))))], TEST) for table in chosen)
