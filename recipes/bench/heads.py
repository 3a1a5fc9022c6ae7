"""`sfa bench heads`: speed and answers of one host with pruned heads, for each rate, head plan and compensation.

    sfa bench heads                                  (nano host, 2 CPU cores: about a quarter of an hour; docs/heads.md)
    sfa bench heads --method s4 --method gate --method flap --method random --plan global --compensation none
    sfa bench heads page.png --model llava-hf/llava-1.5-7b-hf --question "What is the total?" --device cuda

Every arm is pruned for real, and its receipt times it in turns with the whole host. On the nano host the pruned object
also answers questions about charts of unseen tables: relaxed accuracy, fabricated numbers, and modality dominance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from sfa_adapters.errors import DataError, RecipeError
from sfa_adapters.heads.calibrate import calibrate_heads
from sfa_adapters.heads.compensation import Compensation
from sfa_adapters.heads.plan import HeadPlan, plan_heads
from sfa_adapters.heads.prune import prune_heads
from sfa_adapters.heads.receipt import PruneReceipt, prune_receipt, take_probe
from sfa_adapters.hosts.user_supplied import load_user_model, user_prompt
from sfa_adapters.images import as_image
from sfa_adapters.recipes.bench.heads_figure import plot_bench_heads
from sfa_adapters.recipes.bench.heads_quality import Asked, ask, chart_batches, quality_of
from sfa_adapters.recipes.bench.heads_report import HeadArm, HeadBench, write_bench
from sfa_adapters.recipes.bench.options import HeadBenchConfig
from sfa_adapters.recipes.nano.many_heads import load_many_heads
from sfa_adapters.recipes.nano.models import NanoHost
from sfa_adapters.recipes.synthetic.chart_questions import ChartSample, chart_samples

__all__ = ["HeadBenchConfig", "run_bench_heads"]


@dataclass(eq=False)
class _Subject:
    """The model to prune, its prompts, and for the nano host its test questions."""

    model: Any
    batches: list[dict[str, Any]]  # prompts
    labelled: list[dict[str, Any]]  # the same with answers, for "gate"; pages of the user have none
    host: NanoHost | None = None
    samples: Sequence[ChartSample] = ()


def run_bench_heads(config: HeadBenchConfig) -> HeadBench:
    """Measures, prints the table and writes `bench.csv`, `bench.json` and `bench.png`.

    Args:
        config: Options.

    Returns:
        All measurements.

    Raises:
        DataError: A model or image cannot be loaded, or the folder cannot be written.
        RecipeError: No plan removes a head.
    """
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--out {config.out}: the folder cannot be written ({error.strerror}).") from error
    subject = _subject(config)
    plans, left_out = _plans(config, subject)
    if not plans:
        raise RecipeError(f"No plan removes a head: {left_out[0][-1]}")
    whole = ask(subject.host, subject.model, subject.samples) if subject.host is not None and subject.samples else None
    todo: list[tuple[tuple[str, str, float], list[HeadPlan], Any]]
    todo = [
        (key, plan_of_run, compensation) for key, plan_of_run in plans.items() for compensation in config.compensations
    ]
    known: dict[tuple[Any, ...], tuple[PruneReceipt, Asked | None]] = {}
    arms = []
    for (method, kind, rate), plan_of_run, compensation in track(
        todo, description="pruning and asking", transient=True
    ):
        runs = []
        for plan in plan_of_run:
            # Different plans may remove the same heads: those are measured once.
            same = (compensation, *sorted(plan.removed.items()))
            if same not in known:
                known[same] = _measured(config, subject, plan, compensation)
            runs.append(known[same])
        qualities = [measured_quality for _, measured_quality in runs if measured_quality is not None]
        quality = quality_of(qualities, whole) if whole is not None else None
        arms.append(
            HeadArm(method, kind, rate, compensation, plan_of_run[0].count, plan_of_run[0].total, runs[0][0], quality)
        )
    name = config.model or "nano host, 16 heads in each of 4 layers"
    bench = HeadBench(name, None if whole is None else quality_of([whole], whole), tuple(arms), tuple(left_out))
    write_bench(bench, config.out, {name: str(value) for name, value in asdict(config).items()})
    plot_bench_heads(bench, config.out / "bench.png")
    Console().print(f"bench.csv, bench.json and bench.png are in {config.out}/")
    return bench


def _subject(config: HeadBenchConfig) -> _Subject:
    dtype = getattr(torch, config.dtype)
    if config.model is None:
        host = load_many_heads()
        prompts = chart_batches(host, config.charts, labelled=False)
        subject = _Subject(host.model, prompts, chart_batches(host, config.charts, labelled=True), host)
        subject.samples = chart_samples("test", config.questions) if config.questions else []
    else:
        pages = [as_image(path) for path in config.images]  # a bad one is an error before a model is loaded
        model, processor = load_user_model(config.model, attn_implementation="sdpa")
        prompts = [user_prompt(processor, page, config.question or "") for page in pages]
        subject = _Subject(model, prompts, prompts)
    subject.model.eval().to(config.device, dtype)
    for batch in (*subject.batches, *subject.labelled):
        batch |= {name: _placed(value, subject.model) for name, value in batch.items()}
    return subject


def _placed(value: Any, model: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)


Plans = Mapping[tuple[str, str, float], list[HeadPlan]]


def _plans(config: HeadBenchConfig, subject: _Subject) -> tuple[Plans, list[tuple[str, str, float, str]]]:
    """Head plans by method, kind and rate, one for each draw; and those that cannot be made, with the reason."""
    plans: dict[tuple[str, str, float], list[HeadPlan]] = {}
    left_out = []
    for method in config.methods:
        draws = range(config.draws if method == "random" else 1)
        batches = subject.labelled if method == "gate" else subject.batches
        scores = [calibrate_heads(subject.model, batches, method, seed=seed) for seed in draws]  # pyright: ignore[reportArgumentType]
        for kind in config.plans:
            for rate in config.rates:
                try:
                    plans[method, kind, rate] = [plan_heads(one, rate, kind) for one in scores]  # pyright: ignore[reportArgumentType]
                except RecipeError as error:
                    left_out.append((method, kind, rate, str(error)))
    return plans, left_out


def _measured(
    config: HeadBenchConfig, subject: _Subject, plan: HeadPlan, compensation: Compensation
) -> tuple[PruneReceipt, Asked | None]:
    """Prunes a copy, times it and evaluates its answers; the copy is freed afterwards."""
    model = deepcopy(subject.model)
    first = {name: value[:1] if subject.host is not None else value for name, value in subject.batches[0].items()}
    probe = take_probe(model, first)
    prune_heads(model, plan, compensation, subject.batches if compensation == "bias" else None)
    receipt = prune_receipt(probe, model, rounds=config.rounds, tokens=config.tokens)
    del probe
    quality = ask(subject.host, model, subject.samples) if subject.host is not None and subject.samples else None
    return receipt, quality
