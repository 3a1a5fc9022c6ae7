"""`sfa bench tokens`: speed and answers of one host with FastV, for each selector and each kept share.

    sfa bench tokens                                 (nano host, 2 CPU cores: minutes; numbers: docs/fastv.md)
    sfa bench tokens page.png --model llava-hf/llava-1.5-7b-hf --question "What is the total?" --device cuda

Arms take turns with the untouched host, all on sdpa in one process: time to the first token (tower, language model and
selection, from pixels to an id), decoding speed, peak memory, cache size. On the nano host also the quality of answers:
relaxed accuracy and fabricated numbers on charts of unseen tables, and modality dominance (MDI).
"""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sfa_adapters.compat import cache_of_output
from sfa_adapters.errors import DataError
from sfa_adapters.hosts.user_supplied import load_user_model, user_prompt
from sfa_adapters.images import as_image
from sfa_adapters.recipes.bench.options import BenchConfig
from sfa_adapters.recipes.bench.tokens_quality import Quality, answer_quality
from sfa_adapters.recipes.nano.encode import encode
from sfa_adapters.recipes.nano.models import load_nano
from sfa_adapters.recipes.synthetic.chart_questions import chart_samples
from sfa_adapters.reduction.fastv.inject import FastVConfig, eject_fastv, inject_fastv
from sfa_adapters.reduction.image_tokens import image_places
from sfa_adapters.timing import answer_seconds, cache_bytes, peak_bytes
from sfa_adapters.vlm.parts import image_token_ids

__all__ = ["Arm", "BenchConfig", "run_bench"]

UNTOUCHED = "untouched"


@dataclass(frozen=True)
class Arm:
    """Measurements of one selector at one kept share.

    Attributes:
        selector: Its name, or `untouched`.
        keep: Share of image tokens that stay.
        tokens: Image tokens after the pruning, of the timed prompt.
        first_ms: Median milliseconds to the first token, selection included.
        first_ratio: Median over rounds of that time over the untouched host's in the same round.
        per_second: Median decoded tokens per second.
        cache_mb: Size of the cache after the prompt.
        peak_mb: Peak memory of one answer beyond the memory before it.
        quality: Quality of the answers, or None where there were no questions.
    """

    selector: str
    keep: float
    tokens: int
    first_ms: float
    first_ratio: float
    per_second: float
    cache_mb: float
    peak_mb: float
    quality: Quality | None = None


def run_bench(config: BenchConfig) -> list[Arm]:
    """Measures, prints the table and writes `bench.csv`, `bench.json` and `bench.png`.

    Args:
        config: Options.

    Returns:
        The untouched host, then one entry for each selector and share.

    Raises:
        DataError: A model or image cannot be loaded, or the folder cannot be written.
    """
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--out {config.out}: the folder cannot be written ({error.strerror}).") from error
    model, prompts, host, samples = _subject(config)
    settings: list[FastVConfig | None] = [None]
    for selector in config.selectors:
        settings += [FastVConfig(layer=config.layer, ratio=1 - keep, selector=selector) for keep in config.keep]  # pyright: ignore[reportArgumentType]
    times: list[list[tuple[float, float]]] = [[] for _ in settings]
    memory = [_memory(model, setting, prompts[0], config.tokens) for setting in settings]  # also the warm-up
    for number in track(range(config.rounds), description="timing", transient=True):
        for row, setting in zip(times, settings, strict=True):
            with _pruned(model, setting):
                row.append(answer_seconds(model, prompts[number % len(prompts)], config.tokens))
    arms = []
    for row, setting, (tokens, cache, peak) in track(
        zip(times, settings, memory, strict=True), "quality", len(settings), transient=True
    ):
        with _pruned(model, setting):
            quality = answer_quality(host, samples, setting) if host is not None and samples else None
        ratios = [mine[0] / base[0] for mine, base in zip(row, times[0], strict=True)]
        first, decode = (statistics.median(values) for values in zip(*row, strict=True))
        name, keep = (UNTOUCHED, 1.0) if setting is None else (setting.selector, 1 - (setting.ratio or 0))
        speed = (config.tokens - 1) / decode
        arms.append(Arm(name, keep, tokens, 1e3 * first, statistics.median(ratios), speed, cache, peak, quality))
    _write(config, arms)
    return arms


