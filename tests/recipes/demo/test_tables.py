"""`sfa demo` on tables, with an untrained host: its files, equal conditions for all runs, and what it claims."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import sfa_adapters.recipes.demo.tables as module
from sfa_adapters import describe, load_sfa
from sfa_adapters.layer import SFALayer
from sfa_adapters.recipes.demo.run import FILES, DemoConfig, DemoError, run_demo
from sfa_adapters.recipes.demo.tables_report import TablesArm, TablesReport, effect
from sfa_adapters.recipes.nano.models import build_nano


@pytest.fixture(scope="module")
def finished(untrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One run: its folder, what it printed, its report, and the pictures and questions of every training step."""
    import sfa_adapters.recipes.nano.finetune as training

    out, screen, batches = tmp_path_factory.mktemp("run") / "made-by-the-demo", io.StringIO(), []
    original, patch = training.encode_packed, pytest.MonkeyPatch()

    def spy(host: Any, images: Any, questions: Any) -> Any:
        batches.append(([image.tobytes() for image in images], questions))
        return original(host, images, questions)

    patch.setattr(training, "encode_packed", spy)
    patch.setattr(module, "VALIDATION", 2)
    config = DemoConfig(steps=2, questions=14, pictures=8, weights=untrained, out=out)
    report = run_demo(config, Console(file=screen, width=80))
    patch.undo()
    return out, screen.getvalue(), report, batches


def test_it_leaves_what_it_says(finished: Any) -> None:
    out, screen, _, _ = finished
    assert {entry.name for entry in out.iterdir()} == set(FILES["tables"])
    for name in ("learned_bias.png", "curve.png", "test_tables.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert max(len(line) for line in screen.splitlines()) <= 80


def test_the_effect_comes_first_at_the_end(finished: Any) -> None:
    _, screen, report, _ = finished
    text = " ".join(screen.split())
    sentence = effect(report)
    assert sentence in text
    assert text.index(sentence) < text.index("questions about tables")
    assert "18 questions" in text  # 14, rounded up to three tables


def test_all_three_models_see_the_same_tables_and_questions(finished: Any) -> None:
    _, _, report, batches = finished
    assert len(batches) == 6
    assert batches[:2] == batches[2:4] == batches[4:]
    assert [arm.name for arm in report.arms] == ["without SFA", "SFA", "placebo"]
    none, sfa, placebo = (arm.trainable for arm in report.arms)
    assert sfa == placebo == none + 32
    assert report.arms[1].scalars != report.arms[2].scalars


def test_only_the_placebo_has_shuffled_places() -> None:
    host = build_nano("llava_onevision")
    for name, shuffled in (("SFA", False), ("placebo", True)):
        layers = [m for m in module._arm(host, name, 0).model.modules() if isinstance(m, SFALayer)]
        assert len(layers) == 4
        assert all((layer.state.rearrange is not None) == shuffled for layer in layers)


def test_the_numbers_say_how_they_were_made(finished: Any) -> None:
    out, _, report, _ = finished
    record = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert list(record["models"]) == ["without SFA", "SFA", "placebo"]
    assert record["effect"] == effect(report)
    assert record["command"] == (
        "sfa demo --task tables --host llava_onevision --steps 2 --seed 0 --questions 14 "
        "--weights untrained.safetensors"
    )
    assert [step for step, _ in record["models"]["SFA"]["curve"]] == [0, 1, 2]
    text = (out / "results.md").read_text(encoding="utf-8")
    assert record["command"] in text
    assert record["effect"] in text


def test_the_adapter_and_the_base_build_the_trained_model_again(finished: Any, untrained: Path) -> None:
    out, _, _, _ = finished
    host = build_nano("llava_onevision")
    host.model.load_state_dict(load_file(untrained), strict=False)
    missing = host.model.load_state_dict(load_file(out / "base.safetensors"), strict=False)
    assert not missing.unexpected_keys
    assert describe(load_sfa(host.model, out / "adapter")).num_parameters == 32


def test_a_saved_adapter_that_answers_otherwise_is_an_error(
    untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([("1",), ("2",), ("3",), ("4",)])
    monkeypatch.setattr(module, "_answers", lambda host, pictures: next(answers))
    monkeypatch.setattr(module, "VALIDATION", 1)
    with pytest.raises(DemoError, match="does not reproduce"):
        run_demo(DemoConfig(steps=1, questions=1, pictures=8, weights=untrained, out=tmp_path), Console(quiet=True))


def test_a_folder_of_the_other_task_is_refused(untrained: Path, tmp_path: Path) -> None:
    (tmp_path / "test_charts.png").write_bytes(b"")
    with pytest.raises(DemoError, match=r"test_charts\.png"):
        run_demo(DemoConfig(weights=untrained, out=tmp_path), Console(quiet=True))


def _report(sfa: list[float], none: list[float]) -> TablesReport:
    arms = [
        TablesArm(name, [(0, 0.0)], np.array(scores), (), {}, 1, 1.0)
        for name, scores in (("without SFA", none), ("SFA", sfa), ("placebo", none))
    ]
    return TablesReport(tuple(arms), np.zeros(len(sfa)), 6, 200, 1.0)


def test_the_effect_is_claimed_only_where_its_interval_is_clear_of_zero() -> None:
    better = _report([0.6, 0.5, 0.7, 0.4], [0.3, 0.2, 0.5, 0.3])
    assert effect(better).startswith("SFA learns to read tables faster: SFA minus without SFA is 22.5 [")
    worse = dataclasses.replace(better, arms=(better.arms[1], better.arms[0], better.arms[2]))
    assert effect(worse).startswith("SFA is worse than nothing here")
    nothing = _report([0.75, 0.25, 0.75, 0.25], [0.25, 0.5, 0.5, 0.5])
    assert effect(nothing).startswith("No effect of SFA can be seen: SFA minus without SFA is 6.2 [")


def test_numbers_of_each_task_have_their_own_defaults() -> None:
    assert DemoConfig().number("steps") == 140
    assert DemoConfig(task="charts").number("steps") == 160
    assert DemoConfig(steps=7).number("steps") == 7
    with pytest.raises(DemoError, match="--pictures 0"):
        DemoConfig(pictures=0)
    with pytest.raises(DemoError, match="--task poems"):
        DemoConfig(task="poems")  # pyright: ignore[reportArgumentType]


def test_the_same_seed_gives_the_same_model(finished: Any, untrained: Path, tmp_path: Path, monkeypatch: Any) -> None:
    first, _, _, _ = finished
    monkeypatch.setattr(module, "VALIDATION", 2)
    for name in ("draw_curve", "draw_tables", "plot_bias"):  # figures take longer than the rest
        monkeypatch.setattr(module, name, lambda *arguments: None)
    run_demo(DemoConfig(steps=2, questions=14, pictures=8, weights=untrained, out=tmp_path), Console(quiet=True))
    for name in ("adapter/adapter_model.safetensors", "base.safetensors"):
        here, there = load_file(first / name), load_file(tmp_path / name)
        assert all(torch.equal(here[key], there[key]) for key in here)
