"""Accuracy of the density estimator and of edge labels: against printed boxes, an OCR engine, pages without text.

    python -m benchmarks.density                       # 6 minutes on 2 cores; --no-ocr without rapidocr
    python -m benchmarks.density --also edges=runs/density-edges/best.safetensors

Pages are of the test split, which shares no font face, photograph or table with the training pages. "Found" and "false
positive" mean a density over 0.3, the lower threshold of the published plan. 95% intervals resample pages (bootstrap).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from benchmarks.common import compare, write_result
from sfa_adapters.adat import DensityEstimator, density_labels
from sfa_adapters.adat.labels import box_density
from sfa_adapters.recipes.nano.evaluate import Interval, bootstrap
from sfa_adapters.recipes.synthetic.pages import KINDS, SIZE, Page, mixture, render_page, text_page
from sfa_adapters.recipes.synthetic.scans import PHOTOGRAPHS, photograph

TEXT = 0.3
HEIGHTS = (3, 4, 5, 6, 7, 8, 10, 12, 16, 20)
Scorer = Callable[[np.ndarray], np.ndarray]  # uint8 [H, W, 3] -> [rows, columns]


def estimator(weights: Path | None) -> Scorer:
    """The network as a function of one picture."""
    model = DensityEstimator.pretrained(weights).fused()

    def run(image: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255)[0].numpy()

    return run


def correlation(estimate: np.ndarray, true: np.ndarray, rounds: int = 2000) -> Interval:
    """Pearson's correlation over all cells of `[pages, rows, columns]`, its interval by resampling pages."""
    x, y = estimate.reshape(len(estimate), -1).astype(np.float64), true.reshape(len(true), -1).astype(np.float64)
    sums = np.stack(
        [np.full(len(x), x.shape[1]), x.sum(1), y.sum(1), (x * x).sum(1), (y * y).sum(1), (x * y).sum(1)], 1
    )

    def of(total: np.ndarray) -> np.ndarray:
        n, sx, sy, sxx, syy, sxy = np.moveaxis(total, -1, 0)
        return (n * sxy - sx * sy) / np.sqrt((n * sxx - sx**2) * (n * syy - sy**2))

    drawn = np.random.default_rng(0).integers(0, len(x), (rounds, len(x)))
    low, high = np.quantile(of(sums[drawn].sum(1)), (0.025, 0.975))
    return Interval(float(of(sums.sum(0))), float(low), float(high))


