"""The lookup study: its pictures, and the position encodings that it compares."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sfa_adapters.errors import DataError
from sfa_adapters.recipes.studies.lookup import test_grids as grids_of
from sfa_adapters.recipes.studies.lookup import train
from sfa_adapters.recipes.studies.lookup_net import LookupNet, Position
from sfa_adapters.recipes.studies.lookup_pictures import BLANK, CELL, DigitBank, digit_bank, draw_lookups
from sfa_adapters.recipes.studies.settings import load_settings
from sfa_adapters.recipes.studies.training import NONE

pytest.importorskip("sklearn", reason="the digits come with scikit-learn, of the extra [study]")
GRID = (6, 5)


def fake_bank() -> DigitBank:
    """Each digit is one bright pixel at its own place, so that a picture says what its label is."""
    images = torch.zeros(10, CELL * CELL)
    images[torch.arange(10), 3 * torch.arange(10)] = 1
    return DigitBank(images.reshape(10, CELL, CELL), torch.arange(10))


def test_no_writing_is_in_two_splits() -> None:
    banks = [digit_bank(split) for split in ("train", "val", "test")]
    assert [len(bank.labels) for bank in banks] == [1200, 200, 397]
    assert all(len(bank.labels.unique()) == 10 for bank in banks)
    assert sum(len(bank.images) for bank in banks) == 1797


def test_the_answer_is_where_the_marked_headers_cross() -> None:
    batch = draw_lookups(fake_bank(), 64, GRID, torch.Generator().manual_seed(0))
    cells = batch.patches.reshape(64, *GRID, 3, CELL * CELL)
    ground = cells[..., 1::3].mean(-1)  # pixels that no digit lights, by colour
    red = (ground[..., 0] > 0.3).flatten(1)
    blue = (ground[..., 2] > 0.3).flatten(1)
    assert (red.sum(1) == 1).all()
    assert (blue.sum(1) == 1).all()
    row, column = red.int().argmax(1) // GRID[1], blue.int().argmax(1) % GRID[1]
    digits = batch.digits.reshape(64, *GRID)
    assert (batch.answers == digits[torch.arange(64), row, column]).all()
    bright = cells.mean(3)[..., ::3][..., :10].argmax(-1)
    inside = digits != BLANK
    assert (bright[inside] == digits[inside]).all()
    assert (inside.flatten(1).sum(1) >= 9).all()
    headers = batch.headers.reshape(64, *GRID, 2)
    body_cells = headers[..., 0] != NONE
    for picture in range(64):
        rows, columns = inside[picture].nonzero(as_tuple=True)
        top, left = int(rows.min()), int(columns.min())
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
            body = row > top and column > left
            expected = [digits[picture, row, left], digits[picture, top, column]] if body else [NONE, NONE]
            assert headers[picture, row, column].tolist() == expected
    assert not (body_cells & ~inside).any()


def test_equal_seeds_draw_equal_pictures() -> None:
    first, again, other = (draw_lookups(fake_bank(), 4, GRID, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first.patches, again.patches)
    assert not torch.equal(first.patches, other.patches)


def test_arms_share_the_values_of_what_they_share() -> None:
    settings = load_settings("lookup")
    state = LookupNet(GRID, settings.arms["none"], 3).state_dict()
    for arm, options in settings.arms.items():
        theirs = LookupNet(GRID, options, 3).state_dict()
        shared = [name for name in state if name in theirs and not name.startswith("places")]
        assert len(shared) >= len(state) - 1
        assert all(torch.equal(state[name], theirs[name]) for name in shared), arm
    assert not torch.equal(state["embed.weight"], LookupNet(GRID, {}, 4).state_dict()["embed.weight"])


def test_the_placebo_is_the_same_bias_at_shuffled_places() -> None:
    from sfa_adapters import TokenLayout

    layout = TokenLayout.regular(*GRID, prefix_tokens=1)
    options = {"init": "axial", "init_strength": 3.0}
    torch.manual_seed(0)
    true = Position("sfa", 4, 16, GRID, options)
    placebo = Position("placebo", 4, 16, GRID, options)
    placebo.load_state_dict(true.state_dict())
    phi, shuffled = true.bias(layout, GRID), placebo.bias(layout, GRID)
    assert phi is not None
    assert shuffled is not None
    assert torch.allclose(phi.sort(-1).values.sum(-2), shuffled.sort(-1).values.sum(-2), atol=1e-4)
    assert (phi[..., 1:, 1:] - shuffled[..., 1:, 1:]).abs().max() > 2
    assert (shuffled[..., 0, :] == 0).all()
    assert (shuffled[..., :, 0] == 0).all()
    assert torch.equal(shuffled, placebo.bias(layout, GRID))  # pyright: ignore[reportArgumentType]


def test_the_axial_start_makes_row_and_column_heads() -> None:
    position = Position("sfa", 6, 12, GRID, {"init": "axial", "init_strength": 3.0})
    row, col = position.structure.weights.row, position.structure.weights.col  # pyright: ignore[reportAttributeAccessIssue]
    assert row is not None
    assert col is not None
    assert (row[:2] == 3).all()
    assert (col[2:4] == 3).all()
    assert row[2:].abs().max() < 0.2
    assert col[[0, 1, 4, 5]].abs().max() < 0.2


def test_rotary_scores_depend_on_differences_of_places_alone() -> None:
    position = Position("rope", 1, 8, GRID, {})
    tokens = torch.randn(8).expand(1, 1, 1 + GRID[0] * GRID[1], 8)
    query, key = position.queries_and_keys(torch.empty(0), tokens, tokens.roll(1, -1), GRID)
    scores = (query @ key.transpose(-1, -2))[0, 0, 1:, 1:].reshape(*GRID, *GRID)
    assert torch.allclose(scores[0, 0, 2, 1], scores[3, 2, 5, 3], atol=1e-5)
    assert not torch.allclose(scores[0, 0, 2, 1], scores[0, 0, 1, 2], atol=1e-3)


def test_the_dense_bias_is_a_table_of_offsets() -> None:
    position = Position("swin", 2, 8, GRID, {})
    bias = position.bias(None, GRID)  # pyright: ignore[reportArgumentType]
    assert bias is not None
    inner = bias[0, :, 1:, 1:].reshape(2, *GRID, *GRID)
    assert torch.equal(inner[:, 0, 0, 2, 1], inner[:, 3, 2, 5, 3])
    assert torch.equal(inner[:, 0, 0, 2, 1], position.offsets[:, GRID[0] - 1 - 2, GRID[1] - 1 - 1])
    larger = position.bias(None, (12, 10))  # pyright: ignore[reportArgumentType]
    assert larger is not None
    assert larger.shape == (1, 2, 121, 121)


def test_an_extra_matrix_changes_nothing_at_first_and_learns() -> None:
    batch = draw_lookups(fake_bank(), 2, GRID, torch.Generator().manual_seed(0))
    plain, extra = LookupNet(GRID, {}, 0), LookupNet(GRID, {"bias": "extra"}, 0)
    assert torch.equal(plain(batch.patches, GRID)[0], extra(batch.patches, GRID)[0])
    extra(batch.patches, GRID)[0].sum().backward()
    gradient = extra.get_parameter("blocks.0.position.up").grad
    assert gradient is not None
    assert gradient.abs().max() > 0


def test_an_unknown_bias_is_refused() -> None:
    with pytest.raises(DataError, match="bias='alibi' is none of"):
        LookupNet(GRID, {"bias": "alibi"}, 0)


@pytest.mark.parametrize(("study", "arm"), [(s, arm) for s in ("lookup", "crossing") for arm in load_settings(s).arms])
def test_every_arm_trains(study: str, arm: str) -> None:
    job = next(job for job in load_settings(study).jobs() if job.arm == arm)
    small = {"grid": [4, 4], "batch": 4, "steps": 2, "measurements": 2, "validation": 4, "warmup": 1, "width": 16}
    job = replace(job, options={**job.options, **small, "test_pictures": {"same": 4, "x2": 2}})
    outcome, again = train(job), train(job)
    assert [step for step, _ in outcome.curve] == [1, 2]
    assert {name: len(scores) for name, scores in outcome.tests.items()} == {"same": 4, "x2": 2}
    assert outcome.curve == again.curve
    terms = job.options.get("terms", ["row", "col", "dist", "block"]) if "sfa" in str(job.options.get("bias")) else None
    assert set(outcome.scalars) == set(terms if terms else ["row", "col", "dist", "block"] if "placebo" in arm else [])
    assert outcome.scalars == again.scalars
    rate = {"published": 0.002, "sfa-0.01": 0.01}.get(arm, 0.1)
    if terms and "init" not in job.options:
        assert max(outcome.scalars.values()) < 0.09 + 2 * rate


def test_other_grids_keep_the_area_or_grow() -> None:
    assert grids_of((10, 10)) == {"same": (10, 10), "x1.5": (15, 15), "x2": (20, 20), "wide": (7, 14), "tall": (14, 7)}
