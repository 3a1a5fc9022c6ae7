"""The small towers of all registered backbones, built-in ones and those of installed packages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pkgutil import resolve_name

from sfa_adapters.errors import ContractError
from sfa_adapters.registry import Backbone, registered_backbones
from sfa_adapters.testing.cases import NoTower, TowerCase

__all__ = ["small_towers", "towers_or_reasons"]


def small_towers(*backbones: str, runs: Sequence[str] = ("everything",)) -> tuple[TowerCase, ...]:
    """The small towers that records name in `Backbone.small_towers`.

    Args:
        *backbones: Names of registered backbones; by default all whose library is installed.
        runs: Which of them, by `TowerCase.runs`.

    Raises:
        ContractError: No backbone has that name, or one names no small towers, or a named one needs a library that is
            missing.
    """
    entries = towers_or_reasons(*backbones, runs=runs)
    for entry in entries:
        if isinstance(entry, NoTower) and (backbones or entry.library is None):
            raise ContractError(entry.reason)
    return tuple(entry for entry in entries if isinstance(entry, TowerCase))


def towers_or_reasons(*backbones: str, runs: Sequence[str] = ("everything",)) -> list[TowerCase | NoTower]:
    """As `small_towers`, but a backbone without a small tower is an entry that says why.

    Args:
        *backbones: Names of registered backbones; all by default.
        runs: Which of the small towers, by `TowerCase.runs`. A backbone that has only others has no entry.

    Raises:
        ContractError: No backbone has that name, or what its record names is no sequence of its `TowerCase`s.
    """
    records = registered_backbones()
    unknown = sorted(set(backbones) - set(records))
    if unknown:
        raise ContractError(f"No backbone is named {unknown[0]!r}; registered: {', '.join(sorted(records))}.")
    entries: list[TowerCase | NoTower] = []
    for name in backbones or sorted(records):
        entries.extend(e for e in _of_record(records[name]) if isinstance(e, NoTower) or e.runs in runs)
    return entries


def _of_record(record: Backbone) -> Iterable[TowerCase | NoTower]:
    place = record.small_towers
    if place is None:
        text = (
            f"Backbone {record.name!r} names no small tower to test: write a sequence of "
            'sfa_adapters.testing.TowerCase and name it in the record, small_towers="module:NAME" '
            "(see docs/adding_a_backbone.md)."
        )
        return [NoTower(record.name, text)]
    try:
        cases = resolve_name(place)
    except ModuleNotFoundError as error:
        # A library may not be installed; that the module itself is missing is a mistake in the record.
        library = (error.name or "").partition(".")[0]
        if library in ("", place.partition(":")[0].partition(".")[0]):
            raise ContractError(
                f"Backbone {record.name!r}: small_towers={place!r} cannot be imported: {error}"
            ) from error
        return [NoTower(record.name, f"The small towers of {record.name!r} need {library}: {error}", library)]
    except (AttributeError, ValueError) as error:
        raise ContractError(f"Backbone {record.name!r}: small_towers={place!r} cannot be read: {error}") from error
    others = [case for case in cases if _backbone(case) != record.name]
    if others or not cases:
        raise ContractError(
            f"Backbone {record.name!r}: small_towers={place!r} must be a sequence of "
            f"TowerCase(backbone={record.name!r}, ...); got {others[:1] or cases}."
        )
    return cases


def _backbone(case: object) -> str | None:
    if isinstance(case, NoTower):
        return case.name
    return case.backbone if isinstance(case, TowerCase) else None
