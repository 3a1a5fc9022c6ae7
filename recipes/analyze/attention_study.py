"""`sfa analyze study`: the effect of SFA and of the terms of SCR on attention, measured on the nano host.

    sfa analyze study                           (2 CPU cores, about 25 minutes; numbers: docs/scr.md)
    sfa analyze study --steps 20 --questions 60 --pages 20 --out quick

The pretrained host is fine-tuned (tower and projector) without an adapter, with SFA, and with SFA and each term of SCR
alone and all together: same charts, order, seed and steps. Then all answer the same questions about charts of unseen
tables, and their attention is read on the same pages. Differences are paired: page by page, question by question.
"""

from __future__ import annotations

import copy
import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from sfa_adapters import SFAConfig, inject_sfa
from sfa_adapters.analysis import attention_entropy, hallucination_report, modality_dominance
from sfa_adapters.analysis.entropy_report import EntropyReport, compare_entropy
from sfa_adapters.analysis.hallucination import HallucinationReport
from sfa_adapters.analysis.hallucination_compare import compare as compare_hallucination
from sfa_adapters.errors import DataError
from sfa_adapters.recipes.analyze.options import StudyConfig
from sfa_adapters.recipes.nano.encode import encode, encode_packed, pixel_values
from sfa_adapters.recipes.nano.evaluate import Evaluation, evaluate
from sfa_adapters.recipes.nano.finetune import (
    FinetuneConfig,
    evidence_mask,
    finetune,
    train_tower_and_projector,
    training_charts,
)
from sfa_adapters.recipes.nano.models import PIXELS, NanoHost, load_nano
from sfa_adapters.recipes.synthetic.chart_questions import ChartSample, chart_samples
from sfa_adapters.recipes.synthetic.charts import Chart, draw, kinds_for
from sfa_adapters.recipes.synthetic.questions import questions_for
from sfa_adapters.recipes.synthetic.real_tables import load_tables
from sfa_adapters.scr import SCRConfig, SCRLoss
from sfa_adapters.statistics import Interval, bootstrap

__all__ = ["Arm", "StudyConfig", "run_study"]

STATISTICS: dict[str, Any] = {"image_mean": (1.0, 1.0, 1.0), "image_std": (0.5, 0.5, 0.5)}  # of `pixel_values`
OFF: dict[str, float] = {"entropy": 0.0, "grounding": 0.0, "stability": 0.0}
PRETRAINED, CONTROL, SFA = "pretrained", "control", "SFA"
# Weights at which each term shows within a short fine-tuning; starting points for real ones are in docs/scr.md.
TERMS: Mapping[str, Mapping[str, float]] = {
    "SFA + entropy": {"entropy": 1.0},
    "SFA + grounding": {"grounding": 0.3},
    "SFA + stability": {"stability": 0.3},
    "SFA + all three": {"entropy": 1.0, "grounding": 0.3, "stability": 0.3},
}
BAND = (0.3, 0.5)  # of H / log n: the pretrained host lies above it
BASE: Mapping[str, str] = {CONTROL: PRETRAINED, SFA: CONTROL, **dict.fromkeys(TERMS, SFA)}
Values = dict[str, np.ndarray]


@dataclass(frozen=True)
class Arm:
    """One model of the study.

    Attributes:
        name: Name of the arm.
        values: Each quantity, one number per question or page.
        entropy: Entropy of the tower's attention by text density.
        hallucination: Its wrong answers by kind.
    """

    name: str
    values: Values
    entropy: EntropyReport
    hallucination: HallucinationReport


