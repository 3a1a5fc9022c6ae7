"""Pages with density labels on disk, rendered or from folders of images; 448 x 448 px with 28 x 28 labels."""

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np

from sfa_adapters.adat.density import STRIDE
from sfa_adapters.adat.labels import box_density, density_labels
from sfa_adapters.errors import DataError
from sfa_adapters.images import as_image
from sfa_adapters.recipes.density.options import LabelSource
from sfa_adapters.recipes.synthetic.pages import SIZE, mixture
from sfa_adapters.recipes.synthetic.tables import Split

__all__ = ["GRID", "LabelSource", "PageSet", "image_folder", "rendered"]

GRID = (SIZE // STRIDE, SIZE // STRIDE)
CHUNK = 50  # pages that one process renders at a time
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")


@dataclass(frozen=True)
class PageSet:
    """Pages and their labels: uint8 `[N, 448, 448, 3]` and float32 `[N, 28, 28]`."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


def _render(folder: str, split: Split, start: int, stop: int) -> int:
    images = np.lib.format.open_memmap(f"{folder}/images.npy", mode="r+")
    boxes = np.lib.format.open_memmap(f"{folder}/boxes.npy", mode="r+")
    for i in range(start, stop):
        page = mixture(i, split)
        images[i], boxes[i] = page.image, box_density(page.boxes, (SIZE, SIZE), GRID)
    return stop - start


def _create(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """A memory-mapped array, because a data set may not fit into memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)


def rendered(
    folder: Path, split: Split, count: int, labels: LabelSource = "boxes", workers: int | None = None
) -> PageSet:
    """Rendered pages, drawn once and kept in `folder`.

    Args:
        folder: folder of the memory-mapped arrays.
        split: "train", "val" or "test".
        count: how many.
        labels: kind of labels.
        workers: processes; the number of cores by default.

    Returns:
        The pages.

    Raises:
        DataError: `folder` holds another number of pages.
    """
    from rich.progress import Progress

    if not (folder / "done").is_file():
        _create(folder / "images.npy", (count, SIZE, SIZE, 3), np.uint8)
        _create(folder / "boxes.npy", (count, *GRID), np.float32)
        starts = range(0, count, CHUNK)
        jobs: list[tuple[str, Split, int, int]] = [
            (str(folder), split, start, min(start + CHUNK, count)) for start in starts
        ]
        with Progress(transient=True) as bar:
            task = bar.add_task(f"rendering {split} pages", total=count)
            if len(jobs) == 1:
                bar.advance(task, _render(*jobs[0]))
            else:
                with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=get_context("spawn")) as pool:
                    for done in pool.map(_render, *zip(*jobs, strict=True)):
                        bar.advance(task, done)
        (folder / "done").write_text(f"{count}\n")  # last: an interrupted folder is rendered again
    images, boxes = np.load(folder / "images.npy", mmap_mode="r"), np.load(folder / "boxes.npy")
    if len(images) != count:
        raise DataError(
            f"{folder} holds {len(images)} pages, this run asks for {count}. Use another --out, or delete it."
        )
    if labels == "boxes":
        return PageSet(images, boxes)
    labelled = _labels(images, "ocr" if labels == "ocr" else "edges", f"{labels} labels, {split}")
    return PageSet(images, (labelled + boxes) / 2 if labels == "mix" else labelled)


def _labels(images: np.ndarray, source: Literal["edges", "ocr"], what: str) -> np.ndarray:
    from rich.progress import track

    return np.stack([density_labels(np.asarray(i), GRID, source) for i in track(images, what, transient=True)])


def image_folder(folders: tuple[Path, ...], labels: Literal["edges", "ocr"], keep: Path) -> tuple[PageSet, PageSet]:
    """Images of folders, resized to 448 x 448 as for a tower; every 20th is kept for validation.

    Args:
        folders: searched with their subfolders.
        labels: kind of labels.
        keep: folder for the resized images.

    Returns:
        Training and validation pages.

    Raises:
        DataError: a folder is missing, an image is unreadable, or there are fewer than two.
    """
    import cv2
    from rich.progress import track

    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"There is no folder {folder}. Give folders of images, or none for rendered pages.")
    files = sorted(p for folder in folders for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if len(files) < 2:
        named = ", ".join(map(str, folders))
        raise DataError(f"{named}: found {len(files)} images ({', '.join(SUFFIXES)}), need at least 2.")
    parts = {"val": files[::20], "train": [f for i, f in enumerate(files) if i % 20]}
    sets = {}
    for name, part in parts.items():
        images = _create(keep / name / "images.npy", (len(part), SIZE, SIZE, 3), np.uint8)
        for i, file in enumerate(track(part, f"reading {name} images", transient=True)):
            images[i] = cv2.resize(as_image(file), (SIZE, SIZE), interpolation=cv2.INTER_AREA)
        sets[name] = PageSet(images, _labels(images, labels, f"{labels} labels, {name}"))
    return sets["train"], sets["val"]
