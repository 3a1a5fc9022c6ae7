"""`HeadScores`: how much each attention head of a model matters, with all that is needed to use the numbers again."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sfa_adapters.analysis.prompts import decoder_layers
from sfa_adapters.errors import RecipeError
from sfa_adapters.observe import attention_modules
from sfa_adapters.registry import find_tower

__all__ = ["HeadLayer", "HeadScores", "head_layers", "model_identity"]

_VERSION = 1
_SAMPLED = 64  # entries of each weight that tell one model from another
_OUTPUTS = ("o_proj", "out_proj", "proj", "projection_layer")  # in this order: some towers have several


@dataclass(frozen=True, eq=False)
class HeadLayer:
    """The heads of one attention module.

    Attributes:
        module: The attention module.
        output: Its output projection; query head h feeds the columns h * head_dim to (h + 1) * head_dim.
        num_heads: Query heads.
        num_kv_heads: Key/value heads.
        head_dim: Channels of a head.
    """

    module: nn.Module
    output: nn.Module
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class HeadScores:
    """One number per query head; the higher, the more the head matters.

    Numbers of two methods cannot be compared.

    Attributes:
        values: For each attention module (its path, in order of execution), one score per query head.
        num_kv_heads: Key/value heads of each module.
        method: "s4", "gate", "flap" or "random".
        model: What `model_identity` says about the model.
        data: How many samples, which were skipped and why, a digest of the prompts, and what the caller said.
        settings: Of the method.

    Raises:
        RecipeError: There is no score, the modules do not agree, or a score is NaN or infinite.
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
        for name, own in self.values.items():
            groups = self.num_kv_heads[name]
            if not own or type(groups) is not int or groups < 1 or len(own) % groups:
                raise RecipeError(f"{name}: {len(own)} scores do not fit {groups!r} key/value heads.")
            bad = [head for head, value in enumerate(own) if not math.isfinite(value)]
            if bad:
                raise RecipeError(
                    f"{name}: the score of head {bad[0]} is {own[bad[0]]}. Check weights and inputs for NaN, and "
                    "calibrate in bfloat16 or float32."
                )
        object.__setattr__(self, "values", {n: tuple(float(v) for v in own) for n, own in self.values.items()})

    @property
    def num_heads(self) -> dict[str, int]:
        """Query heads of each module."""
        return {name: len(own) for name, own in self.values.items()}

    def check(self, model: nn.Module) -> None:
        """Whether these are scores of a model.

        Raises:
            RecipeError: The model lacks a scored module, has other head counts, or has other weights.
        """
        found = attention_modules(model)
        for name, heads in self.num_heads.items():
            if name not in found:
                raise RecipeError(
                    f"The scores name the attention module {name}, which {type(model).__name__} does not have; it has "
                    f"{next(iter(found), 'none')}. Load the model as it was calibrated, or calibrate this one."
                )
            layer = _layer(name, found[name])
            if (layer.num_heads, layer.num_kv_heads) != (heads, self.num_kv_heads[name]):
                raise RecipeError(
                    f"{name} has {layer.num_heads} query and {layer.num_kv_heads} key/value heads, the scores are of "
                    f"{heads} and {self.num_kv_heads[name]}. Calibrate this model."
                )
        weights = _digest({name: found[name] for name in self.values})
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
        """The scores that `to_json` wrote.

        Raises:
            RecipeError: The text holds no head scores, is of a newer version, or a score cannot be used.
        """
        try:
            told = dict(json.loads(text))
            version = told.pop("version")
            if version != _VERSION:
                raise RecipeError(
                    f"The head scores have version {version!r}; this library reads {_VERSION}. Update it."
                )
            told["values"] = {name: tuple(float(v) for v in own) for name, own in told["values"].items()}
            for name in ("num_kv_heads", "model", "data", "settings"):
                told[name] = dict(told[name])
            return cls(**told)
        except RecipeError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RecipeError(f"These are no head scores ({type(error).__name__}: {error}). Calibrate anew.") from error

    def save(self, path: str | Path) -> Path:
        """Writes the scores as JSON; folders are made.

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
        """Reads what `save` wrote.

        Raises:
            RecipeError: The file cannot be read, or as in `from_json`.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path} cannot be read ({error}); sfa calibrate heads writes such a file.") from error
        return cls.from_json(text)


