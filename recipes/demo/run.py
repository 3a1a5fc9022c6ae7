"""`sfa demo`: fine-tunes a small real vision-language model with SFA and without, and compares them.

    sfa demo                        tables, which it does not know: what SFA is for
    sfa demo --task charts          charts, which it knows already: nothing to gain

Both write a folder with the saved adapter, the learned bias as a figure, the numbers, and a figure of answers
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
    """Runs a task of the demo and writes its folder.

    Args:
        config: Options.
        console: Shows progress and the table; the terminal by default.

    Returns:
        All numbers.

    Raises:
        DemoError: The folder cannot be written, or holds other files.
        WeightsError: The weights of the host are missing or damaged.
    """
    console = console or Console()
    return run_tables(config, console) if config.task == "tables" else run_charts(config, console)
