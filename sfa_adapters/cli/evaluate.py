"""`sfa eval` and `sfa ablate`: answers of a host to a dataset with their scores, and tables of many runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfa_adapters.cli.app import CommandApp
from sfa_adapters.errors import DataError, RecipeError, TrainingError

if TYPE_CHECKING:
    from accelerate import PartialState

    from sfa_adapters.evaluation.tables import Table
    from sfa_adapters.heads.metadata import PrunedMetadata
    from sfa_adapters.hosts.recipe import Recipe

__all__ = ["app"]

app = CommandApp()
ROWS = ("terms", "parts")


@app.command(
    "eval", epilog="Example:  sfa eval runs/internvl3_5_8b --limit 200 --against runs/control/predictions.jsonl"
)
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_RUN", help="A run, a recipe, a model id or folder.")],
    adapter: Annotated[Path | None, typer.Option(help="A run or an SFA adapter, to put into a model.")] = None,
    data: Annotated[str | None, typer.Option(help="Hub id, local folder or file, or charts, or pages.")] = None,
    config: Annotated[str | None, typer.Option(help="Configuration of a hub dataset, e.g. DocVQA.")] = None,
    split: Annotated[str | None, typer.Option(help="Which split.")] = None,
    metric: Annotated[str | None, typer.Option(help="relaxed, relaxed_strict, anls, vqa, ocrbench or exact.")] = None,
    limit: Annotated[int | None, typer.Option(help="Evaluate at most this many questions.")] = None,
    batch: Annotated[int | None, typer.Option(help="Questions per forward.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for answers and tables.")] = None,
    against: Annotated[Path | None, typer.Option(help="Answers of another run to the same questions.")] = None,
    plan: Annotated[str | None, typer.Option(help="nf4, split or bf16.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32.")] = None,
    prompt: Annotated[str | None, typer.Option(help="With {question} in it.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer in tokens.")] = None,
    ocr: Annotated[
        bool, typer.Option("--ocr", help="Read what stands on images, for the hallucination table.")
    ] = False,
    nano: Annotated[bool, typer.Option("--nano", help="The nano host of a recipe, on a CPU.")] = False,
    head_plan: Annotated[Path | None, typer.Option(help="Attention heads to remove, of sfa calibrate heads.")] = None,
    compensation: Annotated[str, typer.Option(help="For removed heads: none, absorb or residual.")] = "none",
) -> None:
    """Answer every question of a dataset with MODEL_OR_RUN and score the answers. The same command resumes a run."""
    from sfa_adapters.evaluation.answers import answer_rows
    from sfa_adapters.evaluation.open_host import open_host, read_head_plan
    from sfa_adapters.evaluation.predictions import metadata_of_answers, read_answers
    from sfa_adapters.evaluation.scores import metric_for
    from sfa_adapters.evaluation.tables import hallucination_table, score_table
    from sfa_adapters.heads.metadata import pruned_metadata
    from sfa_adapters.recipes.run import recipe_rows

    first = _processes().is_main_process
    other = None if against is None else read_answers(against)  # a wrong name is reported before the work
    heads = None if head_plan is None else read_head_plan(head_plan, compensation)
    names = ("data", "data_config", "eval_split", "eval_limit", "eval_batch", "plan", "dtype", "prompt")
    values = (data, config, split, limit, batch, plan, dtype, prompt)
    changes: dict[str, Any] = {n: v for n, v in zip(names, values, strict=True) if v is not None}
    changes |= {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    if data is not None and config is None:
        changes["data_config"] = None  # that of the recipe belongs to the recipe's data
    source = _source(model, nano, out)
    chosen = _metric(metric)
    host = open_host(source, adapter, head_plan=heads, compensation=compensation, **changes)  # pyright: ignore[reportArgumentType]
    recipe, pruned = host.recipe, pruned_metadata(host.model)
    parts = (recipe.name, recipe.data, recipe.eval_split)
    parts += () if pruned is None else ("pruned", pruned.plan, pruned.compensation)
    folder = out or Path("sfa-eval") / "-".join(_plain(part) for part in parts)
    answered_rows = answer_rows(host, recipe_rows(recipe, False), folder / "predictions.jsonl", ocr=ocr)
    if not first:
        return
    if not any(p.answers for p in answered_rows):
        typer.echo(f"No row has a true answer: nothing to score. The answers are in {folder}/predictions.jsonl")
        return
    chosen = chosen or metric_for(recipe.data, recipe.data_config)
    runs, notes = {}, list[str]()
    name = _named(recipe.name, pruned, notes)
    if other is not None and against is not None:
        before = _named(against.resolve().parent.name, metadata_of_answers(against), notes)
        runs[before if before != name else f"{before} (before)"] = other
    runs[name] = answered_rows
    tables = {"scores": score_table(runs, chosen, f"{name} on {recipe.data}, {recipe.eval_split}")}
    if all(any(p.printed for p in each) for each in runs.values()):
        tables["hallucination"] = hallucination_table(runs)
    _leave({key: replace(table, notes=(*table.notes, *notes)) for key, table in tables.items()}, folder)


@app.command(epilog="Example:  sfa ablate internvl3_5_8b --seeds 0,1,2   |   sfa ablate llava_onevision_7b --nano")
def ablate(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe (see: sfa recipes).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings of all rows, as key=value.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with settings.")] = None,
    rows: Annotated[
        str, typer.Option(help="terms: the four terms of the bias, Table 3. parts: SFA, ADAT, SCR, Tables 1 and 2.")
    ] = "terms",
    seeds: Annotated[str, typer.Option(help="With commas between them; every row is trained with each.")] = "0",
    metric: Annotated[str | None, typer.Option(help="relaxed, relaxed_strict, anls, vqa, ocrbench or exact.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for all runs and the tables.")] = None,
    nano: Annotated[bool, typer.Option("--nano", help="On the nano host of the recipe, on a CPU.")] = False,
) -> None:
    """Train and evaluate RECIPE once for every row of a table. The same command resumes after a kill, row by row."""
    from sfa_adapters.evaluation.ablation import part_variants, run_ablation, term_variants
    from sfa_adapters.evaluation.scores import metric_for
    from sfa_adapters.evaluation.tables import ablation_table, hallucination_table, score_table
    from sfa_adapters.files import can_be_made
    from sfa_adapters.hosts.settings import load_recipe
    from sfa_adapters.recipes.catalog import find_recipe
    from sfa_adapters.recipes.nano.checkpoint import nano_settings
    from sfa_adapters.recipes.run import run

    if rows not in ROWS:
        raise RecipeError(f"--rows {rows} must be one of {', '.join(ROWS)}.")
    chosen = _metric(metric)
    base = find_recipe(recipe)
    base = load_recipe(nano_settings(base) if nano else base, config, overrides or [])
    folder = out or Path("runs") / f"{base.name}-{rows}{'-nano' if nano else ''}"
    can_be_made(folder)  # otherwise every row would fail
    first = _processes().is_main_process
    variants = term_variants() if rows == "terms" else part_variants(base)
    numbers, say = _seeds(seeds), typer.echo if first else _say_nothing
    done = run_ablation(base, variants, run, _untrained, folder, numbers, nano, say)
    if not first:
        return
    chosen = chosen or metric_for(base.data, base.data_config)
    tables: dict[str, Table] = {}
    if rows == "terms" and done.runs:
        terms = {variant.name: variant.terms for variant in variants}
        tables["table3"] = ablation_table(done.runs, terms, chosen, f"Terms of the bias: {base.name} on {base.data}")
    elif done.runs:
        one = done.first_seed()
        control = "baseline" if "baseline" in one else None
        seed = f"; seed {numbers[0]}" if len(numbers) > 1 else ""
        tables["table1"] = score_table(one, chosen, f"{base.name} on {base.data}, {base.eval_split}{seed}", control)
        if all(any(p.printed for p in predictions) for predictions in one.values()):
            tables["table2"] = hallucination_table(
                one, f"Numeric hallucination: {base.name} on {base.data}{seed}", control
            )
    _leave(tables, folder)
    if done.failed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in done.failed.items())
        raise TrainingError(f"{len(done.failed)} rows failed and are in no table. {reasons}")


def _source(model: str, nano: bool, out: Path | None) -> str | Recipe:
    """Resolves MODEL_OR_RUN to a path or hub id, or to a recipe, whose host is evaluated without training."""
    from sfa_adapters.recipes.catalog import RECIPES, find_recipe
    from sfa_adapters.recipes.nano.checkpoint import nano as nano_host

    if model not in RECIPES and (Path(model).exists() or "/" in model):
        if nano:
            raise RecipeError(f"--nano is for the name of a recipe; {model} is evaluated as it is.")
        return model
    recipe = find_recipe(model)  # its error suggests similar names
    if not nano:
        return recipe
    with _processes().main_process_first():  # transformers saves only in the main process
        return nano_host(recipe, (out or Path("sfa-eval")) / f"{recipe.family}-nano")


def _untrained(recipe: Recipe, nano: bool) -> Path:
    """Evaluates a host without training, in the folder of its recipe; returns the file of its answers."""
    from sfa_adapters.evaluation.answers import answer_rows
    from sfa_adapters.evaluation.open_host import open_host
    from sfa_adapters.recipes.nano.checkpoint import nano as nano_host
    from sfa_adapters.recipes.run import recipe_rows

    folder = Path(recipe.folder)
    if nano:
        with _processes().main_process_first():
            recipe = nano_host(recipe, folder / "host")
    path = folder / "predictions.jsonl"
    answer_rows(open_host(recipe), recipe_rows(recipe, False), path)
    return path


def _processes() -> PartialState:
    """The state of all processes of this command; initialises torch.distributed if there are several."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())


