"""The main job, `sfa demo`: a small real vision-language model learns something, with SFA and without.

    sfa demo                        tables that it does not know: what SFA is for
    sfa demo --task charts          charts that it knows already: nothing to gain

Both leave a folder with the saved adapter, the learned bias as a picture, the numbers, and a page of answers
(docs/demo.md).
"""

from __future__ import annotations

from rich.console import Console

from sfa_adapters.recipes.demo.charts import run_charts
from sfa_adapters.recipes.demo.options import FILES, DemoConfig, DemoError
from sfa_adapters.recipes.demo.report import Report
from sfa_adapters.recipes.demo.tables import run_tables
from sfa_adapters.recipes.demo.tables_report import TablesReport

__all__ = ["FILES", "DemoConfig", "DemoError", "run_demo"]


def run_demo(config: DemoConfig, console: Console | None = None) -> Report | TablesReport:
    """Runs a task of the demo and leaves its folder.

    Args:
        config: Options.
        console: Where progress and the table go; the terminal by default.

    Returns:
        All numbers.

    Raises:
        DemoError: The folder cannot be written, or holds files of somebody else.
        WeightsError: The weights of the host are missing or damaged.
    """
    console = console or Console()
    return run_tables(config, console) if config.task == "tables" else run_charts(config, console)
