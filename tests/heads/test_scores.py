"""The file of head scores: what it records about its model, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sfa_adapters.errors import RecipeError
from sfa_adapters.heads.layers import head_layers
from sfa_adapters.heads.scores import HeadScores
from tests.support.head_scoring import BY_NAME, LLAVA, calibrated


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(RecipeError, match="head 1 is nan"):
        HeadScores({"a": (0.0, float("nan"))}, {"a": 2}, "s4")
    with pytest.raises(RecipeError, match="do not fit 3"):
        HeadScores({"a": (0.0, 1.0)}, {"a": 3}, "s4")
    with pytest.raises(RecipeError, match="same modules"):
        HeadScores({"a": (0.0,)}, {"b": 1}, "s4")
    model: Any = LLAVA.build()
    with torch.no_grad():
        next(iter(head_layers(model).values())).output.weight.fill_(float("nan"))  # pyright: ignore[reportCallIssue]
    with pytest.raises(RecipeError, match="NaN"):
        calibrated(model, [LLAVA.inputs()], "flap")


def test_saved_scores_come_back_and_know_their_model(tmp_path: Path) -> None:
    model: Any = LLAVA.build()
    scores = calibrated(model, [LLAVA.inputs()], data="two prompts")
    path = scores.save(tmp_path / "new" / "scores.json")
    loaded = HeadScores.load(path)
    assert loaded == scores
    assert loaded.data["about"] == "two prompts"
    assert loaded.settings["gamma"] == 0.4
    loaded.check(model)
    loaded.check(LLAVA.build().to(torch.bfloat16))
    with pytest.raises(RecipeError, match="weights are not those"):
        loaded.check(BY_NAME["internvl"].build())
    name = next(iter(scores.values))
    other = HeadScores({**scores.values, name: (1.0, 2.0)}, scores.num_kv_heads, "s4")
    with pytest.raises(RecipeError, match="has 4 query and 2 key/value heads"):
        other.check(model)
    with torch.no_grad():
        model.get_decoder().layers[0].self_attn.q_proj.weight.mul_(1.5)
    with pytest.raises(RecipeError, match="weights are not those"):
        loaded.check(model)


def test_files_that_are_no_scores_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    with pytest.raises(RecipeError, match="cannot be read"):
        HeadScores.load(path)
    good = json.loads(HeadScores({"a": (0.0, 1.0)}, {"a": 2}, "s4").to_json())
    bad = {**good, "values": {"a": ["x"]}}, {**good, "more": 1}, {k: v for k, v in good.items() if k != "method"}, []
    for record in bad:
        path.write_text(json.dumps(record))
        with pytest.raises(RecipeError, match="no head scores"):
            HeadScores.load(path)
    for text, match in (
        (json.dumps({**good, "version": 2}), "version 2"),
        (json.dumps(good).replace("0.0", "NaN"), "score of head 0 is nan"),
    ):
        path.write_text(text)
        with pytest.raises(RecipeError, match=match):
            HeadScores.load(path)
