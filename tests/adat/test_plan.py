"""Patch plans against slow references: each pixel in one token, budgets met as well as they can be, grid, layout."""

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfa_adapters import StructuralBias, TokenLayout
from sfa_adapters.adat.plan import PatchPlan, cell_grid
from sfa_adapters.adat.policy import PatchPolicy
from sfa_adapters.choices import TERMS
from sfa_adapters.errors import DataError, PlanError

slow = settings(max_examples=40, derandomize=True, deadline=None, database=None)


class Case(NamedTuple):
    policy: PatchPolicy
    density: Tensor
    size: tuple[int, int]
    patch: int


@st.composite
def policies(draw: st.DrawFn) -> tuple[PatchPolicy, int]:
    count = draw(st.integers(1, 4))
    patches = sorted(draw(st.sets(st.integers(1, 12), min_size=count, max_size=count)))
    thresholds = sorted(draw(st.sets(st.integers(1, 15), min_size=count - 1, max_size=count - 1)), reverse=True)
    levels = list(zip([t / 16 for t in thresholds] + [0.0], patches, strict=True))
    patch = draw(st.integers(1, 5))
    return PatchPolicy(levels, cell=draw(st.sampled_from([None, 1, 2, 4, 6, 9]))), patch


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Eighths as densities and sixteenths as thresholds: ties are common, and nothing rounds."""
    policy, patch = draw(policies())
    size = (patch * draw(st.integers(1, 5)), patch * draw(st.integers(1, 5)))
    return Case(policy, random_density(policy, size, patch, draw(st.integers(0, 10_000))), size, patch)


def random_density(policy: PatchPolicy, size: tuple[int, int], patch: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 9, cell_grid(size, policy.cell_of(patch)), generator=generator) / 8


def equal(first: PatchPlan, second: PatchPlan) -> bool:
    return torch.equal(first.boxes, second.boxes) and torch.equal(first.level, second.level)


# -- references, slow and plain -----------------------------------------------------------------------------------


def side_of(cell: int, patch: int) -> int:
    return max(1, math.floor(Fraction(cell, patch) + Fraction(1, 2)))


def reference_boxes(case: Case, shift: float = 0.0) -> list[tuple[Fraction, Fraction, Fraction]]:
    """Top, left and side of every token in reading order, straight from the rule."""
    cell, boxes = case.policy.cell_of(case.patch), []
    for row in range(case.density.shape[0]):
        for column in range(case.density.shape[1]):
            value = case.density[row, column].item()
            above = [patch for threshold, patch in case.policy.levels[:-1] if value - threshold > shift]
            n = side_of(cell, above[0] if above else case.policy.levels[-1][1])
            for i in range(n):
                for j in range(n):
                    top, left = row * cell + Fraction(i * cell, n), column * cell + Fraction(j * cell, n)
                    if top < case.size[0] and left < case.size[1]:
                        boxes.append((top, left, Fraction(cell, n)))
    return sorted(boxes)


def fine_boxes(plan: PatchPlan) -> tuple[int, list[tuple[int, int, int]]]:
    """Sub-pixels per pixel, and the boxes in sub-pixels: whole numbers for every level."""
    scale = math.lcm(*plan.sides)
    boxes = [tuple(round(value * scale) for value in box) for box in plan.boxes.tolist()]
    assert np.abs(np.array(boxes) / scale - plan.boxes.numpy()).max() < 1e-9
    assert all(height == width for _, _, height, width in boxes)
    return scale, [(top, left, side) for top, left, side, _ in boxes]


def candidate_shifts(policy: PatchPolicy, densities: list[Tensor]) -> list[float]:
    """All shifts at which anything can change, and one below."""
    values = torch.cat([density.flatten() for density in densities]).tolist()
    return sorted({-2.0, *(value - threshold for value in values for threshold, _ in policy.levels[:-1])})


# -- the plan -----------------------------------------------------------------------------------------------------


@slow
@given(cases())
def test_a_plan_tiles_the_page_exactly_once(case: Case) -> None:
    plan = case.policy.plan(case.density, case.size, case.patch)
    scale, boxes = fine_boxes(plan)
    height, width = plan.padded_size
    assert height >= case.size[0] > height - plan.cell
    assert width >= case.size[1] > width - plan.cell
    count = np.zeros((height * scale, width * scale), dtype=int)
    for top, left, side in boxes:
        assert top >= 0
        assert left >= 0
        assert top < case.size[0] * scale, "a token wholly in the padding"
        assert left < case.size[1] * scale, "a token wholly in the padding"
        count[top : top + side, left : left + side] += 1
    assert (count[: case.size[0] * scale, : case.size[1] * scale] == 1).all()
    assert count.max() == 1
    assert plan.ratio == plan.num_tokens / (case.size[0] // case.patch * (case.size[1] // case.patch))


@slow
@given(cases())
def test_tokens_follow_the_rule_in_reading_order(case: Case) -> None:
    plan = case.policy.plan(case.density, case.size, case.patch)
    expected = reference_boxes(case)
    assert plan.num_tokens == len(expected)
    np.testing.assert_allclose(plan.boxes[:, :3].numpy(), np.array(expected, dtype=float), atol=1e-12)
    for number, (top, left, side) in enumerate(expected):
        n = plan.sides[int(plan.token_level[number])]
        assert side == Fraction(plan.cell, n)
        assert plan.level[int(top // plan.cell), int(left // plan.cell)] == plan.token_level[number]
        assert plan.index[number] == top // side * (plan.level.shape[1] * n) + left // side


@slow
@given(cases(), st.integers(0, 10_000))
def test_tokens_never_decrease_with_density(case: Case, seed: int) -> None:
    denser = torch.maximum(case.density, random_density(case.policy, case.size, case.patch, seed))
    before = case.policy.plan(case.density, case.size, case.patch)
    after = case.policy.plan(denser, case.size, case.patch)
    assert (after.level <= before.level).all()
    assert after.num_tokens >= before.num_tokens


@slow
@given(cases(), st.one_of(st.integers(1, 60), st.floats(0.05, 4.0)))
def test_a_budget_is_met_by_the_best_shift_at_least(case: Case, budget: float) -> None:
    """What a shift leaves is spent on cells at the shift, in `test_ties`."""
    uniform = case.size[0] // case.patch * (case.size[1] // case.patch)
    limit = budget if isinstance(budget, int) else budget * uniform
    counts = [len(reference_boxes(case, shift)) for shift in candidate_shifts(case.policy, [case.density])]
    possible = [count for count in counts if count <= limit]
    policy = replace(case.policy, budget=budget)
    least = len(reference_boxes(case, 2.0))
    if least > limit:
        with pytest.raises(PlanError, match=rf"at least {least} "):
            policy.plan(case.density, case.size, case.patch)
        return
    plan = policy.plan(case.density, case.size, case.patch)
    assert max([*possible, least]) <= plan.num_tokens <= limit
    alike = replace(policy, scorer="uniform").plan(case.density, case.size, case.patch)
    assert alike.num_tokens == max([*possible, least])


@slow
@given(cases(), st.data())
def test_a_budget_that_a_shift_gives_exactly_is_used_up(case: Case, data: st.DataObject) -> None:
    shift = data.draw(st.sampled_from(candidate_shifts(case.policy, [case.density])))
    count = len(reference_boxes(case, shift))
    assert replace(case.policy, budget=count).plan(case.density, case.size, case.patch).num_tokens == count


@slow
@given(policies(), st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3), st.floats(0, 1))
def test_calibrated_thresholds_meet_the_mean_ratio(
    policy_patch: tuple[PatchPolicy, int], grids: list[tuple[int, int]], share: float
) -> None:
    policy, patch = policy_patch
    sizes = [(patch * rows, patch * columns) for rows, columns in grids]
    pages = [random_density(policy, size, patch, seed) for seed, size in enumerate(sizes)]

    def mean_ratio(shift: float) -> float:
        counts = [len(reference_boxes(Case(policy, *page, patch), shift)) for page in zip(pages, sizes, strict=True)]
        return sum(count / (rows * columns) for count, (rows, columns) in zip(counts, grids, strict=True)) / len(grids)

    least, most = mean_ratio(2.0), mean_ratio(-2.0)
    ratio = least + share * (most - least)
    calibrated = policy.calibrate(pages, sizes, patch, ratio)
    assert calibrated.budget is None
    plans = [calibrated.plan(density, size, patch) for density, size in zip(pages, sizes, strict=True)]
    reached = sum(plan.ratio for plan in plans) / len(plans)
    best = max(r for r in (least, *map(mean_ratio, candidate_shifts(policy, pages))) if r <= ratio + 1e-9)
    assert reached == pytest.approx(best)


@pytest.mark.parametrize("seed", range(20))
def test_rounding_of_a_threshold_moves_no_cell(seed: int) -> None:
    """Densities that are no dyadic fractions: on a single page the calibrated plan is the plan of the budget."""
    generator = torch.Generator().manual_seed(seed)
    density, size = torch.rand(6, 6, generator=generator), (168, 168)
    policy = PatchPolicy([(0.7, 7), (0.45, 10), (0.3, 14), (0.0, 28)])
    for ratio in torch.linspace(0.25, 4, 20).tolist():
        expected = replace(policy, budget=ratio).plan(density, size, 14)
        plan = policy.calibrate([density], [size], 14, ratio).plan(density, size, 14)
        assert torch.equal(plan.boxes, expected.boxes)  # levels that cannot be reached are gone


def test_neighbouring_densities_are_told_apart() -> None:
    """0.7 in double precision is a little more than in single: at 0.05 that is more than one step of a density."""
    low = torch.tensor(0.05)
    density = torch.stack((low, low.nextafter(torch.tensor(1.0))))[None]
    policy = PatchPolicy([(0.7, 7), (0.0, 28)]).calibrate([density], [(28, 56)], 14, 17 / 8)
    assert policy.plan(density, (28, 56), 14).level.tolist() == [[1, 0]]


def test_calibrated_thresholds_hold_on_other_pages() -> None:
    torch.manual_seed(0)
    policy = PatchPolicy.published()
    pages = [torch.rand(8, 8) ** 2 for _ in range(64)]
    calibrated = policy.calibrate(pages[:32], [(224, 224)] * 32, 14, 0.5)
    ratios = [calibrated.plan(page, (224, 224), 14).ratio for page in pages[32:]]
    assert sum(ratios) / 32 == pytest.approx(0.5, abs=0.05)
    assert len({*ratios}) > 10  # dense pages get more


def test_calibrated_default_levels_keep_their_cells() -> None:
    torch.manual_seed(0)
    pages = [torch.rand(4, 4) ** 2 for _ in range(32)]
    calibrated = PatchPolicy().calibrate(pages, [(224, 224)] * 32, 14, 0.5)
    assert calibrated.cell_of(14) == 56
    ratios = [calibrated.plan(page, (224, 224), 14).ratio for page in pages]
    assert 0.45 < sum(ratios) / 32 <= 0.5


def test_a_budget_is_not_spent_on_blank_paper() -> None:
    plan = PatchPolicy.published(budget=0.9).plan(torch.zeros(4, 4), (112, 112), 14)
    assert plan.num_tokens == 16  # the next step would be cells without any text


@slow
@given(cases())
def test_no_nan_and_no_empty_plan(case: Case) -> None:
    plan = case.policy.plan(case.density, case.size, case.patch)
    assert plan.num_tokens >= 1
    assert torch.isfinite(plan.boxes).all()
    assert plan.boxes[:, 2:].min() >= plan.finest - 1e-9


# -- the grid and the layout --------------------------------------------------------------------------------------


@slow
@given(cases())
def test_grid_pairs_share_patches_by_area(case: Case) -> None:
    plan = case.policy.plan(case.density, case.size, case.patch)
    scale, boxes = fine_boxes(plan)
    owner = np.full([side * scale for side in plan.padded_size], -1)
    for token, (top, left, side) in enumerate(boxes):
        owner[top : top + side, left : left + side] = token
    expected: dict[tuple[int, int], float] = {}
    step, columns = case.patch * scale, case.size[1] // case.patch
    for patch in range(case.size[0] // case.patch * columns):
        top, left = patch // columns * step, patch % columns * step
        tokens, pixels = np.unique(owner[top : top + step, left : left + step], return_counts=True)
        for token, count in zip(tokens.tolist(), pixels.tolist(), strict=True):
            expected[patch, token] = count / step**2
    weights = dict(
        zip(zip(*(t.tolist() for t in plan.grid_pairs()[:2]), strict=True), plan.grid_pairs()[2], strict=True)
    )
    assert weights.keys() == expected.keys()
    for key, weight in expected.items():
        assert float(weights[key]) == pytest.approx(weight, rel=1e-6)
    total = torch.zeros(plan.uniform_tokens).index_add_(0, plan.grid_pairs()[0], plan.grid_pairs()[2])
    torch.testing.assert_close(total, torch.ones_like(total))


@slow
@given(cases(), st.integers(0, 2))
def test_layout_says_where_the_boxes_are(case: Case, prefix: int) -> None:
    plan = case.policy.plan(case.density, case.size, case.patch)
    layout = plan.layout(prefix)
    assert layout.num_tokens == prefix + plan.num_tokens
    assert isinstance(layout.grid[0], int)
    assert isinstance(layout.grid[1], int)
    reach = max(layout.grid[0] + layout.grid[1] - 2, 1)
    for axis, at, grid in ((layout.rows, 0, layout.grid[0]), (layout.columns, 1, layout.grid[1])):
        pixels = reach * plan.finest
        start, extent = axis.start[axis.index[prefix:]] * pixels, axis.extent[axis.index[prefix:]] * pixels
        torch.testing.assert_close(start.double(), plan.boxes[:, at], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(extent.double(), plan.boxes[:, at + 2], atol=1e-4, rtol=1e-5)
        assert case.size[at] <= grid * plan.finest + 1e-9
        assert grid * plan.finest <= plan.padded_size[at] + 1e-9


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (3, 5), (8, 8), (7, 2), (32, 32)])
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("cell", [None, 14, 56])
def test_one_level_of_the_own_patch_is_the_regular_layout(grid: tuple[int, int], prefix: int, cell: int | None) -> None:
    """Also where the cells do not divide the page: phi is equal, bit for bit, and tokens come in the tower's order."""
    policy = PatchPolicy([(0.0, 14)], cell=cell)
    size = (14 * grid[0], 14 * grid[1])
    plan = policy.plan(torch.zeros(cell_grid(size, policy.cell_of(14))), size, 14)
    assert plan.ratio == 1
    torch.manual_seed(0)
    bias = StructuralBias(2, init_std=1.0, terms=TERMS)
    regular = TokenLayout.regular(*grid, prefix_tokens=prefix)
    assert torch.equal(bias(plan.layout(prefix)), bias(regular))
    patch, token, weight = plan.grid_pairs()
    assert torch.equal(patch, torch.arange(grid[0] * grid[1]))
    assert torch.equal(token, patch)
    assert torch.equal(weight, torch.ones_like(weight))


