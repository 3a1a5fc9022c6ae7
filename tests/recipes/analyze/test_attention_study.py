"""The attention study from end to end on a few pages: every arm and quantity is there, and changes are paired."""

from __future__ import annotations

import csv
import json
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from sfa_adapters.errors import DataError
from sfa_adapters.recipes.analyze import attention_study
from sfa_adapters.recipes.analyze.attention_study import BASE, StudyConfig, run_study, unseen_charts
from sfa_adapters.recipes.nano.encode import IGNORE, encode_packed
from sfa_adapters.recipes.nano.finetune import FinetuneConfig, evidence_mask
from sfa_adapters.recipes.nano.models import build_nano
from sfa_adapters.recipes.synthetic.questions import questions_for


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_study, "FinetuneConfig", partial(FinetuneConfig, batch_size=2))
        return out, run_study(StudyConfig(out=out, steps=1, questions=2, pages=2, charts=2))


def test_every_arm_and_quantity_is_measured(study: Any) -> None:
    out, arms = study
    assert [arm.name for arm in arms] == ["pretrained", *BASE]
    quantities = set(arms[0].values)
    assert len(quantities) == 11
    for arm in arms:
        assert set(arm.values) == quantities
        assert all(np.isfinite(values).any() for values in arm.values.values())
    files = {path.name for path in out.iterdir()}
    assert files == {"study.md", "study.json", "study.csv", "entropy.png", "hallucination.png"}


def test_changes_are_paired_with_the_arm_before(study: Any) -> None:
    out, arms = study
    rows = json.loads((out / "study.json").read_text())["rows"]
    values = {arm.name: arm.values for arm in arms}
    row = next(r for r in rows if r["arm"] == "SFA + grounding" and r["quantity"] == "mass on the evidence")
    change = values["SFA + grounding"]["mass on the evidence"] - values["SFA"]["mass on the evidence"]
    assert row["against"] == "SFA"
    assert row["change value"] == pytest.approx(np.nanmean(change))
    assert row["change low"] <= row["change value"] <= row["change high"]
    with (out / "study.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows) == 77


def test_evidence_lies_under_the_numbers_that_the_answer_rests_on() -> None:
    host, charts = build_nano("llava_onevision"), unseen_charts(2)
    questions = [questions_for(chart.table)[:6] for chart in charts]
    batch = encode_packed(
        host, [c.image for c in charts], [[(q.text, q.answer) for q in of_chart] for of_chart in questions]
    )
    mask = evidence_mask(batch["labels"], charts, questions)
    assert mask.shape == (*batch["labels"].shape, 144)
    assert torch.equal(mask.any(-1), batch["labels"] != IGNORE)
    chart, question = charts[0], questions[0][0]
    assert question.type == "value"
    ((series, row),) = question.marks
    (box,) = [t.box for t in chart.texts if t.role == "value" and (t.series, t.row) == (series, row)]
    first = mask[0, int((batch["labels"][0] != IGNORE).nonzero()[0])].reshape(12, 12)
    assert first.sum().item() * 144 == pytest.approx((box[2] - box[0]) * (box[3] - box[1]), rel=1e-3)
    top, left = math.floor(box[1] / 12), math.floor(box[0] / 12)
    assert first[top, left] > 0


def test_wrong_options_are_named(tmp_path: Any) -> None:
    with pytest.raises(DataError, match="--pages 0"):
        StudyConfig(pages=0)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="--out"):
        run_study(StudyConfig(out=tmp_path / "file"))
