"""`sfa calibrate ...`: measures thresholds and head scores on images, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sfa_adapters.cli.app import CommandApp

__all__ = ["app"]

app = CommandApp(
    name="calibrate",
    help="Calibrate on images, without training: dymu (thresholds), heads (scores).",
)


@app.callback()
def _group() -> None:
    """Calibrate on images."""


@app.command(epilog="Example:  sfa calibrate dymu pages/*.png --model llava-hf/llava-1.5-7b-hf --keep 0.33")
def dymu(
    images: Annotated[list[Path] | None, typer.Argument(help="Pages; charts by default.")] = None,
    model: Annotated[str | None, typer.Option(help="A model id or folder; the nano host by default.")] = None,
    keep: Annotated[float, typer.Option(help="Share of the tokens to keep on average.")] = 0.5,
    language: Annotated[str, typer.Option(help="logical_rope, vtu or off.")] = "logical_rope",
    charts: Annotated[int, typer.Option(help="Number of charts, without --model.")] = 128,
    batch: Annotated[int, typer.Option(help="Images that share their merges.")] = 64,
    out: Annotated[Path, typer.Option(help="Folder for the thresholds, e.g. that of an adapter.")] = Path("sfa-dymu"),
) -> None:
    """Thresholds above which similar tokens merge (DyMU), one per place between two layers."""
    from sfa_adapters.recipes.calibrate.dymu import run_calibrate_dymu

    run_calibrate_dymu(out, images or (), model, keep, language, charts, batch)


@app.command(
    epilog="Examples:  sfa calibrate heads --rate 0.3 --kind adaptive   |   "
    "sfa calibrate heads pages/*.png --model llava-hf/llava-1.5-7b-hf --question 'What is shown?'"
)
def heads(
    images: Annotated[list[Path] | None, typer.Argument(help="Pages; charts by default.")] = None,
    model: Annotated[str | None, typer.Option(help="A model id or folder; the nano host by default.")] = None,
    question: Annotated[str | None, typer.Option(help="What the model is asked about each page; with --model.")] = None,
    method: Annotated[
        str,
        typer.Option(help="s4 (attention from text to image), gate (slope of the loss), flap (fluctuation), random."),
    ] = "s4",
    gamma: Annotated[float, typer.Option(help="Weight of the mean in s4.")] = 0.4,
    charts: Annotated[int, typer.Option(help="Number of charts, without --model.")] = 100,
    rate: Annotated[
        float | None, typer.Option(help="Share of the heads to remove, e.g. 0.3; writes a head plan.")
    ] = None,
    kind: Annotated[
        str, typer.Option(help="Of the head plan: uniform, adaptive, early_skip (with its own rate) or global.")
    ] = "uniform",
    seed: Annotated[int, typer.Option(help="Of random scores.")] = 0,
    scores: Annotated[Path | None, typer.Option(help="Scores of an earlier run, for another head plan.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the scores and the head plan.")] = Path("sfa-heads"),
) -> None:
    """Scores of the attention heads of a language model, and a plan of which to remove."""
    from sfa_adapters.recipes.calibrate.heads import run_calibrate_heads

    run_calibrate_heads(out, images or (), model, question, method, gamma, charts, rate, kind, seed, scores)