# -- levels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "sides"),
    [(28, (4, 2, 1)), (56, (7, 4, 2)), (112, (14, 8, 4)), (224, (28, 16, 7)), (14, (2, 1)), (8, (1,))],
)
def test_sides_of_the_published_levels(cell: int, sides: tuple[int, ...]) -> None:
    policy = PatchPolicy.published(cell=cell)
    assert tuple(side for _, side in policy.sides_of(14)) == sides


@pytest.mark.parametrize("patch", [12, 14, 16])
def test_by_default_text_gets_the_patches_of_the_tower_and_paper_four_times_their_side(patch: int) -> None:
    policy = PatchPolicy()
    assert policy.cell_of(patch) == 4 * patch
    assert policy.sides_of(patch) == ((0.3, 4), (0.0, 1))
    plan = policy.plan(torch.tensor([[0.31, 0.3]]), (4 * patch, 8 * patch), patch)
    assert plan.num_tokens == 17
    assert plan.boxes[:, 2].unique().tolist() == [patch, 4 * patch]


def test_published_levels_are_kept_whatever_the_defaults_are() -> None:
    assert PatchPolicy.published().levels == ((0.7, 8), (0.3, 14), (0.0, 32))
    policy = PatchPolicy.published(cell=56, scorer="entropy", budget=0.5, reduce="mean")
    levels = [(0.7, 8), (0.3, 14), (0.0, 32)]
    assert policy == PatchPolicy(levels, cell=56, scorer="entropy", budget=0.5, reduce="mean")
    with pytest.raises(PlanError, match="budget=-1"):
        PatchPolicy.published(budget=-1)


