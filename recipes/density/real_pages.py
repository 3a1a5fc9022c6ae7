"""Real pages with the boxes of their words, from Debian documentation packages: made by `sfa density pages`.

Every page is a PNG of 2,000 px on its longer side, with a file of its words beside it:

    OUT/test/pages/krb5-doc/admin-0007.png
    OUT/test/pages/krb5-doc/admin-0007.words.json   {"boxes": [[left, top, right, bottom], ...], "words": [...], ...}
    OUT/test/pages/krb5-doc/admin-0007.600dpi.png

Boxes are in px of the PNG. One page of each package for tests is rendered at 600 dpi as well, as a scanner would give
it. Pages whose text layer cannot be believed are dropped by the rule of `text_layer.py`; which ones, and why, stands in
the `done.json` of their package. Fonts and photographs, for text drawn in training and for pictures without text, are
in `OUT/train/fonts` and the like.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sfa_adapters.errors import DataError
from sfa_adapters.files import write_whole
from sfa_adapters.images import as_image
from sfa_adapters.recipes.density.debian_packages import (
    DebianPackage,
    check_tools,
    download,
    read_list,
    run_tool,
    unpack,
)
from sfa_adapters.recipes.density.options import PagesConfig
from sfa_adapters.recipes.density.text_layer import SCRIPTS, TextLayer, layer_fault, read_layers, script_of
from sfa_adapters.recipes.synthetic.tables import Split

__all__ = ["LARGE", "LONGER", "WORDS", "PagesConfig", "RealPage", "make_pages", "page_files", "read_page", "read_part"]

LONGER = 2000  # px of the longer side
SEEN = 0.5  # the OCR engine gets the page at half the size: print of 10 pt is 5 px high there, which it finds
WORDS = ".words.json"
DPI = 600
LARGE = f".{DPI}dpi.png"
PER_PACKAGE: dict[Split, int] = {"train": 24, "val": 14, "test": 14}
PER_PDF = 8
COUNT = re.compile(r"^Pages:\s+(\d+)", re.MULTILINE)


@dataclass(frozen=True)
class RealPage:
    """One page of the set.

    Attributes:
        path: Its PNG.
        boxes: Left, top, right, bottom of every word in px, float32 `[words, 4]`.
        script: The script of most of its letters, as `text_layer.script_of` says.
        package: The package that it comes from: pages of one package are alike.
        size: Height and width in px.
        words: Their texts, `[words]`; None in sets that were made before texts were kept.
    """

    path: Path
    boxes: np.ndarray
    script: str
    package: str
    size: tuple[int, int]
    words: tuple[str, ...] | None = None

    @property
    def readable(self) -> np.ndarray:
        """Which words have a letter or a digit, bool `[words]`; dots of leaders in tables of contents have none."""
        if self.words is None:
            return np.ones(len(self.boxes), dtype=bool)
        return np.array([any(letter.isalnum() for letter in word) for word in self.words], dtype=bool)

    def picture(self) -> np.ndarray:
        """The page, uint8 `[H, W, 3]`."""
        return as_image(self.path)


def make_pages(config: PagesConfig) -> Counter[str]:
    """Makes the set; a package that is complete is not made again.

    Args:
        config: Options.

    Returns:
        Pages kept by part, and pages dropped by reason.

    Raises:
        DataError: A program is missing, a package cannot be downloaded, or its file is another one.
        ModuleNotFoundError: `rapidocr` is missing, which the rule of the text layer needs.
    """
    from rich.progress import Progress

    check_tools()
    packages = [package for package in read_list() if config.part in (None, package.part)]
    config.out.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    with Progress(transient=True) as bar:
        task = bar.add_task("", total=len(packages))
        for package in packages:
            bar.update(task, description=f"{package.part}: {package.name}")
            counts += _make_package(package, config)
            bar.advance(task)
    return counts


def _make_package(package: DebianPackage, config: PagesConfig) -> Counter[str]:
    folder = config.out / package.part / package.kind / package.name
    record = folder / "done.json"
    if not record.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        archive = download(package, config.out / "packages")
        files = unpack(archive, config.out / "unpacked", package.kind)
        if package.kind == "pages":
            kept, dropped = _pages_of(files, folder, package.part)
        else:
            kept, dropped = len(files), {}
            for number, file in enumerate(files):  # several files of a package may have one name
                shutil.copyfile(file, folder / f"{number:03d}-{file.name}")
        write_whole(record, json.dumps({"kept": kept, "dropped": dropped}, indent=1) + "\n")
        shutil.rmtree(config.out / "unpacked" / archive.stem)
    made = json.loads(record.read_text())
    return Counter({f"{package.part} {package.kind}": made["kept"]}) + Counter(made["dropped"].values())


def _pages_of(files: Sequence[Path], folder: Path, part: Split) -> tuple[int, dict[str, str]]:
    """Writes pages of some PDF files; the number of pages kept, and why others were dropped."""
    most = PER_PACKAGE[part]
    chosen = [files[round(i)] for i in np.linspace(0, len(files) - 1, min(most, len(files)))]
    each = min(PER_PDF, max(1, most // max(1, len(chosen))))
    dropped = {}
    for file in chosen:
        for number in _numbers(file, each):
            name = f"{file.stem}-{number:04d}"
            fault = _make_page(file, number, folder / name)
            if fault is not None:
                dropped[name] = fault
            elif part == "test" and not list(folder.glob(f"*{LARGE}")):
                _render(file, number, folder / (name + LARGE), "-r", str(DPI))
    return len(list(folder.glob(f"*{WORDS}"))), dropped


def _numbers(file: Path, most: int) -> list[int]:
    """Page numbers of a PDF, evenly spread; none where it cannot be opened."""
    try:
        match = COUNT.search(run_tool("pdfinfo", file))
    except DataError:  # some packages hold broken files on purpose, for tests
        return []
    count = int(match.group(1)) if match else 0
    parts = min(most, count)  # the middle page of each part of the document: the first page is often a title
    return [1 + int((i + 0.5) * count / parts) for i in range(parts)]


def _make_page(file: Path, number: int, target: Path) -> str | None:
    """Writes one page and its words; returns why it was left out, or None."""
    path = target.with_name(target.name + ".png")
    try:
        layers = read_layers(run_tool("pdftotext", "-bbox", "-f", str(number), "-l", str(number), file, "-"))
        _render(file, number, path, "-scale-to", str(LONGER))
        picture = as_image(path)
    except DataError:
        path.unlink(missing_ok=True)
        return "cannot be rendered"
    fault = _fault(picture, layers[0]) if layers else "no text layer"
    if fault is not None:
        path.unlink()
        return fault
    layer, (height, width) = layers[0], picture.shape[:2]
    scale = np.tile((width / layer.size[0], height / layer.size[1]), 2)
    content = {
        "boxes": np.round(layer.boxes * scale, 1).tolist(),
        "words": list(layer.words),
        "script": script_of(layer.words),
        "size": [height, width],
    }
    write_whole(target.with_name(target.name + WORDS), json.dumps(content) + "\n")
    return None


def _render(file: Path, number: int, path: Path, *size: str) -> None:
    """Renders one page to a PNG."""
    run_tool("pdftoppm", "-png", *size, "-singlefile", "-f", str(number), "-l", str(number), file, path.with_suffix(""))


def _fault(picture: np.ndarray, layer: TextLayer) -> str | None:
    """As `layer_fault`; the OCR engine, which takes most of the time, is asked last."""
    import cv2

    from sfa_adapters.adat.labels import ocr_boxes

    early = layer_fault(picture, layer, np.zeros((0, 4)))
    if early:
        return early
    smaller = cv2.resize(picture, None, fx=SEEN, fy=SEEN, interpolation=cv2.INTER_AREA)
    return layer_fault(picture, layer, ocr_boxes(smaller) / SEEN)


# -- reading ----------------------------------------------------------------------------------------------------------


def page_files(folder: Path, part: Split) -> list[Path]:
    """The files of words of one part, sorted.

    Args:
        folder: Folder of `sfa density pages`.
        part: train, val or test.

    Raises:
        DataError: There are none.
    """
    files = sorted((folder / part / "pages").rglob(f"*{WORDS}"))
    if not files:
        raise DataError(
            f"{folder / part / 'pages'} holds no pages (files *{WORDS}). Make them: sfa density pages --out {folder}"
        )
    return files


def read_page(file: Path) -> RealPage:
    """Reads one page by its file of words.

    Args:
        file: `NAME.words.json` beside `NAME.png`.

    Raises:
        DataError: The file is damaged, or says something else than boxes in px, a script and a size.
    """
    try:
        content: Any = json.loads(file.read_text())
        boxes = np.asarray(content["boxes"], dtype=np.float32).reshape(-1, 4)
        height, width = map(int, content["size"])
        script = str(content["script"])
        words = tuple(map(str, content["words"])) if "words" in content else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} is not a file of words ({error!r}). Delete its folder and make the pages again."
        ) from error
    if not np.isfinite(boxes).all() or script not in SCRIPTS:
        raise DataError(f"{file}: boxes must be finite numbers, and script {script!r} one of {', '.join(SCRIPTS)}.")
    if words is not None and len(words) != len(boxes):
        raise DataError(f"{file} has {len(boxes)} boxes and {len(words)} words. Delete its folder and make it again.")
    path = file.with_name(file.name.removesuffix(WORDS) + ".png")
    return RealPage(path, boxes, script, file.parent.name, (height, width), words)


def read_part(folder: Path, part: Split) -> list[RealPage]:
    """All pages of one part."""
    return [read_page(file) for file in page_files(folder, part)]


def by_package(pages: Sequence[RealPage]) -> Iterator[tuple[str, list[RealPage]]]:
    """The pages of each package."""
    for name in sorted({page.package for page in pages}):
        yield name, [page for page in pages if page.package == name]
