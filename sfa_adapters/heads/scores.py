"""`HeadScores`: scores of how much each attention head of a model matters, with a record of how they were measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from sfa_adapters.errors import RecipeError
from sfa_adapters.heads.layers import head_layer, weights_digest
from sfa_adapters.observe import attention_modules

__all__ = ["HeadScores"]

_VERSION = 1


@dataclass(frozen=True)
class HeadScores:
    """One score per query head; the higher, the more the head matters.

    Scores of different methods cannot be compared.

    Attributes:
        values: For each attention module (its path, in order of execution), one score per query head.
        num_kv_heads: Key/value heads of each module.
        method: "s4", "gate", "flap" or "random".
        model: Identity of the model, from `model_identity`.
        data: Number of samples, number of skipped ones by reason, digest of the prompts, the caller's description.
        settings: Settings of the method.

    Raises:
        RecipeError: There is no score, `values` and `num_kv_heads` name different modules, or a score is NaN or
            infinite.
    """

    values: Mapping[str, tuple[float, ...]]
    num_kv_heads: Mapping[str, int]
    method: str
    model: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.values or self.values.keys() != self.num_kv_heads.keys():
            raise RecipeError(
                f"There are scores of {len(self.values)} attention modules and key/value heads of "
                f"{len(self.num_kv_heads)}; both must name the same modules, at least one."
            )
        for name, head_scores in self.values.items():
            groups = self.num_kv_heads[name]
            if not head_scores or type(groups) is not int or groups < 1 or len(head_scores) % groups:
                raise RecipeError(f"{name}: {len(head_scores)} scores do not fit {groups!r} key/value heads.")
            bad = [head for head, value in enumerate(head_scores) if not math.isfinite(value)]
            if bad:
                raise RecipeError(
                    f"{name}: the score of head {bad[0]} is {head_scores[bad[0]]}. Check weights and inputs for NaN, "
                    "and calibrate in bfloat16 or float32."
                )
        object.__setattr__(
            self, "values", {n: tuple(float(v) for v in head_scores) for n, head_scores in self.values.items()}
        )

    @property
    def num_heads(self) -> dict[str, int]:
        """Query heads of each module."""
        return {name: len(head_scores) for name, head_scores in self.values.items()}

    def check(self, model: nn.Module) -> None:
        """Checks that these are the scores of a model.

        Raises:
            RecipeError: The model lacks a scored module, has other head counts, or has other weights.
        """
        modules = attention_modules(model)
        for name, heads in self.num_heads.items():
            if name not in modules:
                raise RecipeError(
                    f"The scores name the attention module {name}, which {type(model).__name__} does not have; it has "
                    f"{next(iter(modules), 'none')}. Load the model as it was calibrated, or calibrate this one."
                )
            layer = head_layer(name, modules[name])
            if (layer.num_heads, layer.num_kv_heads) != (heads, self.num_kv_heads[name]):
                raise RecipeError(
                    f"{name} has {layer.num_heads} query and {layer.num_kv_heads} key/value heads, the scores are of "
                    f"{heads} and {self.num_kv_heads[name]}. Calibrate this model."
                )
        weights = weights_digest({name: modules[name] for name in self.values})
        if self.model.get("weights", weights) != weights:
            raise RecipeError(
                f"The attention weights are not those of {self.model.get('name', 'the model')} that was calibrated "
                f"({weights}, not {self.model['weights']}): the model was trained on or is another. Calibrate this one."
            )

    def to_json(self) -> str:
        """The scores as JSON text."""
        return json.dumps({"version": _VERSION, **asdict(self)}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> HeadScores:
        """Reads scores that `to_json` wrote.

        Raises:
            RecipeError: The text holds no head scores, has another version, or a score cannot be used.
        """
        try:
            record = dict(json.loads(text))
            version = record.pop("version")
            if version != _VERSION:
                raise RecipeError(
                    f"The head scores have version {version!r}; this library reads {_VERSION}. Update it."
                )
            record["values"] = {
                name: tuple(float(v) for v in head_scores) for name, head_scores in record["values"].items()
            }
            for name in ("num_kv_heads", "model", "data", "settings"):
                record[name] = dict(record[name])
            return cls(**record)
        except RecipeError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RecipeError(f"These are no head scores ({type(error).__name__}: {error}). Calibrate anew.") from error

    def save(self, path: str | Path) -> Path:
        """Writes the scores as JSON; missing folders are made.

        Raises:
            RecipeError: The file cannot be written.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.to_json(), encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"{path} cannot be written ({error.strerror}); name another file.") from error
        return path

    @classmethod
    def load(cls, path: str | Path) -> HeadScores:
        """Reads a file that `save` wrote.

        Raises:
            RecipeError: The file cannot be read, or as in `from_json`.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path} cannot be read ({error}); sfa calibrate heads writes such a file.") from error
        return cls.from_json(text)
