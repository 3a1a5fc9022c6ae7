"""`sfa analyze ...`: measurements that end in a table and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(name="analyze", help="Measure and draw: tokens.", no_args_is_help=True, rich_markup_mode="rich")


@app.callback()
def _group() -> None:
    """Measure and draw."""


@app.command(epilog="Example:  sfa analyze tokens --steps 40 --questions 90 --out quick")
def tokens(
    out: Annotated[Path, typer.Option(help="Folder for the table and the pictures.")] = Path("sfa-tokens"),
    steps: Annotated[int, typer.Option(help="Fine-tuning steps of each run.")] = 160,
    questions: Annotated[int, typer.Option(help="Number of test questions.")] = 450,
    seeds: Annotated[int, typer.Option(help="How many seeds.")] = 1,
    scorer: Annotated[str, typer.Option(help="density, edges, reconstruction, entropy or uniform.")] = "density",
    pictures: Annotated[bool, typer.Option("--pictures", help="Draw the pages only; no training.")] = False,
) -> None:
    """Accuracy and time at 25-100% of the tokens: adaptive, down-sampled, dropped at random; and pictures of plans."""
    from sfa_adapters.recipes.token_budgets import BudgetConfig, draw_pages, run_budgets

    config = BudgetConfig(out=out, steps=steps, questions=questions, seeds=seeds, scorer=scorer)  # pyright: ignore[reportArgumentType]
    if pictures:
        out.mkdir(parents=True, exist_ok=True)
        draw_pages(out, config.scorer)
        typer.echo(f"plan.png and gallery.png are in {out}/")
        return
    run_budgets(config)
