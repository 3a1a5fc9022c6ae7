"""Time and memory of the density estimator over the size of a page.

    python -m benchmarks.density_time                     a minute on a quiet machine

A page of more than 0.9 million pixels is made smaller first, so both are bounded. Memory is what the process holds at
most above the page itself, which is float32 as a tower gets it (576 MB for 6,000 x 8,000 px).
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.common import write_result
from sfa_adapters.adat import DensityEstimator

SIZES = ((448, 448), (896, 672), (1754, 1240), (3508, 2480), (7016, 4960), (8000, 6000))


def measure(size: tuple[int, int], rounds: int) -> str:
    """A row of the table: one page, quartiles of the milliseconds, megabytes above the page."""
    model = DensityEstimator.pretrained().fused()
    page = torch.rand(1, 3, *size)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the largest size so far (Linux)
    before, taken = _kilobytes("VmRSS"), []
    with torch.inference_mode():
        for _ in range(rounds + 1):
            start = time.perf_counter()
            model(page)
            taken.append(1e3 * (time.perf_counter() - start))
    above = (_kilobytes("VmHWM") - before) / 1024
    low, middle, high = statistics.quantiles(taken[1:], n=4)
    return f"| {size[0]:,} x {size[1]:,} | {middle:.0f} | {low:.0f}-{high:.0f} | {above:.0f} |"


def _kilobytes(name: str) -> int:
    """Size of the process now (`VmRSS`) or at most (`VmHWM`)."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"{name}:\s+(\d+)", status)[0])


def main() -> None:
    """Measures all sizes, from small to large, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    lines = ["| page, px | ms | quartiles | MB above the page |", "|---|---|---|---|"]
    lines += [measure(size, args.rounds) for size in SIZES]
    command = "python -m benchmarks.density_time " + " ".join(sys.argv[1:])
    path = write_result("density-time", torch.device("cpu"), command.strip(), lines)
    Console().print(path.read_text(), markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
