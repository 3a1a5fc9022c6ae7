"""Folders that are written whole or not at all, and the files that may be shared."""

from __future__ import annotations

import errno
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from sfa_adapters.errors import RecipeError
from sfa_adapters.files import MANIFEST, draft_folder, what_is_missing

__all__ = ["CARD", "SHARED_FILES", "adapter_files", "file_errors", "new_folder", "result_files"]

CARD = "README.md"
# The files of a trained adapter. Anything else in its folder is not published.
SHARED_FILES = (
    CARD,
    "adapter_config.json",
    "adapter_model.safetensors",
    "tuned.safetensors",
    "lora/adapter_config.json",
    "lora/adapter_model.safetensors",
    "recipe.json",
    "run.json",
    MANIFEST,
)
WEIGHTS = tuple(name for name in SHARED_FILES if name.endswith(".safetensors"))
RESULT_ENDINGS = (".json", ".jsonl", ".md", ".csv", ".yaml", ".png", ".svg")
# Files of these kinds run code when they are loaded.
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".py")


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Gives a temporary folder, which gets its name when the block ends without an error.

    Args:
        folder: The new folder.

    Raises:
        RecipeError: The folder is there and not empty, cannot be written, or the disk is full.
    """
    folder = Path(folder)
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise RecipeError(f"{folder} is there already. Choose another folder, or remove it first.")
    partial = folder.absolute().with_name(f".{folder.absolute().name}-{uuid.uuid4().hex[:8]}")
    with file_errors(folder), draft_folder(partial):
        yield partial
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Turns system errors about a file or a disk into an error of one line.

    Args:
        path: The file, for the message.

    Raises:
        RecipeError: Writing failed.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk without an errno
        number = getattr(error, "errno", None)
        full = number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        advice = "The disk is full; make room" if full else getattr(error, "strerror", None) or str(error)
        raise RecipeError(f"{path} cannot be written: {advice}.") from error


def adapter_files(folder: str | Path) -> dict[str, Path]:
    """The files of a trained adapter that can be shared, by their name in the repository.

    Args:
        folder: What `save_trained` or `save_sfa` wrote, with or without a card.

    Returns:
        Name in the repository and file.

    Raises:
        RecipeError: The folder holds no adapter, or it holds a pickle, a foreign file, a link or a broken file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RecipeError(f"{folder} is no folder.")
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if not path.is_dir()}
    links = [name for name in files if files[name].is_symlink()]
    links += [path.name for path in folder.rglob("*") if path.is_dir() and path.is_symlink()]
    if links:
        raise RecipeError(f"{folder} holds a link, {links[0]}; what it points to is not looked into. Copy the file.")
    pickles = [name for name in files if name.endswith(PICKLES)]
    if pickles:
        raise RecipeError(
            f"{folder} holds {', '.join(pickles[:3])}, which can run code where it is loaded; that is not shared. "
            "Share the finished run, not a checkpoint of its training."
        )
    foreign = [name for name in files if name not in SHARED_FILES]
    if foreign:
        raise RecipeError(
            f"{folder} holds files that are no part of an adapter: {', '.join(foreign[:3])}. Nothing was sent; move "
            "them elsewhere."
        )
    if not any(name in files for name in WEIGHTS):
        raise RecipeError(f"{folder} holds no adapter; expected one of {', '.join(WEIGHTS)}.")
    for name, path in files.items():
        _check_content(name, path)
    if MANIFEST in files and (missing := what_is_missing(folder)):
        raise RecipeError(f"{folder} is not whole: {', '.join(missing[:5])}. Nothing was sent.")
    return files


def _check_content(name: str, path: Path) -> None:
    """Checks that a file can be read as what its ending says.

    Raises:
        RecipeError: It cannot.
    """
    try:
        if name.endswith(".safetensors"):
            with safe_open(path, framework="pt"):
                return
        if name.endswith(".json"):
            json.loads(path.read_text(encoding="utf-8"))
    except (OSError, SafetensorError, ValueError) as error:
        raise RecipeError(f"{path} is broken: {error}.") from error


def result_files(folder: str | Path) -> dict[str, Path]:
    """Tables, predictions and pictures of a run, those at the top of its folder.

    Args:
        folder: Folder of the run.

    Returns:
        Name in the repository and file.

    Raises:
        RecipeError: There are none.
    """
    folder = Path(folder)
    files = {
        f"results/{path.name}": path
        for path in (sorted(folder.iterdir()) if folder.is_dir() else ())
        if path.suffix in RESULT_ENDINGS and path.is_file() and not path.is_symlink() and path.name[0] != "."
    }
    if not files:
        raise RecipeError(f"{folder} holds no results ({', '.join(RESULT_ENDINGS)}). Run `sfa eval` first.")
    return files
