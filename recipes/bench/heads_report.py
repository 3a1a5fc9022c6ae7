"""Table and files of `sfa bench heads`."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from sfa_adapters.heads.receipt import PruneReceipt
from sfa_adapters.recipes.bench.heads_quality import HeadQuality
from sfa_adapters.statistics import Interval

__all__ = ["HeadArm", "HeadBench", "arm_row", "write_bench"]


@dataclass(frozen=True)
class HeadArm:
    """One way to prune heads, and its measurements.

    Attributes:
        method: Scoring method of the heads.
        plan: Kind of head plan: how pruned heads are divided among layers.
        rate: Requested share of pruned heads.
        compensation: How the kept heads make up for the pruned ones.
        removed: Number of pruned heads; with several draws of random heads, of the first.
        total: Number of heads before.
        receipt: Sizes and times of the pruned model, timed in turns with the whole host; of the first draw.
        quality: Quality of its answers, or None where there were no questions.
    """

    method: str
    plan: str
    rate: float
    compensation: str
    removed: int
    total: int
    receipt: PruneReceipt
    quality: HeadQuality | None


@dataclass(frozen=True)
class HeadBench:
    """All measurements of a run.

    Attributes:
        host: Name of the model.
        whole: Quality of the answers of the host with all its heads, or None where there were no questions.
        arms: The measured arms.
        left_out: Method, plan, rate and reason of arms that are not possible on this host.
    """

    host: str
    whole: HeadQuality | None
    arms: tuple[HeadArm, ...]
    left_out: tuple[tuple[str, str, float, str], ...]


def write_bench(bench: HeadBench, out: Path, options: Mapping[str, str]) -> None:
    """Prints the table and writes `bench.csv` and `bench.json`.

    Args:
        bench: The measurements.
        out: An existing folder.
        options: Options of the run, for `bench.json`.
    """
    rows = [arm_row(arm) for arm in bench.arms]
    with (out / "bench.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    record = {
        "options": dict(options),
        "torch": torch.__version__,
        "host": bench.host,
        "whole": None if bench.whole is None else asdict(bench.whole),
        "arms": rows,
        "left_out": [dict(zip(("method", "plan", "rate", "reason"), left, strict=True)) for left in bench.left_out],
    }
    (out / "bench.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    console = Console()
    for method in dict.fromkeys(arm.method for arm in bench.arms):
        console.print(_table(bench, method))
    for method, plan, rate, reason in bench.left_out:
        console.print(f"{method}, {plan} at {rate:.0%} left out: {reason}", highlight=False)


def arm_row(arm: HeadArm) -> dict[str, Any]:
    """One row of the CSV file, with every interval."""
    row: dict[str, Any] = {"method": arm.method, "plan": arm.plan, "rate": arm.rate, "compensation": arm.compensation}
    row |= {"removed": arm.removed, "total": arm.total}
    intervals: dict[str, Interval] = {}
    if arm.quality is not None:
        intervals = {name: getattr(arm.quality, name) for name in ("accuracy", "change", "invented", "mdi")}
    speed = arm.receipt.speed
    assert speed is not None
    intervals |= {"prefill_ratio": speed.prefill_ratio}
    expected: dict[str, Any] = {"prefill_expected": speed.expected_prefill}
    if speed.decode_ratio is not None:
        intervals |= {"decode_ratio": speed.decode_ratio}
        expected["decode_expected"] = speed.expected_decode
    for name, value in intervals.items():
        row |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
    row |= expected
    for name, pair in {"weights": speed.weights, "cache": speed.cache, "peak": speed.peak}.items():
        if pair is not None:
            row |= {f"{name}_bytes_before": pair[0], f"{name}_bytes": pair[1]}
    row |= {"mean_change": arm.receipt.mean_change, "parameters": arm.receipt.parameters[1]}
    if arm.quality is not None and len(arm.quality.by_seed) > 1:
        row["accuracy_by_draw"] = " ".join(f"{value:.4f}" for value in arm.quality.by_seed)
    else:
        row["accuracy_by_draw"] = ""
    return row


def _table(bench: HeadBench, method: str) -> Table:
    """The table for a terminal of 80 columns; all intervals are in the files."""
    has_quality = bench.whole is not None
    table = Table(
        title=f"heads by {method}; speed in times of the whole host",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("plan", no_wrap=True)
    table.add_column("for the\nrest", no_wrap=True)
    worth = ("accuracy\n% [95%]", "made\nup %", "MDI") if has_quality else ("output\nmoved", "weights\nMB", "peak\nMB")
    for name in ("rate", "heads\ngone", *worth, "pre-\nfill", "de-\ncode", "cache\nMB"):
        table.add_column(name, justify="right", no_wrap=True)
    if bench.whole is not None:
        table.add_row("whole host", "", "", "0", *_worth(bench.whole), "1", "1", "")
    previous = None
    for arm in (arm for arm in bench.arms if arm.method == method):
        if previous is not None and arm.plan != previous:
            table.add_section()
        speed = arm.receipt.speed
        assert speed is not None
        size = [f"{arm.receipt.mean_change:.2g}", *(f"{pair[1] / 2**20:.1f}" for pair in (speed.weights, speed.peak))]
        table.add_row(
            arm.plan,
            arm.compensation,
            f"{arm.rate:.0%}",
            str(arm.removed),
            *(size if arm.quality is None else _worth(arm.quality)),
            f"{speed.prefill_ratio.value:.2f}",
            "" if speed.decode_ratio is None else f"{speed.decode_ratio.value:.2f}",
            "" if speed.cache is None else f"{speed.cache[1] / 2**20:.2f}",
        )
        previous = arm.plan
    return table


def _worth(quality: Any) -> list[str]:
    accuracy = quality.accuracy
    text = f"{100 * accuracy.value:.0f} [{100 * accuracy.low:.0f}, {100 * accuracy.high:.0f}]"
    return [text, f"{100 * quality.invented.value:.0f}", f"{quality.mdi.value:.1f}"]
