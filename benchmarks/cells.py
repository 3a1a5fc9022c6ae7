"""Cost and coverage of ADAT by cell size: patch plans of rendered pages from the true boxes of their words.

    python -m benchmarks.cells                          # 100 pages of 448 px, 1 minute
    python -m benchmarks.cells --scorer density

The columns: mean (and largest) share of the uniform tokens; share of the words' area under tokens of at most 8 px and
of at most 14 px.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from benchmarks.common import write_result
from sfa_adapters.adat import PatchPlan, PatchPolicy
from sfa_adapters.adat.scorers import content, score, to_cells
from sfa_adapters.recipes.synthetic.pages import SIZE, Page, PageKind, box_density, render_page

KINDS: tuple[PageKind, ...] = ("text", "table", "chart", "mixed", "sparse")
PATCH = 14
HEAD = ["| cell | budget | ratio | largest | words under 8 px | words under 14 px |", "|---|---|---|---|---|---|"]


def density(page: Page, cell: int, scorer: str) -> torch.Tensor:
    """Density of each cell of a page, by a scorer or (`boxes`) from the boxes of its words."""
    count = -(-SIZE // cell)
    if scorer == "boxes":
        return to_cells(torch.from_numpy(box_density(page.boxes, (SIZE, SIZE))), (SIZE, SIZE), cell, (count, count))
    pixels = torch.from_numpy(page.image.copy()).permute(2, 0, 1)[None].float() / 255
    return score(pixels, scorer, cell)[0]  # pyright: ignore[reportArgumentType]


def seen(page: Page, cell: int, scorer: str) -> torch.Tensor | None:
    """What orders cells of equal density, as `PatchPolicy.plan_images` measures it; None for the boxes of words."""
    if scorer == "boxes":
        return None
    return content(torch.from_numpy(page.image.copy()).permute(2, 0, 1)[None].float() / 255, cell)[0]


def covered(plan: PatchPlan, page: Page) -> np.ndarray:
    """Number of pixels of words under tokens of at most 8 px, of at most 14 px, and in all, `[3]`."""
    side, words = np.zeros(plan.padded_size), np.zeros(plan.padded_size, dtype=bool)
    for top, left, height, width in plan.boxes.numpy():
        side[round(top) : round(top + height), round(left) : round(left + width)] = height
    for left, top, right, bottom in page.boxes.round().astype(int):
        words[max(top, 0) : bottom, max(left, 0) : right] = True
    return np.array([(side[words] < 8.5).sum(), (side[words] < 14.5).sum(), words.sum()])


def main() -> None:
    """Parses the command line, measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scorer", default="boxes", choices=["boxes", "density", "edges", "reconstruction"])
    parser.add_argument("--pages", type=int, default=20, help="pages of each kind")
    args = parser.parse_args()
    pages = [render_page(kind, seed, "test") for kind in KINDS for seed in range(args.pages)]
    lines = [f"{len(pages)} pages of the test split, densities: {args.scorer}, patches of {PATCH} px.", "", *HEAD]
    for cell in (28, 56, 112, 224):
        maps = [density(page, cell, args.scorer) for page in track(pages, f"cell {cell}", transient=True)]
        contents = [seen(page, cell, args.scorer) for page in pages]
        for budget in (None, 1.0, 0.5):
            policy = PatchPolicy.published(cell=cell, budget=budget)
            plans = [policy.plan(one, (SIZE, SIZE), PATCH, shown) for one, shown in zip(maps, contents, strict=True)]
            ratios = [plan.ratio for plan in plans]
            areas = np.sum([covered(plan, page) for plan, page in zip(plans, pages, strict=True)], axis=0)
            fine, counts, words = areas.tolist()
            cells = (cell, budget or "none", f"{np.mean(ratios):.2f}", f"{max(ratios):.2f}")
            lines.append(f"| {' | '.join(map(str, cells))} | {fine / words:.2f} | {counts / words:.2f} |")
    Console().print("\n".join(lines), markup=False, soft_wrap=True)
    command = f"python -m benchmarks.cells {' '.join(sys.argv[1:])}".strip()
    print("written:", write_result(f"cells-{args.scorer}", torch.device("cpu"), command, lines))


if __name__ == "__main__":
    main()
