"""`sfa analyze ...`: measurements of attention, tokens and answers, each with a table and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sfa_adapters.cli.app import CommandApp
from sfa_adapters.cli.options import from_dataclass
from sfa_adapters.recipes.analyze.options import BudgetConfig, StudyConfig

__all__ = ["app"]

app = CommandApp(
    name="analyze",
    help="Measure and draw: tokens, entropy, dominance, map, hallucination, study.",
)
OUT = typer.Option(help="Folder for table, JSON, CSV and picture.")


@app.callback()
def _group() -> None:
    """Measure and draw."""


@app.command(epilog="Example:  sfa analyze tokens --steps 40 --questions 90 --out quick")
@from_dataclass(BudgetConfig, fields=("out", "pages", "steps", "questions", "seeds", "scorer"))
def tokens(
    config: BudgetConfig,
    pictures: Annotated[
        bool,
        typer.Option("--pictures", help="Only draw pages; with --pages those of `sfa density pages`."),
    ] = False,
) -> None:
    """Accuracy and time at 25-100% of the tokens: adaptive, down-sampled, dropped at random; figures of patch plans."""
    from sfa_adapters.recipes.analyze.token_budgets import draw_pages, run_budgets

    if config.pages is not None and pictures:
        from sfa_adapters.recipes.analyze.real_gallery import draw_real_gallery

        config.out.mkdir(parents=True, exist_ok=True)
        typer.echo(f"gallery: {draw_real_gallery(config.pages, config.out / 'real_gallery.png')}")
        return
    if config.pages is not None:
        from sfa_adapters.recipes.analyze.own_pages import measure_own_pages

        measure_own_pages(config.pages, config.out)
        return
    if pictures:
        config.out.mkdir(parents=True, exist_ok=True)
        draw_pages(config.out, config.scorer)  # pyright: ignore[reportArgumentType]
        typer.echo(f"plan.png and gallery.png are in {config.out}/")
        return
    run_budgets(config)


@app.command(epilog="Example:  sfa analyze entropy page1.png page2.png --model google/siglip-base-patch16-224")
def entropy(
    images: Annotated[list[Path] | None, typer.Argument(help="Pages; charts by default.")] = None,
    model: Annotated[str | None, typer.Option(help="A model id or folder; the nano host by default.")] = None,
    out: Annotated[Path, OUT] = Path("sfa-analysis"),
    charts: Annotated[int, typer.Option(help="Number of charts, without --model.")] = 100,
    threshold: Annotated[float, typer.Option(help="Text density above which a patch is dense.")] = 0.3,
) -> None:
    """Entropy of the vision tower's attention where text is dense and where it is not."""
    from sfa_adapters.recipes.analyze.measure import run_entropy

    run_entropy(out, images or (), model, charts, threshold)


@app.command(
    epilog="Examples:  sfa analyze dominance --charts 40 --layers thirds   |   "
    "sfa analyze dominance page1.png page2.png --model llava-hf/llava-1.5-7b-hf --question 'What is the total?'"
)
def dominance(
    images: Annotated[list[Path] | None, typer.Argument(help="Pages; charts by default.")] = None,
    model: Annotated[str | None, typer.Option(help="A model id or folder; the nano host by default.")] = None,
    question: Annotated[str | None, typer.Option(help="What the model is asked about each page.")] = None,
    out: Annotated[Path, OUT] = Path("sfa-analysis"),
    charts: Annotated[int, typer.Option(help="Number of charts that the nano host is asked about.")] = 100,
    queries: Annotated[str, typer.Option(help="generated or text.")] = "generated",
    layers: Annotated[str, typer.Option(help="2/2/2 or thirds.")] = "2/2/2",
) -> None:
    """How much of the attention goes to text and how much to the image: MDI and AEI."""
    from sfa_adapters.recipes.analyze.measure import run_dominance

    run_dominance(out, charts, queries, layers, images or (), model, question)


@app.command(
    "map",
    epilog="Examples:  sfa analyze map --chart 3 --patch 4,5 --rollout   |   "
    "sfa analyze map page.png --model llava-hf/llava-1.5-7b-hf --question 'What is the total?'",
)
def attention_map(
    image: Annotated[Path | None, typer.Argument(help="A page; a test chart by default.")] = None,
    model: Annotated[str | None, typer.Option(help="A model id or folder; the nano host by default.")] = None,
    question: Annotated[str | None, typer.Option(help="What the model is asked.")] = None,
    out: Annotated[Path, OUT] = Path("sfa-analysis"),
    chart: Annotated[int, typer.Option(help="Number of the test chart.")] = 0,
    patch: Annotated[str | None, typer.Option(help="row,column of a patch of the tower.")] = None,
    token: Annotated[int, typer.Option(help="Number of the answer token, from 0, without --patch.")] = 0,
    rollout: Annotated[bool, typer.Option("--rollout", help="Through all layers of the tower.")] = False,
) -> None:
    """Attention of an answer token of a host, or of a patch of its tower, over the page."""
    from sfa_adapters.recipes.analyze.measure import run_map

    run_map(out, chart, patch, token, rollout, image, model, question)


@app.command(epilog="Example:  sfa analyze hallucination answers.jsonl --mode strict")
def hallucination(
    file: Annotated[Path, typer.Argument(help="JSON lines or CSV with prediction, answers, and image or printed.")],
    out: Annotated[Path, OUT] = Path("sfa-analysis"),
    mode: Annotated[str, typer.Option(help="Of relaxed accuracy: reference or strict.")] = "reference",
) -> None:
    """Which wrong numbers are misread from the image and which are fabricated."""
    from sfa_adapters.recipes.analyze.measure import run_hallucination

    run_hallucination(file, out, mode)


@app.command(epilog="Example:  sfa analyze study --steps 20 --questions 60 --pages 20 --out quick")
@from_dataclass(StudyConfig, fields=("out", "steps", "questions", "pages", "seed"))
def study(config: StudyConfig) -> None:
    """Attention and answers of the nano host before and after SFA, and with each term of SCR."""
    from sfa_adapters.recipes.analyze.attention_study import run_study

    run_study(config)
