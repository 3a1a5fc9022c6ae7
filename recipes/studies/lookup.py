"""Study a: a small vision transformer learns from scratch to look values up in tables.

    sfa study lookup --workers 2        (numbers: docs/studies/lookup/)

Arms of one seed share the initial values of common weights, and see the same pictures in the same order.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from sfa_adapters.rates import SFA_GROUP, largest_weights
from sfa_adapters.recipes.studies.lookup_net import LookupNet
from sfa_adapters.recipes.studies.lookup_pictures import digit_bank, draw_lookups
from sfa_adapters.recipes.studies.results_file import Outcome
from sfa_adapters.recipes.studies.settings import Job
from sfa_adapters.recipes.studies.training import NONE, Stepper, picture_scores

__all__ = ["train"]

READING = 0.5  # weight of the auxiliary task: every cell predicts its own digit
VALIDATION, TEST = 7, 8  # seeds of the pictures that all runs are measured on


def train(job: Job) -> Outcome:
    """Trains and evaluates one run.

    Args:
        job: Its options: `task` (headers or crossing), `steps`, `batch`, `grid`, `lr`, `sfa_lr`, `warmup`,
            `measurements`, `validation`, `test_pictures`, and those of `LookupNet`.
    """
    began, options = time.process_time(), job.options
    grid = (options["grid"][0], options["grid"][1])
    net = LookupNet(grid, options, job.seed)
    stepper = Stepper(_groups(net, options), options["steps"], options["warmup"])
    generator = torch.Generator().manual_seed(1000 + job.seed)
    bank, curve = digit_bank("train"), []
    every = max(1, options["steps"] // options["measurements"])
    for step in range(1, options["steps"] + 1):
        batch = draw_lookups(bank, options["batch"], grid, generator)
        answer, read, header = net(batch.patches, grid)
        if options["task"] == "crossing":
            loss = functional.cross_entropy(answer, batch.answers)
        else:
            loss = functional.cross_entropy(header.flatten(0, 2), batch.headers.flatten(), ignore_index=NONE)
        loss = loss + READING * functional.cross_entropy(read.flatten(0, 1), batch.digits.flatten())
        stepper.step(loss)
        if step % every == 0 or step == options["steps"]:
            right = _score(net, "val", options["task"], grid, options["validation"], VALIDATION)
            curve.append((step, float(right.mean())))
    tests = {
        name: _score(net, "test", options["task"], size, options["test_pictures"][name], TEST)
        for name, size in test_grids(grid).items()
        if name in options["test_pictures"]
    }
    scalars = largest_weights(structure.weights for structure in net.structures())
    extra = sum(p.numel() for block in net.blocks for p in block.position.parameters())  # pyright: ignore[reportAttributeAccessIssue]
    return Outcome(curve, tests, scalars, time.process_time() - began, {"extra_parameters": extra})


def test_grids(grid: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Rows and columns of each test set; all but the first differ from those of training.

    Args:
        grid: Rows and columns of training.
    """
    height, width = grid
    return {
        "same": grid,
        "x1.5": (height * 3 // 2, width * 3 // 2),
        "x2": (2 * height, 2 * width),
        "wide": (height * 7 // 10, width * 14 // 10),
        "tall": (height * 14 // 10, width * 7 // 10),
    }


def _groups(net: LookupNet, options: Any) -> list[dict[str, Any]]:
    scalars = [parameter for structure in net.structures() for parameter in structure.parameters()]
    ids = {id(parameter) for parameter in scalars}
    weights = [parameter for parameter in net.parameters() if id(parameter) not in ids]
    rate = options["lr"] if options["sfa_lr"] == "lr" else options["sfa_lr"]
    return [
        {"params": weights, "lr": options["lr"]},
        {"name": SFA_GROUP, "params": scalars, "lr": rate, "weight_decay": 0.0},
    ]


@torch.no_grad()
def _score(net: LookupNet, split: Any, task: str, grid: tuple[int, int], count: int, seed: int) -> np.ndarray:
    """Share of right answers of each picture, `[count]`; in `crossing` a picture has one question."""
    generator, scores = torch.Generator().manual_seed(seed), []
    for start in range(0, count, 50):
        batch = draw_lookups(digit_bank(split), min(50, count - start), grid, generator)
        answer, _, header = net(batch.patches, grid)
        if task == "crossing":
            scores.append(picture_scores(answer.argmax(-1)[:, None], batch.answers[:, None]))
        else:
            scores.append(picture_scores(header.argmax(-1), batch.headers))
    return np.concatenate(scores)
