"""Cells of equal density within a budget: in the order of content, against a slow reference, and spread evenly."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfa_adapters.adat.plan import PatchPlan, tokens_per_cell
from sfa_adapters.adat.policy import PatchPolicy
from sfa_adapters.adat.scorers import content
from sfa_adapters.adat.shift import margins_over, smallest_shift
from sfa_adapters.adat.ties import spread_rank
from sfa_adapters.errors import PlanError
from tests.adat.test_plan import Case, candidate_shifts, cases, equal, reference_boxes
from tests.adat.test_scorers import batch, page

slow = settings(max_examples=60, derandomize=True, deadline=None, database=None)


def content_map(case: Case, seed: int) -> Tensor:
    """Four contents, zero among them: many cells are equal in it, too."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 4, case.density.shape, generator=generator).float()


def bayer(row: int, column: int, bits: int) -> int:
    """The threshold matrix of ordered dithering by its recursion: each step puts four copies side by side."""
    if not bits:
        return 0
    half = 2 ** (bits - 1)
    quadrant = {(0, 0): 0, (0, 1): 2, (1, 0): 3, (1, 1): 1}[row // half, column // half]
    return 4 * bayer(row % half, column % half, bits - 1) + quadrant


def reference_level(case: Case, shown: Tensor | None, limit: int) -> list[list[int]]:
    """Level of each cell, one pair of threshold and cell after another; nothing rounds (see `cases`)."""
    policy, patch = case.policy, case.patch
    thresholds = [t for t, _ in policy.sides_of(patch)][:-1]
    counts = tokens_per_cell(case.size, policy.cell_of(patch), [n for _, n in policy.sides_of(patch)]).tolist()
    rows, columns = case.density.shape
    bits = max(1, math.ceil(math.log2(max(rows, columns, 2))))
    shift, spent = best_shift(case, limit)
    level = [[len(thresholds)] * columns for _ in range(rows)]
    at_shift = []
    for row in range(rows):
        for column in range(columns):
            density = case.density[row, column].item()
            detail = 0.0 if shown is None else shown[row, column].item()
            for k, threshold in enumerate(thresholds):
                if density - threshold > shift:
                    level[row][column] -= 1
                elif density - threshold == shift and (density or detail):
                    gain = counts[k][row][column] - counts[k + 1][row][column]
                    at_shift.append((-detail, -density, bayer(row, column, bits), -k, gain, row, column))
    for *_, gain, row, column in sorted(at_shift):
        spent += gain
        if spent > limit:
            break
        level[row][column] -= 1
    return level


def best_shift(case: Case, limit: int) -> tuple[float, int]:
    """The smallest shift within the limit, and its number of tokens."""
    for shift in candidate_shifts(case.policy, [case.density]):
        count = len(reference_boxes(case, shift))
        if count <= limit:
            return shift, count
    raise AssertionError("the caller chose a limit that some shift meets")


@slow
@given(cases(), st.integers(0, 10_000), st.floats(0, 1), st.booleans())
def test_equal_cells_become_finer_in_the_order_of_content(case: Case, seed: int, share: float, known: bool) -> None:
    least, most = (len(reference_boxes(case, shift)) for shift in (2.0, -2.0))
    limit = least + math.floor(share * (most - least))
    shown = content_map(case, seed) if known else None
    plan = replace(case.policy, budget=limit).plan(case.density, case.size, case.patch, shown)
    assert plan.num_tokens <= limit
    assert plan.level.tolist() == reference_level(case, shown, limit)


def ties_at_the_shift(case: Case, policy: PatchPolicy) -> int:
    """Pairs of threshold and cell that lie at the smallest shift."""
    merged = policy._merged(case.patch)
    counts = tokens_per_cell(case.size, policy.cell_of(case.patch), [n for _, n, _ in merged]).flatten(1)
    margins = margins_over(case.density.flatten(), merged)
    assert isinstance(policy.budget, int)
    shift = smallest_shift(margins, counts[:-1] - counts[1:], policy.budget - int(counts[-1].sum()))
    return int((margins == shift).sum())


@slow
@given(cases(), st.integers(0, 10_000), st.floats(0, 1))
def test_without_equal_cells_nothing_changes(case: Case, seed: int, share: float) -> None:
    """Distinct densities: the plan is that of the shift, bit for bit, and content is not asked for."""
    generator = torch.Generator().manual_seed(seed)
    density = torch.randperm(case.density.numel(), generator=generator).view(case.density.shape) / 256 + 1 / 1024
    case = case._replace(density=density)
    least, most = (len(reference_boxes(case, shift)) for shift in (2.0, -2.0))
    policy = replace(case.policy, budget=least + math.floor(share * (most - least)))
    together = replace(policy, scorer="uniform").plan(density, case.size, case.patch)
    for shown in (None, content_map(case, seed)):
        plan = policy.plan(density, case.size, case.patch, shown)
        if ties_at_the_shift(case, policy) < 2:
            assert equal(plan, together)
        assert (plan.level <= together.level).all()


@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (7, 1), (2, 2), (5, 12), (16, 16), (33, 3)])
def test_spread_rank_is_the_matrix_of_ordered_dithering(grid: tuple[int, int]) -> None:
    bits = max(1, math.ceil(math.log2(max(grid))))
    plain = [bayer(row, column, bits) for row in range(grid[0]) for column in range(grid[1])]
    rank = spread_rank(grid)
    assert len(set(rank.tolist())) == grid[0] * grid[1]
    assert rank.argsort().tolist() == sorted(range(len(plain)), key=plain.__getitem__)


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.75, 1.0, 2.0])
def test_a_saturated_map_spends_its_budget_all_over_the_page(budget: float) -> None:
    """The page that got no fine patch at all: everything has the largest density that there is."""
    policy, size = PatchPolicy(((0.7, 8), (0.3, 14), (0.0, 32)), budget=budget), (448, 448)
    plan = policy.plan(torch.ones(16, 16), size, 14)
    assert budget - 12 / 1024 < plan.ratio <= budget
    fine = (plan.level < 2).double() if budget <= 1 else (plan.level < 1).double()
    for parts in (2, 4, 8):  # quarters of the page, and quarters of these: each has as many as any other, or one more
        counts = fine.unflatten(0, (parts, -1)).unflatten(2, (parts, -1)).sum((1, 3))
        assert counts.max() - counts.min() <= 1


