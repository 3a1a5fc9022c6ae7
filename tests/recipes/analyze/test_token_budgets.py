"""`sfa analyze tokens` on a small scale: every arm runs within its budget and is in the report."""

from __future__ import annotations

import copy
import json
from functools import partial
from typing import Any

import pytest
import torch

from sfa_adapters.cli.main import main
from sfa_adapters.recipes.analyze import token_budgets
from sfa_adapters.recipes.analyze.token_budgets import BudgetConfig, run_budgets
from sfa_adapters.recipes.nano.encode import pixel_values
from sfa_adapters.recipes.nano.finetune import FinetuneConfig
from sfa_adapters.recipes.nano.models import PIXELS, build_nano


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("tokens")
    config = BudgetConfig(out=out, steps=1, questions=3, charts=2, scorer="reconstruction")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_budgets, "FinetuneConfig", partial(FinetuneConfig, batch_size=2))
        return out, run_budgets(config)


def test_every_method_stays_within_its_budget(runs: Any) -> None:
    _, measured = runs
    assert [(run.method, run.budget) for run in measured] == [
        ("uniform", 144), ("ADAT", 36), ("ADAT", 64), ("ADAT", 100), ("ADAT", 144),
        *((method, budget) for method in ("ADAT, none finer", "down-sampling", "random dropping")
          for budget in (36, 64, 100)),
    ]  # fmt: skip
    for run in measured:
        assert 0 < run.tokens <= run.budget
        assert run.method.startswith("ADAT") or run.tokens == run.budget
        assert 0 <= run.accuracy.low <= run.accuracy.value <= run.accuracy.high <= 1
        assert run.ms > 0


def test_table_and_pictures_are_left(runs: Any) -> None:
    out, measured = runs
    assert {path.name for path in out.iterdir()} == {
        "tokens.md", "tokens.json", "efficiency.png", "plan.png", "gallery.png",
    }  # fmt: skip
    stored = json.loads((out / "tokens.json").read_text())
    assert [run["tokens"] for run in stored["runs"]] == [run.tokens for run in measured]
    assert (out / "tokens.md").read_text().count("| ADAT |") == 4
    assert all((out / name).stat().st_size > 20_000 for name in ("efficiency.png", "plan.png", "gallery.png"))


def test_dropped_patches_are_neither_seen_nor_left_over() -> None:
    host = build_nano("llava_onevision")
    tower: Any = host.model.model.vision_tower
    dropped = copy.deepcopy(tower)
    hook = token_budgets._RandomPatches(dropped, 50)
    pixels = pixel_values([torch.randint(0, 255, (144, 144, 3), dtype=torch.uint8).numpy()], PIXELS)
    seen: list[torch.Tensor] = []
    dropped.post_layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        dropped(pixels)
        kept = hook.kept[0, :, 0]
        embeddings = tower.embeddings(pixels)[:, kept]
        expected = tower.encoder(inputs_embeds=embeddings).last_hidden_state
    assert torch.allclose(seen[0][0, kept], expected[0], atol=1e-6)
    gone = torch.ones(144, dtype=torch.bool)
    gone[kept] = False
    assert int(gone.sum()) == 94
    assert not seen[0][0, gone].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--scorer", "guess", "--pictures"], "scorer='guess'"),
    ],
)
def test_mistakes_end_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["analyze", "tokens", "--out", str(tmp_path / "out"), *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
