"""Head plans: the published counts, what grouped queries allow, and what is refused."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfa_adapters.errors import RecipeError
from sfa_adapters.heads.plan import HeadPlan, plan_heads
from sfa_adapters.heads.quotas import chosen_heads
from sfa_adapters.heads.scores import HeadScores

KINDS = ("uniform", "adaptive", "early_skip", "global")


def scores_of(layers: int, heads: int, groups: int | None = None, seed: int = 0) -> HeadScores:
    """Scores without order, all different."""
    values = {
        f"layers.{n}.self_attn": tuple(float((seed + 7919 * (n * heads + h + 1)) % 10007) for h in range(heads))
        for n in range(layers)
    }
    return HeadScores(values, dict.fromkeys(values, groups or heads), "random")


def counts(plan: HeadPlan) -> list[int]:
    return [len(heads) for heads in plan.removed.values()]


def test_the_published_plans_come_out() -> None:
    llava = scores_of(32, 32)
    assert counts(plan_heads(llava, 0.3)) == [10] * 32  # 320 of 1,024
    assert plan_heads(llava, 0.3, "adaptive").count == 307
    assert plan_heads(llava, 0.15, "adaptive").count == 153
    for rate in (None, 0.2, 0.201):
        plan = plan_heads(llava, rate, "early_skip")
        assert counts(plan) == [0] * 6 + [6] * 16 + [11] * 10
        assert plan.count == 206
        assert f"{plan.rate:.1%}" == "20.1%"


def test_adaptive_spares_the_first_six_layers() -> None:
    removed = counts(plan_heads(scores_of(32, 32), 0.3, "adaptive"))
    assert max(removed[:6]) < min(removed[6:])
    assert min(removed[:6]) > 0
    assert max(removed[6:]) - min(removed[6:]) <= 1


def test_small_models_have_an_early_layer_and_remainders_go_from_late_ones() -> None:
    assert counts(plan_heads(scores_of(4, 8), 0.25, "adaptive")) == [1, 2, 2, 3]
    assert counts(plan_heads(scores_of(2, 8), 0.25, "early_skip")) == [0, 4]
    assert counts(plan_heads(scores_of(1, 8), 0.25, "adaptive")) == [2]
    # 6 layers at half weight and 26 at a whole one: 307 of 29 shares are 10.59 and 5.29.
    assert set(counts(plan_heads(scores_of(32, 32), 0.3, "adaptive"))[:6]) == {5}


def test_rates_that_binary_numbers_miss_count_as_they_are_written() -> None:
    assert 0.29 * 100 < 29  # 28.999999999999996
    assert plan_heads(scores_of(10, 10), 0.29, "adaptive").count == 29
    assert plan_heads(scores_of(10, 10), 0.29, "global").count == 29
    assert counts(plan_heads(scores_of(1, 10), 0.35)) == [4]  # 3.5
    assert counts(plan_heads(scores_of(1, 100), 0.145)) == [15]  # 14.499999999999998


@pytest.mark.parametrize("kind", KINDS)
def test_equal_scores_go_in_a_fixed_order(kind: Any) -> None:
    values: dict[str, tuple[float, ...]] = {f"layers.{n}": (1.0,) * 4 for n in range(4)}
    scores = HeadScores(values, dict.fromkeys(values, 4), "s4")
    plan = plan_heads(scores, 0.4, kind)
    assert plan == plan_heads(scores, 0.4, kind)
    assert all(removed == tuple(range(len(removed))) for removed in plan.removed.values()), "the first of equal heads"
    if kind == "global":
        assert counts(plan) == [3, 3, 0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_lowest_scores_go(kind: Any) -> None:
    scores = scores_of(8, 16)
    for name, removed in plan_heads(scores, 0.3, kind).removed.items():
        order = sorted(range(16), key=lambda head: scores.values[name][head])
        assert removed == tuple(sorted(order[: len(removed)]))


def test_global_takes_the_lowest_of_the_whole_model_but_leaves_each_layer_a_head() -> None:
    values = {"a": (0.0, 1.0, 2.0, 3.0), "b": (10.0, 11.0, 12.0, 13.0)}
    scores = HeadScores(values, {"a": 4, "b": 4}, "flap")
    assert plan_heads(scores, 0.25, "global").removed == {"a": (0, 1), "b": ()}
    assert plan_heads(scores, 0.5, "global").removed == {"a": (0, 1, 2), "b": (0,)}
    with pytest.raises(RecipeError, match=r"without a head.*Lower the rate"):
        plan_heads(scores, 0.9, "global")


def brute_force(values: tuple[float, ...], groups: int, quota: int) -> tuple[int, float]:
    """Over all sets of heads that groups allow: the nearest count (the larger of two), and its best sum."""
    size = len(values) // groups
    allowed = []
    for number in range(1, len(values) + 1):
        for kept in itertools.combinations(range(len(values)), number):
            if len({sum(head // size == g for head in kept) for g in {head // size for head in kept}}) == 1:
                allowed.append((abs(len(values) - quota - number), -number, -sum(values[h] for h in kept)))
    best = min(allowed)
    return -best[1], -best[2]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), shape=st.sampled_from([(8, 8), (8, 4), (8, 2), (8, 1), (6, 2), (9, 3)]))
def test_under_grouped_queries_the_best_allowed_set_stays(data: st.DataObject, shape: tuple[int, int]) -> None:
    heads, groups = shape
    values = tuple(float(v) for v in data.draw(st.lists(st.integers(-50, 50), min_size=heads, max_size=heads)))
    quota = data.draw(st.integers(1, heads - 1))
    removed = chosen_heads(values, groups, quota)
    kept = [head for head in range(heads) if head not in removed]
    assert (len(kept), sum(values[head] for head in kept)) == brute_force(values, groups, quota)


@settings(max_examples=80, deadline=None)
@given(
    layers=st.integers(2, 40),
    shape=st.sampled_from([(32, 32), (32, 8), (28, 4), (16, 2), (12, 12)]),
    rate=st.floats(0.1, 0.4),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 9999),
)
def test_every_plan_can_be_carried_out(layers: int, shape: tuple[int, int], rate: float, kind: Any, seed: int) -> None:
    plan = plan_heads(scores_of(layers, *shape, seed=seed), rate, kind)  # HeadPlan checks the groups
    for name in plan.removed:
        kept, size = plan.kept(name), shape[0] // shape[1]
        assert kept, "a layer has a head"
        kept_in_group = {group: sum(head // size == group for head in kept) for group in plan.kept_kv(name)}
        assert set(kept_in_group.values()) == {len(kept) // len(kept_in_group)}, "equally many in each group that stays"
    if kind == "uniform" and shape[0] == shape[1]:
        assert set(counts(plan)) == {int(rate * shape[0] + 0.5)}
    if kind == "uniform":  # nearer than any other number that the groups allow
        possible = {g * n for g in range(1, shape[1] + 1) for n in range(1, shape[0] // shape[1] + 1)}
        goal = shape[0] - int(rate * shape[0] + 0.5)
        assert abs(shape[0] - counts(plan)[0] - goal) == min(abs(number - goal) for number in possible)
    assert HeadPlan.from_json(plan.to_json()) == plan
    if kind in ("adaptive", "global"):  # a total is promised, up to what groups allow in the last layer
        assert abs(plan.count - int(rate * plan.total)) <= (0 if shape[0] == shape[1] else shape[0] // shape[1] + 1)


def test_what_groups_forbid_goes_from_the_next_layer_only_where_a_total_is_promised() -> None:
    scores = scores_of(8, 28, 4)
    assert set(counts(plan_heads(scores, 0.3))) == {8}
    assert set(counts(plan_heads(scores, 0.2))) == {7}  # 6 cannot go: 22 heads are no rectangle of groups
    removed = counts(plan_heads(scores, 0.3, "adaptive"))
    assert len(set(removed[1:])) > 1
    assert abs(sum(removed) - 67) <= 2
    values: dict[str, tuple[float, ...]] = {"a": (0.0,) * 8, "b": (0.0,) * 8}
    few = HeadScores(values, {"a": 1, "b": 8}, "flap")
    assert sum(counts(plan_heads(few, 0.8, "global"))) == 12


def test_a_plan_tells_how_it_was_made_and_does_not_change() -> None:
    scores = HeadScores({"a": (0.0, 1.0, 2.0, 3.0)}, {"a": 4}, "flap", {"name": "host", "weights": "12ab"})
    plan = plan_heads(scores, 0.25)
    assert plan.how == {
        "kind": "uniform", "rate": 0.25, "method": "flap", "protected": [],
        "model": {"name": "host", "weights": "12ab"},
    }  # fmt: skip
    removed, heads, groups, how = {"a": [0]}, {"a": 4}, {"a": 4}, {"kind": "own"}
    head_plan = HeadPlan(removed, heads, groups, how)  # pyright: ignore[reportArgumentType]
    removed["a"].append(1)
    heads["a"] = groups["a"] = how["kind"] = 9  # pyright: ignore[reportArgumentType]
    assert head_plan == HeadPlan({"a": (0,)}, {"a": 4}, {"a": 4}, {"kind": "own"})
    assert head_plan.rate == 0.25


def test_whole_groups_go_where_they_are_worth_least() -> None:
    scores = HeadScores({"a": (1.0, 1.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0)}, {"a": 4}, "s4")
    plan = plan_heads(scores, 0.25)
    assert plan.removed == {"a": (0, 1)}
    assert plan.kept("a") == (2, 3, 4, 5, 6, 7)
    assert plan.kept_kv("a") == (1, 2, 3)


def test_protected_layers_keep_their_heads() -> None:
    scores = scores_of(8, 8)
    assert counts(plan_heads(scores, 0.25, protect=[0, "*.7.*"])) == [0, 2, 2, 2, 2, 2, 2, 0]
    adaptive = plan_heads(scores, 0.25, "adaptive", protect=[7])
    assert counts(adaptive)[7] == 0
    assert adaptive.count == 14
    assert plan_heads(scores, 0.25, "global", protect=range(7)).count == 2
    # Early layers stay those of the whole model: of the layers that are left, none is early.
    assert min(counts(plan_heads(scores_of(32, 32), 0.2, "early_skip", protect=range(6)))[6:]) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0.99}, "would leave layers.0.self_attn without a head"),
        ({"rate": 0.8, "kind": "early_skip"}, "without a head"),
        ({"rate": 0.01}, "removes no head"),
        ({"rate": 0.0}, "between 0 and 1"),
        ({"rate": 1}, "between 0 and 1"),
        ({"rate": float("nan")}, "between 0 and 1"),
        ({}, "needs a rate"),
        ({"rate": 0.3, "kind": "best"}, "kind='best'"),
        ({"rate": 0.3, "protect": [9]}, "fits no layer"),
        ({"rate": 0.3, "protect": ["*.9.*"]}, "fits no layer"),
        ({"rate": 0.3, "protect": ["*"]}, "no head can go"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message.replace("*", r"\*")):
        plan_heads(scores_of(8, 8), **options)


@pytest.mark.parametrize(
    ("removed", "heads", "groups", "message"),
    [
        ((0, 1, 2, 3), 4, 4, "lose all its 4 heads"),
        ((4,), 4, 4, "from 0 to 3"),
        ((1, 0), 4, 4, "sorted"),
        ((1, 1), 4, 4, "each once"),
        ((0,), 4, 2, "same number in each"),
        ((0,), 4, 3, "multiple"),
        ((0,), 4, 0, "at least 1"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_refused(removed: Any, heads: int, groups: int, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        HeadPlan({"a": removed}, {"a": heads}, {"a": groups})


def test_files_that_are_no_plan_are_refused() -> None:
    with pytest.raises(RecipeError, match="names no attention module"):
        HeadPlan({}, {}, {})
    with pytest.raises(RecipeError, match="b is not in all"):
        HeadPlan({"a": ()}, {"a": 4}, {"a": 4, "b": 4})
    good = json.loads(HeadPlan({"a": (0,)}, {"a": 4}, {"a": 4}).to_json())
    for text in ("", "[]", "{}", '{"version": 1, "how": {}, "layers": {"a": 3}}', "[" * 100_000):
        with pytest.raises(RecipeError, match="no head plan"):
            HeadPlan.from_json(text)
    with pytest.raises(RecipeError, match="version 2"):
        HeadPlan.from_json(json.dumps(good | {"version": 2}))
