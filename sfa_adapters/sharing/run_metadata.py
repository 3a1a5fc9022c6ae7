"""`run.json`: command, machine, time and scores of a run, for its model card."""

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
from sfa_adapters.moved import know_old_names
from sfa_adapters.sharing.folders import file_errors

__all__ = ["RUN_FILE", "RunMetadata", "describe_hardware", "read_run_metadata", "write_run_metadata"]

know_old_names(__name__)

RUN_FILE = "run.json"


@dataclass(frozen=True, kw_only=True)
class RunMetadata:
    """Record of a run; the card shows a field that is None as not recorded.

    Attributes:
        command: The command line.
        hardware: The machine, e.g. `2 x NVIDIA A100-SXM4-40GB`.
        processes: Number of training processes.
        seconds: Wall-clock time of the training.
        steps: Number of optimizer steps.
        examples: Questions that were trained on.
        skipped: Questions that were left out, e.g. for a broken image.
        loss: Training loss at the end.
        scores: One mapping per evaluation, as `ScoreTable.to_dict` gives it; `data` and `split` may be added, else
            those of the recipe count. `host` names the model if it is not the trained host, e.g. `untrained`.
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
        """The record of this process: its command line, its machine, the number of processes.

        Args:
            known: Values of other fields, or other values of these.
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
    """Writes the record of a run beside the trained weights, for the card.

    Args:
        folder: Folder of the trained adapter.
        metadata: The record.

    Returns:
        The file.

    Raises:
        RecipeError: The folder cannot be written.
    """
    path = Path(folder) / RUN_FILE
    with file_errors(path):
        path.write_text(json.dumps(dataclasses.asdict(metadata), indent=1) + "\n", encoding="utf-8")
    return path


def read_run_metadata(folder: str | Path) -> RunMetadata:
    """Reads the record of a run; all fields are None where there is none.

    Args:
        folder: Folder of the trained adapter.

    Raises:
        RecipeError: The file cannot be read.
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
