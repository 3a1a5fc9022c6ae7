"""A study without a model, so that the processes of tests start quickly."""

from __future__ import annotations

import numpy as np

from sfa_adapters.recipes.studies.results_file import Outcome
from sfa_adapters.recipes.studies.settings import Job


def train(job: Job) -> Outcome:
    """A run whose pictures are as hard for all arms: differences are the gain of the arm, and no chance."""
    rng = np.random.default_rng(job.seed)
    tests = {name: (rng.random(200) < 0.5 + job.options.get("gain", 0.0)).astype(float) for name in ("same", "large")}
    return Outcome([(5, 0.4), (10, 0.6)], tests, {"row": 2.0}, 1.5, {"loss": 0.25})
