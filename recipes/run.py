"""`run`: a whole recipe: load, evaluate the untrained host, train, evaluate again, write tables, figures, model card.

    <folder>/recipe.yaml                     every setting
    <folder>/checkpoint-N/                   while it trains; `resume` goes on from the newest
    <folder>/final/                          the trained adapter with its card, for `sfa eval`, `share` and `export`
    <folder>/baseline.jsonl, predictions.jsonl        answers of the untrained and of the trained host
    <folder>/results.md, .json, .png         their scores
    <folder>/log.csv, training.png, bias.csv, bias.png, skipped.jsonl

Evaluation reloads the saved checkpoint, from `final`. Call `run` in every process.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from rich.console import Console
from torch import nn

from sfa_adapters.data.collator import Collator
from sfa_adapters.data.datasets import Questions, StreamedQuestions
from sfa_adapters.data.open_rows import open_rows
from sfa_adapters.errors import RecipeError
from sfa_adapters.evaluation.answers import answer_rows
from sfa_adapters.evaluation.open_host import open_host
from sfa_adapters.evaluation.predictions import Prediction
from sfa_adapters.evaluation.scores import Metric, ScoreTable, metric_for, score
from sfa_adapters.evaluation.tables import hallucination_table, score_table
from sfa_adapters.files import can_be_made, require_writable
from sfa_adapters.heads.metadata import folder_metadata
from sfa_adapters.hosts.load import load_host
from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.hosts.settings import write_recipe
from sfa_adapters.recipes.catalog import architecture
from sfa_adapters.recipes.nano.checkpoint import NANO, nano_settings
from sfa_adapters.recipes.nano.checkpoint import nano as nano_host
from sfa_adapters.recipes.run_pictures import draw_bias, draw_scores
from sfa_adapters.recipes.synthetic.rendered_rows import RENDERED, rendered_rows
from sfa_adapters.sharing.hub import write_card
from sfa_adapters.sharing.run_metadata import RunMetadata, read_run_metadata, write_run_metadata
from sfa_adapters.training.arguments import require_logger
from sfa_adapters.training.checkpoints import RECORD
from sfa_adapters.training.runs import checkpoint_to_resume
from sfa_adapters.training.train import FINAL, train

if TYPE_CHECKING:
    from sfa_adapters.data.rows import Row

__all__ = ["RunResult", "recipe_rows", "run"]

# Number of rendered rows, where the recipe sets no limit.
RENDERED_TRAINING, RENDERED_TEST = 10_000, 500


@dataclass(frozen=True)
class RunResult:
    """Files and scores of a run.

    Attributes:
        folder: Folder of the run.
        trained: The trained adapter in it.
        predictions: Answers of the trained host; None where it was not evaluated, here and below.
        baseline: Answers of the untrained host.
        scores: Scores of the trained host.
        baseline_scores: Scores of the untrained host.
    """

    folder: Path
    trained: Path
    predictions: Path | None = None
    baseline: Path | None = None
    scores: ScoreTable | None = None
    baseline_scores: ScoreTable | None = None


def recipe_rows(recipe: Recipe, training: bool) -> Any:
    """The rows that a recipe trains on or is evaluated on.

    Args:
        recipe: The recipe.
        training: Whether those of training; if not, those of the evaluation, which need no answer and are never
            streamed.

    Raises:
        DataError: They cannot be read.
    """
    split, limit = (recipe.train_split, recipe.limit) if training else (recipe.eval_split, recipe.eval_limit)
    if recipe.data in RENDERED:
        count = limit or (RENDERED_TRAINING if training else RENDERED_TEST)
        return rendered_rows(recipe.data, split, count, recipe.seed if training else 0)
    if training and recipe.streaming:
        return open_rows(recipe.data, split, recipe.data_config, limit, streaming=True)
    return open_rows(recipe.data, split, recipe.data_config, limit, answered=training)


def run(
    recipe: Recipe,
    *,
    nano: bool = False,
    resume: bool | str = False,
    evaluate: bool = True,
    baseline: bool = True,
    share: bool = True,
    console: Console | None = None,
) -> RunResult:
    """Runs a recipe from loading to the model card.

    Args:
        recipe: The recipe.
        nano: Use the nano host of its family: the same code in minutes on a CPU.
        resume: True goes on from the newest whole checkpoint, a path from that one, "auto" only where there is one. A
            run that is trained already is only evaluated; a named checkpoint must belong to it all the same.
        evaluate: Evaluate the trained host.
        baseline: Evaluate the untrained host, too.
        share: Write the model card. Nothing is uploaded.
        console: Shows tables and bars; the terminal by default.

    Returns:
        Files and scores.

    Raises:
        RecipeError: A setting, the memory of this machine or the folder does not fit.
        DataError: The data cannot be used.
        TrainingError: Training stopped.
    """
    processes = PartialState(cpu=not torch.cuda.is_available())
    planned = nano_settings(recipe) if nano else recipe
    host = Path(planned.folder) / "host"
    recipe = planned.replace(model=str(host)) if planned.model.startswith(NANO) else planned
    console = console or Console()
    console.quiet = console.quiet or not processes.is_main_process
    folder = Path(recipe.folder)
    result = RunResult(folder, folder / FINAL)
    trained = _check(recipe, result, resume)
    _require_memory(planned)
    training, row_sets = recipe_rows(recipe, True), recipe_rows(recipe, False) if evaluate else ()
    require_writable(folder)
    if nano:  # after the checks, so that a refused run writes no host
        with processes.main_process_first():  # `save_pretrained` writes in the first process only
            recipe = nano_host(planned, host)
    if trained:
        console.print(f"{folder} is trained already: it is evaluated, not trained again.")
    if processes.is_main_process:
        write_recipe(recipe, folder / "recipe.yaml")
    prediction_files: dict[str, list[Prediction]] = {}
    if evaluate and baseline:
        console.print(f"Asking {recipe.model} {len(row_sets):,} questions before training.")
        prediction_files["untrained"] = _answers(recipe, None, row_sets, folder / "baseline.jsonl", console)
        result = replace(result, baseline=folder / "baseline.jsonl")
    if not trained:
        _train(recipe, training, folder, resume, console, processes)
    if evaluate:
        console.print("Asking the trained host.")
        prediction_files["trained"] = _answers(recipe, result.trained, row_sets, folder / "predictions.jsonl", console)
        result = replace(result, predictions=folder / "predictions.jsonl")
    if processes.is_main_process:
        if prediction_files:
            metric = metric_for(recipe.data, recipe.data_config)
            scores = {name: score(each, metric) for name, each in prediction_files.items()}
            result = replace(result, scores=scores["trained"], baseline_scores=scores.get("untrained"))
            _report(recipe, prediction_files, metric, folder, console)
            _add_scores(result, recipe)
        if share:
            for warning in write_card(result.trained):
                console.print(warning)
        console.print(f"The trained adapter is in {result.trained}, everything else in {folder}.")
    processes.wait_for_everyone()
    return result


def _check(recipe: Recipe, result: RunResult, resume: bool | str) -> bool:
    """Checks everything that can be checked before data are read, without writing anything.

    Returns:
        Whether the run is trained already.
    """
    if recipe.trains_nothing:
        raise RecipeError("Everything is frozen and nothing is added: there is nothing to train. Unfreeze a part.")
    trained = bool(resume) and (result.trained / RECORD).is_file()
    if not trained:
        require_logger(recipe)
    if not trained or (isinstance(resume, str) and resume != "auto"):  # a named checkpoint must exist
        checkpoint_to_resume(recipe, result.folder, resume)
    can_be_made(result.folder)
    return trained


def _require_memory(recipe: Recipe) -> None:
    """Checks the predicted memory before anything is loaded; not on a CPU, whose memory is not known.

    Raises:
        RecipeError: The run does not fit.
    """
    if not torch.cuda.is_available():
        return
    from sfa_adapters.memory.predict import predict_memory

    smallest = min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    gpus = int(os.environ.get("WORLD_SIZE", "1")) if recipe.plan != "split" else torch.cuda.device_count()
    plan = predict_memory(recipe, architecture(recipe), gpus=gpus, memory=smallest)
    if not plan.fits:
        raise RecipeError(str(plan.advice))


def _train(
    recipe: Recipe, rows: Any, folder: Path, resume: bool | str, console: Console, processes: PartialState
) -> None:
    host = load_host(recipe)
    questions = Questions(rows) if isinstance(rows, Sequence) else StreamedQuestions(rows, seed=recipe.seed)
    result = train(host, questions, Collator(host.processor, host.spec, recipe), resume=resume, console=console)
    if processes.is_main_process:
        scalars = dict(result.scalars) or None
        counts = {"steps": result.steps, "examples": result.steps * recipe.batch_size, "skipped": len(result.skipped)}
        write_run_metadata(
            folder / FINAL, RunMetadata.here(seconds=result.seconds, loss=result.loss, scalars=scalars, **counts)
        )
    processes.wait_for_everyone()
    if recipe.plan != "fsdp2":  # under which no process has the whole host
        _picture(recipe, host.model)
    del host
    _free()


def _answers(
    recipe: Recipe, trained: Path | None, rows: Sequence[Row], out: Path, console: Console
) -> list[Prediction]:
    # A model sharded over cards cannot generate.
    plan = {"plan": "bf16"} if recipe.plan == "fsdp2" else {}
    settings = {name: getattr(recipe, name) for name in ("eval_batch", "num_workers", "eval_split", "eval_limit")}
    host = open_host(recipe if trained is None else trained, **plan, **settings)
    predictions = answer_rows(host, rows, out, progress=not console.quiet)
    if trained is not None and recipe.plan == "fsdp2":
        _picture(recipe, host.model)
    del host
    _free()
    return predictions


def _picture(recipe: Recipe, model: nn.Module) -> None:
    if recipe.sfa and PartialState().is_main_process:
        draw_bias(model, Path(recipe.folder), f"{recipe.name}: learned bias")


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _report(recipe: Recipe, runs: dict[str, list[Prediction]], metric: Metric, folder: Path, console: Console) -> None:
    pruned = folder_metadata(recipe.model)
    name = recipe.name if pruned is None else f"{recipe.name} ({pruned.label})"
    notes = () if pruned is None else (f"Of all runs: {pruned}.",)
    tables = {"results": score_table(runs, metric, f"{name} on {recipe.data}, {recipe.eval_split}")}
    if any(p.printed for p in runs["trained"]):
        tables["hallucination"] = hallucination_table(runs)
    for name, table in tables.items():
        table = replace(table, notes=(*table.notes, *notes))
        table.write(folder, name)
        console.print(table.to_terminal())
        for note in table.notes:
            console.print(f"  {note}", highlight=False, markup=False)
    draw_scores(
        {name: score(predictions, metric) for name, predictions in runs.items()}, folder / "results.png", recipe.name
    )


def _add_scores(result: RunResult, recipe: Recipe) -> None:
    """Adds the scores to the record of the run, for the model card."""
    where: dict[str, Any] = {"data": recipe.data, "split": recipe.eval_split}
    pruned = folder_metadata(recipe.model)
    cut = [] if pruned is None else [pruned.label]
    where |= {} if pruned is None else {"pruned": pruned.to_dict()}
    hosts = [", ".join(words) for words in (cut, ["untrained", *cut])]
    measured = ((result.scores, {"host": hosts[0]} if cut else {}), (result.baseline_scores, {"host": hosts[1]}))
    scores = tuple({**table.to_dict(), **where, **more} for table, more in measured if table is not None)
    write_run_metadata(result.trained, replace(read_run_metadata(result.trained), scores=scores))
