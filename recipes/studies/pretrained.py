"""Study b: a real pretrained tower, DINOv2-small, learns to answer along rows and columns.

    sfa study pretrained                rendered tables, last three layers trained
    sfa study pretrained-frozen         rendered tables, nothing but the adapter and the heads trained
    sfa study pretrained-colours        tables of which a cell is a patch
    sfa study pretrained-digits         real handwritten digits

Their numbers are in docs/studies/, in folders of these names.

The lower nine layers are frozen and run once per picture. Every patch on a body cell answers what the headers of its
column and of its row show (`pretrained_pictures`). Arms of one seed have the same heads at the beginning and see the
same pictures in the same order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sfa_adapters import largest_scalars, sfa_parameter_groups
from sfa_adapters.recipes.studies.pretrained_net import Encoded, TableReader, encoded
from sfa_adapters.recipes.studies.pretrained_pictures import NONE
from sfa_adapters.recipes.studies.results_file import Outcome
from sfa_adapters.recipes.studies.settings import Job

__all__ = ["picture_scores", "train"]

READING = 0.5  # weight of the side task: every patch names the content of its own cell
VALIDATION, TEST = 7, 8  # seeds of the pictures that all runs are measured on


def train(job: Job) -> Outcome:
    """Trains and measures one run.

    Args:
        job: Its options: `task`, `layers`, `steps`, `pictures`, `pool` (a run trains on `pictures` of so many, or of
            all where it wants more), `pool_seed`, `batch`, `lr`, `head_lr`, `sfa_lr`, `warmup`, `every`, `validation`,
            `test_pictures` and those of `TableReader`.
    """
    began, options = time.process_time(), job.options
    pool = encoded(options["task"], "train", options["pool_seed"], max(options["pool"], options["pictures"]))
    validation = encoded(options["task"], "val", VALIDATION, options["validation"])
    encoding = time.process_time() - began  # is done once per process and belongs to no run
    net = TableReader(options, job.seed)
    optimizer, schedule, weights = _optimizer(net, options)
    generator = torch.Generator().manual_seed(1000 + job.seed)
    chosen = torch.randperm(len(pool), generator=generator)[: options["pictures"]]
    order, curve = torch.empty(0, dtype=torch.long), []
    for step in range(1, options["steps"] + 1):
        while len(order) < options["batch"]:
            order = torch.cat((order, chosen[torch.randperm(len(chosen), generator=generator)]))
        batch, order = order[: options["batch"]], order[options["batch"] :]
        _loss(net, pool, batch).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % options["every"] == 0 or step == options["steps"]:
            curve.append((step, float(_measure(net, validation)[0].mean())))
    seconds = time.process_time() - began - encoding
    test = encoded(options["task"], "test", TEST, options["test_pictures"])
    scores, reading = _measure(net, test)
    sfa = options.get("adapter") == "sfa"
    numbers = {"reading": round(float(reading.mean()), 4), "adapter_parameters": net.adapter_parameters}
    return Outcome(curve, {"same": scores}, largest_scalars(net) if sfa else {}, seconds, numbers)


def picture_scores(answers: Tensor, targets: Tensor) -> np.ndarray:
    """Share of right answers of each picture, `[pictures]`.

    Args:
        answers: `[pictures, ...]`.
        targets: The same shape, `NONE` where there is no question; every picture has one.
    """
    asked = (targets != NONE).flatten(1)
    right = (answers == targets).flatten(1)  # no answer is NONE
    return (right.sum(1) / asked.sum(1)).numpy().astype(np.float64)


def _loss(net: TableReader, pool: Encoded, batch: Tensor) -> Tensor:
    header, content = net(pool.features[batch])
    loss = functional.cross_entropy(header.flatten(0, 2), pool.headers[batch].flatten(), ignore_index=NONE)
    read = functional.cross_entropy(content.flatten(0, 1), pool.content[batch].flatten(), ignore_index=NONE)
    return loss + READING * read


def _optimizer(
    net: TableReader, options: Mapping[str, Any]
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, list[nn.Parameter]]:
    """Optimizer, schedule, and all weights but the structural scalars: those whose gradient is clipped."""
    lr, decay = options["lr"], 0.01
    if options.get("adapter") == "sfa":
        groups = sfa_parameter_groups(net.tower, lr, options["sfa_lr"], decay)
    else:
        trained = [parameter for parameter in net.tower.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "lr": lr, "weight_decay": decay},
            {"params": [p for p in trained if p.ndim <= 1], "lr": lr, "weight_decay": 0.0},
        ]
    heads = [*net.header.parameters(), *net.content.parameters()]
    weights = [p for group in groups if group.get("name") != "sfa" for p in group["params"]] + heads
    groups = [group for group in groups if group["params"]]
    groups.append({"params": heads, "lr": options["head_lr"], "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    steps, warmup = options["steps"], options["warmup"]

    def share(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * step / steps))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share), weights


@torch.no_grad()
def _measure(net: TableReader, pictures: Encoded) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the headers and of the side task for each picture."""
    parts = [net(features) for features in pictures.features.split(50)]
    header = torch.cat([header for header, _ in parts]).argmax(-1)
    content = torch.cat([content for _, content in parts]).argmax(-1)
    return picture_scores(header, pictures.headers), picture_scores(content, pictures.content)
