"""`train`: trains a prepared host on rows, and writes checkpoints, log and curves into the folder of the run."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from torch.utils.data import Dataset, IterableDataset
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from sfa_adapters.data.datasets import Skipped
from sfa_adapters.errors import SFAWarning
from sfa_adapters.files import require_writable
from sfa_adapters.hosts.load import Host
from sfa_adapters.hosts.summary import module_table
from sfa_adapters.rates import has_active_sfa, largest_scalars
from sfa_adapters.training.arguments import training_arguments
from sfa_adapters.training.callbacks import Interrupted, ProgressBar, StopOnSignal
from sfa_adapters.training.checkpoints import save_trained
from sfa_adapters.training.curves import plot_training, write_log
from sfa_adapters.training.optimizer import Repeated, total_steps
from sfa_adapters.training.runs import checkpoint_to_resume
from sfa_adapters.training.trainer import SFATrainer

__all__ = ["FINAL", "SFATrainer", "TrainResult", "train"]

FINAL = "final"  # the trained tensors in the folder of a run


@dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    Attributes:
        folder: The folder of the run: checkpoints, `log.csv`, `training.png`, `skipped.jsonl`.
        trained: The trained tensors in it, for `load_trained`.
        steps: Optimizer steps of the whole run.
        loss: Mean loss since the last log but one, nats per answer token; NaN where nothing was logged.
        seconds: Wall-clock time of this part of the run.
        skipped: Rows that were skipped, each once.
        history: The log.
        scalars: The largest scalar of each term at the end (`largest_scalars`), in logits; empty without SFA.
    """

    folder: Path
    trained: Path
    steps: int
    loss: float
    seconds: float
    skipped: tuple[Skipped, ...]
    history: tuple[Mapping[str, Any], ...]
    scalars: Mapping[str, float] = field(default_factory=dict)


def train(
    host: Host,
    rows: Dataset[Any],
    collator: Callable[[list[Any]], dict[str, Any]],
    *,
    folder: str | Path | None = None,
    resume: bool | str = False,
    console: Console | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainResult:
    """Trains a host with the settings of its recipe. Call it in every process.

    Args:
        host: A prepared host.
        rows: Training examples, `Questions` or `StreamedQuestions`.
        collator: Makes a batch of examples, `Collator`.
        folder: Folder of the run; `recipe.folder` by default.
        resume: True goes on from the newest whole checkpoint in the folder, a path from that one; "auto" starts from
            the beginning where there is none.
        console: Shows the table, the bar and the list of skipped rows; the terminal by default.
        callbacks: More callbacks for the Trainer.

    Returns:
        The result; the host holds the trained weights and is in eval mode.

    Raises:
        RecipeError: A setting, the folder or the checkpoint cannot be used.
        TrainingError: Training stopped; says why, and which checkpoint is left.
        Interrupted: Ctrl-C or SIGTERM arrived (exit code 130 or 143); a checkpoint was saved.
    """
    recipe = host.recipe
    folder = Path(recipe.folder if folder is None else folder)
    count = len(rows) if hasattr(rows, "__len__") else None  # pyright: ignore[reportArgumentType]
    steps = total_steps(recipe, count)
    rows = Repeated(rows) if isinstance(rows, IterableDataset) else rows
    if recipe.warmup_steps >= steps:
        warnings.warn(
            f"warmup_steps={recipe.warmup_steps} of {steps} steps: the learning rate never gets to its peak.",
            SFAWarning,
            stacklevel=2,
        )
    checkpoint = checkpoint_to_resume(recipe, folder, resume)
    require_writable(folder)
    arguments = training_arguments(recipe, folder, steps, host)
    console = console or Console()
    console.quiet = console.quiet or arguments.process_index > 0
    bar = ProgressBar(console)
    forward, caching = vars(host.model).get("forward"), _turn_off_cache(host.model)
    trainer = SFATrainer(host, args=arguments, train_dataset=rows, data_collator=collator, callbacks=[*callbacks])
    trainer.pop_callback(PrinterCallback)
    trainer.add_callback(bar)
    console.print(module_table(host))
    if checkpoint is not None:
        console.print(f"Going on from {checkpoint}.")
    began = time.perf_counter()
    try:
        with StopOnSignal(trainer.largest, console.print) as stop:
            trainer.add_callback(stop)
            trainer.go_on(checkpoint)
    finally:
        bar.stop()
        for config, value in caching:
            config.use_cache = value
        _restore_forward(host.model, forward)
        host.model.eval()
        if trainer.args.should_save and trainer.state.log_history:
            _write_curves(trainer.state.log_history, folder, recipe.name, console)
    skipped = tuple(trainer.all_skipped())
    if trainer.args.should_save:
        _report_skipped(skipped, folder, console)
    if stop.received:
        step = trainer.state.global_step
        console.print(f"Stopped after step {step} of {steps}; checkpoint-{step} is in {folder}. Go on with --resume.")
        raise Interrupted(stop.received)
    scalars = largest_scalars(host.model) if has_active_sfa(host.model) else {}
    if scalars:
        sizes = ", ".join(f"{term} {size:.2g}" for term, size in scalars.items())
        console.print(f"Largest structural scalars, in logits: {sizes}.")
    save_trained(host, folder / FINAL)
    trainer.accelerator.wait_for_everyone()
    history = tuple(trainer.state.log_history)
    losses = [line["loss"] for line in history if "loss" in line]
    return TrainResult(
        folder=folder,
        trained=folder / FINAL,
        steps=trainer.state.global_step,
        loss=losses[-1] if losses else float("nan"),
        seconds=time.perf_counter() - began,
        skipped=skipped,
        history=history,
        scalars=scalars,
    )


def _turn_off_cache(model: Any) -> list[tuple[Any, Any]]:
    """Sets `use_cache=False` for host and decoder, as training needs no cache; `Trainer` does it for the host only.

    Returns:
        The configurations and their former values.
    """
    configs = [config for config in (model.config, model.config.get_text_config()) if hasattr(config, "use_cache")]
    before = [(config, config.use_cache) for config in configs]
    for config in configs:
        config.use_cache = False
    return before


def _restore_forward(model: Any, forward: Any) -> None:
    """Removes the autocast that accelerate leaves around the forward, and only that."""
    for name, before in (("forward", forward), ("_original_forward", None)):
        if before is None:
            vars(model).pop(name, None)
        else:
            setattr(model, name, before)


def _write_curves(history: list[dict[str, Any]], folder: Path, name: str, console: Console) -> None:
    try:
        write_log(history, folder / "log.csv")
        plot_training(history, folder / "training.png", name)
    except ModuleNotFoundError:
        console.print("training.png was not drawn: pip install matplotlib.")
    except OSError as error:  # must not hide what stopped the run
        console.print(f"log.csv and training.png could not be written: {error}.")


def _report_skipped(skipped: Sequence[Skipped], folder: Path, console: Console) -> None:
    lines = (json.dumps({"id": one.id, "reason": one.reason}, ensure_ascii=False) for one in skipped)
    (folder / "skipped.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if skipped:
        rows = "training row" if len(skipped) == 1 else "training rows"
        console.print(f"{len(skipped)} {rows} could not be used, all listed in {folder / 'skipped.jsonl'}:")
        for one in skipped[:20]:
            console.print(f"  {one.id}: {one.reason}", highlight=False, markup=False)
