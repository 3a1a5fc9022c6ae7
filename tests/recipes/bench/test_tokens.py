"""`sfa bench tokens`: every arm is measured in one run, and the files hold the results."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sfa_adapters.analysis import modality_dominance
from sfa_adapters.cli.bench import app
from sfa_adapters.errors import DataError
from sfa_adapters.recipes.bench.tokens import UNTOUCHED, BenchConfig, run_bench
from sfa_adapters.recipes.bench.tokens_quality import _dominance
from sfa_adapters.recipes.nano.checkpoint import nano_checkpoint
from sfa_adapters.recipes.nano.encode import encode
from sfa_adapters.recipes.nano.models import load_nano
from sfa_adapters.recipes.synthetic.chart_questions import chart_samples
from sfa_adapters.reduction.fastv.inject import FastVConfig, eject_fastv, inject_fastv


def test_nano_host_every_arm_and_its_files(tmp_path: Path) -> None:
    out = tmp_path / "bench"
    options = {"questions": 4, "rounds": 1, "tokens": 2, "keep": (0.5, 0.25)}
    arms = run_bench(BenchConfig(out=out, selectors=("attention", "random"), **options))
    assert [(arm.selector, arm.keep) for arm in arms] == [
        (UNTOUCHED, 1.0), ("attention", 0.5), ("attention", 0.25), ("random", 0.5), ("random", 0.25),
    ]  # fmt: skip
    assert [arm.tokens for arm in arms] == [145, 72, 36, 72, 36]  # 144 patches and a line break
    assert arms[0].first_ratio == 1
    assert arms[0].cache_mb > arms[1].cache_mb > arms[2].cache_mb > 0
    for arm in arms:
        assert min(arm.first_ms, arm.per_second, arm.peak_mb) > 0
        assert arm.quality is not None
        assert arm.quality.mdi.value > 0
    with (out / "bench.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["selector"] for row in rows] == [arm.selector for arm in arms]
    record: Any = json.loads((out / "bench.json").read_text())
    assert record["options"]["layer"] == "2"
    assert len(record["arms"]) == 5
    assert (out / "bench.png").stat().st_size > 10_000


def test_a_model_of_ones_own_on_the_command_line(tmp_path: Path) -> None:
    from PIL import Image

    folder = nano_checkpoint("llava", tmp_path / "llava")
    page = tmp_path / "page.png"
    Image.new("RGB", (120, 90), "white").save(page)
    out = tmp_path / "bench"
    arguments = ["tokens", str(page), "--model", str(folder), "--question", "What?", "--out", str(out), "--rounds", "1"]
    arguments += ["--selector", "diversity", "--keep", "0.5", "--layer", "1", "--decoded", "2"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    with (out / "bench.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["selector"], row["tokens"]) for row in rows] == [(UNTOUCHED, "64"), ("diversity", "32")]
    assert "accuracy" not in rows[0]


def test_dominance_is_that_of_the_analysis_and_counts_what_is_left() -> None:
    host, [sample] = load_nano(), chart_samples("test", 1)
    inputs = encode(host, [sample.image], [sample.question])
    generation: Any = host.model.generation_config
    generation.eos_token_id = None  # four tokens, so three of them ask
    report = modality_dominance(host.model, [inputs], layers={"all": range(4)}, max_new_tokens=4)
    dominance = _dominance(host, sample, None)
    assert dominance == pytest.approx(next(row for row in report.table() if row["stage"] == "all")["mdi"], rel=1e-3)
    setting = FastVConfig(layer=1, ratio=0.9)
    inject_fastv(host.model, setting)
    pruned = _dominance(host, sample, setting)
    eject_fastv(host.model)
    # As much attention for a tenth of the tokens: each one gets more.
    assert pruned < dominance


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": (0.5, 1.5)}, "--keep 1.5"),
        ({"keep": ()}, "--keep"),
        ({"selectors": ("best",)}, "--selector best"),
        ({"rounds": 0}, "--rounds 0"),
        ({"tokens": 1}, "--decoded 1"),
        ({"device": "nonsense"}, "--device nonsense must be cpu, cuda"),
        ({"device": "meta"}, "--device meta must be cpu, cuda"),
        ({"device": "cuda:99"}, "--device cuda:99: torch sees"),
        ({"dtype": "int8"}, "--dtype int8"),
        ({"model": "x"}, "--question and an image together"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        BenchConfig(**options)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    config = BenchConfig(out=tmp_path, model=str(tmp_path / "none"), question="?", images=(tmp_path / "p.png",))
    with pytest.raises(DataError, match="cannot be loaded"):
        run_bench(config)
    assert torch.is_grad_enabled()
