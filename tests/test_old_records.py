"""Records of the form before `layouts` work until 0.2, with a warning, and give what records of the new form give."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from sfa_adapters import registry
from sfa_adapters.arrangement import Windows
from sfa_adapters.errors import InjectionError
from sfa_adapters.layout import TokenLayout
from sfa_adapters.pixel_grids import pixel_grid
from sfa_adapters.registry import Backbone, registered_backbones
from tests.support import compare
from tests.support.towers import CASES, TowerCase

BY_NAME = {case.name: case for case in CASES}


def describe(tower: Any, args: Any, kwargs: Any) -> tuple[int, tuple[tuple[int, int, int], ...]]:
    sizes = tuple(tuple(size) for size in kwargs["grid_thw"].tolist())
    return sum(t * h * w for t, h, w in sizes), sizes  # pyright: ignore[reportReturnType]


def segment_layouts(sizes: Any, bounds: tuple[int, ...], block_map: torch.Tensor) -> list[TokenLayout]:
    row, column = (torch.cat(axis) for axis in zip(*(places(*size) for size in sizes), strict=True))
    grids = [(h, w) for t, h, w in sizes for _ in range(t * h * w)]
    return [
        TokenLayout.from_boxes(row[a:b], column[a:b], torch.ones(b - a), grids[a], block_map=block_map)
        for a, b in itertools.pairwise(bounds)
    ]


def places(frames: int, rows: int, columns: int) -> list[torch.Tensor]:
    return [axis.repeat(frames) for axis in Windows(2, 2).places(rows, columns)]


def old_form(name: str) -> Backbone:
    new = registered_backbones()[name]
    values: dict[str, Any] = {"grid_of_input": pixel_grid}
    if new.joined == "segments":
        values = {"describe_input": describe, "segment_layouts": segment_layouts, "mask_argument": "position_bias"}
    with pytest.warns(DeprecationWarning, match=f"{name!r}: (grid_of_input|describe_input and segment_layouts) will"):
        return replace(new, layouts=None, joined="batch", **values)


@pytest.mark.parametrize("name", ["siglip", "qwen2_5"])
def test_an_old_record_gives_what_the_new_one_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case: TowerCase = BY_NAME[name]
    tower, inputs = compare.injected(case)
    expected = compare.read(case, tower, inputs)
    record = old_form(case.backbone)
    monkeypatch.setitem(registry._BACKBONES, case.backbone, record)
    tower, _ = compare.injected(case)
    assert torch.equal(compare.read(case, tower, inputs), expected)
    plain = compare.read(case, case.build(), inputs)
    assert not torch.equal(plain, expected)
    assert record.mask_argument == ("position_bias" if name == "qwen2_5" else "attention_mask")


def test_a_record_says_once_how_tokens_lie() -> None:
    new = registered_backbones()["siglip"]
    with pytest.raises(InjectionError, match="must say how tokens lie once"):
        replace(new, grid_of_input=pixel_grid)
    with pytest.raises(InjectionError, match="must say how tokens lie once"):
        replace(new, layouts=None)
    with pytest.raises(InjectionError, match="come together"):
        replace(new, describe_input=describe)