def test_more_budget_only_adds_fine_patches() -> None:
    torch.manual_seed(0)
    density, shown = (torch.rand(12, 12) * 2).clamp(max=1), torch.rand(12, 12).round(decimals=1)
    before: PatchPlan | None = None
    for budget in range(144, 16 * 144, 7):
        plan = PatchPolicy(((0.7, 7), (0.3, 14), (0.0, 28)), budget=budget).plan(density, (336, 336), 14, shown)
        assert before is None or (plan.level <= before.level).all()
        before = plan


def saturated(images: Tensor) -> Tensor:
    """A map that says of every place that it is full of text."""
    return torch.ones(len(images), 4, 4)


def test_images_order_their_equal_cells_by_what_they_show() -> None:
    """A page with text in its lower half: at a saturated map half of the tokens go there, not to the top."""
    gray = page(12, side=448, lines=99).copy()
    gray[:224] = 255
    policy = PatchPolicy(((0.3, 14), (0.0, 28)), scorer=saturated, budget=0.5)
    level = policy.plan_images(batch(gray), 14)[0].level
    assert (level[:8] == 1).all()
    assert (level[8:] == 0).float().mean() > 0.6


def test_content_is_measured_only_where_it_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("sfa_adapters.adat.policy.content", lambda *args: calls.append(args) or content(*args))
    images = torch.rand(2, 3, 112, 112)
    PatchPolicy(scorer=saturated).plan_images(images, 14)
    PatchPolicy(scorer="uniform", budget=0.5).plan_images(images, 14)
    PatchPolicy(scorer=lambda x: x.mean(1), budget=0.5).plan_images(images, 14)
    assert not calls
    alone = [PatchPolicy(scorer=saturated, budget=0.5).plan_images(one[None], 14)[0] for one in images]
    assert len(calls) == 2
    together = PatchPolicy(scorer=saturated, budget=0.5).plan_images(images, 14)
    assert all(equal(a, b) for a, b in zip(alone, together, strict=True))