def run_study(config: StudyConfig, console: Console | None = None) -> list[Arm]:
    """Fine-tunes and measures every arm, and writes tables and figures.

    Args:
        config: Options.
        console: Shows progress and tables; the terminal by default.

    Returns:
        The arms, the pretrained host first.

    Raises:
        DataError: The folder cannot be written.
        WeightsError: Weights of the host or of the density estimator are missing or damaged.
    """
    console = console or Console()
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        (config.out / "study.md").touch()
    except OSError as error:
        raise DataError(f"--out {config.out}: the folder cannot be written ({error.strerror}).") from error
    host = load_nano(path=config.weights)
    samples, pages = chart_samples("test", config.questions), unseen_charts(config.pages)
    charts = training_charts(config.charts, config.seed, console)
    arms = [_measured(PRETRAINED, host, samples, pages, config, console)]
    for name in BASE:
        arm = copy.deepcopy(host)
        torch.manual_seed(config.seed)
        if name != CONTROL:
            inject_sfa(arm.model, SFAConfig.published())
        train_tower_and_projector(arm.model)
        settings = FinetuneConfig(steps=config.steps, seed=config.seed)
        scr = _scr(TERMS[name]) if name in TERMS else None
        finetune(arm, charts, settings, name, console, scr)
        arms.append(_measured(name, arm, samples, pages, config, console))
    _write(arms, config)
    console.print(_table(arms))
    console.print(f"Everything is in {config.out}/")
    return arms


def unseen_charts(count: int) -> list[Chart]:
    """One chart of each test table, of different kinds; the same in every call.

    Args:
        count: Largest number of charts.
    """
    tables = load_tables("test")
    picked = [tables[i] for i in np.random.default_rng(0).permutation(len(tables))[:count]]
    return [draw(t, kinds_for(t)[i % len(kinds_for(t))], i) for i, t in enumerate(picked)]


def _scr(weights: Mapping[str, float]) -> SCRConfig:
    return SCRConfig(**{**OFF, **weights}, entropy_band=BAND, **STATISTICS)  # pyright: ignore[reportArgumentType]


def _measured(
    name: str,
    host: NanoHost,
    samples: Sequence[ChartSample],
    pages: Sequence[Chart],
    config: StudyConfig,
    console: Console,
) -> Arm:
    with console.status(f"measuring, {name}"):
        evaluation = evaluate(host, samples)
        truth = [list(sample.answers) for sample in samples]
        printed = [[text.text for text in sample.texts] for sample in samples]
        hallucination = hallucination_report(evaluation.answers, truth, printed=printed)
        entropy = attention_entropy(
            host.model, [pixel_values([page.image], PIXELS) for page in pages], normalize=True, **STATISTICS
        )
        values = _answers(evaluation, hallucination) | _attention(host, pages, config.seed)
        values |= _dominance(host, pages)
        for region, kind in enumerate(("dense", "sparse")):
            means = np.full(len(pages), np.nan)  # pages without such a region
            means[list(entropy.images)] = entropy.values[:, region].mean((-2, -1))
            values[f"H/log n, {kind}"] = means
    return Arm(name, values, entropy, hallucination)


def _answers(evaluation: Evaluation, report: HallucinationReport) -> Values:
    kinds = np.array([judgement.kind for judgement in report.judged])
    wrong = {f"{kind} %": 100.0 * (kinds == kind) for kind in ("misread", "fabricated", "other")}
    return {"accuracy %": 100.0 * evaluation.correct, **wrong}


def _dominance(host: NanoHost, pages: Sequence[Chart]) -> Values:
    questions = [questions_for(page.table)[0].text for page in pages]
    prompts = [encode(host, [page.image], [text]) for page, text in zip(pages, questions, strict=True)]
    report = modality_dominance(host.model, prompts, layers={"first": [0], "last": [3]}, max_new_tokens=8)
    measured_values: Values = {}
    for stage in report.stages:
        values = np.full(len(pages), np.nan)  # an answer of one token has no query
        values[list(report.samples)] = report.per_sample(stage)["mdi"]
        measured_values[f"MDI, {stage} layer"] = values
    return measured_values


