"""The settings of a study: one YAML file, committed before the test pictures are drawn.

A study trains each *arm* (a variant of the model, such as one with another position encoding) for each *budget* (steps,
pictures) with each seed. Everything that a run depends on is in the file; nothing is chosen after results are known.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from sfa_adapters.errors import DataError

__all__ = ["Job", "Primary", "StudySettings", "load_settings"]

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Primary:
    """The one comparison that decides the claim; everything else is secondary.

    Attributes:
        arm: The arm whose gain over the control is tested.
        test: The test set.
        budget: The budget.
    """

    arm: str
    test: str
    budget: Options


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        arm: Name of the arm.
        seed: Of weights, data and order; runs of one seed are paired.
        budget: Steps, pictures, ..., by name.
        options: All settings of the run: those of the study, overridden by those of the arm, and these by the budget.
    """

    arm: str
    seed: int
    budget: Options
    options: Options

    @property
    def key(self) -> str:
        """Name of the run in the results file."""
        return " ".join([self.arm, f"seed={self.seed}", *(f"{name}={value}" for name, value in self.budget.items())])

    @property
    def digest(self) -> str:
        """Hash of the settings of the run."""
        text = json.dumps([self.arm, self.seed, self.options], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """All settings of a study.

    Attributes:
        name: Name of the study on the command line.
        title: Its question in one line.
        metric: Definition of the scores, with their unit.
        primary: The comparison that decides.
        control: The arm that others are compared with.
        placebo: The arm that must have no gain.
        seeds: Of the reported runs.
        budgets: Each a mapping, e.g. `{steps: 500}`.
        fewer_seeds: Budgets that run with some of the seeds only: `{budget: {steps: 1500}, seeds: [0, 1, 2]}`.
        arms: Name to options of the arm; `budgets` and `seeds` in it restrict it to some of them, and `figure: false`
            leaves it out of the figures.
        tests: Names of the test sets, the first one the main one.
        measures: Further quantities per picture that are not scores; they are in the table, not in the figures.
        train: Settings of all runs.
        thresholds: Shares of right answers; the table says after how many steps each is passed.
        tuning: `seeds`, `budget`, and `grids`: for each group of arms the values tried; none of it is reported as a
            result. `before`: options of arms while they were tuned, where the choice has changed them since.
    """

    name: str
    title: str
    metric: str
    primary: Primary
    control: str
    placebo: str
    seeds: Sequence[int]
    budgets: Sequence[Options]
    arms: Mapping[str, Options]
    tests: Sequence[str]
    train: Options
    measures: Sequence[str] = ()
    fewer_seeds: Sequence[Options] = ()
    thresholds: Sequence[float] = (0.5, 0.9)
    tuning: Options = field(default_factory=dict)

    def __post_init__(self) -> None:
        for role in (self.control, self.placebo, self.primary.arm):
            if role not in self.arms:
                raise DataError(f"{self.name}: no arm {role!r} in arms ({', '.join(self.arms)}).")
        if self.primary.test not in self.tests or self.primary.budget not in self.budgets:
            raise DataError(f"{self.name}: primary names a test set or a budget that the study does not have.")
        for entry in self.fewer_seeds:
            if entry["budget"] not in self.budgets or not set(entry["seeds"]) <= set(self.seeds):
                raise DataError(f"{self.name}: fewer_seeds names an unknown budget or seed: {entry}.")
        both = set(self.seeds) & set(self.tuning.get("seeds", ()))
        if both:
            raise DataError(f"{self.name}: seeds {sorted(both)} are reported and tuned on; they must differ.")

    def jobs(self) -> list[Job]:
        """The reported runs, budget by budget and seed by seed, so that finished runs of arms are paired."""
        return [
            self._job(arm, seed, budget)
            for budget, seed, arm in product(self.budgets, self.seeds, self.arms)
            if budget in self.arms[arm].get("budgets", self.budgets)
            and seed in self.arms[arm].get("seeds", self.seeds)
            and seed in self._seeds_of(budget)
        ]

    def _seeds_of(self, budget: Options) -> Sequence[int]:
        return next((entry["seeds"] for entry in self.fewer_seeds if entry["budget"] == budget), self.seeds)

    def tuning_jobs(self) -> list[Job]:
        """Runs on the seeds of the tuning, over the grid of each arm; the values are part of the arm's name."""
        jobs = []
        for grid in self.tuning.get("grids", ()):
            names = [name for name in grid if name != "arms"]
            for seed, arm, values in product(self.tuning["seeds"], grid["arms"], product(*(grid[n] for n in names))):
                tried = dict(zip(names, values, strict=True))
                job = self._job(arm, seed, self.tuning["budget"])
                name = " ".join([arm, *(f"{key}={value:g}" for key, value in tried.items())])
                before = self.tuning.get("before", {}).get(arm, {})
                jobs.append(Job(name, seed, job.budget, {**job.options, **before, **tried}))
        return jobs

    def _job(self, arm: str, seed: int, budget: Options) -> Job:
        of_arm = {name: value for name, value in self.arms[arm].items() if name not in ("budgets", "seeds", "figure")}
        return Job(arm, seed, budget, {**self.train, **of_arm, **budget})


def load_settings(source: str | Path) -> StudySettings:
    """Reads a study.

    Args:
        source: Name of a study that comes with the package, or a YAML file.

    Raises:
        DataError: There is no such file, or it has a setting that no study has.
    """
    path: Any = files("sfa_adapters.recipes.studies") / f"{source}.yaml" if isinstance(source, str) else source
    if not path.is_file():
        raise DataError(f"No settings of a study at {path}.")
    try:
        written = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as YAML: {error}") from error
    names = {each.name for each in fields(StudySettings)}
    if not isinstance(written, dict) or set(written) - names or "primary" not in written:
        unknown = sorted(set(written) - names) if isinstance(written, dict) else written
        raise DataError(
            f"{path}: not the settings of a study; unknown: {unknown}. There are {', '.join(sorted(names))}."
        )
    try:
        return StudySettings(**{**written, "primary": Primary(**written["primary"])})
    except TypeError as error:
        raise DataError(f"{path}: {error}") from error
