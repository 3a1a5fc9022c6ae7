"""`sfa bench ...`: time, memory and worth of what makes a host faster, against the untouched host in the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["app"]

app = typer.Typer(
    name="bench",
    help="Measure what makes a host faster against the untouched host: tokens.",
    no_args_is_help=True,
    rich_markup_mode="rich",
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
    from sfa_adapters.recipes.bench_tokens import BenchConfig, run_bench

    chosen: dict[str, Any] = {"selectors": selector, "keep": keep, "images": images}
    given: dict[str, Any] = {name: tuple(values) for name, values in chosen.items() if values}
    options: dict[str, Any] = {"model": model, "question": question, "out": out, "layer": layer, "device": device}
    options |= {"questions": questions, "rounds": rounds, "tokens": decoded, "dtype": dtype}
    run_bench(BenchConfig(**options, **given))
