"""`sfa study NAME`: what SFA is worth, measured against controls and placebos."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sfa_adapters.cli.app import CommandApp

__all__ = ["app"]

app = CommandApp()


@app.command(
    epilog="Examples:  sfa study lookup --workers 2   |   sfa study lookup --arm none --arm axial --seed 0   |   "
    "sfa study lookup --report"
)
def study(
    name: Annotated[str, typer.Argument(help="Which study; `sfa study list` names them.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the results; sfa-study/NAME by default.")] = None,
    workers: Annotated[int, typer.Option(help="Processes, each with one thread.")] = 1,
    tune: Annotated[bool, typer.Option("--tune", help="Make the runs on tuning seeds instead.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Make no runs: table and figures of what is there.")] = False,
    settings: Annotated[Path | None, typer.Option(help="A YAML file instead of the study's own settings.")] = None,
    arm: Annotated[list[str] | None, typer.Option(help="Only these arms.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Only these seeds.")] = None,
    budget: Annotated[list[str] | None, typer.Option(help="Only these budgets, e.g. steps=500.")] = None,
) -> None:
    """Train every arm of a study with every seed, and compare them. Stopped runs go on where they were."""
    from sfa_adapters.recipes.studies.catalog import STUDIES, StudyOptions, run_study
    from sfa_adapters.recipes.studies.settings import load_settings

    if name == "list":
        for each in STUDIES:
            typer.echo(f"{each:<20}{load_settings(each).title}")
        return
    folder = out or Path("sfa-study") / name
    chosen = {"arms": tuple(arm or ()), "seeds": tuple(seed or ()), "budgets": tuple(budget or ())}
    run_study(
        StudyOptions(name=name, out=folder, workers=workers, tune=tune, report=report, settings=settings, **chosen)
    )
