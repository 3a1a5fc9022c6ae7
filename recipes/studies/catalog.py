"""The list of studies, and `sfa study NAME`, which runs one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module

from rich.console import Console

from sfa_adapters.errors import DataError
from sfa_adapters.recipes.studies.options import StudyOptions
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
    "tokens": "sfa_adapters.recipes.studies.tokens",
}
ROWS, TUNING = "rows.jsonl", "tuning.jsonl"


def run_study(options: StudyOptions, console: Console | None = None) -> None:
    """Makes the missing runs of a study, then its table and figures.

    Args:
        options: Options of `sfa study`.
        console: Shows progress and the table; the terminal by default.

    Raises:
        DataError: There is no such study; or an option, or the results in the folder, do not fit it.
    """
    if options.name not in STUDIES:
        raise DataError(f"No study is called {options.name!r}. There are {', '.join(STUDIES)}.")
    console = console or Console()
    settings = load_settings(options.settings or options.name)
    train: Callable[[Job], object] = import_module(STUDIES[options.name]).train
    path = options.folder / (TUNING if options.tune else ROWS)
    jobs = _chosen(settings.tuning_jobs() if options.tune else settings.jobs(), settings, options)
    if not options.report:
        run_jobs(train, jobs, path, options.workers, console)  # pyright: ignore[reportArgumentType]
    rows = read_rows(path)
    if not rows:
        raise DataError(f"{path} has no runs yet. Run: sfa study {options.name} --out {options.folder}")
    if options.tune:
        print_tuning(settings, rows, console)
        return
    print_report(settings, rows, console)
    write_report(settings, rows, options.folder, read_rows(options.folder / TUNING))
    console.print(f"table, figures and rows are in {options.folder}/")


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
