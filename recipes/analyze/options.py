"""Options of `sfa analyze tokens` and `sfa analyze study`. Nothing heavy is imported: `sfa --help` reads them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sfa_adapters.errors import DataError

__all__ = ["BudgetConfig", "StudyConfig"]


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """Options of `sfa analyze tokens`.

    Attributes:
        out: Folder for the table and the pictures.
        pages: Folder of page images: measures density and plans on them, without training.
        steps: Fine-tuning steps of each run.
        questions: Number of test questions.
        seeds: Number of seeds; each has its own training charts and order.
        charts: Number of training charts.
        scorer: density, edges, reconstruction, entropy or uniform.
        weights: Weights of the nano host, by default those of the package.

    Raises:
        DataError: Names the option and the value.
    """

    out: Path = Path("sfa-tokens")
    pages: Path | None = None
    steps: int = 160
    questions: int = 450
    seeds: int = 1
    charts: int = 1200
    scorer: str = "density"
    weights: Path | None = None

    def __post_init__(self) -> None:
        _at_least_one(self, "steps", "questions", "seeds", "charts")


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Options of `sfa analyze study`.

    Attributes:
        out: Folder for tables and pictures.
        steps: Fine-tuning steps of each run.
        questions: Number of test questions.
        pages: Number of test charts on which attention is read.
        charts: Number of training charts.
        seed: Of charts, order, initial biases and augmentations.
        weights: Weights of the nano host, by default those of the package.

    Raises:
        DataError: Names the option and the value.
    """

    out: Path = Path("sfa-study")
    steps: int = 160
    questions: int = 450
    pages: int = 100
    charts: int = 1200
    seed: int = 0
    weights: Path | None = None

    def __post_init__(self) -> None:
        _at_least_one(self, "steps", "questions", "pages", "charts")


def _at_least_one(config: object, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise DataError(f"--{name} {getattr(config, name)} must be at least 1.")
