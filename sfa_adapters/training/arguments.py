"""`TrainingArguments` of transformers from the settings of a recipe."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from sfa_adapters.errors import RecipeError
from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.install import install_command
from sfa_adapters.training.optimizer import accumulation

if TYPE_CHECKING:
    from sfa_adapters.hosts.load import Host

__all__ = ["require_logger", "training_arguments"]

BROUGHT = {"tensorboard": "recipes"}  # loggers, and the extra that installs them


def training_arguments(recipe: Recipe, folder: Path, steps: int, host: Host) -> TrainingArguments:
    """The arguments of the Trainer for a recipe.

    Args:
        recipe: The recipe.
        folder: Folder of the run.
        steps: Optimizer steps, for `max_steps`.
        host: The host, for its device.

    Raises:
        RecipeError: `batch_size` is not a multiple of `micro_batch` x processes, or the logger cannot be used.
    """
    require_logger(recipe)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    accumulated = accumulation(recipe, processes)
    return TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=recipe.micro_batch,
        gradient_accumulation_steps=accumulated,
        learning_rate=recipe.lr,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup_steps,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.dtype == "bfloat16",
        fp16=recipe.dtype == "float16",
        seed=recipe.seed,
        data_seed=recipe.seed,
        use_cpu=host.device.type == "cpu",
        save_strategy="steps",
        save_steps=recipe.save_steps,
        save_total_limit=recipe.save_total_limit,
        logging_strategy="steps",
        logging_steps=recipe.logging_steps,
        logging_nan_inf_filter=False,  # NaN stops the run
        report_to=[] if recipe.log == "none" else [recipe.log],
        run_name=recipe.name,
        disable_tqdm=True,  # `ProgressBar` is shown instead
        dataloader_num_workers=recipe.num_workers,
        dataloader_pin_memory=host.device.type != "cpu",
        remove_unused_columns=False,
        accelerator_config={"dispatch_batches": False},  # images of different sizes cannot be cut apart again
        ddp_find_unused_parameters=False,  # all that trains gets a gradient; the first step checks it
        ddp_timeout=1800,
    )


def require_logger(recipe: Recipe) -> None:
    """Checks that the logger `recipe.log` can be used, by building its callback as transformers does.

    Args:
        recipe: The recipe.

    Raises:
        RecipeError: It cannot; says what is missing.
    """
    if recipe.log == "none":
        return
    try:
        INTEGRATION_TO_CALLBACK[recipe.log]()
    except Exception as error:  # for missing packages and accounts each logger raises another class
        reason = " ".join(str(error).split()) or type(error).__name__
        hint = f" Run: {install_command(BROUGHT[recipe.log])}." if recipe.log in BROUGHT else ""
        raise RecipeError(
            f"log={recipe.log!r} cannot be used: {reason.rstrip('.')}.{hint} log=none keeps log.csv and training.png "
            "alone."
        ) from error
