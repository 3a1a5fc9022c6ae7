"""Study of the axial start: its cost for a trained tower before training, and its gain after a few steps.

    sfa study starts --workers 2        (numbers: docs/studies/starts/)

A start at 3 logits changes what heads attend to. Which heads should it change, and at once or in a ramp? Three trained
towers (`HOSTS`) know one task and learn another one. There are three scores: `new`, the new task after training;
`known`, the task that the tower knows, with the bias and before any training; and `kept`, the same after training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from sfa_adapters import AxialRamp, SFAConfig, inject_sfa, largest_scalars
from sfa_adapters.axial import LayerHeads
from sfa_adapters.errors import DataError
from sfa_adapters.recipes.studies.results_file import Outcome
from sfa_adapters.recipes.studies.settings import Job
from sfa_adapters.recipes.studies.shuffled_places import shuffle_places

__all__ = ["HOSTS", "StartHost", "attach", "train"]

HOSTS: Mapping[str, str] = {
    "nano": "sfa_adapters.recipes.studies.starts_nano",
    "dinov2": "sfa_adapters.recipes.studies.starts_dinov2",
    "timm": "sfa_adapters.recipes.studies.starts_timm",
}


class StartHost(Protocol):
    """A trained tower with a task that it knows and a new one."""

    model: nn.Module

    def known(self) -> np.ndarray:
        """Score of each test picture of the task that the tower knows."""
        ...

    def new(self, split: str) -> np.ndarray:
        """Score of each picture of the new task.

        Args:
            split: val or test.
        """
        ...

    def learn(self, after_step: Callable[[int], None]) -> None:
        """Trains the new task for `steps`.

        Args:
            after_step: Called with the number of the step after each one.
        """
        ...


def train(job: Job) -> Outcome:
    """Trains and evaluates one run.

    Args:
        job: Its options: `host` (the budget), under the name of the host the options of that host, with `steps`; and of
            the arm `bias` (none, sfa or placebo), `init`, `heads` (first, affinity or gate), `init_strength`, `ramp`
            (share of the steps).

    Raises:
        DataError: There is no such host.
    """
    began, name = time.process_time(), job.options["host"]
    if name not in HOSTS:
        raise DataError(f"host={name!r} is none of {', '.join(HOSTS)}.")
    options = {**job.options, **job.options[name]}
    host: StartHost = import_module(HOSTS[name]).build(options, job.seed)
    known, curve = host.known(), []
    ramp = AxialRamp(host.model) if options["bias"] != "none" else None
    every = max(1, options["steps"] // options["measurements"])

    def after_step(step: int) -> None:
        if ramp is not None:
            ramp.step()
        if step % every == 0 or step == options["steps"]:
            curve.append((step, float(host.new("val").mean())))

    host.learn(after_step)
    tests = {"new": host.new("test"), "known": known, "kept": host.known()}
    scalars = {} if ramp is None else largest_scalars(host.model)
    return Outcome(curve, tests, scalars, time.process_time() - began, {})


def attach(
    model: nn.Module, options: Mapping[str, Any], seed: int, choose: Callable[[Any], dict[int, LayerHeads]]
) -> None:
    """Injects the bias of an arm into a trained model, in place; does nothing for the arm without.

    Args:
        model: The model.
        options: Options of the job.
        seed: Of the scalars and of the shuffle of a placebo.
        choose: Chooses the heads by `affinity` or by `gate`.
    """
    if options["bias"] == "none":
        return
    start: dict[str, Any] = {}
    if options.get("init", "normal") == "axial":
        start = {"init": "axial", "init_strength": float(options["init_strength"])}
        start["init_warmup_steps"] = round(options.get("ramp", 0) * options["steps"])
        if options["heads"] != "first":
            start["init_heads"] = choose(options["heads"])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_sfa(model, SFAConfig.published(**start))
    if options["bias"] == "placebo":
        shuffle_places(model, seed)
