"""Study d: a small VLM of real pretrained parts learns to read pictures of real tables.

    sfa study small-vlm --budget samples=30000,batch=32     one H200, about ten minutes
    sfa study small-vlm --budget samples=1200,batch=4,align_samples=800       a CPU, more than an hour a run

DINOv2-small and SmolLM2-135M-Instruct (`small_vlm`) were not trained together. First the projector alone is aligned:
the model learns to write all texts that are printed on tables and charts. All arms of a seed begin with the same
aligned projector. Then everything trains on questions about tables, with the arm's adapter in the tower.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfa_adapters import SFAConfig, calibrate_axial, inject_sfa, largest_scalars, sfa_parameter_groups
from sfa_adapters.errors import DataError
from sfa_adapters.recipes.studies.results_file import Outcome
from sfa_adapters.recipes.studies.settings import Job
from sfa_adapters.recipes.studies.shuffled_places import shuffle_places
from sfa_adapters.recipes.studies.small_vlm_batches import (
    Examples,
    alignment_examples,
    pixel_values,
    table_examples,
)
from sfa_adapters.recipes.studies.small_vlm_reader import Reader
from sfa_adapters.recipes.synthetic.table_pictures import TableSize

__all__ = ["train"]

TRAINING, ALIGNMENT, VALIDATION, TEST = 30_000, 40_000, 27, 28  # seeds of pictures; a run adds its own to the first two
SIZES = {"same": TableSize((3, 5), (2, 3)), "larger": TableSize((6, 8), (4, 4))}  # rows and columns; `same`: training
Options = Mapping[str, Any]


def train(job: Job) -> Outcome:
    """Trains and evaluates one run.

    Args:
        job: Its options: `samples` (pictures of the training), `batch`, `size` (pixels of a side), `questions` (about a
            picture), `align_samples`, `align_lr`, `lr`, `sfa_lr`, `warmup` (share of the steps), `measurements`,
            `validation`, `test_pictures`, `test_questions`; and of the arm `bias` (none, sfa or placebo), `init`,
            `init_strength`, `calibration_pages`.
    """
    began, options = time.process_time(), job.options
    aligned = _aligned(options["size"], options["align_samples"], options["align_lr"], options["batch"], job.seed)
    reader, curve = Reader(options["size"], job.seed), []
    reader.projector.load_state_dict(aligned.state)
    training = table_examples("train", options["samples"], TRAINING + job.seed, SIZES["same"], options["questions"])
    validation = table_examples("val", options["validation"], VALIDATION, SIZES["same"], options["test_questions"])
    groups = _attach(reader, training, options, job.seed)
    steps = -(-options["samples"] // options["batch"])
    every = max(steps // options["measurements"], 1)

    def measure(step: int) -> None:
        if step % every == 0 or step == steps:
            curve.append((step, float(reader.exact(validation).mean())))

    losses = reader.learn(training, groups, options["batch"], options["warmup"], measure)
    tests = {
        name: reader.exact(table_examples("test", count, TEST, SIZES[name], options["test_questions"]))
        for name, count in options["test_pictures"].items()
    }
    scalars = largest_scalars(reader.model) if options.get("bias", "none") != "none" else {}
    numbers = {"align_loss": aligned.loss, "first_loss": _mean(losses[:10]), "last_loss": _mean(losses[-25:])}
    return Outcome(curve, tests, scalars, time.process_time() - began, numbers)


def _attach(reader: Reader, pages: Examples, options: Options, seed: int) -> list[dict[str, Any]]:
    """Injects the adapter of the arm into the tower; everything trains. Returns the groups of the optimizer."""
    bias = options.get("bias", "none")
    if bias not in ("none", "sfa", "placebo"):
        raise DataError(f"bias={bias!r} is none of none, sfa, placebo.")
    reader.model.requires_grad_(True)
    if bias == "none":
        weights = list(reader.model.parameters())
        return [
            {"params": [p for p in weights if p.ndim > 1], "lr": options["lr"]},
            {"params": [p for p in weights if p.ndim <= 1], "lr": options["lr"], "weight_decay": 0.0},
        ]
    start: dict[str, Any] = {}
    if options.get("init", "normal") == "axial":
        images = [pages[number][0] for number in range(options["calibration_pages"])]
        heads = calibrate_axial(reader.model, pixel_values(images, reader.size, reader.device))
        start = {"init": "axial", "init_strength": options["init_strength"], "init_heads": heads}
    torch.manual_seed(seed)
    inject_sfa(reader.model, SFAConfig.published(**start))
    if bias == "placebo":
        shuffle_places(reader.model, seed)
    return sfa_parameter_groups(reader.model, options["lr"], options["sfa_lr"])


class _Aligned:
    """An aligned projector: its state and the mean loss of its last steps."""

    def __init__(self, state: dict[str, Tensor], loss: float) -> None:
        self.state, self.loss = state, loss


@lru_cache(maxsize=1)
def _aligned(size: int, samples: int, lr: float, batch: int, seed: int) -> _Aligned:
    """Aligns a projector, once per seed and process; arms run seed by seed, so one is kept."""
    reader = Reader(size, seed)
    reader.model.requires_grad_(False)
    groups = [{"params": list(reader.projector.requires_grad_(True).parameters()), "lr": lr}]
    examples = alignment_examples(samples, ALIGNMENT + seed, SIZES["same"])
    losses = reader.learn(examples, groups, batch, warmup=0.03)
    return _Aligned(copy.deepcopy(reader.projector.state_dict()), _mean(losses[-25:]))


def _mean(losses: list[float]) -> float:
    return round(float(np.mean(losses)), 4)
