"""The training loop of the demo and the studies: AdamW, cosine with warm-up, packed questions, a progress bar.

Two runs with the same settings see the same charts and questions in the same order, whatever the model, so that a run
without SFA is a control.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from sfa_adapters.errors import DataError
from sfa_adapters.layer import SFALayer
from sfa_adapters.rates import DEFAULT_SFA_LR
from sfa_adapters.recipes.nano.encode import encode_packed
from sfa_adapters.recipes.nano.models import PATCH, PIXELS, NanoHost
from sfa_adapters.recipes.synthetic.charts import Chart, TextBox, draw, kinds_for
from sfa_adapters.recipes.synthetic.questions import Question, pick_questions
from sfa_adapters.recipes.synthetic.real_tables import load_tables
from sfa_adapters.recipes.synthetic.tables import Table
from sfa_adapters.scr import SCRConfig, SCRLoss
from sfa_adapters.scr.targets import Box, packed_evidence

__all__ = [
    "FinetuneConfig",
    "FinetuneResult",
    "Printed",
    "evidence_mask",
    "finetune",
    "train_tower_and_projector",
    "training_charts",
]


class Printed(Protocol):
    """A picture to train on: a chart, or a picture of a table."""

    @property
    def table(self) -> Table:
        """The table that questions are about."""
        ...

    @property
    def image(self) -> np.ndarray:
        """uint8 [144, 144, 3]."""
        ...

    @property
    def texts(self) -> tuple[TextBox, ...]:
        """All texts that are printed on it."""
        ...


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Settings of one run.

    Attributes:
        steps: Optimiser steps.
        batch_size: Charts per step.
        questions: Mean number of value, difference and largest questions about a chart.
        lr: Peak learning rate of the model's own weights.
        bias_lr: Peak learning rate of the structural scalars. They start near 0 and act in logits, so they need larger
            steps than weights do.
        warmup: Share of the steps in which the learning rate rises.
        weight_decay: On matrices of the model only.
        seed: Of the order of charts and questions.

    Raises:
        DataError: A number is out of range; names it.
    """

    steps: int
    batch_size: int = 16
    questions: tuple[float, float, float] = (3.0, 1.0, 1.0)
    lr: float = 3e-4
    bias_lr: float = DEFAULT_SFA_LR
    warmup: float = 0.1
    weight_decay: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise DataError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.seed < 0:
            raise DataError(f"seed={self.seed} must be at least 0.")


@dataclass(frozen=True)
class FinetuneResult:
    """Losses, time and size of a run.

    Attributes:
        losses: Loss of each step.
        seconds: Wall-clock time of the loop.
        trainable: Number of parameters that were trained.
    """

    losses: tuple[float, ...]
    seconds: float
    trainable: int


def training_charts(count: int, seed: int, console: Console | None = None) -> list[Chart]:
    """Draws charts of the real tables of the training split.

    Args:
        count: Number of charts; each table is used once before any is used twice, if possible as another kind of
            chart.
        seed: Of tables, kinds and colours.
        console: Shows the progress bar; none by default.
    """
    rng = np.random.default_rng(seed)
    tables = load_tables("train")
    charts: list[Chart] = []
    with _progress(console) as bar:
        task = bar.add_task("drawing training charts", total=count)
        while len(charts) < count:
            for index in rng.permutation(len(tables))[: count - len(charts)]:
                kinds = kinds_for(tables[index])
                charts.append(draw(tables[index], kinds[int(rng.integers(len(kinds)))], int(rng.integers(2**31))))
                bar.advance(task)
    return charts


