"""Parses the names of SFA's tensors in files, and matches them with the layers of a model.

The path of an attention module is not the same everywhere: it has a prefix inside a host, another inside a PEFT model,
and versions of transformers move towers. Layers are matched by the part of the path that differs between them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sfa_adapters.bias import TERMS
from sfa_adapters.errors import AdapterMismatchError

__all__ = ["PEFT_PREFIX", "ScalarKey", "match_paths", "plain_path", "record_keys", "scalar_keys"]

PEFT_PREFIX = "base_model.model."
_SCALAR = re.compile(rf"(?:(?P<path>.+)\.)?sfa\.(?P<attribute>sfa_(?:{'|'.join(TERMS)}))(?:\.(?P<adapter>[^.]+))?")
_RECORD = re.compile(r"(?:.+\.)?sfa\._extra_state")
# What torch.compile, FSDP and activation checkpointing put into the path of a module.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


class ScalarKey(NamedTuple):
    """One tensor of SFA in a state dict: path of its attention module, `sfa_row` etc., adapter name or None."""

    path: str
    attribute: str
    adapter: str | None


def scalar_keys(keys: Iterable[str]) -> dict[str, ScalarKey]:
    """The keys of a state dict or file that are structural scalars, parsed."""
    matches = {key: _SCALAR.fullmatch(key) for key in keys}
    return {k: ScalarKey(m["path"] or "", m["attribute"], m["adapter"]) for k, m in matches.items() if m}


def record_keys(keys: Iterable[str]) -> list[str]:
    """The keys that hold a configuration of SFA (`sfa_adapters.state_record`)."""
    return [key for key in keys if _RECORD.fullmatch(key)]


def plain_path(path: str) -> str:
    """The path of a module without the parts that PEFT, DDP, FSDP and torch.compile add."""
    parts = [part for part in path.split(".") if part not in _WRAPPERS]
    while parts[:2] == ["base_model", "model"] or parts[:1] == ["module"]:
        parts = parts[2:] if parts[0] == "base_model" else parts[1:]
    return ".".join(parts)


def match_paths(saved: Sequence[str], live: Sequence[str], source: str) -> dict[str, str]:
    """Matches the paths of attention modules in a file with those in a model, one to one.

    Args:
        saved: Paths of the attention modules in a file.
        live: Those of the model's adapted layers.
        source: The file, for errors.

    Returns:
        Live paths by saved path.

    Raises:
        AdapterMismatchError: The paths do not match one to one.
    """
    for name in (plain_path, _last_part) if len({*saved}) == 1 else (plain_path, None):
        first, second = ([name(p) for p in paths] if name else _distinct_parts(paths) for paths in (saved, live))
        if sorted(first) == sorted(second) and len({*second}) == len(second):
            lives = dict(zip(second, live, strict=True))
            return {path: lives[part] for path, part in zip(saved, first, strict=True)}
    raise AdapterMismatchError(
        f"{source} has SFA scalars for {len(saved)} layers ({_examples(saved)}); the adapter here has {len(live)} "
        f"({_examples(live)}), and they do not match. Load it on the model it was trained with."
    )


def _last_part(path: str) -> str:
    """The last three parts of a path, by which a single layer is matched: `layers.0.self_attn`."""
    return ".".join(plain_path(path).split(".")[-3:])


def _distinct_parts(paths: Sequence[str]) -> list[str]:
    """The paths without their common prefix."""
    split = [plain_path(path).split(".") for path in paths]
    common = 0
    for parts in zip(*split, strict=False):
        if len({*parts}) > 1:
            break
        common += 1
    return [".".join(parts[common:]) for parts in split]


def _examples(paths: Sequence[str]) -> str:
    return f"e.g. {min(paths)}" if paths else "none"
