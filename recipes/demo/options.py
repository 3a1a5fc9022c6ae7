"""What `sfa demo` can be told, and what its tasks share: the folder, the host, saving and loading again."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from safetensors.torch import load_file, save_file
from torch import Tensor

from sfa_adapters import load_sfa, save_sfa
from sfa_adapters.errors import SFAError, WeightsError
from sfa_adapters.recipes.nano.models import HostName, NanoHost, load_nano

__all__ = [
    "FILES",
    "RELOADED",
    "DemoConfig",
    "DemoError",
    "Task",
    "command_of",
    "load_host",
    "prepare_folder",
    "reloaded",
    "save_trained",
]

Task = Literal["tables", "charts"]
Number = Literal["steps", "questions", "pictures"]
# What a run may leave, of either task; a folder that holds anything else is not written to.
_SHARED = ("adapter", "base.safetensors", "learned_bias.csv", "learned_bias.png", "results.json", "results.md")
FILES: Mapping[Task, tuple[str, ...]] = {
    "tables": (*_SHARED, "curve.png", "test_tables.png"),
    "charts": (*_SHARED, "test_charts.png"),
}
# Tables: so that three models train and answer in less than five minutes on two cores.
DEFAULTS: Mapping[Task, Mapping[Number, int]] = {
    "tables": {"steps": 140, "questions": 480, "pictures": 480},
    "charts": {"steps": 160, "questions": 450, "pictures": 1200},
}
RELOADED = 32  # test questions that the reloaded adapter must answer in the same words


class DemoError(SFAError, ValueError):
    """An option of the demo cannot be used; the text names it."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Options of `sfa demo`.

    Attributes:
        task: `tables`, which the host does not know yet, or `charts`, which it knows.
        host: A nano host, see `recipes/nano/models.py`.
        steps: Fine-tuning steps of each model; by default what the task says, see `number`.
        seed: Of the training pictures, their order and the initial bias. The test questions stay the same.
        out: Folder for what is left behind.
        weights: Pretrained weights of a host that does not come with the package.
        questions: Number of test questions. Tables are asked six each, so that it is rounded up to a multiple of six.
        pictures: Number of training pictures.

    Raises:
        DemoError: Names the option and the value.
    """

    task: Task = "tables"
    host: str = "llava_onevision"
    steps: int | None = None
    seed: int = 0
    out: Path = Path("sfa-demo")
    weights: Path | None = None
    questions: int | None = None
    pictures: int | None = None

    def __post_init__(self) -> None:
        if self.task not in get_args(Task):
            raise DemoError(f"--task {self.task}: no such task. There are {', '.join(get_args(Task))}.")
        if self.host not in get_args(HostName):
            raise DemoError(f"--host {self.host}: no such nano host. There are {', '.join(get_args(HostName))}.")
        for name in get_args(Number):
            if self.number(name) < 1:
                raise DemoError(f"--{name} {self.number(name)} must be at least 1.")
        if self.seed < 0:
            raise DemoError(f"--seed {self.seed} must be at least 0.")

    def number(self, name: Number) -> int:
        """What was given for `steps`, `questions` or `pictures`, else the default of the task."""
        given: int | None = getattr(self, name)
        return DEFAULTS[self.task][name] if given is None else given


def prepare_folder(config: DemoConfig) -> None:
    """Makes the folder.

    Raises:
        DemoError: It cannot be written, or holds files that this task does not leave.
    """
    folder = config.out
    try:
        folder.mkdir(parents=True, exist_ok=True)
        foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in FILES[config.task])
    except OSError as error:
        raise DemoError(f"--out {folder}: the folder cannot be made ({error.strerror}).") from error
    if foreign:
        raise DemoError(f"--out {folder} holds other files ({foreign[0]}, ...); choose an empty or a new folder.")
    if not os.access(folder, os.W_OK):
        raise DemoError(f"--out {folder} cannot be written to.")


def load_host(config: DemoConfig) -> NanoHost:
    """The pretrained host.

    Raises:
        WeightsError: Its weights are missing or damaged; says how to get them.
    """
    try:
        return load_nano(config.host, path=config.weights)  # pyright: ignore[reportArgumentType]
    except WeightsError as error:
        if config.weights is not None:
            raise
        raise WeightsError(f"{error} Then give them with: sfa demo --host {config.host} --weights FILE") from error


def save_trained(host: NanoHost, folder: Path) -> None:
    """Saves the adapter, and the tower and projector that were trained with it."""
    trained: dict[str, Tensor] = {
        name: parameter.detach().contiguous()
        for name, parameter in host.model.named_parameters()
        if parameter.requires_grad and ".sfa." not in name
    }
    save_sfa(host.model, folder / "adapter")
    save_file(trained, folder / "base.safetensors", metadata={"format": "pt"})


def reloaded(original: NanoHost, folder: Path) -> NanoHost:
    """A copy of the pretrained host with what `save_trained` left."""
    again = copy.deepcopy(original)
    keys = again.model.load_state_dict(load_file(folder / "base.safetensors"), strict=False)
    assert not keys.unexpected_keys, keys.unexpected_keys
    load_sfa(again.model, folder / "adapter")
    return again


def command_of(config: DemoConfig) -> str:
    """The command line that makes the same run."""
    parts = ["sfa demo", f"--task {config.task}", f"--host {config.host}", f"--steps {config.number('steps')}"]
    parts += [f"--seed {config.seed}", f"--questions {config.number('questions')}"]
    return " ".join([*parts, *([f"--weights {config.weights.name}"] if config.weights else [])])
