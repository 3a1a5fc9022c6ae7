"""The results file of a study: one JSON object per finished run, so that a study can be resumed."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sfa_adapters.errors import DataError
from sfa_adapters.recipes.studies.settings import Job

__all__ = ["Outcome", "Row", "append_row", "read_rows", "source_commit", "todo"]

PACKAGES = ("torch", "transformers", "peft")


@dataclass(frozen=True)
class Outcome:
    """The measurements of one run.

    Attributes:
        curve: (step, score on the validation pictures) during training.
        tests: Test set to one score in [0, 1] for each picture, in their order.
        scalars: Largest scalar of each structural term at the end, logits; empty for arms without SFA.
        seconds: CPU time of the run.
        numbers: Other measurements, by name.
    """

    curve: Sequence[tuple[int, float]]
    tests: dict[str, np.ndarray]
    scalars: dict[str, float]
    seconds: float
    numbers: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A finished run, as read from the file.

    Attributes:
        key: Its name, see `Job.key`.
        arm: Its arm.
        seed: Its seed.
        budget: Its budget.
        digest: Hash of its settings.
        outcome: Its measurements.
    """

    key: str
    arm: str
    seed: int
    budget: dict[str, Any]
    digest: str
    outcome: Outcome


def append_row(path: Path, job: Job, outcome: Outcome, commit: str) -> None:
    """Appends a run to the file; the line is on disk when this returns.

    Args:
        path: The results file.
        job: The run.
        outcome: Its measurements.
        commit: Commit of the code, from `source_commit`.
    """
    line = {
        "key": job.key,
        "arm": job.arm,
        "seed": job.seed,
        "budget": dict(job.budget),
        "digest": job.digest,
        "commit": commit,
        "versions": {name: version(name) for name in PACKAGES},
        "seconds": round(outcome.seconds, 1),
        "curve": [[step, round(score, 4)] for step, score in outcome.curve],
        "tests": {name: _pack(scores) for name, scores in outcome.tests.items()},
        "scalars": {name: round(value, 3) for name, value in outcome.scalars.items()},
        "numbers": outcome.numbers,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if torn else "") + json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[Row]:
    """All finished runs of a file; none where there is no file yet.

    A last line that was cut off by a crash is left out: that run is made again.

    Args:
        path: The results file.

    Raises:
        DataError: A line is not a run.
    """
    if not path.is_file():
        return []
    rows, lines = [], path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(_row(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) or not line.endswith("}"):
                continue
            raise DataError(f"{path}, line {number}: not a run of a study ({error}).") from error
    return rows


def todo(jobs: Sequence[Job], rows: Sequence[Row], path: Path) -> list[Job]:
    """The runs that are not in the file yet.

    Args:
        jobs: All runs.
        rows: Those in the file.
        path: The file, for the error.

    Raises:
        DataError: A run of the file was made with other settings.
    """
    digests = {row.key: row.digest for row in rows}
    for job in jobs:
        if digests.get(job.key, job.digest) != job.digest:
            raise DataError(
                f"{path} holds the run {job.key!r}, made with other settings than those of today. Give another --out, "
                "or delete the file to begin again."
            )
    return [job for job in jobs if job.key not in digests]


def source_commit() -> str:
    """The commit of this clone, with `+` where files were changed since; empty outside of a clone."""
    folder = Path(__file__).resolve().parent
    try:
        head = _git(folder, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()  # noqa: S603


def _pack(scores: np.ndarray) -> str | list[float]:
    """Scores of 0 and 1 as a text of one character each, other scores as a list."""
    if np.isin(scores, (0, 1)).all():
        return "".join("1" if score else "0" for score in scores)
    return [round(float(score), 3) for score in scores]


def _row(line: dict[str, Any]) -> Row:
    tests = {
        name: np.array([float(score) for score in scores], dtype=np.float64) for name, scores in line["tests"].items()
    }
    curve = tuple((int(step), float(score)) for step, score in line["curve"])
    outcome = Outcome(curve, tests, line["scalars"], line["seconds"], line["numbers"])
    return Row(line["key"], line["arm"], line["seed"], line["budget"], line["digest"], outcome)
