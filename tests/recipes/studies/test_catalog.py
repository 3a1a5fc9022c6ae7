"""What all studies share: settings, resumable results, paired statistics, table, figures, command."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sfa_adapters.cli.main import main
from sfa_adapters.errors import DataError
from sfa_adapters.recipes.studies import catalog
from sfa_adapters.recipes.studies.catalog import STUDIES, StudyOptions, run_study
from sfa_adapters.recipes.studies.figures import legend_lines
from sfa_adapters.recipes.studies.report import verdict, write_report
from sfa_adapters.recipes.studies.results_file import Outcome, append_row, read_rows, source_commit, todo
from sfa_adapters.recipes.studies.runner import run_jobs
from sfa_adapters.recipes.studies.settings import Job, StudySettings, load_settings
from sfa_adapters.recipes.studies.summary import TuningLine, by_pictures, steps_to, summarize, tuning_lines
from sfa_adapters.statistics import seeds_bootstrap
from tests.support.study_toy import train

WRITTEN: dict[str, Any] = {
    "name": "toy",
    "title": "A toy",
    "metric": "share of right answers",
    "primary": {"arm": "good", "test": "same", "budget": {"steps": 10}},
    "control": "none",
    "placebo": "placebo",
    "seeds": [0, 1, 2],
    "budgets": [{"steps": 10}, {"steps": 20}],
    "tests": ["same", "large"],
    "train": {"lr": 0.1},
    "arms": {
        "none": {},
        "good": {"gain": 0.3},
        "placebo": {},
        "few": {"seeds": [0], "budgets": [{"steps": 20}], "figure": False},
    },
    "tuning": {"seeds": [100], "budget": {"steps": 10}, "grids": [{"arms": ["none", "good"], "lr": [0.1, 0.2]}]},
}


def written(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump({**WRITTEN, **changes}, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture
def settings(tmp_path: Path) -> StudySettings:
    return load_settings(written(tmp_path))


def test_jobs_are_paired_and_arms_may_run_in_fewer_of_them(settings: StudySettings) -> None:
    jobs = settings.jobs()
    assert [(job.budget["steps"], job.seed, job.arm) for job in jobs[:4]] == [
        (10, 0, "none"), (10, 0, "good"), (10, 0, "placebo"), (10, 1, "none"),
    ]  # fmt: skip
    assert [job.arm for job in jobs if job.budget["steps"] == 20][:5] == ["none", "good", "placebo", "few", "none"]
    assert len(jobs) == 3 * 6 + 1
    assert jobs[1].options == {"lr": 0.1, "gain": 0.3, "steps": 10}
    assert len({job.key for job in jobs}) == len({job.digest for job in jobs}) == len(jobs)
    tried = settings.tuning_jobs()
    assert [job.arm for job in tried] == ["none lr=0.1", "none lr=0.2", "good lr=0.1", "good lr=0.2"]
    assert tried[-1].options == {"lr": 0.2, "gain": 0.3, "steps": 10}
    assert tried[-1].seed == 100


def test_what_was_tried_stands_over_what_an_arm_had_before(tmp_path: Path) -> None:
    tuning = {**WRITTEN["tuning"], "before": {"good": {"lr": 0.7, "gain": 0.1}}}
    tried = load_settings(written(tmp_path, tuning=tuning)).tuning_jobs()
    assert [job.options["lr"] for job in tried] == [0.1, 0.2, 0.1, 0.2]
    assert [job.options.get("gain") for job in tried] == [None, None, 0.1, 0.1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control": "nothing"}, "no arm 'nothing'"),
        ({"primary": {"arm": "good", "test": "other", "budget": {"steps": 10}}}, "primary names a test set"),
        ({"primary": {"arm": "good", "test": "same", "budget": {"steps": 11}}}, "primary names a test set"),
        ({"seeds": [0, 100]}, r"\[100\] are reported and tuned on"),
        ({"colour": "red"}, "unknown: .'colour'."),
        ({"primary": {"arm": "good"}}, "missing 2 required"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_settings(written(tmp_path, **changes))


def test_a_file_that_is_no_yaml_or_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    with pytest.raises(DataError, match="No settings of a study"):
        load_settings(path)
    path.write_text("a: [", encoding="utf-8")
    with pytest.raises(DataError, match="cannot be read as YAML"):
        load_settings(path)
    path.write_text("- a\n- b\n", encoding="utf-8")
    with pytest.raises(DataError, match="not the settings of a study"):
        load_settings(path)


@pytest.mark.parametrize("name", STUDIES)
def test_the_settings_of_every_study_load(name: str) -> None:
    settings = load_settings(name)
    assert settings.name == name
    assert settings.jobs()
    assert settings.tuning_jobs() or not settings.tuning  # some take what was chosen for another study
    assert len(settings.seeds) >= 3


def test_runs_are_resumed_and_read_back(settings: StudySettings, tmp_path: Path) -> None:
    path, jobs = tmp_path / "rows.jsonl", settings.jobs()
    assert run_jobs(train, jobs[:4], path) == 4
    assert run_jobs(train, jobs, path) == len(jobs) - 4
    assert run_jobs(train, jobs, path) == 0
    rows = read_rows(path)
    assert [row.key for row in rows] == [job.key for job in jobs]
    again = train(jobs[1])
    assert np.array_equal(rows[1].outcome.tests["same"], again.tests["same"])
    assert (rows[1].outcome.curve, rows[1].outcome.scalars) == (tuple(again.curve), again.scalars)
    assert json.loads(path.read_text().splitlines()[0])["commit"] == source_commit()


def test_processes_write_the_same_rows(settings: StudySettings, tmp_path: Path) -> None:
    jobs = settings.jobs()[:1]  # each process loads torch, so there is one
    run_jobs(train, jobs, tmp_path / "one")
    run_jobs(train, jobs, tmp_path / "two", workers=2)
    texts = [sorted((tmp_path / name).read_text().splitlines()) for name in ("one", "two")]
    assert texts[0] == texts[1]


def test_a_torn_last_line_is_made_again(settings: StudySettings, tmp_path: Path) -> None:
    path, jobs = tmp_path / "rows.jsonl", settings.jobs()[:3]
    run_jobs(train, jobs, path)
    path.write_text(path.read_text()[:-40], encoding="utf-8")
    assert len(read_rows(path)) == 2
    assert run_jobs(train, jobs, path) == 1
    assert sorted(row.key for row in read_rows(path)) == sorted(job.key for job in jobs)


def test_a_file_of_something_else_is_refused(settings: StudySettings, tmp_path: Path) -> None:
    path, job = tmp_path / "rows.jsonl", settings.jobs()[0]
    path.write_text('{"a": 1}\n{"b": 2}\n', encoding="utf-8")
    with pytest.raises(DataError, match="line 1: not a run"):
        read_rows(path)
    path.unlink()
    append_row(path, Job(job.arm, job.seed, job.budget, {**job.options, "lr": 9}), train(job), "")
    with pytest.raises(DataError, match="made with other settings"):
        todo(settings.jobs(), read_rows(path), path)
    with pytest.raises(DataError, match="--workers 0"):
        run_jobs(train, [], path, workers=0)


def test_scores_that_are_shares_come_back(settings: StudySettings, tmp_path: Path) -> None:
    outcome = Outcome([(1, 0.123456)], {"same": np.array([0.25, 1.0, 0.0])}, {}, 0.0, {})
    append_row(tmp_path / "rows", settings.jobs()[0], outcome, "")
    (row,) = read_rows(tmp_path / "rows")
    assert row.outcome.tests["same"].tolist() == [0.25, 1.0, 0.0]
    assert row.outcome.curve == ((1, 0.1235),)


def test_the_summary_pairs_by_seed_and_picture(settings: StudySettings, tmp_path: Path) -> None:
    run_jobs(train, settings.jobs(), tmp_path / "rows")
    rows = read_rows(tmp_path / "rows")
    lines = {(line.arm, line.budget["steps"]): line for line in summarize(settings, rows)}
    good, placebo, few = lines["good", 10], lines["placebo", 10], lines["few", 20]
    assert good.gain is not None
    assert placebo.gain is not None
    expected = [train(job).tests["same"].mean() for job in settings.jobs() if job.budget["steps"] == 10]
    assert good.gain.value == pytest.approx(np.mean(expected[1::3]) - np.mean(expected[0::3]))
    assert 0.2 < good.gain.low < good.gain.value < good.gain.high < 0.4
    assert (placebo.gain.value, placebo.gain.low, placebo.gain.high) == (0, 0, 0)
    assert lines["none", 10].gain is None
    assert (good.sign, placebo.sign, few.seeds) == (0.25, 1.0, (0,))
    assert good.steps == {0.5: (10, 3), 0.9: (None, 0)}
    assert (good.scalars, good.numbers, good.seconds) == ({"row": 2.0}, {"loss": 0.25}, 1.5)
    assert verdict(settings, summarize(settings, rows)).endswith("; clear of zero.")
    nothing = replace(settings, primary=replace(settings.primary, arm="placebo"))
    assert verdict(nothing, summarize(nothing, rows)).endswith("; not clear of zero.")
    assert "no runs yet" in verdict(settings, [])


def test_the_report_is_complete_and_its_figures_are_pictures(settings: StudySettings, tmp_path: Path) -> None:
    run_jobs(train, settings.jobs(), tmp_path / "rows")
    run_jobs(train, settings.tuning_jobs(), tmp_path / "tuning")
    tuning = read_rows(tmp_path / "tuning")
    assert tuning_lines(settings, tuning) == [TuningLine(job.arm, 1, 0.6, None) for job in settings.tuning_jobs()]
    write_report(settings, read_rows(tmp_path / "rows"), tmp_path / "out", tuning)
    page = (tmp_path / "out" / "table.md").read_text()
    for part in ("# A toy", "## 10 steps", "## 20 steps", "| good | 3 |", "| few | 1 |", "Primary:", "| none lr=0.2 |"):
        assert part in page
    assert len(json.loads((tmp_path / "out" / "table.json").read_text())) == 7
    for name in ("curves.png", "tests.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_the_legend_has_the_arms_of_every_panel() -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots(1, 3)
    for axis, arms in zip(axes, (["none"], ["none", "axial", "sfa"], ["late"]), strict=True):
        for height, arm in enumerate(arms):
            axis.plot([0, 1], [5, height], label=arm)
    assert list(legend_lines(axes)) == ["sfa", "axial", "none", "late"]


def test_few_and_many_pictures_are_set_side_by_side(tmp_path: Path) -> None:
    budgets = [{"steps": 5, "pictures": 100}, {"steps": 10, "pictures": 9}, {"steps": 10, "pictures": 100}]
    settings = load_settings(
        written(
            tmp_path,
            budgets=budgets,
            primary={"arm": "good", "test": "same", "budget": budgets[1]},
            arms={"none": {}, "good": {"gain": 0.4}, "placebo": {"budgets": budgets[:2]}},
            thresholds=[0.5, 0.55],
        )
    )
    outcomes = {9: Outcome([(1, 0.5)], {"same": np.array([0.0, 1.0]), "large": np.zeros(1)}, {}, 1.0, {})}
    outcomes[100] = Outcome([(1, 0.5)], {"same": np.array([1.0, 1.0]), "large": np.zeros(1)}, {}, 1.0, {})
    for job in settings.jobs():
        append_row(tmp_path / "rows", job, outcomes[job.budget["pictures"] if job.arm != "none" else 9], "")
    rows = read_rows(tmp_path / "rows")
    lines = {line.arm: line for line in by_pictures(settings, summarize(settings, rows))}
    assert list(lines) == ["none", "good"]  # the placebo has one number of pictures under equal steps
    assert lines["good"].rest == {"steps": 10}
    assert {count: score.value for count, score in lines["good"].scores.items()} == {9: 0.5, 100: 1.0}
    assert lines["good"].fewest == {0.5: 9, 0.55: 100}
    assert lines["none"].fewest == {0.5: 9, 0.55: None}
    write_report(settings, rows, tmp_path / "out")
    page = (tmp_path / "out" / "table.md").read_text()
    assert "| none | 10 steps | 50.0 [" in page
    assert "| 100.0 [100.0, 100.0] | 9 | 100 |" in page


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path)
    monkeypatch.setattr(catalog, "STUDIES", {"toy": "tests.support.study_toy"})
    options = {"name": "toy", "out": tmp_path / "out", "settings": path}
    run_study(StudyOptions(**options, seeds=(0,), arms=("none", "good"), budgets=("steps=10",)))
    assert [row.key for row in read_rows(tmp_path / "out" / "rows.jsonl")] == [
        "none seed=0 steps=10",
        "good seed=0 steps=10",
    ]
    run_study(StudyOptions(**options, tune=True))
    run_study(StudyOptions(**options, report=True))
    shown = capsys.readouterr().out
    assert "1 of 3 seeds" in " ".join(shown.split())
    assert "lr=0.2" in shown
    for wrong, message in (
        ({"arms": ["bad"]}, "--arm bad"),
        ({"seeds": [9]}, "--seed 9"),
        ({"budgets": ["x"]}, "--budget x"),
    ):
        with pytest.raises(DataError, match=message):
            run_study(StudyOptions(**{**options, **wrong}))  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="has no runs yet"):
        run_study(StudyOptions(**{**options, "out": tmp_path / "empty"}, report=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "No study is called"),
        (["lookup", "--workers", "0"], "--workers 0"),
        (["lookup", "--report"], "no runs yet"),
    ],
)
def test_mistakes_are_one_line(
    arguments: Sequence[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["study", *arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error
    assert error.count("\n") == 1


def test_the_list_names_every_study(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["study", "list"])
    assert stop.value.code == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(STUDIES)


@pytest.mark.parametrize(
    ("scores", "step"),
    [
        ([0.1, 0.6, 0.7], 20),
        ([0.6, 0.4, 0.7], 30),
        ([0.1, 0.2, 0.3], None),
        ([0.5, 0.5, 0.5], 10),
        ([0.6, 0.6, 0.4], None),
    ],
)
def test_a_threshold_counts_once_it_is_kept(scores: list[float], step: int | None) -> None:
    assert steps_to([(10 * (number + 1), score) for number, score in enumerate(scores)], 0.5) == step


@given(st.lists(st.lists(st.floats(-1, 1), min_size=3, max_size=6), min_size=1, max_size=5))
def test_the_interval_over_seeds_holds_the_mean(values: list[list[float]]) -> None:
    interval = seeds_bootstrap([np.array(run) for run in values], rounds=200)
    assert interval.value == pytest.approx(np.mean([np.mean(run) for run in values]))
    means = np.array([np.mean(run) for run in values])
    assert min(map(min, values)) - 1e-9 <= interval.low <= interval.high <= max(map(max, values)) + 1e-9
    assert interval.low <= means.max() + 1e-9


def test_runs_that_differ_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    alike = [rng.random(200) for _ in range(4)]
    apart = [run + shift for run, shift in zip(alike, (-0.5, -0.2, 0.2, 0.5), strict=True)]
    narrow, wide = seeds_bootstrap(alike), seeds_bootstrap(apart)
    assert wide.high - wide.low > 5 * (narrow.high - narrow.low)
    assert math.isnan(seeds_bootstrap([]).value)
