"""Common parts of reports of runs: intervals and tables as text, and the metadata of a run."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from sfa_adapters.statistics import Interval

__all__ = ["hardware", "markdown_table", "metadata_line", "percent", "run_metadata", "terminal_table"]

PACKAGES = ("sfa-adapters", "torch", "transformers", "peft")


def percent(interval: Interval | None) -> str:
    """An interval in percent, e.g. `62.3 [58.1, 66.4]`; a dash for NaN, and empty for None."""
    if interval is None:
        return ""
    if math.isnan(interval.value):
        return "-"
    return f"{100 * interval.value:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def terminal_table(head: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> Table:
    """A table for the terminal: all columns but the first one end at the right, as numbers do."""
    table = Table(*head, title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    return table


def hardware() -> str:
    """Processor and threads, or the graphics card."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():  # Linux leaves platform.processor() empty
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return f"{name}, {torch.get_num_threads()} threads of {os.cpu_count()}"


def run_metadata(command: str, settings: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Metadata of a run for JSON: command, settings, hardware, versions and time.

    Args:
        command: The command line that repeats it.
        settings: Host, seed, steps, ...
        seconds: Wall-clock time.
    """
    return {
        "command": command,
        **settings,
        "hardware": hardware(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "seconds": round(seconds, 1),
    }


def metadata_line(metadata: Mapping[str, Any]) -> str:
    """The metadata of a run in one line.

    Args:
        metadata: From `run_metadata`, with `seed` and `steps` among the settings.
    """
    versions = ", ".join(f"{name} {number}" for name, number in metadata["versions"].items())
    steps = f"Seed {metadata['seed']}, {metadata['steps']} steps."
    return f"{steps} {metadata['hardware']}. {versions}. {metadata['seconds']:.0f} s."
