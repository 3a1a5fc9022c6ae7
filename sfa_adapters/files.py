"""Atomic writes: files and folders are written under another name, flushed, then renamed, so none is ever half written.

Every atomic write of the library goes through `write_whole` or `draft_folder`. The caller chooses how an error of the
disk is named (`TrainingError` in a run, `RecipeError` elsewhere).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sfa_adapters.errors import RecipeError, TrainingError

__all__ = [
    "MANIFEST",
    "can_be_made",
    "draft_folder",
    "is_disk_error",
    "require_writable",
    "seal",
    "what_is_missing",
    "whole_folder",
    "write_whole",
    "writing",
]

MANIFEST = "manifest.json"


def write_whole(path: Path, text: str) -> None:
    """Writes a text file (UTF-8) atomically: a kill or a full disk leaves the old one. Its folder is made.

    Args:
        path: The file.
        text: Its whole content.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        draft.write_text(text, encoding="utf-8")
        _flush(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def draft_folder(partial: Path) -> Iterator[Path]:
    """Makes an empty folder under a temporary name, which the caller renames; it is removed if it was not renamed.

    Args:
        partial: Its name; a folder that a killed process left there is removed first.
    """
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def writing(what: str, folder: Path, advice: str = "") -> Iterator[None]:
    """Turns errors of the disk while a file is written into one error that says what to do.

    Args:
        what: What is being written, for the error.
        folder: Where, for the error.
        advice: A further sentence for the error.

    Raises:
        TrainingError: The disk is full, or does not let us write.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not is_disk_error(error):
            raise
        with suppress(OSError):
            free = f" {shutil.disk_usage(_existing(folder)).free / 1e9:.2f} GB are free there."
            raise TrainingError(_message(what, folder, error, free, advice)) from error
        raise TrainingError(_message(what, folder, error, "", advice)) from error


@contextmanager
def whole_folder(folder: Path, advice: str = "") -> Iterator[Path]:
    """Gives a folder to write into, which replaces `folder` at the end if there was no error.

    The old content of `folder` stays until then, also when the process is killed.

    Args:
        folder: Where the files are in the end.
        advice: A sentence for the error of a full disk.

    Raises:
        TrainingError: It cannot be written.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    with writing(str(folder.name), folder.parent, advice), draft_folder(partial):
        yield partial
        seal(partial, folder)


def seal(partial: Path, folder: Path) -> None:
    """Writes a manifest of the files of `partial` with their sizes, flushes all to disk and renames it to `folder`.

    Raises:
        OSError: It cannot be done; the folder that was there is still there.
    """
    (partial / MANIFEST).unlink(missing_ok=True)
    files = {str(path.relative_to(partial)): path.stat().st_size for path in _files(partial)}
    (partial / MANIFEST).write_text(json.dumps(files, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    for path in (*_files(partial), *(path for path in partial.rglob("*") if path.is_dir()), partial):
        _flush(path)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    _flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def what_is_missing(folder: Path) -> list[str]:
    """Files of a sealed folder that are missing or cut off, by its manifest; empty when it is complete."""
    try:
        listed: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return [MANIFEST]
    sizes = {name: (folder / name).stat().st_size if (folder / name).is_file() else None for name in listed}
    return [name if sizes[name] is None else f"{name} (cut off)" for name in listed if sizes[name] != listed[name]]


def can_be_made(folder: Path) -> None:
    """Checks that a folder is writable, or could be made, and leaves nothing there.

    Args:
        folder: The folder of a run that may still be refused.

    Raises:
        RecipeError: It cannot be written; says why.
    """
    _try_to_write(folder, _existing(folder))


def require_writable(folder: Path) -> None:
    """Makes the folder of a run and checks that it is writable, before hours of training.

    Raises:
        RecipeError: It cannot be written; says why.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(_not_writable(folder, error)) from error
    _try_to_write(folder, folder)


def _try_to_write(folder: Path, place: Path) -> None:
    probe = place / f".writable-{os.getpid()}"
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise RecipeError(_not_writable(folder, error)) from error


def _not_writable(folder: Path, error: OSError) -> str:
    return f"output={str(folder)!r} cannot be written: {error.strerror or error}. Choose another output folder."


def is_disk_error(error: Exception) -> bool:
    """Whether an error comes from the disk: it is full, gone, or does not let us write."""
    # torch and safetensors report a full disk in their own words.
    words = ("no space left", "file too large", "quota exceeded", "pytorchstreamwriter", "unexpected pos", "i/o error")
    return isinstance(error, OSError) or any(word in str(error).lower() for word in words)


def _message(what: str, folder: Path, error: Exception, free: str, advice: str) -> str:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = "the disk is full" if full else str(getattr(error, "strerror", None) or error)
    return " ".join(f"{what} could not be written to {folder}: {reason}.{free} {advice}".split())


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
