"""Runs of recipes with the axial start: the rate of the scalars, and how large they became."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from sfa_adapters.errors import RecipeError, SFAWarning
from sfa_adapters.evaluation.ablation import term_variants
from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.rates import DEFAULT_SFA_LR, largest_scalars
from sfa_adapters.recipes.catalog import find_recipe
from sfa_adapters.recipes.nano.finetune import FinetuneConfig
from sfa_adapters.sharing.card import model_card
from sfa_adapters.sharing.run_metadata import RunMetadata, read_run_metadata, write_run_metadata
from sfa_adapters.training.checkpoints import load_trained, saved_recipe
from sfa_adapters.tuner import injected_layers
from tests.support.tiny_training import assert_equal, recipe, run, tiny_host, trained

AXIAL: dict[str, Any] = {"init": "axial", "init_strength": 2.0, "init_warmup_steps": 5}


def config_of(host: Any) -> Any:
    return injected_layers(host.model)[0][2].configs["default"]


def test_a_run_ramps_resumes_and_reports(tmp_path: Path) -> None:
    """Six steps with a save after two and four: going on from there is the same run bit for bit."""
    given = recipe(**AXIAL, sfa_lr=0.3, save_total_limit=3)
    host, result = run(tmp_path / "a", given)
    assert config_of(host).init_warmup_done == 5
    assert result.scalars == largest_scalars(host.model)
    assert result.scalars["row"] > 2.0
    with (tmp_path / "a" / "log.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert float(lines[0]["sfa/row"]) < float(lines[-1]["sfa/row"])
    assert "sfa/col" in lines[0]
    again, _ = run(tmp_path / "a", given, resume=str(tmp_path / "a" / "checkpoint-2"))
    assert_equal(trained(again), trained(host))
    # What was trained is loaded with its progress: it can be saved again without a warning.
    fresh = tiny_host(saved_recipe(result.trained))
    load_trained(fresh, result.trained)
    assert config_of(fresh).init_warmup_done == 5
    assert json.loads((result.trained / "adapter_config.json").read_text())["init_warmup_done"] == 5


def test_a_run_whose_scalars_cannot_move_warns_and_runs(tmp_path: Path) -> None:
    """The published rate."""
    slow = recipe(sfa_lr=find_recipe("internvl3_5_8b_published").sfa_lr, max_steps=2)
    with pytest.warns(SFAWarning) as caught:
        _, result = run(tmp_path, slow)
    texts = [str(one.message) for one in caught if issubclass(one.category, SFAWarning)]
    assert any("add up to" in text and "logits over 2 steps" in text for text in texts)
    assert any("The bias hardly acts" in text for text in texts)
    assert max(result.scalars.values()) < 1


def test_a_run_without_a_bias_says_nothing_of_it(tmp_path: Path) -> None:
    _, result = run(tmp_path, recipe(sfa=False, max_steps=1, warmup_steps=0))
    assert result.scalars == {}
    assert not any(key.startswith("sfa/") for line in result.history for key in line)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"init": "rows"}, "init='rows' must be one of normal, axial"),
        ({"init_strength": 0}, "init_strength=0 must be a number above 0"),
        ({"init_warmup_steps": -1}, "init_warmup_steps=-1 must be a whole number, at least 0"),
        ({"init_warmup_steps": 3}, "init_warmup_steps=3 must be 0 with init=normal"),
        ({"init": "axial", "sfa_terms": ("dist",)}, "init='axial' must be normal with sfa_terms=dist"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        recipe(**settings)


def test_the_card_and_records_of_before(tmp_path: Path) -> None:
    _, result = run(tmp_path, recipe(**AXIAL, sfa_lr=0.02, max_steps=1, warmup_steps=0))
    write_run_metadata(result.trained, RunMetadata(scalars=dict(result.scalars)))
    metadata = read_run_metadata(result.trained)
    assert metadata.scalars == result.scalars
    card = str(model_card(result.trained, metadata=metadata))
    assert "| start | axial, 2 logits, from 0 over 5 steps |" in card
    assert "| largest SFA scalars at the end | row " in card

    # A saved recipe without the new settings loads; its own rate stays.
    record = json.loads((result.trained / "recipe.json").read_text())
    record["recipe"] = {k: v for k, v in record["recipe"].items() if not k.startswith("init")}
    (result.trained / "recipe.json").write_text(json.dumps(record))
    sizes = json.loads((result.trained / "manifest.json").read_text())
    sizes["recipe.json"] = (result.trained / "recipe.json").stat().st_size
    (result.trained / "manifest.json").write_text(json.dumps(sizes))
    loaded = saved_recipe(result.trained)
    assert (loaded.init, loaded.init_warmup_steps, loaded.sfa_lr) == ("normal", 0, 0.02)
    load_trained(tiny_host(loaded), result.trained)


def test_ablations_without_rows_and_columns_start_normal() -> None:
    base = recipe(**AXIAL)
    for variant in term_variants():
        changed = base.replace(**variant.changes)
        starts = not {"row", "col"}.isdisjoint(variant.terms)
        assert (changed.init == "axial") == (starts or not changed.sfa), variant.name


def test_one_constant_is_the_default() -> None:
    assert {field.name: field.default for field in dataclasses.fields(Recipe)}["sfa_lr"] == DEFAULT_SFA_LR == 0.1
    assert FinetuneConfig(steps=1).bias_lr == DEFAULT_SFA_LR
