"""Where plans put their fine patches on real pages, at 25, 50 and 75% of the tokens.

    sfa density pages --part test --out real-pages
    python -m benchmarks.real_plans --pages real-pages               # about ten minutes on 2 cores
    python -m benchmarks.real_plans --pages real-pages --part val    # the table by which the default was chosen

Intervals are 95%, with packages resampled. The last lines are the time of scoring and planning one page.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.common import write_result
from sfa_adapters.adat import PatchPolicy
from sfa_adapters.recipes.density.plan_measures import PATCH, shown_size
from sfa_adapters.recipes.density.plan_rows import SCORERS, plan_rows
from sfa_adapters.recipes.density.real_pages import RealPage, read_part

HEAD = "| plan | budget | tokens used | words' area under at most 14 px, % | mean side over words, px |"


def times(page: RealPage, rounds: int = 7) -> list[str]:
    """Milliseconds of scoring and planning one page, by scorer."""
    import cv2

    picture = cv2.resize(page.picture(), shown_size(page)[::-1], interpolation=cv2.INTER_AREA)
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    lines = []
    for scorer in SCORERS:
        policy, taken = PatchPolicy(scorer=scorer, budget=0.5), []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            policy.plan_images(pixels, PATCH)
            taken.append(1e3 * (time.perf_counter() - start))
        low, middle, high = statistics.quantiles(taken[1:], n=4)
        lines.append(
            f"* {scorer}: {middle:.0f} ms ({low:.0f}-{high:.0f}) for {pixels.shape[-2]} x {pixels.shape[-1]} px"
        )
    return lines


def main() -> None:
    """Plans all pages, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=Path, default=Path("real-pages"), help="folder of `sfa density pages`")
    parser.add_argument("--part", default="test", choices=["val", "test"])
    args = parser.parse_args()
    pages = read_part(args.pages, args.part)
    packages = len({page.package for page in pages})
    lines = [f"{len(pages)} pages of {packages} packages, part {args.part}.", "", HEAD, "|---|---|---|---|---|"]
    for row in sorted(plan_rows(pages), key=lambda row: (row.budget, -row.fine.value)):
        fine = f"{100 * row.fine.value:.1f} [{100 * row.fine.low:.1f}, {100 * row.fine.high:.1f}]"
        side = f"{row.side.value:.1f} [{row.side.low:.1f}, {row.side.high:.1f}]"
        lines.append(f"| {row.name} | {100 * row.budget:.0f}% | {100 * row.tokens:.0f}% | {fine} | {side} |")
    lines += ["", "Scoring and planning a page, median and quartiles:", "", *times(pages[0])]
    command = "python -m benchmarks.real_plans " + " ".join(sys.argv[1:])
    path = write_result(f"real-plans-{args.part}", torch.device("cpu"), command.strip(), lines)
    Console().print(path.read_text(), markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