def test_halves_are_rounded_up_and_equal_levels_are_merged() -> None:
    policy = PatchPolicy([(0.8, 8), (0.5, 20), (0.2, 24), (0.0, 900)], cell=28)
    assert policy.sides_of(14) == ((0.8, 4), (0.0, 1))  # 28 / 8 = 3.5; 20, 24 and 900 px give one token each
    # The lowest threshold of equal levels counts: 0.6 is no longer above any.
    assert policy.plan(torch.tensor([[0.6]]), (28, 28), 14).num_tokens == 1
    assert policy.plan(torch.tensor([[0.9]]), (28, 28), 14).num_tokens == 16


def test_thresholds_are_strict() -> None:
    policy, values = PatchPolicy.published(), torch.tensor([[0.0, 0.3, 0.3001, 0.7, 0.7001, 1.0]])
    assert policy.plan(values, (28, 168), 14).level.tolist() == [[2, 2, 1, 1, 0, 0]]


def test_a_patch_larger_than_the_page_is_one_token() -> None:
    plan = PatchPolicy([(0.0, 224)], cell=224).plan(torch.zeros(1, 1), (28, 42), 14)
    assert plan.boxes.tolist() == [[0, 0, 224, 224]]
    assert plan.grid_pairs()[2].tolist() == [1.0] * 6


