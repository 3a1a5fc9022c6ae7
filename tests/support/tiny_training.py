"""Training of a tiny host: rows whose answer is the brightness of the page, and a program that tests kill."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from transformers import TrainerCallback

from sfa_adapters.data.datasets import Skipped
from sfa_adapters.hosts.load import Host, prepare
from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.training.train import TrainResult, train
from tests.support.hosts import HOSTS, IMAGE

BY_NAME = {host.name: host for host in HOSTS}
END, FIRST_ANSWER = 2, 40


def recipe(**changes: Any) -> Recipe:
    """Six steps of four rows on a CPU, in float32."""
    defaults: dict[str, Any] = {
        "name": "tiny", "model": "tiny", "family": "llava", "plan": "bf16", "dtype": "float32", "log": "none",
        "data": "tiny", "num_workers": 0, "batch_size": 4, "micro_batch": 2, "epochs": 3.0, "warmup_steps": 2,
        "save_steps": 2, "logging_steps": 1, "lr": 1e-3, "gradient_checkpointing": False,
    }  # fmt: skip
    return Recipe(**{**defaults, **changes})


def tiny_host(given: Recipe | None = None, dropout: float = 0.1) -> Host:
    """A host of the recipe's family with two decoder layers, always the same, with dropout in both parts."""
    given = given or recipe()
    model: Any = BY_NAME[given.family].build()
    if given.dtype != "float32":
        model.to(getattr(torch, given.dtype))
    host = prepare(model, None, given)
    module: Any
    for module in host.model.modules():
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = dropout
        elif isinstance(getattr(module, "dropout", None), float) and hasattr(module, "num_heads"):
            module.dropout = dropout
    return host


def sample(family: str, number: int) -> dict[str, Any]:
    """One row: a page of one of four shades, a question, and the shade as the answer."""
    shade = number % 4
    generator = torch.Generator().manual_seed(number)
    page = torch.full((3, 56, 56), shade / 2 - 0.75) + 0.05 * torch.randn(3, 56, 56, generator=generator)
    case = BY_NAME[family]
    question = torch.randint(3, 30, (3 + number % 2,), generator=generator)
    answer = torch.tensor([FIRST_ANSWER + shade, END])
    ids = torch.cat((torch.full((case.image_tokens,), IMAGE), question, answer))
    labels = torch.where(torch.arange(len(ids)) < len(ids) - 2, -100, ids)
    made: dict[str, Any] = {"input_ids": ids, "labels": labels, "pixel_values": page.clamp(-1, 1)}
    if family == "llava_onevision":
        made |= {"pixel_values": page.clamp(-1, 1).expand(2, 3, 56, 56), "image_sizes": torch.tensor([56, 56])}
    return made


class Rows(Dataset[dict[str, Any]]):
    """Rows by number; every fifth one reports that a broken row was skipped before it."""

    def __init__(self, count: int = 9, family: str = "llava") -> None:
        self.count, self.family = count, family

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Any]:
        skipped = (Skipped(f"broken{number}", "cut off"),) if number % 5 == 1 else ()
        return {"id": f"row{number}", "skipped": skipped, **sample(self.family, number)}


class Stream(IterableDataset[dict[str, Any]]):
    """The same rows as a stream."""

    def __init__(self, count: int) -> None:
        self.rows = Rows(count)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self.rows[number] for number in range(len(self.rows)))


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Makes a batch padded on the right, as `Collator` does."""
    blank = {"input_ids": 0, "labels": -100}
    batch: dict[str, Any] = {
        name: nn.utils.rnn.pad_sequence([e[name] for e in examples], batch_first=True, padding_value=fill)
        for name, fill in blank.items()
    }
    lengths = torch.tensor([len(e["input_ids"]) for e in examples])
    batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    for name in ("pixel_values", "image_sizes"):
        if name in examples[0]:
            batch[name] = torch.stack([e[name] for e in examples])
    batch["row_ids"] = [e["id"] for e in examples]
    batch["skipped"] = [skipped for e in examples for skipped in e["skipped"]]
    return batch


def run(
    folder: Path, given: Recipe | None = None, rows: Any = None, curves: bool = False, **options: Any
) -> tuple[Host, TrainResult]:
    """Trains a tiny host without console output or a picture of the curves, which takes as long as the training."""
    given = given or recipe()
    host = tiny_host(given)
    rows = Rows(family=given.family) if rows is None else rows
    options = {"console": Console(quiet=True), **options}
    with pytest.MonkeyPatch.context() as patch:
        if not curves:
            patch.setattr("sfa_adapters.training.train.plot_training", lambda *_: None)
        return host, train(host, rows, collate, folder=folder, **options)


def trained(host: Host) -> dict[str, Tensor]:
    """Copies of the parameters that are trained."""
    return {name: p.detach().clone() for name, p in host.model.named_parameters() if p.requires_grad}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Asserts that two state dicts are equal bit for bit."""
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"{len(different)} of {len(first)} differ, e.g. {different[:3]}"


class At(TrainerCallback):
    """Calls a function at the end of one step."""

    def __init__(self, step: int, act: Any) -> None:
        self.step, self.act = step, act

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.act()


def main(folder: str, *signals: str) -> None:
    """A program that trains from its latest checkpoint and gets a signal at a step, once for each `name:step`.

    Each time in a fork, with a process group of its own to which the signal is sent. Beside the folder, `NAME.log` gets
    what the fork prints, and `outcomes.json` the exit code by name and the checkpoints that it left.
    """
    torch.set_num_threads(1)
    numbers = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
    outcomes: dict[str, Any] = {}
    for name, _, step in (text.partition(":") for text in signals):
        if os.fork() == 0:
            os.setsid()
            log = os.open(Path(folder).with_name(f"{name}.log"), os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sent = At(int(step), lambda name=name: os.killpg(0, numbers[name]))
            run(Path(folder), recipe(num_workers=1), resume="auto", callbacks=[sent], console=None)
            return
        code = os.waitstatus_to_exitcode(os.wait()[1])
        outcomes[name] = [code, sorted(path.name for path in Path(folder).glob("checkpoint-*"))]
    Path(folder).with_name("outcomes.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(*sys.argv[1:])
