"""The study of tables: exact match without generating, its placebo, misread and fabricated numbers, its settings."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import sfa_adapters.recipes.studies.tables_measures as measures_module
from sfa_adapters import SFAConfig, StructuralBias, TokenLayout, eject_sfa, inject_sfa
from sfa_adapters.choices import TERMS
from sfa_adapters.errors import DataError, InjectionError
from sfa_adapters.layer import SFALayer
from sfa_adapters.recipes.nano.encode import pixel_values
from sfa_adapters.recipes.nano.evaluate import generate_answers
from sfa_adapters.recipes.nano.finetune import FinetuneConfig, finetune, train_tower_and_projector
from sfa_adapters.recipes.nano.models import NanoHost, build_nano, load_nano
from sfa_adapters.recipes.nano.teacher_forcing import exact_matches
from sfa_adapters.recipes.studies.report import print_report, write_report
from sfa_adapters.recipes.studies.results_file import Outcome, Row
from sfa_adapters.recipes.studies.settings import Job, StudySettings, load_settings
from sfa_adapters.recipes.studies.shuffled_places import ShuffledPlaces, shuffle_places
from sfa_adapters.recipes.studies.tables import build_arm, train
from sfa_adapters.recipes.studies.tables_measures import answer_measures, text_regions
from sfa_adapters.recipes.synthetic.charts import Chart
from sfa_adapters.recipes.synthetic.table_pictures import (
    TablePicture,
    TableSize,
    ask_all,
    larger_charts,
    table_pictures,
)

SIZE = TableSize((3, 5), (2, 3))
TINY: Mapping[str, Any] = {
    "steps": 1, "batch": 2, "every": 1, "training_tables": 4, "validation": 1, "test_questions": 2, "generated": 2,
    "test_pictures": {"same": 2, "larger": 1, "charts": 2}, "pages": 2, "calibration_pages": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def host() -> NanoHost:
    return load_nano("llava_onevision")


# -- exact match ----------------------------------------------------------------------------------------------------


def test_exact_match_is_what_generating_gives(host: NanoHost) -> None:
    pictures: list[TablePicture | Chart] = [*larger_charts("val", 4, 1), *table_pictures("val", 2, 1, SIZE)]
    questions = ask_all(pictures, 4, 0)
    pairs = [(p, q) for p, about in zip(pictures, questions, strict=True) for q in about]
    answers, _ = generate_answers(host, [p.image for p, _ in pairs], [q.text for _, q in pairs], max_new_tokens=12)
    expected = [float(answer == question.answer) for answer, (_, question) in zip(answers, pairs, strict=True)]
    right = exact_matches(host, [p.image for p in pictures], questions, batch_size=4)  # two forwards
    assert np.concatenate(right).tolist() == expected
    assert 0.1 < np.mean(expected) < 0.9  # both kinds are there
    assert [len(each) for each in right] == [len(about) for about in questions]


def test_measuring_leaves_the_host_in_its_mode(host: NanoHost) -> None:
    pictures = table_pictures("val", 1, 1, SIZE)
    for mode in (True, False):
        host.model.train(mode)
        exact_matches(host, [pictures[0].image], ask_all(pictures, 2, 0))
        assert host.model.training is mode


def test_a_measurement_is_made_behind_every_step() -> None:
    model, steps, losses = build_nano("llava_onevision"), [], []
    pictures = table_pictures("train", 4, 1, SIZE)
    train_tower_and_projector(model.model)
    for seen in (None, steps.append):
        settings = FinetuneConfig(steps=3, batch_size=2, questions=(2.0, 0.0, 0.0))
        losses.append(finetune(copy.deepcopy(model), pictures, settings, "", after_step=seen).losses)
    assert steps == [1, 2, 3]
    assert losses[0] == losses[1]


# -- the placebo ----------------------------------------------------------------------------------------------------


def test_shuffled_places_permute_the_bias_and_keep_the_prefix() -> None:
    torch.manual_seed(0)
    layout = TokenLayout.regular(3, 4, prefix_tokens=1)
    bias = StructuralBias(2, init_std=1.0, terms=TERMS)
    phi, shuffled = bias(layout)[0], bias(ShuffledPlaces(5)(layout))[0]
    order = torch.arange(13)
    order[1:] = 1 + torch.randperm(12, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(shuffled, phi[:, order][:, :, order])
    assert not torch.equal(shuffled, phi)
    assert torch.equal(shuffled[:, 0], phi[:, 0])
    assert not torch.equal(bias(ShuffledPlaces(6)(layout))[0], shuffled)


def test_a_placebo_acts_in_the_host_and_is_gone_with_sfa() -> None:
    tower: Any = build_nano("llava_onevision").model.get_submodule("model.vision_tower")
    page = torch.randn(1, 3, 144, 144, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = tower(page).last_hidden_state
        torch.manual_seed(0)
        inject_sfa(tower, SFAConfig.published(init_std=1.0))
        with_sfa = tower(page).last_hidden_state
        shuffle_places(tower, 1)  # layouts that were built already do not stay
        placebo = tower(page).last_hidden_state
        copied = copy.deepcopy(tower)(page).last_hidden_state
    assert (placebo - with_sfa).abs().max() > 1e-3
    assert torch.equal(copied, placebo)
    eject_sfa(tower)
    with torch.no_grad():
        assert torch.equal(tower(page).last_hidden_state, before)
    with pytest.raises(InjectionError, match="no SFA"):
        shuffle_places(tower)


# -- what wrong answers are -----------------------------------------------------------------------------------------


def test_misread_and_fabricated_numbers_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = table_pictures("val", 2, 3, SIZE)
    questions = ask_all(pictures, 3, 0)
    printed = [text.text for text in pictures[1].texts if text.is_number]
    elsewhere = next(text for text in printed if abs(float(text) / float(questions[1][0].answer) - 1) > 0.06)
    answers = [questions[0][0].answer, "99999", elsewhere, "no idea"]
    monkeypatch.setattr(measures_module, "generate_answers", lambda *args: (answers, 0.0))
    measures, numbers = answer_measures(build_nano("llava_onevision"), pictures, questions, 2)
    assert measures["relaxed"].tolist() == [0.5, 0.0]
    assert measures["fabricated"].tolist() == [0.5, 0.0]
    assert numbers == {"fabricated_of_wrong": 0.5}


def test_regions_are_where_the_text_is() -> None:
    (picture,) = table_pictures("val", 1, 2, SIZE)
    regions = text_regions(picture)
    assert regions.shape == (12, 12)
    ink = (picture.image.min(-1) < 100).reshape(12, 12, 12, 12).any((1, 3))
    assert set(np.unique(regions)) == {-1, 0, 1}
    assert ink[regions == 1].mean() > 0.9
    texts = [text.box for text in picture.texts]
    for row, column in np.argwhere(regions == 0):
        assert not any(
            b[0] < 12 * column + 12 and b[2] > 12 * column and b[1] < 12 * row + 12 and b[3] > 12 * row for b in texts
        )


# -- runs -----------------------------------------------------------------------------------------------------------


def _job(arm: str, **changes: Any) -> Job:
    job = next(job for job in load_settings("tables").jobs() if job.arm == arm)
    return replace(job, options={**job.options, **TINY, **changes})


@pytest.mark.parametrize("arm", ["axial", "sfa+adat"])
def test_a_run_measures_everything(arm: str) -> None:
    outcome = train(_job(arm))
    settings = load_settings("tables")
    assert {*settings.tests, *settings.measures} == set(outcome.tests)
    assert {name: len(scores) for name, scores in outcome.tests.items()} == {
        "same": 2, "larger": 1, "charts": 2, "relaxed": 2, "fabricated": 2,
    }  # fmt: skip
    assert [step for step, _ in outcome.curve] == [1]
    assert set(outcome.scalars) == {"row", "col", "dist", "block"}
    assert ("entropy_ratio" in outcome.numbers) == (arm == "axial")
    assert {"mdi_first", "mdi_last", "fabricated_of_wrong", "last_loss"} <= set(outcome.numbers)


def test_a_tuning_run_sees_no_test_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    import sfa_adapters.recipes.studies.tables as module

    splits = []
    original = module.table_pictures
    monkeypatch.setattr(module, "table_pictures", lambda split, *args: splits.append(split) or original(split, *args))
    job = load_settings("tables").tuning_jobs()[0]
    outcome = train(replace(job, options={**job.options, **TINY, "training_tables": 3, "validation": 2}))
    assert outcome.tests == {}
    assert set(splits) == {"train", "val"}


def test_arms_differ_in_what_their_name_says() -> None:
    weights = {}
    for arm in ("none", "sfa", "axial", "placebo"):
        model = build_arm(_job(arm).options, 3).model
        layers = [module for module in model.modules() if isinstance(module, SFALayer)]
        assert len(layers) == (0 if arm == "none" else 4)
        assert all((layer.state.rearrange is not None) == (arm == "placebo") for layer in layers)
        largest = [float(layer.tensors("default")["sfa_row"].detach().abs().max()) for layer in layers]
        strength = _job("axial").options["init_strength"]
        assert all(size == strength if arm == "axial" else size < 0.2 for size in largest)
        weights[arm] = {n: p for n, p in model.named_parameters() if ".sfa." not in n}
        assert all(torch.equal(p, weights["none"][name]) for name, p in weights[arm].items())
    with pytest.raises(DataError, match="bias='magic'"):
        build_arm({**_job("none").options, "bias": "magic"}, 0)


def test_an_unknown_test_set_is_named() -> None:
    with pytest.raises(DataError, match="'spheres'"):
        train(_job("none", test_pictures={"spheres": 1}))


# -- settings and report --------------------------------------------------------------------------------------------


def test_a_budget_may_run_with_fewer_seeds() -> None:
    settings = load_settings("tables")
    jobs = settings.jobs()
    assert {job.seed for job in jobs if job.budget == {"steps": 1500}} == {0, 1, 2}
    assert {job.seed for job in jobs if job.budget == {"steps": 500}} == {0, 1, 2, 3, 4}
    assert {job.arm for job in jobs if job.budget == {"steps": 1500}} == {"none", "sfa", "axial"}
    with pytest.raises(DataError, match="fewer_seeds"):
        replace(settings, fewer_seeds=[{"budget": {"steps": 7}, "seeds": [0]}])


def test_measures_are_in_the_table_with_their_difference(tmp_path: Path) -> None:
    settings: StudySettings = load_settings("tables")
    names = (*settings.tests, *settings.measures)
    rows = []
    for arm, share in (("none", 0.0), ("sfa", 0.5)):
        outcome = Outcome([(1, 0.1)], {name: np.array([share, share]) for name in names}, {}, 1.0, {})
        rows.append(Row(arm, arm, 0, {"steps": 500}, "", outcome))
    write_report(settings, rows, tmp_path)
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| arm | relaxed | minus none | fabricated | minus none |" in text
    assert text.count("| sfa | 50.0 [50.0, 50.0] | 50.0 [50.0, 50.0] | 50.0") == 2
    assert (tmp_path / "tests.png").is_file()
    print_report(settings, rows, Console(quiet=True))


def test_the_pictures_are_what_the_tower_gets() -> None:
    """Tables have the size of the charts that the host was pretrained on: nothing is resized."""
    (picture,) = table_pictures("train", 1, 1, SIZE)
    pixels = pixel_values([picture.image], 144)
    assert torch.equal(pixels[0, 0], torch.from_numpy(picture.image[..., 0]).float().sub(255).div(127.5))


def test_a_choice_does_not_change_what_was_tuned() -> None:
    """Else the rows of the tuning would be refused, once its choice is written into the settings."""
    settings = load_settings("tables")
    chosen = {name: {**options, "lr": 1.0, "sfa_lr": 2.0} for name, options in settings.arms.items()}
    before, after = settings.tuning_jobs(), replace(settings, arms=chosen).tuning_jobs()
    assert [job.digest for job in before] == [job.digest for job in after]
    assert len({job.digest for job in before}) == len(before) == 30
    assert {job.options["lr"] for job in before} == {0.00015, 0.0003, 0.0006, 0.0012}