# -- images -------------------------------------------------------------------------------------------------------


def test_permuting_images_permutes_plans_and_a_batch_is_its_images() -> None:
    torch.manual_seed(0)
    images = torch.rand(5, 3, 84, 98) ** torch.arange(1, 6)[:, None, None, None]
    for policy in (
        PatchPolicy.published(scorer=lambda x: x.mean(1)),
        PatchPolicy(scorer=lambda x: x.amax(1), budget=0.6),
    ):
        plans = policy.plan_images(images, 14)
        order = [3, 0, 4, 1, 2]
        permuted = policy.plan_images(images[order], 14)
        assert all(equal(plans[k], plan) for k, plan in zip(order, permuted, strict=True))
        assert all(
            equal(policy.plan_images(image[None], 14)[0], plan) for image, plan in zip(images, plans, strict=True)
        )
        assert not equal(plans[0], plans[4])


def test_the_border_that_the_tower_does_not_see_is_not_planned() -> None:
    images = torch.rand(1, 3, 95, 60)
    plan = PatchPolicy(scorer="uniform").plan_images(images, 14)[0]
    assert plan.image_size == (84, 56)
    assert plan.ratio == 1


@pytest.mark.parametrize("patch", [8, 12, 14, 16, 32])
def test_uniform_picks_the_own_patch(patch: int) -> None:
    levels = [(0.9, 8), (0.6, 12), (0.5, 14), (0.2, 16), (0.0, 32)]
    plan = PatchPolicy(levels, cell=672, scorer="uniform").plan_images(torch.zeros(1, 3, 672, 672), patch)[0]
    assert plan.ratio == 1


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": []}, "levels is empty"),
        ({"levels": [(0.3, 8), (0.7, 14), (0.0, 32)]}, r"levels\[1\]=\(0.7, 14\): densities must descend.* 0.3"),
        ({"levels": [(0.3, 8), (0.3, 14), (0.0, 32)]}, r"levels\[1\].*descend"),
        ({"levels": [(0.7, 14), (0.3, 8), (0.0, 32)]}, r"levels\[1\]=\(0.3, 8\): patches must ascend.* 14 px"),
        ({"levels": [(0.7, 8), (0.3, 14)]}, r"levels\[1\].*must have density 0.0"),
        ({"levels": [(1.0, 8), (0.0, 14)]}, r"levels\[0\].*\[0, 1\)"),
        ({"levels": [(float("nan"), 8), (0.0, 14)]}, r"levels\[0\].*\[0, 1\)"),
        ({"levels": [(0.5, 0), (0.0, 14)]}, r"levels\[0\].*at least 1"),
        ({"levels": [(0.5, 8.5), (0.0, 14)]}, r"levels\[0\].*whole pixels"),
        ({"levels": [(0.5, 8, 1), (0.0, 14)]}, r"levels\[0\].*\(density, patch\)"),
        ({"cell": 0}, "cell=0"),
        ({"cell": 28.0}, "cell=28.0"),
        ({"budget": 0}, "budget=0 "),
        ({"budget": -0.5}, "budget=-0.5"),
        ({"budget": float("nan")}, "budget=nan"),
        ({"budget": float("inf")}, "budget=inf"),
        ({"budget": True}, "budget=True"),
        ({"scorer": "sobel"}, "scorer='sobel'.*reconstruction"),
        ({"reduce": "min"}, "reduce='min'"),
    ],
)
def test_wrong_policies_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        PatchPolicy(**options)


