"""Makes the missing runs of a study, in one or several processes, and saves each run when it ends."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sfa_adapters.errors import DataError
from sfa_adapters.recipes.studies.results_file import Outcome, append_row, read_rows, source_commit, todo
from sfa_adapters.recipes.studies.settings import Job

__all__ = ["Train", "run_jobs"]

# A function at the top level of a module, so that processes can import it.
Train = Callable[[Job], Outcome]


def run_jobs(train: Train, jobs: Sequence[Job], path: Path, workers: int = 1, console: Console | None = None) -> int:
    """Makes the runs that are not in the results file yet.

    Args:
        train: Makes one run.
        jobs: All runs.
        path: The results file.
        workers: Processes; each computes with one thread.
        console: Shows the progress bar.

    Returns:
        Number of runs that were made.

    Raises:
        DataError: `workers` is below 1, or the file holds runs of other settings.
    """
    if workers < 1:
        raise DataError(f"--workers {workers} must be at least 1.")
    left = todo(jobs, read_rows(path), path)
    commit = source_commit()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=console is None) as bar:
        task = bar.add_task("runs", total=len(jobs), completed=len(jobs) - len(left))
        for job, outcome in _outcomes(train, left, workers):
            append_row(path, job, outcome, commit)
            bar.update(task, advance=1, description=job.key)
    return len(left)


def _outcomes(train: Train, jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, Outcome]]:
    if workers == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as with several workers: the order of sums changes the numbers
        try:
            for job in jobs:
                yield job, train(job)
        finally:
            torch.set_num_threads(threads)
        return
    # Forked processes would share the threads of torch; spawned ones have one thread each.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        waiting = {pool.submit(train, job): job for job in jobs}
        try:
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _one_thread() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
