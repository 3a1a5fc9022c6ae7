"""`RunMetadata`: what a model card says about a run beyond its recipe (command, machine, time, scores)."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sfa_adapters.errors import RecipeError
from sfa_adapters.moved import old_names
from sfa_adapters.sharing.folders import file_errors

__all__ = ["RUN_FILE", "RunMetadata", "describe_hardware", "read_run_metadata", "write_run_metadata"]

__getattr__ = old_names(__name__)

RUN_FILE = "run.json"


@dataclass(frozen=True, kw_only=True)
class RunMetadata:
    """Metadata of a run; the card says "not recorded" for a field that is None.

    Attributes:
        command: The command line.
        hardware: The machine, e.g. `2 x NVIDIA A100-SXM4-40GB`.
        processes: Of the training.
        seconds: Of training, wall clock.
        steps: Optimizer steps that were made.
        examples: Questions that were trained on.
        skipped: Questions that were left out, e.g. for a broken image.
        loss: Training loss at the end.
        scores: One mapping per evaluation, as `ScoreTable.to_dict` gives it; `data` and `split` may be added, else
            those of the recipe count. `host` names an evaluated host that is not the trained one, e.g. `untrained`.
        scalars: The largest structural scalar of each term after training, in logits.
    """

    command: str | None = None
    hardware: str | None = None
    processes: int | None = None
    seconds: float | None = None
    steps: int | None = None
    examples: int | None = None
    skipped: int | None = None
    loss: float | None = None
    scores: tuple[Mapping[str, Any], ...] = ()
    scalars: Mapping[str, float] | None = None

    @classmethod
    def here(cls, **known: Any) -> RunMetadata:
        """The metadata of this process: its command line, its machine, how many processes take part.

        Args:
            known: Other fields, or these with other values.
        """
        program = Path(sys.argv[0]).name
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        values = {"command": shlex.join([program, *sys.argv[1:]]), "hardware": describe_hardware()}
        return cls(**{**values, "processes": processes, **known})


def describe_hardware() -> str:
    """The machine in a few words: its GPUs, or its processor and the cores that this process may use."""
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"CPU ({platform.machine()}, {cores} cores)"


def write_run_metadata(folder: str | Path, metadata: RunMetadata) -> Path:
    """Writes the metadata beside the trained weights, for the card.

    Raises:
        RecipeError: The folder cannot be written.
    """
    path = Path(folder) / RUN_FILE
    with file_errors(path):
        path.write_text(json.dumps(dataclasses.asdict(metadata), indent=1) + "\n", encoding="utf-8")
    return path


def read_run_metadata(folder: str | Path) -> RunMetadata:
    """Reads the metadata beside trained weights; all None where there is no file.

    Raises:
        RecipeError: The file was not written by `write_run_metadata`.
    """
    path = Path(folder) / RUN_FILE
    if not path.is_file():
        return RunMetadata()
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return RunMetadata(**{**record, "scores": tuple(_mappings(record.get("scores", ())))})
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}. Remove it to make a card without it.") from error


def _mappings(scores: Any) -> Sequence[Mapping[str, Any]]:
    if not isinstance(scores, list | tuple) or not all(isinstance(entry, dict) for entry in scores):
        raise TypeError("scores must be a list of objects")
    return scores