def train_tower_and_projector(model: nn.Module) -> int:
    """Freezes everything but the vision tower (with what is injected there) and the projector.

    Returns:
        The number of trainable parameters.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower" in name or "multi_modal_projector" in name)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def finetune(
    host: NanoHost,
    charts: Sequence[Printed],
    config: FinetuneConfig,
    label: str,
    console: Console | None = None,
    scr: SCRConfig | None = None,
    after_step: Callable[[int], None] | None = None,
) -> FinetuneResult:
    """Trains the parameters that require gradients, in place; the host is in eval mode afterwards.

    Args:
        host: The model with its tokenizer.
        charts: Charts or tables to train on; used as often as the steps need, in a new order each time.
        config: Settings.
        label: Label of the progress bar.
        console: Shows the progress bar; none by default.
        scr: SCR terms to add to the loss. Evidence is the boxes of the marks that a question is about.
        after_step: Called with the number of the step after each one; it may measure the host, and must leave it in
            training mode.

    Returns:
        Losses, time and number of trained parameters.

    Raises:
        DataError: There is no chart, or nothing to train.
    """
    if not charts:
        raise DataError("Fine-tuning needs at least one chart.")
    optimizer = torch.optim.AdamW(_groups(host.model, config), betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, round(config.warmup * config.steps), config.steps)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    batches = _Batches(charts, config)
    losses: list[float] = []
    regularizer = None if scr is None else SCRLoss(host.model, scr)
    host.model.train()
    began = time.perf_counter()
    with _progress(console, TextColumn("loss {task.fields[loss]:.3f}")) as bar:
        task = bar.add_task(label, total=config.steps, loss=float("nan"))
        for step in range(1, config.steps + 1):
            drawn, picked = next(batches)
            loss = _loss(host, drawn, picked, regularizer)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            bar.update(task, advance=1, loss=float(np.mean(losses[-20:])))
            if after_step is not None:
                after_step(step)
    host.model.eval()
    count = sum(parameter.numel() for parameter in trained)
    return FinetuneResult(tuple(losses), time.perf_counter() - began, count)


def _loss(
    host: NanoHost, charts: Sequence[Printed], questions: Sequence[Sequence[Question]], scr: SCRLoss | None
) -> Tensor:
    pairs = [[(question.text, question.answer) for question in of_picture] for of_picture in questions]
    batch = encode_packed(host, [chart.image for chart in charts], pairs)
    if scr is None:
        return host.model(**batch, use_cache=False).loss
    with scr.watch():
        outputs = host.model(**batch, use_cache=False)
    penalty, _ = scr(outputs, batch, evidence_mask=evidence_mask(batch["labels"], charts, questions))
    return outputs.loss + penalty


def evidence_mask(labels: Tensor, charts: Sequence[Printed], questions: Sequence[Sequence[Question]]) -> Tensor:
    """Evidence for `SCRLoss`: the places of the marks that each question is about.

    Args:
        labels: `[B, L]`, as `encode_packed` gives them.
        charts: B pictures.
        questions: Questions about each of them.

    Returns:
        `[B, L, patches]`.
    """
    boxes = [
        [_evidence(chart, question) for question in of_chart] for chart, of_chart in zip(charts, questions, strict=True)
    ]
    side = PIXELS // PATCH
    return packed_evidence(labels, boxes, (PIXELS, PIXELS), (side, side))


def _evidence(chart: Printed, question: Question) -> list[Box]:
    """Boxes of the numbers of the marks, or of their names where the answer is a name."""
    role = "row" if question.type == "largest" else "value"
    marks = {(0, row) for _, row in question.marks} if role == "row" else set(question.marks)
    return [text.box for text in chart.texts if text.role == role and (text.series, text.row) in marks]


def _groups(model: nn.Module, config: FinetuneConfig) -> list[dict[str, Any]]:
    scalars = {id(p) for module in model.modules() if isinstance(module, SFALayer) for p in module.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise DataError("Nothing to train: every parameter is frozen.")
    others = [parameter for parameter in trained if id(parameter) not in scalars]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "lr": config.lr, "weight_decay": config.weight_decay},
        {"params": [p for p in others if p.ndim <= 1], "lr": config.lr, "weight_decay": 0.0},
        {"params": [p for p in trained if id(p) in scalars], "lr": config.bias_lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class _Batches:
    """Endless batches of pictures and their questions, the same for every run with the same settings."""

    def __init__(self, charts: Sequence[Printed], config: FinetuneConfig) -> None:
        self.charts, self.config = charts, config
        self.rng = np.random.default_rng(config.seed)
        self.order: list[int] = []

    def __next__(self) -> tuple[list[Printed], list[list[Question]]]:
        while len(self.order) < self.config.batch_size:
            self.order += self.rng.permutation(len(self.charts)).tolist()
        chosen = [self.charts[self.order.pop(0)] for _ in range(self.config.batch_size)]
        return chosen, [pick_questions(chart.table, self.config.questions, self.rng) for chart in chosen]


def _progress(console: Console | None, *columns: Any) -> Progress:
    return Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        *columns,
        console=console,
        disable=console is None,
    )
