"""`sfa demo --task charts` on an untrained host: its files, equal conditions for both runs, and reproducibility."""

import copy
import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import sfa_adapters.recipes.demo.charts as module
from sfa_adapters import describe, inject_sfa, load_sfa
from sfa_adapters.errors import DataError, WeightsError
from sfa_adapters.recipes.demo.options import prepare_folder
from sfa_adapters.recipes.demo.run import FILES, DemoConfig, DemoError, run_demo
from sfa_adapters.recipes.nano.evaluate import Interval
from sfa_adapters.recipes.nano.finetune import FinetuneConfig, finetune, train_tower_and_projector, training_charts
from sfa_adapters.recipes.nano.models import build_nano
from sfa_adapters.recipes.report_parts import percent
from sfa_adapters.recipes.synthetic.real_tables import load_tables


def _config(untrained: Path, out: Path, **changes: Any) -> DemoConfig:
    options: dict[str, Any] = {
        "task": "charts",
        "steps": 2,
        "questions": 6,
        "pictures": 3,
        "weights": untrained,
        "out": out,
    }
    return DemoConfig(**(options | changes))


def _run(config: DemoConfig, console: Console) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FinetuneConfig", partial(FinetuneConfig, batch_size=2))
        run_demo(config, console)


@pytest.fixture(scope="module")
def finished(untrained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One run: its folder, and what it printed."""
    out = tmp_path_factory.mktemp("run") / "made-by-the-demo"
    screen = io.StringIO()
    _run(_config(untrained, out), Console(file=screen, width=80))
    return out, screen.getvalue()


def test_it_leaves_what_it_says(finished: tuple[Path, str]) -> None:
    out, screen = finished
    assert {entry.name for entry in out.iterdir()} == set(FILES["charts"])
    for name in ("learned_bias.png", "test_charts.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert "SFA minus control" in screen
    assert max(len(line) for line in screen.splitlines()) <= 80


def test_the_numbers_say_how_they_were_made(finished: tuple[Path, str]) -> None:
    out, _ = finished
    record = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert list(record["models"]) == ["pretrained", "SFA", "control"]
    sfa, control = record["models"]["SFA"], record["models"]["control"]
    assert sfa["trainable_parameters"] - control["trainable_parameters"] == 304
    assert record["steps"] == 2
    assert record["seed"] == 0
    assert torch.__version__.startswith(record["versions"]["torch"].partition("+")[0])
    text = (out / "results.md").read_text(encoding="utf-8")
    assert record["command"] in text
    assert "| SFA |" in text
    assert "nan" not in text.lower()


def test_the_adapter_and_the_base_build_the_trained_model_again(finished: tuple[Path, str], untrained: Path) -> None:
    out, _ = finished
    host = build_nano("llava_onevision")
    host.model.load_state_dict(load_file(untrained), strict=False)
    trained = load_file(out / "base.safetensors")
    missing = host.model.load_state_dict(trained, strict=False)
    assert not missing.unexpected_keys
    assert all("vision_tower" in name or "multi_modal_projector" in name for name in trained)
    assert describe(load_sfa(host.model, out / "adapter")).num_parameters == 304


def test_the_same_seed_gives_the_same_numbers(finished: tuple[Path, str], untrained: Path, tmp_path: Path) -> None:
    first, _ = finished
    _run(_config(untrained, tmp_path), Console(quiet=True))
    for name in ("adapter/adapter_model.safetensors", "base.safetensors"):
        here, there = load_file(first / name), load_file(tmp_path / name)
        assert all(torch.equal(here[key], there[key]) for key in here)


def test_a_second_run_writes_over_its_own_folder_only(untrained: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine", encoding="utf-8")
    with pytest.raises(DemoError, match=r"thesis\.tex"):
        run_demo(_config(untrained, tmp_path), Console(quiet=True))
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_each_task_has_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sfa demo` and then `sfa demo --task charts`, as on the page of the demo."""
    monkeypatch.chdir(tmp_path)
    for task, name in (("tables", "sfa-demo"), ("charts", "sfa-demo-charts")):
        config = DemoConfig(task=task)  # pyright: ignore[reportArgumentType]
        prepare_folder(config)
        (tmp_path / name / FILES[config.task][-1]).write_text("")
    with pytest.raises(DemoError, match=r"curve\.png|test_tables\.png"):
        prepare_folder(DemoConfig(task="charts", out=Path("sfa-demo")))


def test_a_folder_that_cannot_be_made(untrained: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(DemoError, match="--out"):
        run_demo(_config(untrained, tmp_path / "file" / "below"), Console(quiet=True))


def test_a_host_without_weights_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"(?s)recipes\.nano\.pretrain --host llava.*--weights FILE"):
        run_demo(DemoConfig(task="charts", host="llava", out=tmp_path / "out"), Console(quiet=True))
    with pytest.raises(WeightsError, match="nowhere"):
        run_demo(DemoConfig(task="charts", weights=tmp_path / "nowhere", out=tmp_path / "out"), Console(quiet=True))


@pytest.mark.parametrize("name", ["internvl", "llava"])
def test_the_other_hosts_can_be_fine_tuned(name: str) -> None:
    host = build_nano(name)  # pyright: ignore[reportArgumentType]
    inject_sfa(host.model)
    result = finetune(host, training_charts(2, 0), FinetuneConfig(steps=2, batch_size=2), name)
    assert len(result.losses) == 2
    assert not host.model.training


def test_both_runs_see_the_same_charts_and_questions_and_only_sfa_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    import sfa_adapters.recipes.nano.finetune as module

    seen: list[list[object]] = []
    original = module.encode_packed

    def spy(host, images, questions):
        seen[-1].append(([image.tobytes() for image in images], questions))
        return original(host, images, questions)

    monkeypatch.setattr(module, "encode_packed", spy)
    charts = training_charts(6, 0)
    host = build_nano("llava_onevision")
    arms = [copy.deepcopy(host), copy.deepcopy(host)]
    inject_sfa(arms[0].model)
    before = [{key: value.clone() for key, value in arm.model.state_dict().items()} for arm in arms]
    for arm in arms:
        seen.append([])
        train_tower_and_projector(arm.model)
        finetune(arm, charts, FinetuneConfig(steps=3, batch_size=4), "")
    assert seen[0] == seen[1]
    for arm, start in zip(arms, before, strict=True):
        changed = {key for key, value in arm.model.state_dict().items() if not torch.equal(value, start[key])}
        assert any("multi_modal_projector" in key for key in changed)
        assert not any("language_model" in key or "lm_head" in key for key in changed)
    scalars = {key: value for key, value in arms[0].model.state_dict().items() if ".sfa.sfa_" in key}
    assert scalars
    assert all(not torch.equal(value, before[0][key]) for key, value in scalars.items())


def test_fine_tuning_lowers_the_loss() -> None:
    host = build_nano("llava_onevision")
    inject_sfa(host.model)
    losses = finetune(host, training_charts(4, 0), FinetuneConfig(steps=12, batch_size=4, lr=1e-3), "").losses
    assert losses[-1] < losses[0] - 0.1


def test_training_charts_come_from_training_tables_only() -> None:
    names = {table.id for table in load_tables("train")}
    charts = training_charts(30, seed=3)
    assert {chart.table.id for chart in charts} <= names
    assert [chart.table.id for chart in charts] == [chart.table.id for chart in training_charts(30, seed=3)]
    assert [chart.table.id for chart in charts] != [chart.table.id for chart in training_charts(30, seed=4)]


def test_wrong_settings_are_named() -> None:
    with pytest.raises(DataError, match="steps=0"):
        FinetuneConfig(steps=0)
    host = build_nano("llava_onevision")
    with pytest.raises(DataError, match="at least one chart"):
        finetune(host, [], FinetuneConfig(steps=1), "")
    host.model.requires_grad_(False)
    with pytest.raises(DataError, match="frozen"):
        finetune(host, training_charts(1, 0), FinetuneConfig(steps=1), "")


def test_numbers_are_told_in_percent() -> None:
    assert percent(Interval(0.6234, 0.58, 0.664)) == "62.3 [58.0, 66.4]"
    assert percent(Interval(float("nan"), float("nan"), float("nan"))) == "-"
