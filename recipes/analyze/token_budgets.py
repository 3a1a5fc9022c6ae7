"""`sfa analyze tokens`: accuracy and time at several budgets of vision tokens, and three figures.

    sfa analyze tokens                          (2 CPU cores, about 20 minutes; numbers: docs/adat.md)
    sfa analyze tokens --steps 40 --questions 90 --out quick

The pretrained nano host is fine-tuned (tower and projector) and evaluated on charts of unseen tables with

* its own tokens, 144 patches of 12 pixels;
* adaptive tokens, at most as many as the budget says, with patches finer than the tower's own and without;
* plain down-sampling: larger patches everywhere, which is the page made smaller;
* patches dropped at random.

Charts, questions, their order, seed, steps and learning rates are the same for all. The tower scatters its tokens back
to the grid, so that the language model sees 144 places in every case; places of dropped patches are zero.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from sfa_adapters.adat import AdaptiveTokenizer, PatchPolicy, inject_adat, latest_plans
from sfa_adapters.adat.scorers import Scorer, score
from sfa_adapters.errors import DataError
from sfa_adapters.recipes.analyze.options import BudgetConfig
from sfa_adapters.recipes.analyze.tokens_report import Measured, ScoredPage, plot_efficiency, plot_gallery, plot_plan
from sfa_adapters.recipes.nano.encode import pixel_values
from sfa_adapters.recipes.nano.evaluate import Evaluation, Interval, bootstrap, evaluate
from sfa_adapters.recipes.nano.finetune import FinetuneConfig, finetune, train_tower_and_projector, training_charts
from sfa_adapters.recipes.nano.models import PIXELS, NanoHost, load_nano
from sfa_adapters.recipes.report_parts import percent, terminal_table
from sfa_adapters.recipes.synthetic.chart_questions import ChartSample, chart_samples
from sfa_adapters.recipes.synthetic.charts import Chart
from sfa_adapters.recipes.synthetic.pages import PageKind, render_page

__all__ = ["BudgetConfig", "Run", "draw_pages", "run_budgets"]

UNIFORM, ADAT, DOWN, RANDOM = "uniform", "ADAT", "down-sampling", "random dropping"
COARSER = "ADAT, none finer"
SIDES = (6, 8, 10)  # patches along one side of a page that was made smaller: 25, 44 and 69% of 12 x 12
STATISTICS: dict[str, Any] = {"image_mean": (1.0, 1.0, 1.0), "image_std": (0.5, 0.5, 0.5)}  # of `pixel_values`
# Cells of 3 x 3 patches of the tower: a cell has 16, 9, 4 or 1 tokens.
LEVELS = ((0.7, 9), (0.4, 12), (0.2, 18), (0.0, 36))
# Without patches smaller than those the tower was trained on, which a short fine-tuning has to teach it.
COARSER_LEVELS = ((0.4, 12), (0.2, 18), (0.0, 36))
GALLERY: tuple[PageKind, ...] = ("text", "table", "chart", "mixed", "sparse", "blank", "lines", "photo")


@dataclass(frozen=True)
class Run:
    """All seeds of one method at one budget.

    Attributes:
        method: How tokens were saved.
        budget: Largest number of tokens of an image.
        tokens: Mean number of tokens of a test chart in the tower.
        ms: Median milliseconds of the tower for a chart, scoring and planning included.
        accuracy: Relaxed accuracy over the questions of all seeds.
        by_seed: The same for each seed.
    """

    method: str
    budget: int
    tokens: float
    ms: float
    accuracy: Interval
    by_seed: tuple[float, ...]


class _RandomPatches(nn.Module):
    """Keeps `count` random patches of each image before the encoder, and puts zeros at the other places after it."""

    def __init__(self, tower: nn.Module, count: int) -> None:
        super().__init__()
        self.count, self.kept = count, torch.empty(0)
        self.generator = torch.Generator().manual_seed(0)
        encoder: Any = tower.get_submodule("encoder")
        encoder.register_forward_pre_hook(self.drop, with_kwargs=True)
        encoder.register_forward_hook(self.lay_out)
        tower.register_forward_hook(self.lay_out_recorded)

    def drop(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        states: Tensor = kwargs["inputs_embeds"]
        self.places = states.shape[1]
        noise = torch.rand(states.shape[:2], generator=self.generator)
        self.kept = noise.topk(self.count).indices.sort().values[..., None].expand(-1, -1, states.shape[-1])
        return args, {**kwargs, "inputs_embeds": states.gather(1, self.kept)}

    def lay_out(self, _: nn.Module, args: Any, output: Any) -> Any:
        output["last_hidden_state"] = self.grid(output["last_hidden_state"])
        return output

    def lay_out_recorded(self, _: nn.Module, args: Any, output: Any) -> Any:
        if output.get("hidden_states") is not None:
            # Only the states that the host reads are recorded; the others are None.
            recorded = output["hidden_states"]
            output["hidden_states"] = tuple(None if states is None else self.grid(states) for states in recorded)
        return output

    def grid(self, short: Tensor) -> Tensor:
        grid = short.new_zeros(len(short), self.places, short.shape[-1])
        return grid.scatter(1, self.kept, short)


def run_budgets(config: BudgetConfig, console: Console | None = None) -> list[Run]:
    """Fine-tunes and evaluates the host at every budget, and writes table and figures.

    Args:
        config: Options.
        console: Shows progress and the table; the terminal by default.

    Returns:
        One entry per method and budget.

    Raises:
        DataError: The folder cannot be written.
        WeightsError: Weights of the host or of the density estimator are missing or damaged.
    """
    console = console or Console()
    _make(config.out)
    host = load_nano(path=config.weights)
    draw_pages(config.out, config.scorer)  # pyright: ignore[reportArgumentType]
    with console.status(f"drawing {config.questions} test charts"):
        samples = chart_samples("test", config.questions)
    measured_arms: dict[tuple[str, int], list[tuple[Evaluation, float, float]]] = {}
    for seed in range(config.seeds):
        charts = training_charts(config.charts, seed, console)
        for method, budget in _arms():
            result = _one(host, method, budget, charts, samples, config, seed, console)
            measured_arms.setdefault((method, budget), []).append(result)
    runs = [_summary(method, budget, results) for (method, budget), results in measured_arms.items()]
    _write(runs, config, samples)
    console.print(_table(runs, config))
    console.print(f"Everything is in {config.out}/")
    return runs


def _arms() -> list[tuple[str, int]]:
    whole = (PIXELS // 12) ** 2
    budgets = [side**2 for side in SIDES]
    arms = [(UNIFORM, whole), *((ADAT, b) for b in [*budgets, whole])]
    return [*arms, *((method, b) for method in (COARSER, DOWN, RANDOM) for b in budgets)]


def _one(
    host: NanoHost,
    method: str,
    budget: int,
    charts: Sequence[Chart],
    samples: Sequence[ChartSample],
    config: BudgetConfig,
    seed: int,
    console: Console,
) -> tuple[Evaluation, float, float]:
    """Fine-tunes one copy of the host and returns its answers, its mean number of tokens and its tower's time."""
    arm = copy.deepcopy(host)
    model: Any = arm.model
    tower: nn.Module = model.model.vision_tower
    if method == RANDOM:
        _RandomPatches(tower, budget)
    elif method == DOWN:
        levels = ((0.0, round(PIXELS / budget**0.5)),)
        inject_adat(model, PatchPolicy(levels=levels, cell=PIXELS, scorer="uniform"))
    elif method in (ADAT, COARSER):
        levels = LEVELS if method == ADAT else COARSER_LEVELS
        policy = PatchPolicy(levels=levels, cell=36, scorer=config.scorer, budget=budget)  # pyright: ignore[reportArgumentType]
        inject_adat(model, AdaptiveTokenizer(policy=policy, **STATISTICS))
    train_tower_and_projector(model)
    finetune(arm, charts, FinetuneConfig(steps=config.steps, seed=seed), f"{method} {budget}", console)
    with console.status(f"answering, {method} {budget}"):
        evaluation = evaluate(arm, samples)
    counted: list[int] = []

    def count() -> None:
        counted.append(latest_plans(model)[0].num_tokens if method != UNIFORM and method != RANDOM else budget)

    ms = _tower_time(tower, samples[: min(len(samples), 64)], count)
    return evaluation, statistics.mean(counted), ms


