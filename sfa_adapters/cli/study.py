"""`sfa study NAME`: measures the effect of SFA against controls and placebos."""

from __future__ import annotations

import typer

from sfa_adapters.cli.app import CommandApp
from sfa_adapters.cli.options import from_dataclass
from sfa_adapters.recipes.studies.options import StudyOptions

__all__ = ["app"]

app = CommandApp()


@app.command(
    epilog="Examples:  sfa study lookup --workers 2   |   sfa study lookup --arm none --arm axial --seed 0   |   "
    "sfa study lookup --report"
)
@from_dataclass(StudyOptions, arguments=("name",), names={"arms": "--arm", "seeds": "--seed", "budgets": "--budget"})
def study(options: StudyOptions) -> None:
    """Train every arm of a study with every seed, and compare them. Stopped runs are resumed."""
    from sfa_adapters.recipes.studies.catalog import STUDIES, run_study
    from sfa_adapters.recipes.studies.settings import load_settings

    if options.name == "list":
        for each in STUDIES:
            typer.echo(f"{each:<20}{load_settings(each).title}")
        return
    run_study(options)
