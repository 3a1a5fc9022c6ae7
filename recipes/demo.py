"""The main job, `sfa demo`: a small real vision-language model on real charts, with SFA and without.

    sfa demo                                    (2 CPU cores; numbers: docs/demo.md)
    sfa demo --host internvl --weights FILE --steps 200 --out my-demo

1. A nano host that was pretrained without SFA answers questions about charts of tables that were never trained on.
2. Two copies are fine-tuned on charts of the training tables, tower and projector: one with SFA injected, one without.
   Steps, data order, seed and learning rates are the same.
3. All three are compared, and the folder gets the adapter, the table, the learned bias, and a page of answers.
"""

from __future__ import annotations

import copy
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfa_adapters import inject_sfa, load_sfa, save_sfa
from sfa_adapters.errors import SFAError, WeightsError
from sfa_adapters.figures import plot_bias, write_bias_table
from sfa_adapters.inject import eject_sfa
from sfa_adapters.recipes.data import chart_samples
from sfa_adapters.recipes.demo_report import Arm, Report, draw_answers, percent, results_table, write_results
from sfa_adapters.recipes.evaluate import Evaluation, evaluate, paired_difference
from sfa_adapters.recipes.finetune import FinetuneConfig, finetune, train_tower_and_projector, training_charts
from sfa_adapters.recipes.nano import HostName, NanoHost, load_nano

__all__ = ["DemoConfig", "DemoError", "run_demo"]

# What a run leaves; a folder that holds anything else is not written to.
FILES = (
    "adapter",
    "base.safetensors",
    "learned_bias.csv",
    "learned_bias.png",
    "results.json",
    "results.md",
    "test_charts.png",
)
RELOADED = 32  # test questions that the reloaded adapter must answer in the same words


class DemoError(SFAError, ValueError):
    """An option of the demo cannot be used; the text names it."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Options of `sfa demo`.

    Attributes:
        host: A nano host, see `recipes/nano.py`.
        steps: Fine-tuning steps of each of the two runs.
        seed: Of the data order and of the initial bias. The test questions stay the same.
        out: Folder for what is left behind.
        weights: Pretrained weights of a host that does not come with the package.
        questions: Number of test questions.
        charts: Number of training charts.

    Raises:
        DemoError: Names the option and the value.
    """

    host: str = "llava_onevision"
    steps: int = 160
    seed: int = 0
    out: Path = Path("sfa-demo")
    weights: Path | None = None
    questions: int = 450
    charts: int = 1200

    def __post_init__(self) -> None:
        if self.host not in get_args(HostName):
            raise DemoError(f"--host {self.host}: no such nano host. There are {', '.join(get_args(HostName))}.")
        for name in ("steps", "questions", "charts"):
            if getattr(self, name) < 1:
                raise DemoError(f"--{name} {getattr(self, name)} must be at least 1.")
        if self.seed < 0:
            raise DemoError(f"--seed {self.seed} must be at least 0.")


def run_demo(config: DemoConfig, console: Console | None = None) -> Report:
    """Runs the demo and leaves its folder.

    Args:
        config: Options.
        console: Where progress and the table go; the terminal by default.

    Returns:
        All numbers.

    Raises:
        DemoError: The folder cannot be written, or holds files of somebody else.
        WeightsError: The weights of the host are missing or damaged.
    """
    console = console or Console()
    began = time.perf_counter()
    _prepare_folder(config.out)
    host = _load_host(config)
    console.print(f"host {config.host}: {type(host.model).__name__}, {_count(host):,} parameters")
    with console.status(f"drawing {config.questions} test charts"):
        samples = chart_samples("test", config.questions)
    evaluate(host, samples[:64])  # the first forward of a process is slow and must not count as this model's time
    with console.status("answering before fine-tuning"):
        before = evaluate(host, samples)
    settings = FinetuneConfig(steps=config.steps, seed=config.seed)
    charts = training_charts(config.charts, config.seed, console)

    with_sfa, control = copy.deepcopy(host), copy.deepcopy(host)
    torch.manual_seed(config.seed)
    inject_sfa(with_sfa.model)
    arms = [Arm("pretrained", before, 0, 0.0)]
    for name, arm in (("SFA", with_sfa), ("control", control)):
        train_tower_and_projector(arm.model)
        result = finetune(arm, charts, settings, name, console)
        with console.status(f"answering, {name}"):
            arms.append(Arm(name, evaluate(arm, samples), result.trainable, result.seconds))

    _save(with_sfa, config)
    _check_reload(host, config, arms[1].evaluation)
    difference = paired_difference(arms[2].evaluation, arms[1].evaluation)
    report = Report(tuple(arms), difference, time.perf_counter() - began)
    settings_told = {"host": config.host, "seed": config.seed, "steps": config.steps}
    write_results(report, config.out, _command(config), settings_told)
    plot_bias(with_sfa.model, config.out / "learned_bias.png")
    write_bias_table(with_sfa.model, config.out / "learned_bias.csv")
    draw_answers(report, config.out / "test_charts.png")
    console.print(results_table(report))
    console.print(
        f"SFA minus control: {percent(difference)} points of accuracy (paired, 95%). Control: the same without SFA."
    )
    console.print(f"{time.perf_counter() - began:.0f} s in all; everything is in {config.out}/")
    return report


def _count(host: NanoHost) -> int:
    return sum(parameter.numel() for parameter in host.model.parameters())


def _prepare_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in FILES)
    except OSError as error:
        raise DemoError(f"--out {folder}: the folder cannot be made ({error.strerror}).") from error
    if foreign:
        raise DemoError(f"--out {folder} holds other files ({foreign[0]}, ...); choose an empty or a new folder.")
    if not os.access(folder, os.W_OK):
        raise DemoError(f"--out {folder} cannot be written to.")


def _load_host(config: DemoConfig) -> NanoHost:
    try:
        return load_nano(config.host, path=config.weights)  # pyright: ignore[reportArgumentType]
    except WeightsError as error:
        if config.weights is not None:
            raise
        raise WeightsError(f"{error} Then give them with: sfa demo --host {config.host} --weights FILE") from error


def _trained_base(host: NanoHost) -> dict[str, Tensor]:
    return {
        name: parameter.detach().contiguous()
        for name, parameter in host.model.named_parameters()
        if parameter.requires_grad and ".sfa." not in name
    }


def _save(host: NanoHost, config: DemoConfig) -> None:
    save_sfa(host.model, config.out / "adapter")
    save_file(_trained_base(host), config.out / "base.safetensors", metadata={"format": "pt"})


def _check_reload(original: NanoHost, config: DemoConfig, expected: Evaluation) -> None:
    """Builds the fine-tuned host again from the saved files; its first answers must be the same."""
    again = copy.deepcopy(original)
    found = again.model.load_state_dict(load_file(config.out / "base.safetensors"), strict=False)
    assert not found.unexpected_keys, found.unexpected_keys
    load_sfa(again.model, config.out / "adapter")
    samples = expected.samples[:RELOADED]
    answers = evaluate(again, samples).answers
    eject_sfa(again.model)
    if answers != expected.answers[: len(samples)]:
        raise DemoError(f"The adapter in {config.out / 'adapter'} does not reproduce the answers of the trained model.")


def _command(config: DemoConfig) -> str:
    parts = ["sfa demo", f"--host {config.host}", f"--steps {config.steps}", f"--seed {config.seed}"]
    parts += [f"--questions {config.questions}"] + ([f"--weights {config.weights.name}"] if config.weights else [])
    return " ".join(parts)
