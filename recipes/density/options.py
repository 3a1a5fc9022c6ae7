"""Options of `sfa density train`. Nothing heavy is imported: `sfa --help` reads them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from sfa_adapters.errors import DataError

__all__ = ["LabelSource", "PagesConfig", "TrainConfig"]

LabelSource = Literal["boxes", "edges", "mix", "ocr"]


@dataclass(frozen=True)
class TrainConfig:
    """Options of `sfa density train`.

    Attributes:
        images: Folders of images; rendered pages when none.
        real: Folder of `sfa density pages`: trains on crops of real pages with true word boxes, in all turns, colours
            and sizes.
        figures: With `real`, share of the crops that show figures; half of these are drawn curves without text.
        start: Weights to start from; by default random ones.
        out: Folder of the run; an interrupted run goes on.
        labels: boxes (true boxes), edges, mix (the mean of these two) or ocr; by default boxes, and edges for folders.
        pages: Number of rendered pages.
        steps: Optimizer steps.
        batch: Crops of 256 x 256 per step.
        rate: Highest learning rate; it falls to a hundredth along a cosine.
        seed: Seed of the first weights and of the order of the pages.
        every: Steps between checkpoints, each with a validation.
        workers: Processes that render pages; the number of cores by default.

    Raises:
        DataError: Names the option and the value.
    """

    images: tuple[Path, ...] = ()
    real: Path | None = None
    figures: float = 0.0
    start: Path | None = None
    out: Path = Path("runs/density")
    labels: LabelSource | None = None
    pages: int = 3000
    steps: int = 2000
    batch: int = 16
    rate: float = 2e-3
    seed: int = 0
    every: int = 250
    workers: int | None = None

    def __post_init__(self) -> None:
        for name in ("pages", "steps", "batch", "every"):
            if getattr(self, name) < 1:
                raise DataError(f"--{name} {getattr(self, name)} must be at least 1.")
        if self.label_source not in get_args(LabelSource):
            raise DataError(f"--labels {self.labels!r} must be one of {', '.join(get_args(LabelSource))}.")
        if self.images and self.labels in ("boxes", "mix"):
            raise DataError(f"--labels {self.labels} needs rendered pages; for folders of images use edges or ocr.")
        if self.real is not None and (self.images or self.labels not in (None, "boxes") or self.batch < 16):
            raise DataError(
                "--real has true word boxes: give no IMAGES, no other --labels, and a --batch of 16 or more."
            )
        if not 0 <= self.figures <= 0.25 or (self.figures and self.real is None):
            raise DataError(f"--figures {self.figures} must lie in 0..0.25, and needs --real.")
        if not 0 < self.rate < 1 or self.seed < 0:
            raise DataError(f"--rate {self.rate} must lie in (0, 1), and --seed {self.seed} must not be negative.")

    @property
    def label_source(self) -> LabelSource:
        """Kind of the labels: `labels`, by default edges for folders of images and boxes for rendered pages."""
        return self.labels or ("edges" if self.images else "boxes")


@dataclass(frozen=True, kw_only=True)
class PagesConfig:
    """Options of `sfa density pages`.

    Attributes:
        out: Folder of the pages; what is there already is kept.
        part: train, val or test; all three by default.

    Raises:
        DataError: Names the option and the value.
    """

    out: Path = Path("real-pages")
    part: Literal["train", "val", "test"] | None = None

    def __post_init__(self) -> None:
        if self.part not in (None, "train", "val", "test"):
            raise DataError(f"--part {self.part!r} must be train, val or test.")
