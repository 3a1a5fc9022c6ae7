"""Settings that override those of a recipe: from a YAML file and from `key=value` on the command line.

Values are read by the type of the field in `Recipe`, not by the type that YAML gives them: `lr: 2e-5` is text to YAML,
and `revision: 0123456` a number.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from sfa_adapters.errors import RecipeError
from sfa_adapters.files import write_whole, writing
from sfa_adapters.hosts.recipe import Recipe

__all__ = ["load_recipe", "write_recipe"]

# What other trainers call a setting, for the hint when someone writes that.
PEERS: Mapping[str, str] = {
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "micro_batch",
    "gradient_accumulation_steps": "batch_size",
    "per_device_eval_batch_size": "eval_batch",
    "output_dir": "output",
    "report_to": "log",
    "model_name_or_path": "model",
    "dataset": "data",
    "dataset_name": "data",
    "dataset_config": "data_config",
    "split": "train_split",
    "vit_lr": "vision_lr",
    "aligner_lr": "projector_lr",
    "freeze_vit": "freeze_vision",
    "freeze_vision_tower": "freeze_vision",
    "freeze_aligner": "freeze_projector",
    "freeze_multi_modal_projector": "freeze_projector",
    "freeze_language_model": "freeze_llm",
    "lora_rank": "lora_llm",
    "lora_r": "lora_llm",
    "max_patches": "max_tiles",
    "max_dynamic_patch": "max_tiles",
}
_YES, _NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def load_recipe(base: Recipe, file: str | Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
    r"""A recipe with its settings overridden by those of a file, and these by `key=value`.

    Args:
        base: The recipe that gives all other settings.
        file: YAML: one `key: value` for each setting. None for no file.
        overrides: `key=value`; of several for one key the last counts. `none` unsets, a list is written `row,col`, and
            dashes in a key count as underscores. In `prompt`, `\n` is a line break.

    Returns:
        The recipe.

    Raises:
        RecipeError: A key is unknown (suggests a similar one), a value has another type or cannot be used, or the file
            cannot be read. Says where the value came from.
    """
    changes: dict[str, Any] = {}
    if file is not None:
        where = f"in {file}"
        changes = {_known(key, where): value for key, value in _read(Path(file)).items()}
        changes = {key: _typed(key, value, where) for key, value in changes.items()}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"{override!r} is no setting. Write key=value, e.g. lr=2e-5.")
        key = _known(key.strip(), "on the command line")
        # A shell passes `\n` as two characters.
        value = value.replace("\\n", "\n") if key == "prompt" else value.strip()
        changes[key] = _typed(key, value, "on the command line")
    return base.replace(**changes)


def write_recipe(recipe: Recipe, path: str | Path) -> Path:
    """Writes every setting as YAML, whole or not at all; `load_recipe` reads it back equal.

    Args:
        recipe: The recipe.
        path: The file; its folder is made if needed.

    Returns:
        The file.

    Raises:
        TrainingError: It cannot be written.
    """
    path = Path(path)
    settings = {
        name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(recipe).items()
    }
    # PyYAML folds these three line breaks into spaces in a text that it writes unescaped.
    breaks = any(mark in str(value) for value in settings.values() for mark in "\x85\u2028\u2029")
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=not breaks, width=120)
    with writing(path.name, path.parent):
        write_whole(path, text)
    return path


def _read(file: Path) -> Mapping[Any, Any]:
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"There is no file {file}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{file} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if settings is None:
        return {}
    if not isinstance(settings, Mapping):
        raise RecipeError(f"{file} must hold one `key: value` for each setting, e.g. `lr: 2e-5`.")
    return settings


def _known(key: object, where: str) -> str:
    names = [field.name for field in dataclasses.fields(Recipe)]
    name = str(key).removeprefix("--").replace("-", "_")
    if name in names:
        return name
    near = next(iter(get_close_matches(name, [*names, *PEERS], 1, 0.6)), None)
    near = PEERS.get(near, near) if near else None
    hint = f"Did you mean {near}?" if near else f"There are: {', '.join(names)}."
    raise RecipeError(f"Unknown setting {key!r} {where}. {hint}")


@cache
def _types() -> Mapping[str, Any]:
    return get_type_hints(Recipe)


def _typed(name: str, value: Any, where: str) -> Any:
    hint = _types()[name]
    try:
        return _read_as(hint, value)
    except (ValueError, TypeError):
        raise RecipeError(f"{name}={value!r} {where} must be {_expected(hint)}.") from None


def _read_as(hint: Any, value: Any) -> Any:
    """Reads a value as a type of `Recipe`; ValueError where it is none."""
    if get_origin(hint) in (Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "")):
            return None
        return _read_as(next(kind for kind in get_args(hint) if kind is not type(None)), value)
    if get_origin(hint) is tuple:
        parts = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else list(value)
        return tuple(_read_as(get_args(hint)[0], part) for part in parts)
    if get_origin(hint) is Literal:
        hint = str
    return _READERS[hint](value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _truth(value: Any) -> bool:
    word = str(value).strip().lower()
    if not isinstance(value, bool | str) or word not in (*_YES, *_NO):
        raise ValueError
    return word in _YES


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return float(value)


def _whole(value: Any) -> int:
    number = _number(value)  # 1e4 is a whole number too
    if not number.is_integer():
        raise ValueError
    return int(number)


_READERS: Mapping[Any, Callable[[Any], Any]] = {str: _text, bool: _truth, float: _number, int: _whole}
_WORDS: Mapping[Any, str] = {
    str: "text (in quotes, in YAML)",
    bool: "true or false",
    float: "a number",
    int: "a whole number",
}


def _expected(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return f"{_expected(next(kind for kind in get_args(hint) if kind is not type(None)))}, or none"
    if get_origin(hint) is tuple:
        return f"a list like {'0,1,2' if get_args(hint)[0] is int else 'row,col'}"
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    return _WORDS[hint]
