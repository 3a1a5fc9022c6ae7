"""Options of `sfa study`. Nothing heavy is imported: `sfa --help` reads them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["StudyOptions"]


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """Options of `sfa study`.

    Attributes:
        name: Which study; `sfa study list` names them.
        out: Folder of the results, to which runs are added; sfa-study/NAME by default.
        workers: Processes, each with one thread.
        tune: Make the runs on tuning seeds instead.
        report: Make no runs, only table and figures of those that are there.
        settings: A YAML file instead of the study's own settings.
        arms: Only these arms.
        seeds: Only these seeds.
        budgets: Only these budgets, e.g. steps=500.
    """

    name: str
    out: Path | None = None
    workers: int = 1
    tune: bool = False
    report: bool = False
    settings: Path | None = None
    arms: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    budgets: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Folder of the results."""
        return self.out or Path("sfa-study") / self.name
