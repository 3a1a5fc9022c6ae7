"""`sfa demo --task tables`: fine-tunes the nano host on tables, on which it was not pretrained.

Three copies of a nano host that was pretrained on charts are fine-tuned on pictures of real tables, tower and
projector: without SFA, with SFA, and with a placebo, the same bias with shuffled places. Tables, questions, their
order, seed, steps and learning rates are the same. The tests are tables of countries that no training picture shows.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from rich.console import Console

from sfa_adapters import inject_sfa, largest_scalars
from sfa_adapters.figures import plot_bias, write_bias_table
from sfa_adapters.recipes.demo.host import RELOADED, load_host, reloaded, save_trained
from sfa_adapters.recipes.demo.options import DemoConfig, DemoError, command_of, prepare_folder
from sfa_adapters.recipes.demo.tables_figures import draw_curve, draw_tables
from sfa_adapters.recipes.demo.tables_report import TablesArm, TablesReport, effect, results_table, write_results
from sfa_adapters.recipes.nano.evaluate import generate_answers
from sfa_adapters.recipes.nano.finetune import FinetuneConfig, finetune, train_tower_and_projector
from sfa_adapters.recipes.nano.models import NanoHost
from sfa_adapters.recipes.nano.teacher_forcing import exact_matches
from sfa_adapters.recipes.studies.shuffled_places import shuffle_places
from sfa_adapters.recipes.synthetic.table_pictures import TablePicture, TableSize, ask_all, table_pictures

__all__ = ["run_tables"]

# The first settings of recipes/studies/tables.yaml.
LR, SFA_LR, BATCH = 6e-4, 0.1, 8
ARMS = ("without SFA", "SFA", "placebo")
SIZE = TableSize((3, 5), (2, 3))
EACH = 6  # questions about a test table: the smallest ones have six cells
VALIDATION = 32  # tables for the curve
POINTS = 5  # of the curve, after the start
SHOWN = 12  # test tables on the page of answers


def run_tables(config: DemoConfig, console: Console) -> TablesReport:
    """Runs the task on tables; arguments, result and errors as in `run_demo`."""
    began = time.perf_counter()
    prepare_folder(config)
    host, steps = load_host(config), config.number("steps")
    console.print(f"host {config.host}: {type(host.model).__name__}, {host.parameters:,} parameters")
    test = table_pictures("test", -(-config.number("questions") // EACH), 8, SIZE)
    validation = table_pictures("val", VALIDATION, 7, SIZE)
    training = table_pictures("train", config.number("pictures"), 10_000 + config.seed, SIZE, console)
    settings = FinetuneConfig(
        steps=steps, batch_size=BATCH, questions=(5.0, 0.0, 0.0), lr=LR, bias_lr=SFA_LR, seed=config.seed
    )
    every, start = max(1, steps // POINTS), float(_scores(host, validation).mean())
    arms: list[TablesArm] = []
    trained: list[NanoHost] = []
    for name in ARMS:
        model, curve = _arm(host, name, config.seed), [(0, start)]
        result = finetune(model, training, settings, name, console, after_step=_curve(model, validation, every, curve))
        with console.status(f"answering, {name}"):
            scores, answers = _scores(model, test), _answers(model, test[:RELOADED])
        scalars = {} if name == ARMS[0] else largest_scalars(model.model)
        arms.append(TablesArm(name, curve, scores, answers, scalars, result.trainable, result.seconds))
        trained.append(model)

    with console.status("saving, loading again, drawing"):
        save_trained(trained[1], config.folder)
        if _answers(reloaded(host, config.folder), test[:RELOADED]) != arms[1].answers:
            raise DemoError(
                f"The adapter in {config.folder / 'adapter'} does not reproduce the answers of the trained model."
            )
        plot_bias(trained[1].model, config.folder / "learned_bias.png")
        write_bias_table(trained[1].model, config.folder / "learned_bias.csv")
        report = TablesReport(tuple(arms), _scores(host, test), EACH, steps, time.perf_counter() - began)
        draw_curve(report, config.folder / "curve.png")
        first = [about[0] for about in ask_all(test[:SHOWN], 1, 0)]
        draw_tables(report, test[:SHOWN], first, config.folder / "test_tables.png")
        write_results(report, config.folder, command_of(config), {"host": config.host, "seed": config.seed})
    console.print(effect(report), style="bold")
    console.print(results_table(report))
    console.print(f"{time.perf_counter() - began:.0f} s in all; everything is in {config.folder}/")
    return report


def _arm(host: NanoHost, name: str, seed: int) -> NanoHost:
    """A copy of the host for an arm, with its bias, tower and projector trainable."""
    model = copy.deepcopy(host)
    if name != ARMS[0]:
        torch.manual_seed(seed)
        inject_sfa(model.model)
    if name == "placebo":
        shuffle_places(model.model, seed)
    train_tower_and_projector(model.model)
    return model


def _curve(
    model: NanoHost, pictures: Sequence[TablePicture], every: int, curve: list[tuple[int, float]]
) -> Callable[[int], None]:
    def measure(step: int) -> None:
        if step % every == 0:
            curve.append((step, float(_scores(model, pictures).mean())))

    return measure


def _scores(host: NanoHost, pictures: Sequence[TablePicture]) -> np.ndarray:
    """Share of right answers about each table."""
    right = exact_matches(host, [picture.image for picture in pictures], ask_all(pictures, EACH, 0))
    return np.array([answers.mean() for answers in right])


def _answers(host: NanoHost, pictures: Sequence[TablePicture]) -> tuple[str, ...]:
    """Answers of the model to one question about each table."""
    questions = [about[0].text for about in ask_all(pictures, 1, 0)]
    return tuple(generate_answers(host, [picture.image for picture in pictures], questions)[0])
