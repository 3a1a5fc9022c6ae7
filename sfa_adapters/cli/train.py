"""`sfa train`, `sfa plan` and `sfa recipes`: run a recipe, predict its memory, list all recipes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfa_adapters.cli.app import CommandApp
from sfa_adapters.cli.options import from_dataclass
from sfa_adapters.errors import RecipeError
from sfa_adapters.hosts.recipe import Recipe

if TYPE_CHECKING:
    from sfa_adapters.memory.predict import MemoryPlan

__all__ = ["app"]

app = CommandApp()
Name = Annotated[str, typer.Argument(metavar="RECIPE", help="Its name; `sfa recipes` lists them.")]
Settings = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Any other setting of the recipe.")]
Config = Annotated[Path | None, typer.Option(help="YAML file with settings; flags and KEY=VALUE win over it.")]
Nano = Annotated[bool, typer.Option("--nano", help="The small host of the same family: minutes on a CPU.")]
A100 = 40e9  # bytes, of each of the two cards that the recipes are made for


# The settings of a recipe that are flags of `train`. All others are given as KEY=VALUE.
FLAGS = (
    "plan", "freeze_vision", "freeze_projector", "freeze_llm", "lora_llm", "sfa", "sfa_terms", "init",
    "init_strength", "init_warmup_steps", "adat", "scr_entropy", "scr_grounding", "scr_stability", "lr", "vision_lr",
    "projector_lr", "llm_lr", "sfa_lr", "epochs", "max_steps", "batch_size", "micro_batch", "data", "limit", "output",
    "seed",
)  # fmt: skip
PAIRS = {f"freeze_{part}": f"--freeze-{part}/--train-{part}" for part in ("vision", "projector", "llm")}


@app.command(epilog="Example:  sfa train internvl3_5_8b --lr 1e-5 --sfa-terms row,col --limit 1000 weight_decay=0")
@from_dataclass(Recipe, fields=FLAGS, names=PAIRS, given_only=True)
def train(
    flags: dict[str, Any],
    recipe: Name,
    settings: Settings = None,
    config: Config = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the newest complete checkpoint.")] = False,
    resume_from: Annotated[Path | None, typer.Option(help="Resume from this checkpoint.")] = None,
    nano: Nano = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show settings, memory and steps; load and write nothing.")
    ] = False,
) -> None:
    """Fine-tune the host of RECIPE and evaluate it before and after. Later settings win: file, flags, KEY=VALUE."""
    resolved = _resolve(recipe, config, flags, settings, nano)
    if dry_run:
        _dry_run(resolved)
        return
    from sfa_adapters.recipes.run import run

    run(resolved, nano=nano, resume=str(resume_from) if resume_from else resume)


@app.command(epilog="Example:  sfa plan internvl3_5_8b --gpus 2 --memory 40GB --batch 4 --tiles 12")
def plan(
    recipe: Name,
    settings: Settings = None,
    config: Config = None,
    gpus: Annotated[int, typer.Option(help="Number of GPUs.")] = 2,
    memory: Annotated[str, typer.Option(help="Memory of each GPU: 40GB, 80GB, 24GiB.")] = "40GB",
    batch: Annotated[int | None, typer.Option(help="Questions per forward of one process.")] = None,
    tiles: Annotated[int | None, typer.Option(help="Tiles of every image; by default the recipe's maximum.")] = None,
    plan: Annotated[str | None, typer.Option(help="nf4, split, bf16 or fsdp2.")] = None,
    answer_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of the longest answer; by default 96 tokens of text, any of which has a label."),
    ] = None,
    nano: Nano = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Predict the memory that RECIPE needs on each GPU, before anything is downloaded. Exit code 2: it does not fit."""
    resolved = _resolve(recipe, config, {} if plan is None else {"plan": plan}, settings, nano)
    prediction = _predict(resolved, gpus, _bytes(memory), batch, tiles, answer_tokens)
    if as_json:
        typer.echo(json.dumps(prediction.as_dict(), indent=2))
    else:
        _show(prediction)
    if not prediction.fits:
        raise RecipeError(prediction.advice)


