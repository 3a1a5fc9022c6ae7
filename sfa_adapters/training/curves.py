"""The training curves of a run, as CSV and as a figure."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sfa_adapters.figure_style import BLUE, COLOURS, GRAY

__all__ = ["plot_training", "write_log"]

FIRST = ("step", "epoch", "loss", "learning_rate", "grad_norm")


def _lines(history: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [line for line in history if "loss" in line]


def write_log(history: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Writes the training log as CSV, one line per log.

    Args:
        history: `trainer.state.log_history`.
        path: The file to write.

    Returns:
        The file.
    """
    lines = _lines(history)
    others = sorted({name for line in lines for name in line} - set(FIRST))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[*FIRST, *others], restval="")
        writer.writeheader()
        writer.writerows(lines)
    return path


def plot_training(history: Sequence[Mapping[str, Any]], path: Path, title: str = "") -> Path | None:
    """Draws loss, learning rates and norm of the gradients over steps.

    Args:
        history: `trainer.state.log_history`.
        path: The file to write; its ending chooses the format.
        title: Title of the figure.

    Returns:
        The file; None where nothing was logged.
    """
    from matplotlib.figure import Figure

    lines = _lines(history)
    if not lines:
        return None
    steps = [line["step"] for line in lines]
    marker = "o" if len(steps) < 40 else ""
    figure = Figure(figsize=(9.0, 9.5), dpi=140, layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    top.plot(steps, [line["loss"] for line in lines], marker=marker, color=BLUE, linewidth=2)
    top.set_ylabel("loss\n(nats per answer token)", fontsize=15)
    parts = sorted({name for line in lines for name in line if name.startswith("lr/")}) or ["learning_rate"]
    for number, name in enumerate(parts):
        rates = [line.get(name, float("nan")) for line in lines]
        # Two parts with one rate would hide each other: later ones are drawn thinner.
        width = 2 + 1.5 * (len(parts) - 1 - number)
        middle.plot(steps, rates, color=COLOURS[number % len(COLOURS)], linewidth=width, label=name.removeprefix("lr/"))
    middle.set_ylabel("learning rate", fontsize=15)
    middle.set_yscale("log" if any(line.get(name, 0) > 0 for line in lines for name in parts) else "linear")
    middle.legend(fontsize=13, ncols=2)
    norms = [line.get("grad_norm", float("nan")) for line in lines]
    bottom.plot(steps, norms, marker=marker, color=GRAY, linewidth=2)
    bottom.set_yscale("log" if all(norm > 0 for norm in norms) else "linear")
    bottom.set_ylabel("gradient norm\nbefore clipping", fontsize=15)
    bottom.set_xlabel("optimizer step", fontsize=15)
    for axis in (top, middle, bottom):
        axis.tick_params(labelsize=13)
        axis.grid(alpha=0.3)
    figure.align_ylabels()
    if title:
        figure.suptitle(title, fontsize=16)
    figure.savefig(path)
    return path