def noisy(seed: int) -> np.ndarray:
    """A sheet with nothing but noise, from faint to heavy, gray or coloured."""
    rng = np.random.default_rng((seed, 13))
    channels = 1 if seed % 2 else 3
    noise = rng.normal(0, rng.uniform(2, 40), (SIZE, SIZE, channels))
    return np.clip(rng.uniform(60, 250) + noise, 0, 255).astype(np.uint8).repeat(3 // channels, axis=2)


def photo(seed: int) -> np.ndarray:
    """A piece of one of the test photographs."""
    return photograph(np.random.default_rng((seed, 17)), "test", SIZE, SIZE, textures=0.0)


def found_words(scorer: Scorer, pages: Sequence[Page]) -> Interval:
    """Share of words whose middle lies in a cell that counts as text; the mean over pages."""
    shares = []
    for page in pages:
        centre = ((page.boxes[:, :2] + page.boxes[:, 2:]) / 32).astype(int).clip(0, 27)
        shares.append(float((scorer(page.image)[centre[:, 1], centre[:, 0]] > TEXT).mean()))
    return bootstrap(np.array(shares))


def agreement(scorers: dict[str, Scorer], pages: Sequence[Page], ocr: int) -> list[str]:
    """Correlations with the printed boxes, and with OCR boxes on the first `ocr` pages."""
    shape = (SIZE, SIZE)
    true = np.stack([box_density(p.boxes, shape) for p in pages])
    maps = {n: np.stack([s(p.image) for p in track(pages, n, transient=True)]) for n, s in scorers.items()}
    lines = [
        "| map | against | all pages | mean squared error | " + " | ".join(KINDS[:4]) + " |",
        "|---|---|---|---|" + "---|" * 4,
    ]

    def row(name: str, against: str, estimate: np.ndarray, wanted: np.ndarray) -> None:
        kinds = np.array([p.kind for p in pages[: len(wanted)]])
        parts = [f"{correlation(estimate[kinds == k], wanted[kinds == k], 10).value:.3f}" for k in KINDS[:4]]
        loss = bootstrap(((estimate - wanted) ** 2).mean(axis=(1, 2)))
        cells = [
            name,
            against,
            str(correlation(estimate, wanted)),
            f"{loss.value:.4f} [{loss.low:.4f}, {loss.high:.4f}]",
        ]
        lines.append("| " + " | ".join([*cells, *parts]) + " |")

    for name, estimate in maps.items():
        row(name, "printed boxes", estimate, true)
    edges = maps["edges"]
    for name, estimate in maps.items():
        if name != "edges":
            row(name, "edges", estimate, edges)
    if ocr:
        images = [p.image for p in pages[:ocr]]
        read = np.stack([density_labels(image, source="ocr") for image in track(images, "OCR", transient=True)])
        for name, estimate in maps.items():
            row(name, f"OCR, {ocr} pages", estimate[:ocr], read)
        row("OCR", f"printed boxes, {ocr} pages", read, true[:ocr])
    return lines


def scanned_page(scorers: dict[str, Scorer], ocr: bool) -> list[str]:
    """scikit-image's scanned page, at two sizes, against OCR boxes."""
    import cv2
    import skimage.data

    scan = np.stack([skimage.data.page()] * 3, axis=-1)
    lines = ["| map | 192 x 384 px (its own size) | 448 x 896 px |", "|---|---|---|"]
    sizes = [cv2.resize(scan, size, interpolation=cv2.INTER_CUBIC) for size in ((384, 192), (896, 448))]
    for name, scorer in scorers.items():
        cells = []
        for image in sizes:
            density = scorer(image)
            text = f"mean {density.mean():.2f}, text in {100 * (density > TEXT).mean():.0f}% of the cells"
            if ocr:
                read = density_labels(image, density.shape, "ocr")
                text = f"correlation {np.corrcoef(density.ravel(), read.ravel())[0, 1]:.3f}; {text}"
            cells.append(text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def negatives(scorers: dict[str, Scorer], count: int) -> list[str]:
    """Share of cells that count as text, and mean density, on pages that have none."""
    white = [np.full((SIZE, SIZE, 3), v, np.uint8) for v in (255, 250, 200, 128, 0)]
    pages = {
        "blank, one colour": white,
        "blank scans": [render_page("blank", seed, "test").image for seed in range(count)],
        "noise": [noisy(seed) for seed in range(count)],
        f"photographs ({', '.join(PHOTOGRAPHS['test'])})": [photo(seed) for seed in range(count)],
        "grids, hatching, shapes": [render_page("lines", seed, "test").image for seed in range(count)],
    }
    lines = ["| pages | map | false positives | mean density | densest page |", "|---|---|---|---|---|"]
    for what, images in pages.items():
        for name, scorer in scorers.items():
            maps = np.stack([scorer(image) for image in images])
            share, mean = bootstrap((maps > TEXT).mean(axis=(1, 2))), maps.mean(axis=(1, 2))
            lines.append(f"| {what}, {len(images)} | {name} | {share} | {bootstrap(mean)} | {mean.max():.3f} |")
    return lines


def by_height(scorers: dict[str, Scorer], count: int) -> list[str]:
    """Words found, for each x-height, on clean pages and on pages with the artefacts of a scan."""
    lines = ["| x-height, px | " + " | ".join(f"{n}, {c}" for c in ("clean", "scanned") for n in scorers) + " |"]
    lines.append("|---|" + "---|" * 2 * len(scorers))
    for height in track(HEIGHTS, "x-heights", transient=True):
        cells = [str(height)]
        for strength in (0.0, 1.0):
            pages = [text_page(height, seed, "test", strength) for seed in range(count)]
            cells += [str(found_words(scorer, pages)) for scorer in scorers.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def speed(rounds: int) -> list[str]:
    """Milliseconds per 448 x 448 page; `plain` is the fused network, as `sfa density map` runs it."""
    image = mixture(3, "test").image
    device = torch.device("cpu")
    batch = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    model = DensityEstimator.pretrained()
    fused = model.fused()
    with torch.inference_mode():
        rows = compare(
            {"plain": lambda: fused(batch), "not fused": lambda: model(batch), "edges": lambda: density_labels(image)},
            rounds,
            device,
            "speed",
        )
    names = {"plain": "estimator, fused", "not fused": "estimator, not fused", "edges": "edge labels"}
    lines = ["| what | ms | ratio | quartiles |", "|---|---|---|---|"]
    return lines + [
        f"| {names[r.name]} | {r.milliseconds:.1f} | {r.ratio:.2f} | {r.low:.2f}-{r.high:.2f} |" for r in rows
    ]


def main() -> None:
    """Runs everything and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=300)
    parser.add_argument("--ocr-pages", type=int, default=80)
    parser.add_argument("--no-ocr", action="store_true")
    parser.add_argument("--count", type=int, default=60, help="pages of each kind without text")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--also", nargs="*", default=[], metavar="NAME=FILE", help="other weights to compare")
    args = parser.parse_args()
    scorers: dict[str, Scorer] = {"estimator": estimator(None)}
    for item in args.also:
        name, _, file = item.partition("=")
        scorers[f"trained on {name}"] = estimator(Path(file))
    scorers["edges"] = lambda image: density_labels(image, (image.shape[0] // 16, image.shape[1] // 16))
    pages = [mixture(i, "test") for i in track(range(args.pages), "rendering", transient=True)]
    ocr = 0 if args.no_ocr else min(args.ocr_pages, args.pages)
    body = [f"## Agreement on {args.pages} held-out pages", "", *agreement(scorers, pages, ocr)]
    body += ["", "## scikit-image's scanned page", "", *scanned_page(scorers, bool(ocr))]
    body += ["", "## Pages without text", "", *negatives(scorers, args.count)]
    body += ["", "## Words found, by x-height", "", *by_height(scorers, 10)]
    body += ["", "## Time for 448 x 448 px", "", *speed(args.rounds)]
    path = write_result("density", torch.device("cpu"), "python -m benchmarks.density " + " ".join(sys.argv[1:]), body)
    Console().print(path.read_text(), markup=False)


if __name__ == "__main__":
    main()
