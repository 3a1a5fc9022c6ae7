"""`PrunedMetadata`: which heads were pruned, kept with every score of the model, so that both are read together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sfa_adapters.errors import InjectionError, RecipeError
from sfa_adapters.heads.head_plan import HeadPlan
from sfa_adapters.heads.pruned_files import PLAN_NAME, pruned_of, read_pruned
from sfa_adapters.moved import know_old_names

__all__ = ["PrunedMetadata", "folder_metadata", "plan_metadata", "pruned_folder", "pruned_metadata"]

know_old_names(__name__)


@dataclass(frozen=True)
class PrunedMetadata:
    """Which heads were pruned from a model.

    Attributes:
        plan: The first 8 digits of a hash of the pruned heads, by layer: other heads, another hash.
        kind: How the plan divides the heads over layers (`uniform`, ...); None for a plan made by hand.
        method: The scores behind it (`s4`, ...); None for a plan made by hand.
        removed: Number of pruned query heads.
        heads: Number of query heads before pruning, in the layers that the plan names.
        compensation: How the remaining weights were changed to make up for them, see `heads.compensation`.
    """

    plan: str
    kind: str | None
    method: str | None
    removed: int
    heads: int
    compensation: str

    @property
    def rate(self) -> float:
        """Share of pruned heads, 0 to 1."""
        return self.removed / self.heads

    def __str__(self) -> str:
        made = " ".join(filter(None, (self.kind, self.method))) or "by hand"
        return (
            f"{self.removed} of {self.heads} heads removed ({self.rate:.1%}), plan {made} {self.plan}, compensation "
            f"{self.compensation}"
        )

    @property
    def label(self) -> str:
        """A few words for the name of a run."""
        return f"{self.rate:.1%} of heads removed, {self.compensation}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "rate": self.rate}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> PrunedMetadata:
        """What `to_dict` gave.

        Raises:
            RecipeError: It is something else.
        """
        try:
            return cls(**{name: value for name, value in record.items() if name != "rate"})
        except (TypeError, AttributeError) as error:
            raise RecipeError(f"This is no metadata of a pruned model: {record!r}.") from error


def plan_metadata(plan: HeadPlan, compensation: str) -> PrunedMetadata:
    """The metadata of a model that is pruned by a plan."""
    gone = {path: list(heads) for path, heads in sorted(plan.removed.items()) if heads}
    digest = hashlib.sha256(json.dumps(gone).encode()).hexdigest()[:8]
    kind, method = (plan.how.get(name) for name in ("kind", "method"))
    names = [None if value is None else str(value) for value in (kind, method)]
    return PrunedMetadata(digest, names[0], names[1], plan.count, plan.total, compensation)


def pruned_metadata(model: nn.Module) -> PrunedMetadata | None:
    """The metadata of a model in memory; None if it is not pruned."""
    try:
        pruned = pruned_of(model)
    except InjectionError:
        return None
    return plan_metadata(pruned.plan, pruned.compensation)


def folder_metadata(model: str | Path) -> PrunedMetadata | None:
    """The metadata of a model in a folder; None if it is not pruned, and for an id of the hub.

    Raises:
        RecipeError: Its `head_plan.json` cannot be read.
    """
    if not pruned_folder(model):
        return None
    pruned, _ = read_pruned(Path(model))
    return plan_metadata(pruned.plan, pruned.compensation)


def pruned_folder(model: str | Path) -> bool:
    """Whether a folder holds a model of `save_pruned`.

    A plan beside an unpruned model, which `sfa calibrate heads --out` may write there, does not count.
    """
    path = Path(model) / PLAN_NAME
    if not path.is_file():
        return False
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return True  # loading it will raise the error
    return not (isinstance(record, Mapping) and "layers" in record and "plan" not in record)
