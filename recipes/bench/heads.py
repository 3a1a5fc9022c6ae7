"""`sfa bench heads`: what removing attention heads costs and brings on one host: rates x plans x compensations.

    sfa bench heads                                  (nano host, 2 CPU cores: about a quarter of an hour; docs/heads.md)
    sfa bench heads --method s4 --method gate --method flap --method random --plan global --compensation none
    sfa bench heads page.png --model llava-hf/llava-1.5-7b-hf --question "What is the total?" --device cuda

Every arm is pruned for real, and its receipt times it in turns with the whole host. On the nano host the pruned object
also answers questions about charts of unseen tables: relaxed accuracy, invented numbers, and where the question looks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.progress import track

from sfa_adapters.errors import DataError, RecipeError
from sfa_adapters.heads.calibrate import Method, calibrate_heads
from sfa_adapters.heads.compensation import COMPENSATIONS, Compensation
from sfa_adapters.heads.plan import HeadPlan, Kind, plan_heads
from sfa_adapters.heads.prune import prune_heads
from sfa_adapters.heads.receipt import PruneReceipt, prune_receipt, take_probe
from sfa_adapters.heads.speed import LEAST_ROUNDS
from sfa_adapters.hosts.user_supplied import load_own, own_prompt
from sfa_adapters.images import as_image
from sfa_adapters.recipes.bench.device import require_device
from sfa_adapters.recipes.bench.heads_figure import plot_bench_heads
from sfa_adapters.recipes.bench.heads_quality import Asked, ask, chart_batches, quality_of
from sfa_adapters.recipes.bench.heads_report import HeadArm, HeadBench, write_bench
from sfa_adapters.recipes.nano.many_heads import load_many_heads
from sfa_adapters.recipes.nano.models import NanoHost
from sfa_adapters.recipes.synthetic.chart_questions import ChartSample, chart_samples

__all__ = ["HeadBenchConfig", "run_bench_heads"]


@dataclass(frozen=True, kw_only=True)
class HeadBenchConfig:
    """Options of `sfa bench heads`.

    Attributes:
        out: Folder for table and picture.
        images: Pages, needed with `model`.
        model: A vision-language model, an id or a folder; the nano host with 16 heads a layer by default.
        question: What `model` is asked about each page.
        rates: Shares of the heads that should go.
        plans: How they are divided among layers.
        compensations: What the kept heads do for them.
        methods: What heads are scored by.
        draws: Seeds of "random": so many plans are drawn, and their answers averaged.
        charts: How many training charts the nano host is calibrated on.
        questions: How many test questions it is asked; 0 measures time only.
        rounds: How often every arm is timed.
        tokens: Decoded tokens of each timing.
        device: Where.
        dtype: Of the weights.

    Raises:
        DataError: Names the option and the value.
    """

    out: Path = Path("sfa-bench-heads")
    images: tuple[Path, ...] = ()
    model: str | None = None
    question: str | None = None
    rates: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2, 0.3)
    plans: tuple[Kind, ...] = get_args(Kind)
    compensations: tuple[Compensation, ...] = COMPENSATIONS
    methods: tuple[Method, ...] = ("s4",)
    draws: int = 3
    charts: int = 100
    questions: int = 150
    rounds: int = 5
    tokens: int = 16
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        given = (self.model is not None, bool(self.images), self.question is not None)
        if any(given) and not all(given):
            raise DataError("Give --model, --question and an image together; without them, the nano host reads charts.")
        wrong = [rate for rate in self.rates if not 0 < rate < 1]
        if wrong or not self.rates:
            raise DataError(f"--rate {wrong[0] if wrong else ''} must be a share of the heads, between 0 and 1.")
        choices = {"plan": (self.plans, Kind), "compensation": (self.compensations, Compensation)}
        for name, (chosen, known) in (choices | {"method": (self.methods, Method)}).items():
            unknown = [value for value in chosen if value not in get_args(known)]
            if unknown or not chosen:
                raise DataError(f"--{name} {' '.join(unknown)} must be one of {', '.join(get_args(known))}.")
        for name, least in (("draws", 1), ("charts", 1), ("questions", 0), ("rounds", LEAST_ROUNDS), ("tokens", 2)):
            if getattr(self, name) < least:
                option = "decoded" if name == "tokens" else name
                raise DataError(f"--{option} {getattr(self, name)} must be at least {least}.")
        require_device(self.device)
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise DataError(f"--dtype {self.dtype} must be float32, bfloat16 or float16.")


@dataclass(eq=False)
class _Subject:
    """What is pruned and asked."""

    model: Any
    batches: list[dict[str, Any]]  # prompts
    labelled: list[dict[str, Any]]  # the same with answers, for "gate"; pages of one's own have none
    host: NanoHost | None = None
    samples: Sequence[ChartSample] = ()


def run_bench_heads(config: HeadBenchConfig) -> HeadBench:
    """Measures, prints the table and writes `bench.csv`, `bench.json` and `bench.png`.

    Args:
        config: Options.

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
    todo: list[tuple[tuple[str, str, float], list[HeadPlan], Compensation]]
    todo = [(key, own, compensation) for key, own in plans.items() for compensation in config.compensations]
    known: dict[tuple[Any, ...], tuple[PruneReceipt, Asked | None]] = {}
    arms = []
    for (method, kind, rate), own, compensation in track(todo, description="pruning and asking", transient=True):
        runs = []
        for plan in own:
            # Different ways may come to the same heads: those are measured once.
            same = (compensation, *sorted(plan.removed.items()))
            if same not in known:
                known[same] = _measured(config, subject, plan, compensation)
            runs.append(known[same])
        asked = [found for _, found in runs if found is not None]
        quality = quality_of(asked, whole) if whole is not None else None
        arms.append(HeadArm(method, kind, rate, compensation, own[0].count, own[0].total, runs[0][0], quality))
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
        pages = [as_image(path) for path in config.images]  # a bad one is told before a model is loaded
        model, processor = load_own(config.model, attn_implementation="sdpa")
        prompts = [own_prompt(processor, page, config.question or "") for page in pages]
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
    """Plans by method, kind and rate, one for each draw; and what cannot be planned."""
    plans: dict[tuple[str, str, float], list[HeadPlan]] = {}
    left_out = []
    for method in config.methods:
        draws = range(config.draws if method == "random" else 1)
        batches = subject.labelled if method == "gate" else subject.batches
        scores = [calibrate_heads(subject.model, batches, method, seed=seed) for seed in draws]
        for kind in config.plans:
            for rate in config.rates:
                try:
                    plans[method, kind, rate] = [plan_heads(own, rate, kind) for own in scores]
                except RecipeError as error:
                    left_out.append((method, kind, rate, str(error)))
    return plans, left_out


def _measured(
    config: HeadBenchConfig, subject: _Subject, plan: HeadPlan, compensation: Compensation
) -> tuple[PruneReceipt, Asked | None]:
    """Prunes a copy, times it and asks it; the copy is gone afterwards."""
    model = deepcopy(subject.model)
    first = {name: value[:1] if subject.host is not None else value for name, value in subject.batches[0].items()}
    probe = take_probe(model, first)
    prune_heads(model, plan, compensation, subject.batches if compensation == "bias" else None)
    receipt = prune_receipt(probe, model, rounds=config.rounds, tokens=config.tokens)
    del probe
    found = ask(subject.host, model, subject.samples) if subject.host is not None and subject.samples else None
    return receipt, found
