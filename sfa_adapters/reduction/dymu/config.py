"""`DyMUConfig`: thresholds and options of DyMU, and the two files that hold them beside an adapter."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sfa_adapters.errors import InjectionError, RecipeError, WeightsError

__all__ = ["DyMUConfig", "load_dymu", "save_dymu"]

Language = Literal["logical_rope", "vtu", "off"]
WEIGHTS_NAME, CONFIG_NAME = "dymu.safetensors", "dymu_config.json"
# Used where nothing was calibrated: it merges near copies only (blank paper, flat colour).
UNCALIBRATED = 0.95


@dataclass(frozen=True, kw_only=True)
class DyMUConfig:
    """Options of DyMU: which tokens merge, and what the language model does with them.

    Attributes:
        thresholds: Cosine similarity of keys above which two tokens merge: one number for all places between two
            layers, or one per place, of which there is one less than layers that the host reads. 1 merges nothing.
        language: What the language model does: "logical_rope" drops the image tokens that were merged into others, and
            each one left keeps the position id of its representative; "vtu" computes attention as the full sequence
            would have it (exact, needs sdpa), with a cache as short as the merged sequence; "off" leaves it as it is.
        side: Tokens along one side of a group that merges whole; None for what the host needs: 2 where it makes one
            token of 2x2, else 1.
        tower: Signature of the tower that the thresholds were calibrated for, see `tower_signature`.

    Raises:
        RecipeError: A field cannot be used.
    """

    thresholds: float | tuple[float, ...] = UNCALIBRATED
    language: Language = "logical_rope"
    side: int | None = None
    tower: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.thresholds, list):
            object.__setattr__(self, "thresholds", tuple(self.thresholds))
        values = self.thresholds if isinstance(self.thresholds, tuple) else (self.thresholds,)
        wrong = [v for v in values if isinstance(v, bool) or not isinstance(v, int | float) or not -1 <= v <= 1]
        if wrong or not all(math.isfinite(v) for v in values):
            raise RecipeError(f"thresholds={self.thresholds} must be cosine similarities, -1..1; wrong: {wrong}.")
        if self.language not in get_args(Language):
            raise RecipeError(f"language={self.language!r} must be one of {list(get_args(Language))}.")
        if self.side is not None and (isinstance(self.side, bool) or self.side not in (1, 2)):
            raise RecipeError(f"side={self.side} must be 1 or 2, or None for what the host needs.")

    def per_place(self, places: int) -> tuple[float, ...]:
        """One threshold per place.

        Args:
            places: Number of places between two layers at which tokens can merge.

        Raises:
            InjectionError: There are more or fewer thresholds than places.
        """
        if not isinstance(self.thresholds, tuple):
            return (float(self.thresholds),) * places
        if len(self.thresholds) != places:
            raise InjectionError(
                f"{len(self.thresholds)} thresholds were given, but tokens can merge at {places} places between the "
                "layers that the host reads. Calibrate on this tower (sfa calibrate dymu), or give one number."
            )
        return tuple(float(v) for v in self.thresholds)


def save_dymu(config: DyMUConfig, folder: str | Path) -> Path:
    """Writes thresholds and options beside an adapter: `dymu.safetensors` and `dymu_config.json`.

    Args:
        config: From `calibrate_dymu`, or written by hand.
        folder: Made if it is not there; other files in it stay.

    Returns:
        The folder.

    Raises:
        RecipeError: The folder cannot be written.
    """
    folder = Path(folder)
    values = config.thresholds if isinstance(config.thresholds, tuple) else (config.thresholds,)
    record = {k: v for k, v in asdict(config).items() if k != "thresholds"}
    record["one_threshold"] = not isinstance(config.thresholds, tuple)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"thresholds": torch.tensor(values, dtype=torch.float64)}, folder / WEIGHTS_NAME, {"format": "pt"})
        (folder / CONFIG_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{folder} cannot be written ({error.strerror}); name another folder.") from error
    return folder


def load_dymu(folder: str | Path) -> DyMUConfig:
    """Reads what `save_dymu` wrote.

    Args:
        folder: The folder.

    Returns:
        The configuration for `inject_dymu`.

    Raises:
        WeightsError: A file is missing or cannot be read.
        RecipeError: It holds values that cannot be used.
    """
    folder = Path(folder)
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        if not (folder / name).is_file():
            raise WeightsError(f"{folder} has no {name}; save_dymu or `sfa calibrate dymu` writes it.")
    try:
        record = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        values = load_file(folder / WEIGHTS_NAME)["thresholds"].double().flatten().tolist()
        single = bool(record.pop("one_threshold"))
        config = DyMUConfig(**record)
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        if isinstance(error, RecipeError):
            raise
        raise WeightsError(f"{folder}: the saved thresholds cannot be read ({error}). Calibrate again.") from error
    return replace(config, thresholds=values[0] if single else tuple(values))
