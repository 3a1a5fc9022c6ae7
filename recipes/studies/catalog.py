"""The studies that there are, and what `sfa study NAME` does with one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from rich.console import Console

from sfa_adapters.errors import DataError
from sfa_adapters.recipes.studies.report import print_report, print_tuning, write_report
from sfa_adapters.recipes.studies.results_file import read_rows
from sfa_adapters.recipes.studies.runner import run_jobs
from sfa_adapters.recipes.studies.settings import Job, StudySettings, load_settings

__all__ = ["STUDIES", "StudyOptions", "run_study"]

# Name of the study and of its YAML file -> the module whose `train(job)` makes a run.
STUDIES: Mapping[str, str] = {
    "lookup": "sfa_adapters.recipes.studies.lookup",
    "crossing": "sfa_adapters.recipes.studies.lookup",
    "pretrained": "sfa_adapters.recipes.studies.pretrained",
    "pretrained-frozen": "sfa_adapters.recipes.studies.pretrained",
    "pretrained-colours": "sfa_adapters.recipes.studies.pretrained",
    "pretrained-digits": "sfa_adapters.recipes.studies.pretrained",
    "tables": "sfa_adapters.recipes.studies.tables",
    "starts": "sfa_adapters.recipes.studies.starts",
    "small-vlm": "sfa_adapters.recipes.studies.small_vlm_study",
}
ROWS, TUNING = "rows.jsonl", "tuning.jsonl"


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """Options of `sfa study`.

    Attributes:
        name: Which study.
        out: Folder of the results; a folder with results of the same study is gone on with.
        workers: Processes, each with one thread.
        tune: Make the runs on the tuning seeds instead of the reported ones.
        report: Make no runs; only table and figures of what is there.
        settings: Another YAML file than the study's own.
        arms: Only these arms; all by default.
        seeds: Only these seeds; all by default.
        budgets: Only these budgets, written `steps=500`; all by default.

    Raises:
        DataError: There is no such study.
    """

    name: str
    out: Path
    workers: int = 1
    tune: bool = False
    report: bool = False
    settings: Path | None = None
    arms: Sequence[str] = ()
    seeds: Sequence[int] = ()
    budgets: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.name not in STUDIES:
            raise DataError(f"No study is called {self.name!r}. There are {', '.join(STUDIES)}.")


def run_study(options: StudyOptions, console: Console | None = None) -> None:
    """Makes the runs that are missing, then the table and the figures.

    Raises:
        DataError: An option, or the results in the folder, do not fit the study.
    """
    console = console or Console()
    settings = load_settings(options.settings or options.name)
    train: Callable[[Job], object] = import_module(STUDIES[options.name]).train
    path = options.out / (TUNING if options.tune else ROWS)
    jobs = _chosen(settings.tuning_jobs() if options.tune else settings.jobs(), settings, options)
    if not options.report:
        run_jobs(train, jobs, path, options.workers, console)  # pyright: ignore[reportArgumentType]
    rows = read_rows(path)
    if not rows:
        raise DataError(f"{path} has no runs yet. Run: sfa study {options.name} --out {options.out}")
    if options.tune:
        print_tuning(settings, rows, console)
        return
    print_report(settings, rows, console)
    write_report(settings, rows, options.out, read_rows(options.out / TUNING))
    console.print(f"table, figures and rows are in {options.out}/")


def _chosen(jobs: Sequence[Job], settings: StudySettings, options: StudyOptions) -> list[Job]:
    known = {"arms": set(settings.arms), "seeds": {job.seed for job in jobs}, "budgets": {_text(job) for job in jobs}}
    for name, values in known.items():
        unknown = [value for value in getattr(options, name) if value not in values]
        if unknown:
            raise DataError(f"--{name[:-1]} {unknown[0]}: the study has {', '.join(map(str, sorted(values)))}.")
    return [
        job
        for job in jobs
        if (not options.arms or job.arm.split()[0] in options.arms)
        and (not options.seeds or job.seed in options.seeds)
        and (not options.budgets or _text(job) in options.budgets)
    ]


def _text(job: Job) -> str:
    return ",".join(f"{name}={value}" for name, value in job.budget.items())
