"""Study b: a real pretrained tower, DINOv2-small, learns to answer along rows and columns.

    sfa study pretrained                rendered tables, last three layers trained
    sfa study pretrained-frozen         rendered tables, nothing but the adapter and the heads trained
    sfa study pretrained-colours        tables whose cells are patches
    sfa study pretrained-digits         real handwritten digits

Their numbers are in docs/studies/, in folders of these names.

The lower nine layers are frozen and run once per picture. Every patch on a body cell predicts what the headers of its
column and of its row show (`pretrained_pictures`). Arms of one seed have the same initial heads and see the same
pictures in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sfa_adapters import largest_scalars, sfa_parameter_groups
from sfa_adapters.recipes.studies.pretrained_net import Encoded, TableReader, encoded
from sfa_adapters.recipes.studies.results_file import Outcome
from sfa_adapters.recipes.studies.settings import Job
from sfa_adapters.recipes.studies.training import NONE, Stepper, picture_scores

__all__ = ["Run", "train"]

READING = 0.5  # weight of the auxiliary task: every patch predicts the content of its own cell
VALIDATION, TEST = 7, 8  # seeds of the pictures that all runs are measured on


def train(job: Job) -> Outcome:
    """Trains and evaluates one run.

    Args:
        job: Its options: `task`, `layers`, `steps`, `pictures`, `pool` (pictures from which a run chooses `pictures`;
            more are drawn where it needs more), `pool_seed`, `batch`, `lr`, `head_lr`, `sfa_lr`, `warmup`, `every`,
            `validation`, `test_pictures` and those of `TableReader`.
    """
    began, options = time.process_time(), job.options
    run, curve = Run(options, job.seed), []
    seconds = time.process_time() - began - run.encoding

    def after_step(step: int) -> None:
        if step % options["every"] == 0 or step == options["steps"]:
            curve.append((step, float(run.scores("val")[0].mean())))

    began = time.process_time()
    run.learn(after_step)
    seconds += time.process_time() - began
    scores, reading = run.scores("test")
    numbers = {"reading": round(float(reading.mean()), 4), "adapter_parameters": run.net.adapter_parameters}
    sfa = options.get("adapter") == "sfa"
    return Outcome(curve, {"same": scores}, largest_scalars(run.net) if sfa else {}, seconds, numbers)


class Run:
    """One run: the last layers with an arm's adapter, its pictures and its optimizer.

    Args:
        options: As for `train`.
        seed: Of heads, scalars, pictures and order.

    Attributes:
        net: The last layers with the heads.
        encoding: CPU time of the lower layers, which is spent once per process and not counted for a run.
    """

    def __init__(self, options: Mapping[str, Any], seed: int) -> None:
        began = time.process_time()
        self.options, self.seed = options, seed
        count = max(options["pool"], options["pictures"])
        self.pool = encoded(options["task"], "train", options["pool_seed"], count)
        self.validation = encoded(options["task"], "val", VALIDATION, options["validation"])
        self.encoding = time.process_time() - began
        self.net = TableReader(options, seed)

    def learn(self, after_step: Callable[[int], None]) -> None:
        """Trains for the steps of the options.

        Args:
            after_step: Called with the number of the step after each one.
        """
        options = self.options
        stepper = Stepper(self.groups(), options["steps"], options["warmup"])
        generator = torch.Generator().manual_seed(1000 + self.seed)
        chosen = torch.randperm(len(self.pool), generator=generator)[: options["pictures"]]
        order = torch.empty(0, dtype=torch.long)
        for step in range(1, options["steps"] + 1):
            while len(order) < options["batch"]:
                order = torch.cat((order, chosen[torch.randperm(len(chosen), generator=generator)]))
            batch, order = order[: options["batch"]], order[options["batch"] :]
            stepper.step(self.loss(batch))
            after_step(step)

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups of the optimizer."""
        return _groups(self.net, self.options)

    def loss(self, batch: Tensor) -> Tensor:
        """The loss on some pictures.

        Args:
            batch: Their numbers in the pool.
        """
        return _loss(self.net, self.pool, batch)

    def scores(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Scores of the headers and of the auxiliary task for each picture.

        Args:
            split: val or test.
        """
        if split == "val":
            return _measure(self.net, self.validation)
        return _measure(self.net, encoded(self.options["task"], "test", TEST, self.options["test_pictures"]))


def _loss(net: TableReader, pool: Encoded, batch: Tensor) -> Tensor:
    header, content = net(pool.features[batch])
    loss = functional.cross_entropy(header.flatten(0, 2), pool.headers[batch].flatten(), ignore_index=NONE)
    read = functional.cross_entropy(content.flatten(0, 1), pool.content[batch].flatten(), ignore_index=NONE)
    return loss + READING * read


def _groups(net: TableReader, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    lr = options["lr"]
    heads = {"params": [*net.header.parameters(), *net.content.parameters()], "lr": options["head_lr"]}
    if options.get("adapter") == "sfa":
        return [*sfa_parameter_groups(net.tower, lr, options["sfa_lr"]), heads]
    trained = [parameter for parameter in net.tower.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "lr": lr},
        {"params": [p for p in trained if p.ndim <= 1], "lr": lr, "weight_decay": 0.0},
        heads,
    ]


@torch.no_grad()
def _measure(net: TableReader, pictures: Encoded) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the headers and of the auxiliary task for each picture."""
    parts = [net(features) for features in pictures.features.split(50)]
    header = torch.cat([header for header, _ in parts]).argmax(-1)
    content = torch.cat([content for _, content in parts]).argmax(-1)
    return picture_scores(header, pictures.headers), picture_scores(content, pictures.content)
