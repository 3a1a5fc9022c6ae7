"""Shared parts of the benchmarks: interleaved timing, peak memory, result files with a header.

Times are only compared inside one run. Candidates take turns (A B C A B C ...), so that a machine that slows down
slows all of them, and each ratio is formed inside one round; the table gives the median ratio and its quartiles.
"""

from __future__ import annotations

import datetime
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

RESULTS = Path(__file__).parent / "results"
BASELINE = "plain"


@dataclass(frozen=True)
class Row:
    """One line of a result table.

    Attributes:
        name: The candidate.
        milliseconds: Median time.
        ratio: Median over rounds of its time over the baseline's in the same round.
        low: Lower quartile of those ratios.
        high: Upper quartile.
        megabytes: Peak of the memory that one call allocates, without what was allocated before.
    """

    name: str
    milliseconds: float
    ratio: float
    low: float
    high: float
    megabytes: float

    def markdown(self, *labels: str) -> str:
        """The row as a line of a Markdown table, behind cells with these labels."""
        cells = [*labels, self.name, f"{self.milliseconds:.1f}", f"{self.ratio:.2f}", f"{self.low:.2f}-{self.high:.2f}"]
        return "| " + " | ".join([*cells, f"{self.megabytes:.0f}"]) + " |"


def compare(candidates: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, label: str) -> list[Row]:
    """Times candidates in turns; the one named `plain` is the baseline."""

    def once(run: Callable[[], object]) -> float:
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        return time.perf_counter() - start

    memory = {name: peak_memory(run, device) for name, run in candidates.items()}  # also the warm-up
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in track(range(rounds), description=label, transient=True):
        for name, run in candidates.items():
            times[name].append(once(run))
    rows: list[Row] = []
    for name in candidates:
        ratios = [mine / base for mine, base in zip(times[name], times[BASELINE], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        rows.append(Row(name, 1e3 * statistics.median(times[name]), median, low, high, memory[name]))
    return rows


def peak_memory(run: Callable[[], object], device: torch.device) -> float:
    """Peak of the memory that one call allocates, in MB: allocator counters on CUDA, memory events on a CPU."""
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    results: Any = profiler.profiler
    events = results.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    current = peak = 0
    for _, size in changes:
        current += size
        peak = max(peak, current)
    return peak / 2**20


def hardware(device: torch.device) -> str:
    """A short name of the hardware for file names, e.g. `cpu2` or `h200`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device).lower().replace("nvidia", "").strip().replace(" ", "-")
    return f"cpu{torch.get_num_threads()}"


def write_result(what: str, device: torch.device, command: str, body: list[str]) -> Path:
    """Writes `benchmarks/results/<what>_<hardware>_<date>.md`, one dated file per machine."""
    import transformers

    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    path = RESULTS / f"{what}_{hardware(device)}_{today}.md"
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    head = [
        f"# {what}, {hardware(device)}, {today}",
        "",
        f"Command: `{command}`",
        "",
        f"{chip}, {torch.get_num_threads()} threads; torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}.",
        "Ratios are medians over rounds in which the candidates take turns, with quartiles; memory is the peak that",
        "one call allocates. Times of different runs are not comparable.",
        "",
    ]
    path.write_text("\n".join([*head, *body]) + "\n")
    return path


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
