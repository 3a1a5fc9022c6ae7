"""Options of `sfa demo`, and its folder. Nothing heavy is imported: `sfa --help` reads them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from sfa_adapters.errors import SFAError

__all__ = [
    "FILES",
    "DemoConfig",
    "DemoError",
    "Task",
    "command_of",
    "prepare_folder",
]

Task = Literal["tables", "charts"]
Number = Literal["steps", "questions", "pictures"]
# Files of a run, of either task; a folder with any other file is not written to.
_SHARED = ("adapter", "base.safetensors", "learned_bias.csv", "learned_bias.png", "results.json", "results.md")
FILES: Mapping[Task, tuple[str, ...]] = {
    "tables": (*_SHARED, "curve.png", "test_tables.png"),
    "charts": (*_SHARED, "test_charts.png"),
}
FOLDERS: Mapping[Task, str] = {"tables": "sfa-demo", "charts": "sfa-demo-charts"}
# Tables: so that three models train and answer in less than five minutes on two cores.
DEFAULTS: Mapping[Task, Mapping[Number, int]] = {
    "tables": {"steps": 140, "questions": 480, "pictures": 480},
    "charts": {"steps": 160, "questions": 450, "pictures": 1200},
}


class DemoError(SFAError, ValueError):
    """An option of the demo cannot be used; the text names it."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Options of `sfa demo`.

    Attributes:
        task: tables, new to the host, or charts, which it knows.
        host: Nano host: llava_onevision, internvl or llava.
        steps: Fine-tuning steps of each model; by default 140 for tables, 160 for charts.
        seed: Seed of the training pictures, of their order and of the initial bias; the test questions stay the same.
        out: Folder for the adapter, the table and the figures; by default sfa-demo, for charts sfa-demo-charts.
        weights: Weights of the host, for one that is not shipped.
        questions: Number of test questions; by default 480 for tables (six to each, rounded up), 450 for charts.
        pictures: Number of training pictures.

    Raises:
        DemoError: Names the option and the value.
    """

    task: Task = "tables"
    host: str = "llava_onevision"
    steps: int | None = None
    seed: int = 0
    out: Path | None = None
    weights: Path | None = None
    questions: int | None = None
    pictures: int | None = None

    def __post_init__(self) -> None:
        if self.task not in get_args(Task):
            raise DemoError(f"--task {self.task}: no such task. There are {', '.join(get_args(Task))}.")
        from sfa_adapters.recipes.nano.models import HOSTS

        if self.host not in HOSTS:
            raise DemoError(f"--host {self.host}: no such nano host. There are {', '.join(HOSTS)}.")
        for name in get_args(Number):
            if self.number(name) < 1:
                raise DemoError(f"--{name} {self.number(name)} must be at least 1.")
        if self.seed < 0:
            raise DemoError(f"--seed {self.seed} must be at least 0.")

    @property
    def folder(self) -> Path:
        """`out`; by default one for each task, since a folder of the other task is refused."""
        return Path(FOLDERS[self.task]) if self.out is None else self.out

    def number(self, name: Number) -> int:
        """The value of `steps`, `questions` or `pictures`; by default that of the task."""
        given: int | None = getattr(self, name)
        return DEFAULTS[self.task][name] if given is None else given


def prepare_folder(config: DemoConfig) -> None:
    """Makes the folder of the demo.

    Args:
        config: Options.

    Raises:
        DemoError: It cannot be written, or holds files that this task does not write.
    """
    folder = config.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in FILES[config.task])
    except OSError as error:
        raise DemoError(f"--out {folder}: the folder cannot be made ({error.strerror}).") from error
    if foreign:
        raise DemoError(f"--out {folder} holds other files ({foreign[0]}, ...); choose an empty or a new folder.")
    if not os.access(folder, os.W_OK):
        raise DemoError(f"--out {folder} cannot be written to.")


def command_of(config: DemoConfig) -> str:
    """The command line that makes the same run."""
    parts = ["sfa demo", f"--task {config.task}", f"--host {config.host}", f"--steps {config.number('steps')}"]
    parts += [f"--seed {config.seed}", f"--questions {config.number('questions')}"]
    return " ".join([*parts, *([f"--weights {config.weights.name}"] if config.weights else [])])
