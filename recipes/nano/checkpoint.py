"""Nano hosts as checkpoint folders, which `from_pretrained` loads like those of the full-size hosts.

A folder holds the configuration, the weights and the files of the host's own processor class, so `--nano` runs the
code of the real run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sfa_adapters.errors import RecipeError
from sfa_adapters.files import draft_folder, is_disk_error
from sfa_adapters.hosts.recipe import DEFAULT_PROMPT, Recipe
from sfa_adapters.recipes.nano.hosts import build_host
from sfa_adapters.vlm.records import registered_vlms, vlm_spec

__all__ = ["NANO", "nano", "nano_checkpoint", "nano_settings"]

NANO = "nano:"  # prefix of `model`, before the family, in a recipe whose nano host is not written yet
MARK = "nano.json"  # written last: a folder that has it is complete
VERSION = 1


def nano_checkpoint(family: str, folder: str | Path, seed: int = 0) -> Path:
    """Writes the nano host of a family as a checkpoint folder, unless it is there already.

    The folder is written under another name and renamed, so it is complete or not there. The same family and seed give
    the same weights.

    Args:
        family: Name of its record.
        folder: The folder. Its parents are made.
        seed: Of new weights; the global random state is left as it was.

    Returns:
        The folder, for `AutoModelForImageTextToText.from_pretrained` and `AutoProcessor.from_pretrained`.

    Raises:
        RecipeError: No such family, or the folder holds something else or cannot be written.
    """
    known = [name for name, spec in registered_vlms().items() if spec.nano is not None]
    if family not in known:
        raise RecipeError(f"No nano host of the family {family!r}. Known: {', '.join(known)}.")
    folder = Path(folder)
    mark = {"family": family, "seed": seed, "version": VERSION}
    if _is_written(folder, mark):
        return folder
    model, processor = build_host(family, seed)
    try:
        with draft_folder(folder.with_name(f".{folder.name}-{os.getpid()}")) as draft:
            model.save_pretrained(draft)
            processor.save_pretrained(draft)
            (draft / MARK).write_text(json.dumps(mark))
            os.replace(draft, folder)
    except (OSError, SafetensorError, RuntimeError) as error:  # safetensors and torch have their own disk errors
        if not is_disk_error(error):
            raise
        # Another process of the same run may have been faster.
        if not _is_written(folder, mark):
            reason = getattr(error, "strerror", None) or error
            raise RecipeError(f"The nano host cannot be written to {folder}: {reason}.") from error
    return folder


def _is_written(folder: Path, mark: Mapping[str, Any]) -> bool:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    marked = folder / MARK
    if not marked.is_file():
        raise RecipeError(f"{folder} holds something else than a nano host. Name a new folder, or delete this one.")
    if json.loads(marked.read_text()) != mark:
        raise RecipeError(f"{folder} holds another nano host: {marked.read_text()}. Name a new folder, or delete it.")
    return True


def nano_settings(recipe: Recipe) -> Recipe:
    """The recipe on the nano host of its family: a minute on a CPU instead of hours on a GPU.

    Plan `bf16` (one device, nothing in 4-bit) in float32, rendered charts, few and short steps. Terms, layers, freezes,
    ADAT, SCR and LoRA stay. Change settings on the returned recipe: `nano_settings(r).replace(...)`.

    Args:
        recipe: Of a full-size host; one of a nano host is returned as it is.

    Returns:
        The recipe. Its `model` is `nano:` and the family until `nano` writes the host.
    """
    if recipe.model.startswith(NANO) or (Path(recipe.model) / MARK).is_file():
        return recipe
    settings = recipe.replace(
        model=NANO + recipe.family,
        revision=None,
        plan="bf16",
        dtype="float32",
        lr=1e-3,
        vision_lr=None,
        projector_lr=None,
        llm_lr=None,
        warmup_steps=2,
        max_steps=recipe.max_steps or 24,
        batch_size=8,
        micro_batch=4,
        data="charts",
        data_config=None,
        train_split="train",
        eval_split="test",
        limit=recipe.limit or 64,
        eval_limit=recipe.eval_limit or 32,
        prompt="{question}" if recipe.prompt == DEFAULT_PROMPT else recipe.prompt,
        max_tiles=2,
        max_pixels=140 * 140,
        streaming=False,
        num_workers=0,
        max_new_tokens=12,
        output="runs/{name}-nano" if recipe.output == "runs/{name}" else recipe.output,
        save_steps=8,
        logging_steps=1,
        log="none",
    )
    return settings.replace(**vlm_spec(recipe.family).nano_settings)


def nano(recipe: Recipe, folder: str | Path, seed: int = 0) -> Recipe:
    """Writes the nano host of a recipe, and gives the recipe on it.

    Args:
        recipe: Of a full-size host, or from `nano_settings`.
        folder: Folder of the host, see `nano_checkpoint`.
        seed: Of the host's weights.

    Raises:
        RecipeError: The folder holds something else.
    """
    recipe = nano_settings(recipe)
    if not recipe.model.startswith(NANO):
        return recipe
    return recipe.replace(model=str(nano_checkpoint(recipe.family, folder, seed)))