def head_layers(model: nn.Module, modules: str = "language") -> dict[str, HeadLayer]:
    """The attention modules whose heads can be scored, by path, in order of execution.

    Args:
        model: A language model, a tower or a whole vision-language model.
        modules: "language": the layers of the language model; "vision": those layers of the tower that are read.

    Raises:
        RecipeError: `modules` is unknown, or two layers share a module or a weight.
        ObservationError: The model has no such layer.
    """
    if modules == "language":
        names = decoder_layers(model)
    elif modules == "vision":
        names = tuple(attention_modules(model, "vision"))[: find_tower(model).used_layers]
    else:
        raise RecipeError(f"modules={modules!r} must be 'language' or 'vision'.")
    inside = {name: model.get_submodule(name) for name in names}
    _refuse_shared(model, inside)
    return {name: _layer(name, module) for name, module in inside.items()}


def model_identity(model: nn.Module, layers: Mapping[str, HeadLayer]) -> dict[str, str]:
    """What tells a model from others: its class, its name, and a digest of the attention weights.

    Args:
        model: The model.
        layers: From `head_layers`.

    Returns:
        "class", "name" (of a local folder only its last part) and "weights".
    """
    name = str(getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__)
    name = Path(name).name if Path(name).exists() else name
    digest = _digest({path: layer.module for path, layer in layers.items()})
    return {"class": type(model).__name__, "name": name, "weights": digest}


def _layer(name: str, module: nn.Module) -> HeadLayer:
    output = next((getattr(module, n) for n in _OUTPUTS if isinstance(getattr(module, n, None), nn.Module)), None)
    width = getattr(output, "in_features", None)
    if output is None or width is None:
        raise RecipeError(
            f"{name} ({type(module).__name__}) has no output projection that is known ({', '.join(_OUTPUTS)}): its "
            "heads cannot be told apart."
        )
    size = getattr(module, "head_dim", None) or width // int(getattr(module, "num_heads", 1))
    keys: Any = getattr(module, "k_proj", None)
    groups = width if keys is None else keys.out_features
    return HeadLayer(module, output, width // size, groups // size, size)


def _refuse_shared(model: nn.Module, inside: Mapping[str, nn.Module]) -> None:
    owners: dict[int, str] = {}
    wanted = {id(module) for module in inside.values()}
    paths = [(path, m) for path, m in model.named_modules(remove_duplicate=False) if id(m) in wanted]
    for path, module in paths:
        for thing in (module, *module.parameters()):
            first = owners.setdefault(id(thing), path)
            if first != path:
                raise RecipeError(
                    f"{first} and {path} share {'a weight' if isinstance(thing, nn.Parameter) else 'one module'}: "
                    "heads that went from one would go from the other. Untie them first (copy.deepcopy of one)."
                )


def _digest(modules: Mapping[str, nn.Module]) -> str:
    """Of names, shapes and some entries of each weight, in bfloat16: the same however the model was loaded."""
    found = hashlib.sha256()
    for path, module in modules.items():
        for name, parameter in module.named_parameters():
            flat = parameter.detach().flatten()
            chosen = torch.linspace(0, max(0, flat.numel() - 1), min(_SAMPLED, flat.numel()), device=flat.device).long()
            values = flat[chosen].to(torch.bfloat16).float().cpu()
            found.update(f"{path}.{name} {tuple(parameter.shape)} {values.tolist()}".encode())
    return found.hexdigest()[:16]
