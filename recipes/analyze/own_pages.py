"""`sfa analyze tokens --pages FOLDER`: the tables of density and of plans for pages of the user.

    sfa analyze tokens --pages scans/

The truth is the file of words beside a page where there is one (`NAME.words.json`, as `sfa density pages` writes it:
boxes in px). Else an OCR engine finds the lines of text, which is an estimate, too; the tables say for how many pages.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from sfa_adapters.adat.labels import ocr_boxes
from sfa_adapters.errors import DataError
from sfa_adapters.files import write_whole
from sfa_adapters.images import as_image
from sfa_adapters.recipes.density.labelled_pages import SUFFIXES
from sfa_adapters.recipes.density.map_scorers import map_scorers
from sfa_adapters.recipes.density.measures import count_page, measure
from sfa_adapters.recipes.density.plan_rows import Case, PlanRow, plan_rows
from sfa_adapters.recipes.density.real_pages import LARGE, WORDS, RealPage, read_page
from sfa_adapters.recipes.density.views import view_of
from sfa_adapters.recipes.report_parts import percent, terminal_table

__all__ = ["FoundPages", "measure_own_pages", "own_pages"]


# The default levels with every scorer, then others with the default scorer.
SHOWN = (
    *(Case(scorer, "14, 56") for scorer in ("density", "edges", "reconstruction", "entropy")),
    Case("density", "14, 28"),
    Case("density", "8, 14, 32 (published)"),
    Case("boxes", "14, 56"),
    Case("random", "14, 56"),
)


@dataclass(frozen=True)
class FoundPages:
    """The pages of a folder.

    Attributes:
        pages: Pages with boxes.
        by_engine: How many of them have their boxes from the OCR engine.
    """

    pages: tuple[RealPage, ...]
    by_engine: int


def own_pages(folder: Path) -> FoundPages:
    """Reads the pages of a folder and its subfolders, with the boxes of their words.

    Args:
        folder: Images, with or without files of words beside them.

    Returns:
        The pages that have text; every page counts as a document of its own.

    Raises:
        DataError: There is no such folder, no image in it, no text on any of them, or a PDF instead of its pages.
        ModuleNotFoundError: A page has no file of words, and `rapidocr` is missing.
    """
    if not folder.is_dir():
        raise DataError(f"--pages {folder} is not a folder. Give a folder of page images.")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.endswith(LARGE))
    if not files:
        pdfs = sorted(p.name for p in folder.rglob("*.pdf"))
        advice = f" Render the pages of {pdfs[0]} first: pdftoppm -r 150 -png {pdfs[0]} page" if pdfs else ""
        raise DataError(f"--pages {folder} has no images ({', '.join(SUFFIXES)}).{advice}")
    pages, engine = [], 0
    for path in track(files, "reading pages", transient=True):
        words = path.with_name(path.stem + WORDS)
        if words.is_file():
            page = read_page(words)
            page = RealPage(path, page.boxes, page.script, str(path), page.size)
        else:
            picture = as_image(path)
            page = RealPage(path, ocr_boxes(picture).astype(np.float32), "other", str(path), picture.shape[:2])
            engine += 1
        if len(page.boxes):
            pages.append(page)
    if not pages:
        raise DataError(f"--pages {folder}: no text on any of the {len(files)} images.")
    return FoundPages(tuple(pages), engine)


def measure_own_pages(folder: Path, out: Path, console: Console | None = None) -> list[PlanRow]:
    """Measures how well text is found on pages of the user, and where plans put their fine patches.

    Args:
        folder: As in `own_pages`.
        out: Folder for `pages.md` and `pages.json`.
        console: Shows progress and tables; the terminal by default.

    Returns:
        The rows of the second table.

    Raises:
        DataError: As `own_pages`, or `out` cannot be written.
    """
    console = console or Console()
    pages = own_pages(folder)
    agreement = _agreement(pages.pages)
    rows = plan_rows(pages.pages, SHOWN)
    source = f"{len(pages.pages)} pages; boxes of words: {len(pages.pages) - pages.by_engine} from files, "
    source += f"{pages.by_engine} from the OCR engine"
    heads = (("density", "r", "AUC %", "words found %", "false %"), ("plan", "tokens %", "fine %", "mean side"))
    seconds = [(row.name, f"{100 * row.budget:.0f}", percent(row.fine), f"{row.side.value:.1f} px") for row in rows]
    console.print(terminal_table(heads[0], agreement, source))
    title = "words' area under patches of at most 14 px, % (mean side, px)"
    budgets = sorted({row.budget for row in rows})
    head = ("plan", *(f"{100 * budget:.0f}% of tokens" for budget in budgets))
    console.print(terminal_table(head, _by_budget(rows, budgets), title))
    content: dict[str, Any] = {"folder": str(folder), "pages": len(pages.pages), "by_engine": pages.by_engine}
    content |= {"density": [dict(zip(heads[0], row, strict=True)) for row in agreement]}
    content |= {"plans": [asdict(row) for row in rows]}
    try:
        write_whole(out / "pages.json", json.dumps(content, indent=1) + "\n")
        write_whole(out / "pages.md", _markdown(source, heads, (agreement, seconds)))
    except OSError as error:
        raise DataError(f"--out {out}: the folder cannot be written ({error.strerror}).") from error
    console.print(f"Both tables are in {out}/pages.md")
    return rows


def _by_budget(rows: Sequence[PlanRow], budgets: Sequence[float]) -> list[tuple[str, ...]]:
    """One line per plan: for each budget the share, and the mean side of the patches."""
    cells = {(row.name, row.budget): f"{100 * row.fine.value:.1f} ({row.side.value:.1f})" for row in rows}
    names = list(dict.fromkeys(row.name for row in rows))
    return [(name, *(cells.get((name, budget), "-") for budget in budgets)) for name in names]


def _agreement(pages: Sequence[RealPage]) -> list[tuple[str, ...]]:
    scorers = map_scorers({"estimator": None})
    counts = {name: [] for name in scorers}
    for number, page in enumerate(track(pages, "scoring pages", transient=True)):
        view = view_of(page, "upright", number)
        assert view is not None
        for name, scorer in scorers.items():
            counts[name].append(count_page(page.package, scorer(view.picture), view.density, view.middles))
    return [
        (
            name,
            f"{measure(part, 'r').value:.3f}",
            percent(measure(part, "AUC")),
            percent(measure(part, "hit")),
            percent(measure(part, "false")),
        )
        for name, part in counts.items()
    ]


def _markdown(source: str, heads: Sequence[Sequence[str]], tables: Sequence[Sequence[Sequence[str]]]) -> str:
    lines = ["# sfa analyze tokens --pages", "", source + "."]
    for head, table in zip(heads, tables, strict=True):
        lines += ["", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        lines += [f"| {' | '.join(row)} |" for row in table]
    return "\n".join(lines) + "\n"
