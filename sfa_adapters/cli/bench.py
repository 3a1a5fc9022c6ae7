"""`sfa bench ...`: time, memory and worth of what makes a host faster, against the untouched host in the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sfa_adapters.cli.app import CommandApp

__all__ = ["app"]

app = CommandApp(
    name="bench",
    help="Measure what makes a host faster against the untouched host: tokens, heads.",
)


@app.callback()
def _group() -> None:
    """Measure what makes a host faster against the untouched host."""


@app.command(epilog="Example:  sfa bench tokens --selector attention --selector density --keep 0.5 --keep 0.25")
def tokens(
    images: Annotated[list[Path] | None, typer.Argument(help="Pages, with --model; charts by default.")] = None,
    model: Annotated[str | None, typer.Option(help="A model id or folder; the nano host by default.")] = None,
    question: Annotated[str | None, typer.Option(help="What --model is asked about each page.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for table and curve.")] = Path("sfa-bench"),
    selector: Annotated[list[str] | None, typer.Option(help="Only these selectors; all by default.")] = None,
    keep: Annotated[list[float] | None, typer.Option(help="Shares of image tokens that stay.")] = None,
    layer: Annotated[int, typer.Option(help="Tokens go in front of this layer.")] = 2,
    questions: Annotated[int, typer.Option(help="Questions about charts; 0 measures time only.")] = 150,
    rounds: Annotated[int, typer.Option(help="How often every arm is timed.")] = 5,
    decoded: Annotated[int, typer.Option(help="Decoded tokens of each timing.")] = 16,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Every selector of FastV at every share of image tokens: time to first token, tokens/s, memory, accuracy."""
    from sfa_adapters.recipes.bench.tokens import BenchConfig, run_bench

    chosen: dict[str, Any] = {"selectors": selector, "keep": keep, "images": images}
    given: dict[str, Any] = {name: tuple(values) for name, values in chosen.items() if values}
    options: dict[str, Any] = {"model": model, "question": question, "out": out, "layer": layer, "device": device}
    options |= {"questions": questions, "rounds": rounds, "tokens": decoded, "dtype": dtype}
    run_bench(BenchConfig(**options, **given))


@app.command(epilog="Example:  sfa bench heads --rate 0.1 --rate 0.3 --plan global --compensation none --method flap")
def heads(
    images: Annotated[list[Path] | None, typer.Argument(help="Pages, with --model; charts by default.")] = None,
    model: Annotated[str | None, typer.Option(help="A model id or folder; the nano host by default.")] = None,
    question: Annotated[str | None, typer.Option(help="What --model is asked about each page.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for table and picture.")] = Path("sfa-bench-heads"),
    rate: Annotated[list[float] | None, typer.Option(help="Shares of the heads that go; five by default.")] = None,
    plan: Annotated[list[str] | None, typer.Option(help="uniform, adaptive, early_skip, global; all.")] = None,
    compensation: Annotated[list[str] | None, typer.Option(help="none, absorb, bias, residual; all.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="s4 (default), gate, flap, random.")] = None,
    draws: Annotated[int, typer.Option(help="Draws of random heads, averaged.")] = 3,
    charts: Annotated[int, typer.Option(help="Training charts that heads are scored on.")] = 100,
    questions: Annotated[int, typer.Option(help="Questions about test charts; 0 measures time only.")] = 150,
    rounds: Annotated[int, typer.Option(help="How often every arm is timed.")] = 5,
    decoded: Annotated[int, typer.Option(help="Decoded tokens of each timing.")] = 16,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Heads removed by every plan at every rate: accuracy, invented numbers, MDI, speed, memory."""
    from sfa_adapters.recipes.bench.heads import HeadBenchConfig, run_bench_heads

    chosen: dict[str, Any] = {"rates": rate, "plans": plan, "compensations": compensation, "methods": method}
    chosen["images"] = images
    given: dict[str, Any] = {name: tuple(values) for name, values in chosen.items() if values}
    options: dict[str, Any] = {"model": model, "question": question, "out": out, "draws": draws, "charts": charts}
    options |= {"questions": questions, "rounds": rounds, "tokens": decoded, "device": device, "dtype": dtype}
    run_bench_heads(HeadBenchConfig(**options, **given))