@torch.no_grad()
def _tower_time(tower: nn.Module, samples: Sequence[ChartSample], count: Callable[[], None]) -> float:
    times = []
    for number, sample in enumerate([samples[0], *samples]):  # the first forward warms up
        pixels = pixel_values([sample.image], PIXELS)
        start = time.perf_counter()
        tower(pixels)
        if number:
            times.append(1e3 * (time.perf_counter() - start))
            count()
    return statistics.median(times)


def _summary(method: str, budget: int, results: Sequence[tuple[Evaluation, float, float]]) -> Run:
    by_seed = tuple(float(np.mean(evaluation.correct)) for evaluation, _, _ in results)
    # Seeds share the questions: the bootstrap resamples questions, each with its mean over seeds.
    accuracy = bootstrap(np.mean([evaluation.correct for evaluation, _, _ in results], axis=0))
    tokens, ms = statistics.mean(count for _, count, _ in results), statistics.mean(time for *_, time in results)
    return Run(method, budget, tokens, ms, accuracy, by_seed)


def _table(runs: Sequence[Run], config: BudgetConfig) -> Table:
    head = ("method", "at most", "tokens", "relaxed accuracy %", "ms in the tower")
    rows = [(run.method, str(run.budget), f"{run.tokens:.0f}", percent(run.accuracy), f"{run.ms:.1f}") for run in runs]
    return terminal_table(head, rows, f"{config.questions} questions, {config.seeds} seed(s), 95% intervals")


