"""`sfa bench heads`: every arm is pruned, timed and evaluated on one object, and the files hold the results."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from sfa_adapters.cli.bench import app
from sfa_adapters.errors import DataError, RecipeError
from sfa_adapters.heads import calibrate_heads, plan_heads, prune_heads
from sfa_adapters.recipes.bench.heads import HeadBenchConfig, run_bench_heads
from sfa_adapters.recipes.bench.heads_quality import ask, chart_batches, quality_of
from sfa_adapters.recipes.nano.checkpoint import nano_checkpoint
from sfa_adapters.recipes.nano.evaluate import evaluate
from sfa_adapters.recipes.nano.many_heads import build_many_heads, load_many_heads, split_heads
from sfa_adapters.recipes.nano.models import NanoHost, load_nano
from sfa_adapters.recipes.synthetic.chart_questions import chart_samples

FAST: dict[str, Any] = {"questions": 6, "charts": 4, "rounds": 5, "tokens": 2}


def test_every_arm_and_its_files(tmp_path: Path) -> None:
    config = HeadBenchConfig(out=tmp_path, rates=(0.02, 0.3), plans=("uniform", "adaptive"),
                             compensations=("bias",), **FAST)  # fmt: skip
    bench = run_bench_heads(config)
    settings = [(arm.plan, arm.rate, arm.compensation, arm.removed) for arm in bench.arms]
    assert settings == [
        ("uniform", 0.3, "bias", 20),
        ("adaptive", 0.02, "bias", 1),
        ("adaptive", 0.3, "bias", 19),
    ]
    assert [(plan, rate) for _, plan, rate, _ in bench.left_out] == [("uniform", 0.02)]
    assert "no head" in bench.left_out[0][-1]
    for arm in bench.arms:
        lost = sum(before - after for before, after in arm.receipt.heads.values())
        assert (lost, arm.total) == (arm.removed, 64)
        assert arm.receipt.compensation == arm.compensation
        assert arm.receipt.speed is not None
        assert arm.quality is not None
        assert len(arm.quality.by_seed) == 1
    with (tmp_path / "bench.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["removed"]) for row in rows] == [arm.removed for arm in bench.arms]
    for row in rows:
        assert float(row["accuracy_low"]) <= float(row["accuracy"]) <= float(row["accuracy_high"])
        assert int(row["cache_bytes"]) < int(row["cache_bytes_before"])
        assert int(row["weights_bytes"]) < int(row["weights_bytes_before"])
        assert float(row["decode_expected"]) > 1
    record: Any = json.loads((tmp_path / "bench.json").read_text())
    assert record["options"]["rates"] == "(0.02, 0.3)"
    assert record["left_out"][0]["rate"] == 0.02
    assert record["whole"]["change"]["value"] == 0
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def test_the_answers_are_those_of_a_model_pruned_by_hand(tmp_path: Path) -> None:
    options: dict[str, Any] = FAST | {"questions": 20}
    one = {"rates": (0.3,), "plans": ("global",), "compensations": ("absorb",), "methods": ("gate",)}
    [arm] = run_bench_heads(HeadBenchConfig(out=tmp_path, **one, **options)).arms  # pyright: ignore[reportArgumentType]
    host = load_many_heads()
    samples = chart_samples("test", 20)
    whole = evaluate(host, samples)
    scores = calibrate_heads(host.model, chart_batches(host, 4, labelled=True), "gate", progress=False)
    prune_heads(host.model, plan_heads(scores, 0.3, "global"), "absorb")
    evaluation = evaluate(host, samples)
    assert arm.quality is not None
    assert arm.quality.accuracy == evaluation.accuracy
    assert evaluation.answers != whole.answers
    assert arm.quality.change.value == pytest.approx(evaluation.correct.mean() - whole.correct.mean())


def test_random_heads_are_drawn_several_times_and_averaged(tmp_path: Path) -> None:
    one = {"rates": (0.2,), "plans": ("global",), "compensations": ("none",), "methods": ("random",), "draws": 2}
    [arm] = run_bench_heads(HeadBenchConfig(out=tmp_path, **one, **FAST)).arms  # pyright: ignore[reportArgumentType]
    assert arm.quality is not None
    assert len(arm.quality.by_seed) == 2
    assert arm.quality.accuracy.value == pytest.approx(np.mean(arm.quality.by_seed))
    with (tmp_path / "bench.csv").open() as file:
        [row] = csv.DictReader(file)
    assert [float(value) for value in row["accuracy_by_draw"].split()] == pytest.approx(arm.quality.by_seed, abs=1e-4)


def test_a_change_is_drawn_again_in_pairs() -> None:
    host = load_many_heads()
    samples = chart_samples("test", 8)
    whole = ask(host, host.model, samples)
    same = quality_of([whole, whole], whole)
    assert (same.change.value, same.change.low, same.change.high) == (0, 0, 0)
    assert same.accuracy.low < same.accuracy.high


def test_a_model_of_ones_own_on_the_command_line(tmp_path: Path) -> None:
    from PIL import Image

    folder = nano_checkpoint("llava", tmp_path / "llava")
    page = tmp_path / "page.png"
    Image.new("RGB", (120, 90), "white").save(page)
    arguments = ["heads", str(page), "--model", str(folder), "--question", "What?", "--out", str(tmp_path / "bench")]
    arguments += ["--rate", "0.5", "--plan", "uniform", "--compensation", "absorb", "--rounds", "5", "--decoded", "2"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    with (tmp_path / "bench" / "bench.csv").open() as file:
        [row] = csv.DictReader(file)
    assert row["compensation"] == "absorb"
    assert "accuracy" not in row
    assert "moved" in result.output
    assert "made" not in result.output


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "rate": ({"rates": (0.1, 1.5)}, r"--rate 1\.5"),
    "plan": ({"plans": ("even",)}, "--plan even"),
    "compensation": ({"compensations": ("hope",)}, "--compensation hope"),
    "method": ({"methods": ("s5",)}, "--method s5"),
    "rounds": ({"rounds": 2}, "--rounds 2 must be at least 5"),
    "questions": ({"questions": -1}, "--questions -1"),
    "dtype": ({"dtype": "int8"}, "--dtype int8"),
    "model": ({"model": "m"}, "Give --model, --question and an image together"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_named(case: str) -> None:
    options, words = WRONG[case]
    with pytest.raises(DataError, match=words):
        HeadBenchConfig(**options)


def test_when_no_plan_removes_a_head_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="No plan removes a head"):
        run_bench_heads(HeadBenchConfig(out=tmp_path, rates=(0.001,), **FAST))


def _text(host: NanoHost) -> Any:
    model: Any = host.model
    return model.model.language_model


def test_split_heads_keep_values_and_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where attention is even, four quarters of a head give what the head gave."""
    old = load_nano()
    state = {name: p.detach().clone() for name, p in old.model.named_parameters()}
    new = build_many_heads()
    ids = torch.randint(5, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    for model in (_text(old), _text(new)):
        for layer in model.layers:
            layer.self_attn.q_proj.weight.data.zero_()
            layer.self_attn.q_proj.bias.data.zero_()
    with torch.no_grad():
        expected, states = (_text(host)(input_ids=ids).last_hidden_state for host in (old, new))
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(states, expected, atol=1e-4, rtol=1e-4)
    shapes = {name: tuple(t.shape) for name, t in split_heads(state, 4, 32).items() if "layers.0.self_attn" in name}
    assert {s for n, s in shapes.items() if "language_model" in n and n.endswith("weight")} == {(256, 128), (128, 256)}


def test_a_split_head_keeps_the_rotary_pairs_that_turn_as_before() -> None:
    """The quarters with even pairs turn exactly like those pairs of the whole head."""
    old, new = (_text(host).rotary_emb.inv_freq for host in (load_nano(), build_many_heads()))
    torch.testing.assert_close(new, old[::2])


def test_the_host_with_many_heads_reads_charts() -> None:
    evaluation = evaluate(load_many_heads(), chart_samples("test", 60))
    assert evaluation.accuracy.value > 0.35