def test_content_is_equal_for_equal_cells_and_has_no_upper_end() -> None:
    tile = torch.rand(3, 28, 28)
    shown = content(tile.tile(1, 1, 5, 7)[..., 28:-28, 28:-28].contiguous(), 28)
    assert shown.shape == (1, 3, 5)
    assert shown[0, 1, 1:-1].unique().numel() == 1  # beyond the edges of the page
    strokes = torch.ones(1, 3, 56, 56)
    strokes[..., ::2] = 0
    half = strokes.clone()
    half[..., 28:] = 1
    assert content(strokes, 28).min() > 100
    assert content(half, 28)[0, :, 1].max() < content(half, 28)[0, :, 0].min()
    assert content(torch.ones(1, 3, 56, 56), 28).max() == 0
    assert content(torch.ones(1, 3, 30, 57), 28).shape == (1, 2, 3)


def test_content_sees_print_that_differs_in_hue_only() -> None:
    """Red and green of one gray level."""
    gray = page(12)
    ink, paper = torch.tensor([0.9, 0.2, 0.1]), torch.tensor([0.2, 0.5566, 0.1])
    colored = torch.where(torch.from_numpy(gray < 128)[None, None], ink.view(3, 1, 1), paper.view(3, 1, 1))
    shown = content(colored, 28)
    assert shown[:, 1:4, 1:7].min() > 5
    assert shown.min() >= 0


def test_content_comes_before_density_and_what_does_not_fit_ends_it() -> None:
    """Two thresholds: 16 tokens for the cell of 1.0 and 4 for that of 0.5 are at the same shift."""
    policy, density = PatchPolicy(((0.75, 7), (0.25, 14), (0.0, 28))), torch.tensor([[0.5, 1.0]])

    def levels(budget: int, shown: Tensor | None = None) -> list[int]:
        return replace(policy, budget=budget).plan(density, (28, 56), 14, shown).level[0].tolist()

    assert [levels(budget) for budget in (5, 8, 16, 17, 19, 20)] == [[2, 1]] * 3 + [[2, 0]] * 2 + [[1, 0]]
    left = torch.tensor([[2.0, 1.0]])
    assert [levels(budget, left) for budget in (5, 7, 8, 19, 20)] == [[2, 1]] * 2 + [[1, 1]] * 2 + [[1, 0]]


@pytest.mark.parametrize(
    ("shown", "message"),
    [
        (torch.zeros(2, 3), r"content \(2, 3\) must have one value per cell, as density \(2, 2\)"),
        (torch.tensor([[0.0, -1.0], [0.0, 0.0]]), r"content\[0, 1\] is -1.0"),
        (torch.tensor([[0.0, 0.0], [float("nan"), 0.0]]), r"content\[1, 0\] is nan"),
        (torch.tensor([[float("inf"), 0.0], [0.0, 0.0]]), r"content\[0, 0\] is inf"),
    ],
)
def test_wrong_contents_are_named(shown: Tensor, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        PatchPolicy.published(budget=0.5).plan(torch.ones(2, 2), (56, 56), 14, shown)


def test_calibrated_thresholds_stay_below_their_target_where_all_are_equal() -> None:
    """Thresholds cannot tell equal cells apart, which the docstring of `calibrate` says."""
    policy = PatchPolicy(((0.3, 14), (0.0, 28)))
    calibrated = policy.calibrate([torch.ones(4, 4)], [(112, 112)], 14, 0.5)
    assert calibrated.plan(torch.ones(4, 4), (112, 112), 14).ratio == 0.25
    assert replace(policy, budget=0.5).plan(torch.ones(4, 4), (112, 112), 14).num_tokens == 31