@app.command(epilog="Example:  sfa recipes")
def recipes() -> None:
    """List the recipes: their hosts, the parts that train, and their learning rates."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from sfa_adapters.recipes.catalog import RECIPES

    table = Table("recipe and its host", "trains", "lr", "of SFA", box=box.SIMPLE_HEAD)
    table.columns[0].no_wrap = True
    for recipe in RECIPES.values():
        host = f"[bold]{recipe.name}[/bold]\n{recipe.model}"
        table.add_row(host, f"{_trains(recipe)}\nplan {recipe.plan}\n", f"{recipe.lr:g}", f"{recipe.sfa_lr:g}")
    console = Console()
    console.print(table)
    console.print("Run one: sfa train NAME. On a CPU in minutes: sfa train NAME --nano", soft_wrap=True)


def _resolve(name: str, config: Path | None, flags: dict[str, Any], settings: list[str] | None, nano: bool) -> Recipe:
    from sfa_adapters.hosts.settings import load_recipe
    from sfa_adapters.recipes.catalog import find_recipe
    from sfa_adapters.recipes.nano.checkpoint import nano_settings

    base = find_recipe(name)
    overrides = [f"{key}={value}" for key, value in flags.items()]
    return load_recipe(nano_settings(base) if nano else base, config, [*overrides, *(settings or ())])


def _dry_run(recipe: Recipe) -> None:
    import dataclasses

    from rich.console import Console
    from rich.table import Table

    from sfa_adapters.recipes.catalog import RECIPES, training_rows
    from sfa_adapters.training.optimizer import total_steps

    console = Console()
    usual = RECIPES.get(recipe.name)
    table = Table("setting", "value", "of the recipe", title=recipe.name)
    for field in dataclasses.fields(recipe):
        value, current_value = getattr(recipe, field.name), getattr(usual, field.name, None)
        changed = usual is not None and value != current_value
        table.add_row(
            field.name, _text(value), _text(current_value) if changed else "", style="bold" if changed else None
        )
    console.print(table)
    _show(_predict(recipe))
    rows = training_rows(recipe)
    if recipe.max_steps is not None:
        console.print(f"{recipe.max_steps:,} optimizer steps of {recipe.batch_size} questions.")
    elif rows is None:
        console.print(f"How many steps shows when {recipe.data} is read: {recipe.epochs:g} passes over it.")
    else:
        steps = total_steps(recipe, rows)
        console.print(
            f"{steps:,} optimizer steps of {recipe.batch_size} questions: {recipe.epochs:g} passes over {rows:,}."
        )
    console.print("Nothing was loaded or written.")


def _predict(
    recipe: Recipe,
    gpus: int = 2,
    memory: float = A100,
    batch: int | None = None,
    tiles: int | None = None,
    answer_tokens: int | None = None,
) -> MemoryPlan:
    from sfa_adapters.memory.predict import predict_memory
    from sfa_adapters.recipes.catalog import architecture

    return predict_memory(recipe, architecture(recipe), gpus, memory, batch, tiles, answer_tokens)


def _show(prediction: MemoryPlan) -> None:
    from rich.console import Console

    console = Console()
    console.print(prediction.table())


def _trains(recipe: Recipe) -> str:
    parts = {"tower": recipe.freeze_vision, "projector": recipe.freeze_projector, "LLM": recipe.freeze_llm}
    names = [name for name, frozen in parts.items() if not frozen]
    return ", ".join(
        [*names, *(["SFA"] if recipe.sfa else []), *([f"LoRA {recipe.lora_llm}"] if recipe.lora_llm else [])]
    )


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "none" if value is None else str(value).replace("\n", "\\n")


def _bytes(size: str) -> float:
    """Parses a size of memory such as `40GB`, `24GiB` or `40` (GB) to bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([gm]i?b?)?\s*", size, re.IGNORECASE)
    if not match or float(match[1]) == 0:
        raise RecipeError(f"--memory {size!r} is no size of memory. Write e.g. 40GB.")
    unit = (match[2] or "gb").lower()
    base = 1024 if "i" in unit else 1000
    return float(match[1]) * base ** (3 if unit[0] == "g" else 2)