def _write(runs: Sequence[Run], config: BudgetConfig, samples: Sequence[ChartSample]) -> None:
    whole = (PIXELS // 12) ** 2
    rows = [Measured(run.method, run.tokens / whole, run.tokens, run.ms, run.accuracy) for run in runs]
    plot_efficiency(rows, config.out / "efficiency.png")
    settings: dict[str, Any] = {"steps": config.steps, "questions": len(samples), "seeds": config.seeds}
    settings |= {"charts": config.charts, "scorer": config.scorer}
    content = {"settings": settings, "runs": [asdict(run) for run in runs]}
    (config.out / "tokens.json").write_text(json.dumps(content, indent=2) + "\n")
    lines = ["| method | at most | tokens | relaxed accuracy % | by seed | ms |", "|---|---|---|---|---|---|"]
    for run in runs:
        seeds = ", ".join(f"{100 * value:.1f}" for value in run.by_seed)
        cells = (run.method, run.budget, f"{run.tokens:.0f}", percent(run.accuracy), seeds, f"{run.ms:.1f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    listed = ", ".join(f"{name} {value}" for name, value in settings.items())
    (config.out / "tokens.md").write_text("\n".join(["# sfa analyze tokens", "", listed, "", *lines]) + "\n")


def draw_pages(folder: Path, scorer: Scorer = "density", budget: float = 0.5) -> None:
    """Draws the patch plan of one page (plan.png), and a gallery of pages with their density (gallery.png).

    Args:
        folder: Folder of the figures.
        scorer: Estimates densities.
        budget: Share of the tokens of a tower with patches of 14 pixels.
    """

    def scored(kind: PageKind) -> ScoredPage:
        image = render_page(kind, 1, "test").image
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
        return ScoredPage(kind, image, score(pixels, scorer, 16)[0])

    pages = [scored(kind) for kind in GALLERY]
    page = pages[GALLERY.index("mixed")]
    pixels = torch.from_numpy(page.image).permute(2, 0, 1)[None].float() / 255
    plan = PatchPolicy(scorer=scorer, budget=budget).plan_images(pixels, 14)[0]
    plot_plan(page, plan, folder / "plan.png")
    plot_gallery(pages, folder / "gallery.png")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokens.md").touch()
    except OSError as error:
        raise DataError(f"--out {folder}: the folder cannot be written ({error.strerror}).") from error