@torch.no_grad()
def _attention(host: NanoHost, pages: Sequence[Chart], seed: int) -> Values:
    """The quantities of the three terms of SCR, page by page."""
    scr = SCRLoss(
        host.model, SCRConfig(entropy=1, grounding=1, stability=1, entropy_band=BAND, seed=seed, **STATISTICS)
    )
    names = {
        "outside the band": ("entropy", "entropy"),
        "mass on the evidence": ("grounding", "grounding_mass"),
        "divergence, nats": ("stability", "stability"),
    }
    measured_values: dict[str, list[float]] = {name: [] for name in names}
    for page in pages:
        questions = [question for question in questions_for(page.table) if question.type == "value"][:3]
        batch = encode_packed(host, [page.image], [[(q.text, q.answer) for q in questions]])
        with scr.watch():
            outputs = host.model(**batch, use_cache=False)
        _, terms = scr(outputs, batch, evidence_mask=evidence_mask(batch["labels"], [page], [questions]))
        for name, (term, quantity) in names.items():
            measured_values[name].append(terms[quantity] if terms[f"{term}_used"] else float("nan"))
    return {name: np.array(values) for name, values in measured_values.items()}


def _rows(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    by_name = {arm.name: arm for arm in arms}
    rows = []
    for arm in arms:
        for quantity, values in arm.values.items():
            row: dict[str, Any] = {"arm": arm.name, "quantity": quantity, "count": int(np.isfinite(values).sum())}
            row |= asdict(_mean(values))
            if arm.name in BASE:
                change = _mean(values - by_name[BASE[arm.name]].values[quantity])
                row |= {"against": BASE[arm.name], **{f"change {k}": v for k, v in asdict(change).items()}}
            rows.append(row)
    return rows


def _mean(values: np.ndarray) -> Interval:
    """Mean of the values that could be measured, with its interval."""
    return bootstrap(values[np.isfinite(values)])


def _cell(value: Interval) -> str:
    digits = 1 if max(abs(value.low), abs(value.high)) >= 10 else 3
    return f"{value.value:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def _table(arms: Sequence[Arm]) -> Table:
    """The table for the terminal: means and half the width of their 95% intervals."""
    table = Table("mean +- half of the 95% interval", *(arm.name for arm in arms))
    for quantity in arms[0].values:
        intervals = [_mean(arm.values[quantity]) for arm in arms]
        digits = 1 if max(abs(value.value) for value in intervals) >= 10 else 3
        table.add_row(quantity, *(f"{v.value:.{digits}f}\n+-{(v.high - v.low) / 2:.{digits}f}" for v in intervals))
    return table


def _write(arms: Sequence[Arm], config: StudyConfig) -> None:
    rows, quantities = _rows(arms), list(arms[0].values)
    settings = {key: str(value) for key, value in asdict(config).items() if key not in ("out", "weights")}
    (config.out / "study.json").write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    with (config.out / "study.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[-1]))
        writer.writeheader()
        writer.writerows(rows)
    lines = ["# sfa analyze study", "", ", ".join(f"{k} {v}" for k, v in settings.items()), ""]
    lines += [f"| {' | '.join(('quantity', *(arm.name for arm in arms)))} |", "|---" * (len(arms) + 1) + "|"]
    for quantity in quantities:
        lines.append(f"| {quantity} | {' | '.join(_cell(_mean(arm.values[quantity])) for arm in arms)} |")
    lines += ["", "Paired change:", "", f"| quantity | {' | '.join(f'{a} - {b}' for a, b in BASE.items())} |"]
    lines.append("|---" * (len(BASE) + 1) + "|")
    by_name = {arm.name: arm.values for arm in arms}
    for quantity in quantities:
        changes = [_mean(by_name[a][quantity] - by_name[b][quantity]) for a, b in BASE.items()]
        lines.append(f"| {quantity} | {' | '.join(map(_cell, changes))} |")
    (config.out / "study.md").write_text("\n".join(lines) + "\n")
    compare_entropy({arm.name: arm.entropy for arm in arms[:3]}).savefig(config.out / "entropy.png")
    compare_hallucination({arm.name: arm.hallucination for arm in arms}).savefig(config.out / "hallucination.png")
