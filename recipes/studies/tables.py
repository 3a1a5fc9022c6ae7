"""Study c: a small vision-language model learns to read pictures of real tables.

    sfa study tables --workers 2        (numbers: docs/studies/tables/)

The host is the nano LLaVA-OneVision of the package: it was pretrained on charts, without SFA. Tower and projector train
on tables of the training countries; tests are about countries that no training picture shows. Arms of one seed see the
same tables and questions in the same order.
"""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from sfa_adapters import SFAConfig, calibrate_axial, inject_sfa, largest_scalars
from sfa_adapters.adat import AdaptiveTokenizer, PatchPolicy, inject_adat
from sfa_adapters.errors import DataError
from sfa_adapters.recipes.analyze.attention_study import BAND, OFF, STATISTICS
from sfa_adapters.recipes.nano.encode import pixel_values
from sfa_adapters.recipes.nano.finetune import FinetuneConfig, finetune, train_tower_and_projector
from sfa_adapters.recipes.nano.models import PATCH, PIXELS, NanoHost, load_nano
from sfa_adapters.recipes.nano.teacher_forcing import exact_matches
from sfa_adapters.recipes.studies.results_file import Outcome
from sfa_adapters.recipes.studies.settings import Job
from sfa_adapters.recipes.studies.shuffled_places import shuffle_places
from sfa_adapters.recipes.studies.tables_measures import answer_measures, attention_measures
from sfa_adapters.recipes.synthetic.charts import Chart
from sfa_adapters.recipes.synthetic.questions import Question
from sfa_adapters.recipes.synthetic.table_pictures import (
    TablePicture,
    TableSize,
    ask_all,
    larger_charts,
    table_pictures,
)
from sfa_adapters.scr import SCRConfig

__all__ = ["train"]

TRAINING, VALIDATION, TEST = 10_000, 7, 8  # seeds of pictures; a run adds its own seed to the first
# Cells of 3 x 3 of the tower's patches with 9, 4 or 1 tokens: no patch is finer than those the tower was trained on.
LEVELS = ((0.4, 12), (0.2, 18), (0.0, 36))
Pictures = tuple[TablePicture | Chart, ...]
TestSet = tuple[Pictures, tuple[list[Question], ...]]


def train(job: Job) -> Outcome:
    """Trains and evaluates one run.

    Args:
        job: Its options: `bias` (none, sfa or placebo), `terms`, `init`, `init_strength`, `scr` (weights of terms),
            `adat` (budget in tokens); `steps`, `batch`, `questions`, `lr`, `sfa_lr`, `every`; `rows` and `columns` of
            the training, `training_tables`, `validation`, `test_pictures`, `test_questions`; `measure`.
    """
    began, options = time.process_time(), job.options
    host = build_arm(options, job.seed)
    tables = _training_tables(options["training_tables"], job.seed, _size(options))
    settings = FinetuneConfig(
        steps=options["steps"],
        batch_size=options["batch"],
        questions=(options["questions"], 0.0, 0.0),
        lr=options["lr"],
        bias_lr=options["sfa_lr"],
        seed=job.seed,
    )
    validation, curve = _test_set("validation", options["validation"], options["test_questions"], _size(options)), []

    def measure(step: int) -> None:
        if step % options["every"] == 0 or step == options["steps"]:
            curve.append((step, float(np.mean(_exact(host, validation)))))

    scr = SCRConfig(**{**OFF, **options["scr"]}, entropy_band=BAND, **STATISTICS) if "scr" in options else None
    result = finetune(host, tables, settings, job.arm, scr=scr, after_step=measure)
    tests: dict[str, np.ndarray] = {}
    numbers: dict[str, Any] = {"last_loss": round(float(np.mean(result.losses[-25:])), 4)}
    if options.get("measure", True):
        for name, count in options["test_pictures"].items():
            tests[name] = _exact(host, _test_set(name, count, options["test_questions"], _size(options)))
        same = _test_set("same", options["test_pictures"]["same"], options["test_questions"], _size(options))
        answered, further = answer_measures(host, *same, options["generated"])
        tests |= answered
        numbers |= further | attention_measures(host, *same, options["pages"], adaptive="adat" in options)
    scalars = largest_scalars(host.model) if options["bias"] != "none" else {}
    return Outcome(curve, tests, scalars, time.process_time() - began, numbers)


def build_arm(options: Any, seed: int) -> NanoHost:
    """The pretrained host with the adapters of an arm, tower and projector trainable.

    Args:
        options: Options of a job.
        seed: Of the scalars and of the shuffle of a placebo.

    Raises:
        DataError: There is no such bias.
    """
    host = load_nano("llava_onevision")
    bias = options["bias"]
    if bias not in ("none", "sfa", "placebo"):
        raise DataError(f"bias={bias!r} is none of none, sfa, placebo.")
    if "adat" in options:
        policy = PatchPolicy(levels=LEVELS, cell=3 * PATCH, budget=options["adat"])
        inject_adat(host.model, AdaptiveTokenizer(policy=policy, **STATISTICS))
    if bias != "none":
        start: dict[str, Any] = {"terms": list(options["terms"])} if "terms" in options else {}
        if options.get("init", "normal") == "axial":
            pages = _training_tables(options["training_tables"], seed, _size(options))[: options["calibration_pages"]]
            heads = calibrate_axial(host.model, pixel_values([page.image for page in pages], PIXELS))
            start = {"init": "axial", "init_strength": options["init_strength"], "init_heads": heads}
        torch.manual_seed(seed)
        inject_sfa(host.model, SFAConfig.published(**start))
    if bias == "placebo":
        shuffle_places(host.model, seed)
    train_tower_and_projector(host.model)
    return host


def _size(options: Any) -> TableSize:
    return TableSize(tuple(options["rows"]), tuple(options["columns"]))


def _exact(host: NanoHost, test: TestSet) -> np.ndarray:
    """Share of right answers of each picture."""
    pictures, questions = test
    right = exact_matches(host, [picture.image for picture in pictures], questions)
    return np.array([answers.mean() for answers in right])


@lru_cache(maxsize=2)
def _training_tables(count: int, seed: int, size: TableSize) -> tuple[TablePicture, ...]:
    return tuple(table_pictures("train", count, TRAINING + seed, size))


@lru_cache(maxsize=8)
def _test_set(name: str, count: int, most: int, size: TableSize) -> TestSet:
    """Pictures and questions of a test set, the same for all runs."""
    if name == "validation":
        pictures: Pictures = tuple(table_pictures("val", count, VALIDATION, size))
    elif name == "same":
        pictures = tuple(table_pictures("test", count, TEST, size))
    elif name == "larger":
        pictures = tuple(table_pictures("test", count, TEST, TableSize((6, 8), (4, 4))))
    elif name == "charts":
        pictures = tuple(larger_charts("test", count, TEST))
    else:
        raise DataError(f"No test set is called {name!r}. There are same, larger, charts.")
    return pictures, tuple(ask_all(pictures, most, TEST))