def _metric(name: str | None) -> Any:
    from typing import get_args

    from sfa_adapters.evaluation.scores import Metric

    if name is not None and name not in get_args(Metric):
        raise DataError(f"--metric {name} must be one of {', '.join(get_args(Metric))}.")
    return name


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise RecipeError(f"--seeds {text} must be whole numbers with commas between them, such as 0,1,2.")
    return [int(part) for part in parts]


def _plain(text: str) -> str:
    return "".join(c if c.isalnum() or c in "._" else "_" for c in Path(text).name)


def _named(name: str, pruned: PrunedMetadata | None, notes: list[str]) -> str:
    """The name of a run with its share of removed heads; adds their details to the notes."""
    if pruned is None:
        return name
    named = f"{name} ({pruned.label})"
    notes.append(f"{named}: {pruned}.")
    return named


def _say_nothing(line: str) -> None:
    del line


def _leave(tables: dict[str, Table], folder: Path) -> None:
    """Writes tables as Markdown and JSON, and prints them."""
    from rich.console import Console

    console = Console()
    for name, table in tables.items():
        table.write(folder, name)
        console.print(table.to_terminal())
        for note in table.notes:
            console.print(f"  {note}", highlight=False, markup=False)
    files = ", ".join(f"{name}.md, {name}.json" for name in tables)
    console.print(f"In {folder}/: {files or 'no table'}", highlight=False, markup=False)
