"""The checkpoints in the folder of a run: which one is resumed, and how many are kept."""

from __future__ import annotations

import dataclasses
import re
import shutil
import warnings
from pathlib import Path

from sfa_adapters.errors import RecipeError, SFAWarning
from sfa_adapters.files import what_is_missing
from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.training.checkpoints import RECORD, saved_recipe

__all__ = ["checkpoint_to_resume", "checkpoints_of", "keep_newest"]

NAME = re.compile(r"checkpoint-(\d+)")
NEEDED = (RECORD, "optimizer.pt", "scheduler.pt", "trainer_state.json")
# Settings that may change when a run is resumed, because they do not change what is learned.
FREE = {
    "name", "output", "save_steps", "save_total_limit", "logging_steps", "log", "num_workers",
    "eval_split", "eval_limit", "eval_batch", "max_new_tokens",
}  # fmt: skip


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints in the folder of a run, whole or not, from the oldest to the newest."""
    numbered = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


def checkpoint_to_resume(recipe: Recipe, folder: Path, resume: bool | str) -> Path | None:
    """Finds the checkpoint from which a run goes on.

    Args:
        recipe: The recipe of the run.
        folder: Its folder.
        resume: True: the newest whole checkpoint. "auto": the same, or from the start where there is none. A path:
            that checkpoint. False: from the start.

    Returns:
        The checkpoint, or None to start.

    Raises:
        RecipeError: There is no such checkpoint, something is missing in it, it was made with other settings, or a run
            that is to start from the beginning would mix with what is there.
    """
    known = checkpoints_of(folder)
    whole = [path for path in known if not what_is_missing(path)]
    if resume is False:
        if known:
            raise RecipeError(
                f"{folder} already holds {known[-1].name} of an earlier run. Go on with it (--resume), or choose "
                "another output folder."
            )
        return None
    if isinstance(resume, str) and resume != "auto":
        chosen = Path(resume)
        _require_whole(chosen)
    elif whole:
        chosen = whole[-1]
        for path in known[known.index(chosen) + 1 :]:
            missing = ", ".join(what_is_missing(path)[:3])
            warnings.warn(
                f"{path.name} is not whole ({missing}); resuming from {chosen.name}.", SFAWarning, stacklevel=2
            )
    elif known:
        _require_whole(known[-1])
        return None
    elif resume == "auto":
        return None
    else:
        raise RecipeError(f"{folder} has no checkpoint to resume from. Start without --resume.")
    _same_run(recipe, saved_recipe(chosen), chosen)
    return chosen


def keep_newest(folder: Path, limit: int) -> None:
    """Deletes all checkpoints but the newest ones.

    Args:
        folder: Folder of the run.
        limit: How many are kept.
    """
    for path in checkpoints_of(folder)[:-limit]:
        shutil.rmtree(path, ignore_errors=True)


def _require_whole(folder: Path) -> None:
    if not folder.is_dir():
        raise RecipeError(f"resume={str(folder)!r}: there is no such folder.")
    missing = [name for name in NEEDED if not (folder / name).is_file()] or what_is_missing(folder)
    if missing:
        raise RecipeError(
            f"{folder} cannot be resumed: {', '.join(missing)} missing. Weights alone are no checkpoint of a run; take "
            "another one, or start over."
        )


def _same_run(recipe: Recipe, saved: Recipe, folder: Path) -> None:
    if saved.family != recipe.family:
        raise RecipeError(
            f"{folder} is a checkpoint of another host: {saved.family} ({saved.model}), not {recipe.family}."
        )
    names = [field.name for field in dataclasses.fields(Recipe) if field.name not in FREE]
    changed = [name for name in names if getattr(saved, name) != getattr(recipe, name)]
    if changed:
        differences = ", ".join(
            f"{name} was {getattr(saved, name)!r}, is {getattr(recipe, name)!r}" for name in changed
        )
        raise RecipeError(
            f"{folder} was made with other settings: {differences}. A run goes on as it began; for other settings "
            "choose another output folder."
        )