@pytest.mark.parametrize(
    ("density", "size", "patch", "message"),
    [
        (torch.zeros(4, 4), (56, 56), 14, r"density \(4, 4\).*\(2, 2\) cells of 28 px"),
        (torch.zeros(1, 2, 2), (56, 56), 14, r"density \(1, 2, 2\)"),
        (torch.tensor([[0.0, 0.1], [float("nan"), 0.2]]), (56, 56), 14, r"density\[1, 0\] is nan"),
        (torch.tensor([[0.0, 1.5], [0.0, 0.2]]), (56, 56), 14, r"density\[0, 1\] is 1.5"),
        (torch.tensor([[0.0, 0.0], [0.0, -0.25]]), (56, 56), 14, r"density\[1, 1\] is -0.25"),
        (torch.zeros(2, 2), (60, 56), 14, r"not whole patches.*\(56, 56\)"),
        (torch.zeros(1, 1), (7, 56), 14, "7x56 px page is smaller than one 14 px patch"),
        (torch.zeros(1, 1), (0, 14), 14, "smaller than one 14 px patch"),
        (torch.zeros(2, 2), (56, 56), 0, "patch=0"),
    ],
)
def test_wrong_pages_are_named(density: Tensor, size: tuple[int, int], patch: int, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        PatchPolicy.published().plan(density, size, patch)


def test_a_budget_below_the_coarsest_plan_says_what_is_possible() -> None:
    with pytest.raises(PlanError, match=r"budget=0.1 allows 6 tokens .* at least 16 \(0.250 of the 64"):
        PatchPolicy.published(budget=0.1).plan(torch.rand(4, 4), (112, 112), 14)
    assert PatchPolicy.published(budget=0.25).plan(torch.rand(4, 4), (112, 112), 14).num_tokens == 16


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan"), float("inf"), 0.2])
def test_ratios_that_cannot_be_met_are_named(ratio: float) -> None:
    with pytest.raises(PlanError, match=r"ratio=" + str(ratio)):
        PatchPolicy.published().calibrate([torch.rand(4, 4)], [(112, 112)], 14, ratio)


def test_calibrate_needs_one_size_per_page() -> None:
    for pages, sizes in (([], []), ([torch.rand(4, 4)], [])):
        with pytest.raises(PlanError, match=f"got {len(pages)} and {len(sizes)}"):
            PatchPolicy.published().calibrate(pages, sizes, 14, 0.5)


@pytest.mark.parametrize(
    ("images", "error"),
    [
        (torch.zeros(3, 56, 56), DataError),
        (torch.zeros(1, 3, 10, 56), PlanError),  # the tower's patch is larger than the image
        (torch.full((1, 3, 56, 56), float("nan")), DataError),
        (torch.full((1, 3, 56, 56), 255.0), DataError),
        (torch.zeros(1, 3, 56, 56, dtype=torch.uint8), DataError),
        (torch.zeros(1, 1, 56, 56), DataError),
    ],
)
def test_wrong_images_are_named(images: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error):
        PatchPolicy(scorer="reconstruction").plan_images(images, 14)


def test_plans_from_levels_check_the_map() -> None:
    for level, sides in ((torch.zeros(3, 2), (1,)), (torch.full((2, 2), 1), (1,)), (torch.zeros(2, 2), (1, 2))):
        with pytest.raises(PlanError):
            PatchPlan.from_levels(level, sides, (56, 56), 14, 28)
