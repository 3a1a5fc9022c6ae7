"""Accuracy of text density on real pages: the estimator, edge labels, blurred Canny edges.

    sfa density pages --part test --out real-pages
    python -m benchmarks.real_pages --pages real-pages            # about half an hour on 2 cores
    python -m benchmarks.real_pages --pages real-pages --part val --also new=runs/density/best.safetensors

Three tables: agreement with the boxes of words by script; words found in every view (turned, coloured, faint, scanned,
photographed, small, large); pictures without text. What the measures are: `sfa_adapters/recipes/density/measures.py`.
Densities of scans are compared in cells of the page at 896 px.
Intervals are 95%, with packages resampled.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from benchmarks.common import write_result
from sfa_adapters.images import as_image
from sfa_adapters.recipes.density.batches import halvings
from sfa_adapters.recipes.density.drawn_text import draw_lines
from sfa_adapters.recipes.density.map_scorers import MapScorer, map_scorers
from sfa_adapters.recipes.density.measures import TEXT, PageCounts, count_page, measure
from sfa_adapters.recipes.density.negatives import draw_map
from sfa_adapters.recipes.density.real_pages import RealPage, read_part
from sfa_adapters.recipes.density.truth import corners_of, view_density
from sfa_adapters.recipes.density.views import VIEWS, view_of
from sfa_adapters.recipes.nano.evaluate import Interval, bootstrap
from sfa_adapters.recipes.synthetic.pages import render_page
from sfa_adapters.recipes.synthetic.scans import photograph

SIDE = 896
Counts = dict[str, list[PageCounts]]  # by scorer


def decimal(interval: Interval, digits: int = 3, scale: float = 1.0) -> str:
    """A number with its interval."""
    if not np.isfinite(interval.value):
        return "-"
    value, low, high = (f"{scale * x:.{digits}f}" for x in (interval.value, interval.low, interval.high))
    return f"{value} [{low}, {high}]"


def counts_of(scorers: dict[str, MapScorer], pages: Sequence[RealPage], view: str) -> Counts:
    """Counts of every page in one view, by scorer."""
    counts: Counts = {name: [] for name in scorers}
    for number, page in enumerate(track(pages, view, transient=True)):
        shown = view_of(page, view, number)
        if shown is None:
            continue
        for name, scorer in scorers.items():
            density = scorer(shown.picture)
            counts[name].append(count_page(page.package, density, shown.density, shown.middles, shown.coarse))
    return counts


def agreement(scorers: dict[str, MapScorer], pages: Sequence[RealPage]) -> list[str]:
    """All measures over upright pages, in all and by script."""
    counts = counts_of(scorers, pages, "upright")
    lines = ["| pages | map | r | AUC | hit % | false % |", "|---|---|---|---|---|---|"]
    scripts = sorted({page.script for page in pages})
    for script in [None, *scripts]:
        chosen = [i for i, page in enumerate(pages) if script in (None, page.script)]
        packages = len({pages[i].package for i in chosen})
        what = f"{script or 'all'}, {len(chosen)} of {packages}"
        for name, all_counts in counts.items():
            part = [all_counts[i] for i in chosen]
            cells = [decimal(measure(part, "r")), decimal(measure(part, "AUC"), 4)]
            cells += [decimal(measure(part, "hit"), 1, 100), decimal(measure(part, "false"), 2, 100)]
            lines.append(f"| {what} | {name} | {' | '.join(cells)} |")
    return lines


def views(scorers: dict[str, MapScorer], pages: Sequence[RealPage], names: Sequence[str]) -> list[str]:
    """r, words found and false positives in every view, and in drawn text of handwriting-like fonts."""
    lines = ["| view | map | r | hit % | false % |", "|---|---|---|---|---|"]
    for view in names:
        for name, part in counts_of(scorers, pages, view).items():
            if not part:
                continue
            cells = [decimal(measure(part, "r")), decimal(measure(part, "hit"), 1, 100)]
            cells.append(decimal(measure(part, "false"), 2, 100))
            lines.append(f"| {view}, {len(part)} | {name} | {' | '.join(cells)} |")
    return lines


def handwriting(scorers: dict[str, MapScorer], fonts: Sequence[Path], count: int) -> list[str]:
    """Rows of drawn text in handwriting-like fonts that no training crop has."""
    counts: Counts = {name: [] for name in scorers}
    for font in fonts:
        for number in range(count):
            rng = np.random.default_rng((number, 31))
            paper = np.full((SIDE // 2, SIDE // 2, 3), 250, np.uint8)
            picture, boxes = draw_lines(paper, rng, font, float(rng.uniform(5, 20)), (30, 30, 60))
            corners = corners_of(boxes, np.eye(3))
            truth = view_density(corners, (SIDE // 32, SIDE // 32))
            for name, scorer in scorers.items():
                counts[name].append(count_page(font.stem, scorer(picture), truth, corners.mean(axis=1)[:, ::-1] / 16))
    rows = []
    for name, part in counts.items():
        cells = [decimal(measure(part, "r")), decimal(measure(part, "hit"), 1, 100)]
        cells.append(decimal(measure(part, "false"), 2, 100))
        rows.append(f"| handwriting-like fonts, {len(part)} | {name} | {' | '.join(cells)} |")
    return rows


def without_text(scorers: dict[str, MapScorer], photographs: Sequence[Path], count: int) -> list[str]:
    """Share of cells that count as text in pictures that have none."""
    rng = np.random.default_rng(41)
    pictures = {
        f"photographs, {len(photographs)} files": [halvings(as_image(path), 500)[-1] for path in photographs],
        "photographs of scikit-image": [photograph(rng, "test", 448, 448, textures=0.0) for _ in range(count)],
        "maps and line drawings": [draw_map(rng, 448) for _ in range(count)],
        "grids, hatching, shapes": [render_page("lines", seed, "test").image for seed in range(count)],
        "blank scans": [render_page("blank", seed, "test").image for seed in range(count)],
    }
    lines = ["| pictures | map | false % | worst |", "|---|---|---|---|"]
    for what, images in pictures.items():
        for name, scorer in scorers.items():
            shares = np.array([float((scorer(image) > TEXT).mean()) for image in images])
            lines.append(
                f"| {what}, {len(images)} | {name} | {decimal(bootstrap(shares), 2, 100)} | {shares.max():.3f} |"
            )
    return lines


def main() -> None:
    """Runs everything and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=Path, default=Path("real-pages"), help="folder of `sfa density pages`")
    parser.add_argument("--part", default="test", choices=["val", "test"])
    parser.add_argument("--also", nargs="*", default=[], metavar="NAME=FILE", help="other weights to compare")
    parser.add_argument("--views", nargs="*", default=list(VIEWS)[1:], metavar="NAME", help=", ".join(VIEWS))
    parser.add_argument("--every", type=int, default=3, help="for views, take every so many pages")
    parser.add_argument("--count", type=int, default=40, help="pictures of each kind without text")
    args = parser.parse_args()
    weights: dict[str, str | Path | None] = {"estimator": None}
    for item in args.also:
        name, _, file = item.partition("=")
        weights[name] = Path(file)
    scorers = map_scorers(weights)
    pages = read_part(args.pages, args.part)
    packages = len({page.package for page in pages})
    body = [f"{len(pages)} pages of {packages} packages, part {args.part}.", "", "## Agreement with word boxes", ""]
    body += [*agreement(scorers, pages), "", "## Views", ""]
    # The pages at 600 dpi are few: all of them are in the sample.
    chosen = [p for i, p in enumerate(pages) if i % args.every == 0 or p.path.with_suffix(".600dpi.png").is_file()]
    body += views(scorers, chosen, args.views)
    extra = args.pages / "test"
    body += handwriting(scorers, sorted((extra / "fonts").rglob("*.ttf")), args.count // 4)
    body += ["", "## Pictures without text", ""]
    photographs = sorted(p for p in (extra / "photographs").rglob("*") if p.suffix in (".webp", ".jpg", ".png"))
    body += without_text(scorers, photographs, args.count)
    command = "python -m benchmarks.real_pages " + " ".join(sys.argv[1:])
    path = write_result(f"real-pages-{args.part}", torch.device("cpu"), command, body)
    Console().print(path.read_text(), markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
