"""`share`, `push_to_hub`, `fetch`: upload of a trained adapter to the Hugging Face hub, and download."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfa_adapters.errors import RecipeError
from sfa_adapters.files import write_whole
from sfa_adapters.moved import old_keywords
from sfa_adapters.sharing.card import MARK, model_card
from sfa_adapters.sharing.folders import CARD, SHARED_FILES, adapter_files, file_errors, result_files
from sfa_adapters.sharing.run_metadata import RunMetadata

__all__ = ["Shared", "fetch", "push_to_hub", "share", "write_card"]

TEXTS = (".json", ".jsonl", ".md", ".csv", ".yaml")


@dataclass(frozen=True)
class Shared:
    """What was sent to the hub, or would be in a dry run.

    Attributes:
        repo_id: `user/name`, or None where only the card was written.
        files: Size in bytes by name in the repository.
        sent: False for a dry run.
        url: Of the commit, where one was made.
        warnings: Files that name folders of this machine, and a card that was left as it is.
    """

    repo_id: str | None
    files: Mapping[str, int]
    sent: bool
    url: str | None = None
    warnings: tuple[str, ...] = ()


@old_keywords(facts="metadata")
def share(
    folder: str | Path,
    repo_id: str | None = None,
    *,
    results: str | Path | None = None,
    metadata: RunMetadata | None = None,
    licence: str | None = None,
    private: bool | None = None,
    dry_run: bool = False,
    api: Any = None,
) -> Shared:
    """Writes the model card of a trained adapter and sends adapter and card to the hub.

    Args:
        folder: What `save_trained` wrote.
        repo_id: `user/name`; None writes the card and checks the folder, and sends nothing.
        results: Folder of the run, whose tables, predictions and pictures are sent too, under `results/`.
        metadata: For the card; by default those of `run.json` in the folder.
        licence: Licence of the adapter as the hub names it, e.g. `apache-2.0`.
        private: Whether a new repository is private; the account's own choice by default.
        dry_run: Check everything, send nothing.
        api: A `huggingface_hub.HfApi`; a fresh one by default.

    Returns:
        What was sent.

    Raises:
        RecipeError: The folder holds something that is not to be shared, the name is wrong, or the hub refuses.
    """
    adapter_files(folder)  # before the card: nothing is written into a folder that is no adapter
    kept = write_card(folder, metadata=metadata, licence=licence, repo_id=repo_id)
    if repo_id is None:
        files = adapter_files(folder)
        sizes = {name: path.stat().st_size for name, path in files.items()}
        return Shared(None, sizes, sent=False, warnings=kept)
    shared = push_to_hub(folder, repo_id, results=results, private=private, dry_run=dry_run, api=api)
    return Shared(repo_id, shared.files, shared.sent, shared.url, (*kept, *shared.warnings))


@old_keywords(facts="metadata")
def write_card(
    folder: str | Path, *, metadata: RunMetadata | None = None, licence: str | None = None, repo_id: str | None = None
) -> tuple[str, ...]:
    """Writes `README.md` beside the adapter; one that was written by hand stays.

    Args:
        folder: Folder of the trained adapter.
        metadata: For the card; by default that of `run.json` in the folder.
        licence: As the hub names it.
        repo_id: Name of its repository, for the lines that load it.

    Returns:
        A warning where it stays.

    Raises:
        RecipeError: It cannot be written, or the folder is no adapter.
    """
    path = Path(folder) / CARD
    if path.is_file() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return (f"{CARD} was not written by this library and stays as it is.",)
    card = str(model_card(folder, metadata=metadata, licence=licence, repo_id=repo_id))
    with file_errors(path):
        write_whole(path, card)
    return ()


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    results: str | Path | None = None,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "SFA adapter, written by sfa-adapters",
    dry_run: bool = False,
    api: Any = None,
) -> Shared:
    """Sends a trained adapter and its card to the hub, in one commit.

    Everything is checked before anything is sent: only the files of an adapter go (`SHARED_FILES`), and of a run its
    tables, predictions and pictures.

    Args:
        folder: The adapter, with its card.
        repo_id: `user/name`; made where it does not exist.
        results: Folder of the run, for its results.
        private: Whether a new repository is private.
        revision: Branch, `main` by default.
        message: Of the commit.
        dry_run: Send nothing.
        api: A `huggingface_hub.HfApi`; a fresh one by default, with the token of `hf auth login`.

    Returns:
        What was sent.

    Raises:
        RecipeError: The folder holds something that is not to be shared, the name is wrong, or the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    _check_repo_id(repo_id)
    files = adapter_files(folder)
    if CARD not in files:
        raise RecipeError(f"{folder} has no {CARD}; write the model card first (write_card, or share).")
    if results is not None:
        files |= result_files(results)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    warnings = _private_paths(files)
    if dry_run:
        return Shared(repo_id, sizes, sent=False, warnings=warnings)
    api = HfApi() if api is None else api
    with _hub_errors(repo_id):
        api.create_repo(repo_id, repo_type="model", private=private, exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
        done = api.create_commit(repo_id, operations, commit_message=message, repo_type="model", revision=revision)
    return Shared(repo_id, sizes, sent=True, url=str(done.commit_url), warnings=warnings)


def fetch(repo_id: str, revision: str | None = None, *, download: Callable[..., str] | None = None) -> Path:
    """Downloads a shared adapter from the hub: its safetensors and JSON files, and no others.

    Args:
        repo_id: `user/name`.
        revision: Branch, tag or commit.
        download: In place of `huggingface_hub.snapshot_download`.

    Returns:
        A folder for `load_trained`, `load_sfa` or `PeftModel.from_pretrained`.

    Raises:
        RecipeError: The hub refuses, or the repository holds no adapter.
    """
    from huggingface_hub import snapshot_download

    _check_repo_id(repo_id)
    with _hub_errors(repo_id):
        folder = Path((download or snapshot_download)(repo_id, revision=revision, allow_patterns=list(SHARED_FILES)))
    if not any((folder / name).is_file() for name in SHARED_FILES if name.endswith(".safetensors")):
        raise RecipeError(f"{repo_id} holds no adapter of this library.")
    return folder


def _check_repo_id(repo_id: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise RecipeError(f"repo={repo_id!r} is no name of a repository: {error}") from error
    if repo_id.count("/") != 1:
        raise RecipeError(f"repo={repo_id!r} must be user/name.")


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Turns errors of the hub and the network into an error of one line with advice.

    Raises:
        RecipeError: A request failed.
    """
    from huggingface_hub.errors import HfHubHTTPError

    network = HfHubHTTPError.__mro__[1]  # the base of all errors of the HTTP library, whichever the hub uses
    try:
        yield
    except (OSError, network) as error:  # pyright: ignore[reportGeneralTypeIssues]
        status = getattr(getattr(error, "response", None), "status_code", None)
        advice = {
            401: "Log in with: hf auth login",
            403: "Your token may not write there: hf auth login, with a token that can write.",
            404: "There is no such repository, or you may not see it.",
        }.get(status or 0, "Check the network, HF_HUB_OFFLINE, and run: hf auth login")
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise RecipeError(f"{repo_id}: the hub did not take the request ({first}). {advice}") from error


def _private_paths(files: Mapping[str, Path]) -> tuple[str, ...]:
    """A warning about text files that name folders of this machine, because they are sent as they are."""
    home = str(Path.home())
    marks = {json.dumps(str(folder))[1:-1] for folder in (Path.cwd(), home) if len(Path(folder).parts) > 1}
    named = []
    for name, path in files.items():
        if path.suffix in TEXTS and any(mark in path.read_text(encoding="utf-8", errors="replace") for mark in marks):
            named.append(name)
    if not named:
        return ()
    return (f"These files name folders of this machine, and everybody can read them: {', '.join(named)}.",)
