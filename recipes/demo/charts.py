"""`sfa demo --task charts`: fine-tunes the nano host on charts, on which it was fully pretrained.

1. A nano host that was pretrained without SFA answers questions about charts of tables that were never trained on.
2. Two copies are fine-tuned on charts of the training tables, tower and projector: one with SFA injected, one without.
   Steps, data order, seed and learning rates are the same.
3. All three are compared.
"""

from __future__ import annotations

import copy
import time

import torch
from rich.console import Console

from sfa_adapters import SFAConfig, inject_sfa
from sfa_adapters.figures import plot_bias, write_bias_table
from sfa_adapters.recipes.demo.host import RELOADED, load_host, reloaded, save_trained
from sfa_adapters.recipes.demo.options import DemoConfig, DemoError, command_of, prepare_folder
from sfa_adapters.recipes.demo.report import Arm, Report, draw_answers, results_table, write_results
from sfa_adapters.recipes.nano.evaluate import Evaluation, evaluate, paired_difference
from sfa_adapters.recipes.nano.finetune import FinetuneConfig, finetune, train_tower_and_projector, training_charts
from sfa_adapters.recipes.nano.models import NanoHost
from sfa_adapters.recipes.report_parts import percent
from sfa_adapters.recipes.synthetic.chart_questions import chart_samples

__all__ = ["run_charts"]


def run_charts(config: DemoConfig, console: Console) -> Report:
    """Runs the task on charts; arguments, result and errors as in `run_demo`."""
    began = time.perf_counter()
    prepare_folder(config)
    host, questions = load_host(config), config.number("questions")
    console.print(f"host {config.host}: {type(host.model).__name__}, {host.parameters:,} parameters")
    with console.status(f"drawing {questions} test charts"):
        samples = chart_samples("test", questions)
    evaluate(host, samples[:64])  # the first forward of a process is slow and must not be timed
    with console.status("answering before fine-tuning"):
        before = evaluate(host, samples)
    settings = FinetuneConfig(steps=config.number("steps"), seed=config.seed, bias_lr=0.01)
    charts = training_charts(config.number("pictures"), config.seed, console)

    with_sfa, control = copy.deepcopy(host), copy.deepcopy(host)
    torch.manual_seed(config.seed)
    inject_sfa(with_sfa.model, SFAConfig.published())  # and the rate of that time
    arms = [Arm("pretrained", before, 0, 0.0)]
    for name, arm in (("SFA", with_sfa), ("control", control)):
        train_tower_and_projector(arm.model)
        result = finetune(arm, charts, settings, name, console)
        with console.status(f"answering, {name}"):
            arms.append(Arm(name, evaluate(arm, samples), result.trainable, result.seconds))

    save_trained(with_sfa, config.folder)
    _check_reload(host, config, arms[1].evaluation)
    difference = paired_difference(arms[2].evaluation, arms[1].evaluation)
    report = Report(tuple(arms), difference, time.perf_counter() - began)
    settings_record = {"host": config.host, "seed": config.seed, "steps": config.number("steps")}
    write_results(report, config.folder, command_of(config), settings_record)
    plot_bias(with_sfa.model, config.folder / "learned_bias.png")
    write_bias_table(with_sfa.model, config.folder / "learned_bias.csv")
    draw_answers(report, config.folder / "test_charts.png")
    console.print(results_table(report))
    console.print(
        f"SFA minus control: {percent(difference)} points of accuracy (paired, 95%). Control: the same without SFA. "
        "Where the host knows the task already, nothing is gained."
    )
    console.print(f"{time.perf_counter() - began:.0f} s in all; everything is in {config.folder}/")
    return report


def _check_reload(original: NanoHost, config: DemoConfig, expected: Evaluation) -> None:
    """Checks that the reloaded model gives the same first answers.

    Raises:
        DemoError: It does not.
    """
    samples = expected.samples[:RELOADED]
    if evaluate(reloaded(original, config.folder), samples).answers != expected.answers[: len(samples)]:
        raise DemoError(
            f"The adapter in {config.folder / 'adapter'} does not reproduce the answers of the trained model."
        )