def _subject(config: BenchConfig) -> tuple[Any, list[dict[str, Any]], Any, list[Any]]:
    """The model, prompts to time, and the nano host with its questions."""
    dtype = getattr(torch, config.dtype)
    if config.model is None:
        host = load_nano()
        samples = list(chart_samples("test", max(config.questions, 4)))
        prompts = [dict(encode(host, [s.image], [s.question])) for s in samples[:4]]
        model: Any = host.model
    else:
        host, samples = None, []
        model, processor = load_user_model(config.model, attn_implementation="sdpa")
        prompts = [user_prompt(processor, as_image(path), config.question or "") for path in config.images]
    model.eval().to(config.device, dtype)
    moved = [{name: _placed(value, model) for name, value in prompt.items()} for prompt in prompts]
    return model, moved, host, samples if config.questions else []


def _placed(value: Any, model: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)


@contextmanager
def _pruned(model: Any, setting: FastVConfig | None) -> Iterator[None]:
    if setting is None:
        yield
        return
    inject_fastv(model, setting)
    try:
        yield
    finally:
        eject_fastv(model)


def _memory(
    model: Any, setting: FastVConfig | None, prompt: Mapping[str, Any], tokens: int
) -> tuple[int, float, float]:
    """Image tokens after the pruning, MB of the cache, and peak MB while answering."""
    with _pruned(model, setting):
        with torch.no_grad():
            cache = cache_of_output(model(**prompt, use_cache=True))
        held = cache_bytes(cache)
        lost = cache.layers[0].get_seq_length() - cache.layers[-1].get_seq_length()
        del cache
        peak = peak_bytes(model, prompt, tokens)
    places = image_places(prompt["input_ids"], image_token_ids(model))
    return int(places.sum()) - int(lost), held / 2**20, peak / 2**20


def _write(config: BenchConfig, arms: Sequence[Arm]) -> None:
    rows = [arm_row(arm) for arm in arms]
    with (config.out / "bench.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    record = {"options": {k: str(v) for k, v in asdict(config).items()}, "torch": torch.__version__, "arms": rows}
    (config.out / "bench.json").write_text(json.dumps(record, indent=2) + "\n")
    console = Console()
    console.print(_table(arms))
    from sfa_adapters.recipes.bench.tokens_figure import plot_bench

    plot_bench(arms, config.out / "bench.png")
    console.print(f"bench.csv, bench.json and bench.png are in {config.out}/")


def _table(arms: Sequence[Arm]) -> Table:
    """The table for a terminal of 80 columns; intervals are in the files."""
    numbers = ("kept", "first ms", "ratio", "tok /s", "cache MB", "peak MB", "acc. %", "made up %", "MDI")
    table = Table("selector", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.columns[0].no_wrap = True
    for name in numbers:
        table.add_column("\n".join(name.split()), justify="right")
    for arm in arms:
        times = [f"{arm.first_ms:.0f}", f"{arm.first_ratio:.2f}", f"{arm.per_second:.0f}"]
        measured_quality = arm.quality
        worth = [""] * 3
        if measured_quality is not None:
            worth = [
                f"{100 * measured_quality.accuracy.value:.0f}",
                f"{100 * measured_quality.invented.value:.0f}",
                f"{measured_quality.mdi.value:.2f}",
            ]
        memory = [f"{arm.cache_mb:.2f}", f"{arm.peak_mb:.1f}"]
        table.add_row(arm.selector, f"{arm.keep:.0%}", *times, *memory, *worth)
    return table


def arm_row(arm: Arm) -> dict[str, Any]:
    """One row of the CSV file."""
    row = {name: value for name, value in asdict(arm).items() if name != "quality"}
    if arm.quality is not None:
        for name in ("accuracy", "invented", "mdi"):
            value = getattr(arm.quality, name)
            row |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
    return row
