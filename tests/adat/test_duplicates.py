"""Groups that repeat a neighbour: against a slow loop over groups, and in the hosts that can leave groups out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfa_adapters import inject_sfa
from sfa_adapters.adat import GroupPolicy, drop_blank_groups
from sfa_adapters.adat.duplicates import repeated_groups
from sfa_adapters.errors import PlanError
from tests.adat.test_groups import batch_of as qwen_batch
from tests.adat.test_groups import last_logits, tiny_qwen
from tests.adat.test_groups_navit import SIDE, batch_of, every_navit, logits_of, short_and_masked
from tests.adat.test_scorers import batch, half_a_page, noisy
from tests.support.compare import assert_close, difference, strong_config
from tests.support.hosts import IMAGE
from tests.support.navit_hosts import BUILD

slow = settings(max_examples=150, derandomize=True, deadline=None, database=None)
EXACT = GroupPolicy(scorer="duplicates")


@st.composite
def pages(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Pages of few different groups that differ in one pixel by a few 64ths, so that all branches are taken."""
    rows, columns, side = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.sampled_from([1, 2, 4]))
    levels = torch.tensor(draw(st.lists(st.integers(0, 5), min_size=rows * columns, max_size=rows * columns)))
    image = torch.full((3, rows * side, columns * side), 0.25)
    place = draw(st.tuples(st.integers(0, 2), st.integers(0, side - 1), st.integers(0, side - 1)))
    image[place[0], place[1] :: side, place[2] :: side] = levels.view(rows, columns) / 64
    return image, side


def reference(image: Tensor, side: int, tolerance: float) -> tuple[list[list[bool]], list[list[int]]]:
    """Group by group in reading order; what a dropped group shows is what the kept group shows that it repeats."""
    rows, columns = image.shape[1] // side, image.shape[2] // side
    shown: dict[tuple[int, int], Tensor] = {}
    number: dict[tuple[int, int], int] = {}

    def similar(first: Tensor, second: Tensor) -> bool:
        return float((first - second).abs().max()) <= tolerance

    for r in range(rows):
        for c in range(columns):
            group = image[:, r * side : r * side + side, c * side : c * side + side]
            left, above, corner = (r, c - 1), (r - 1, c), (r - 1, c - 1)
            straight = r > 0 and c > 0 and similar(shown[corner], shown[left])
            predicted = above if c == 0 or (straight and not similar(shown[corner], shown[above])) else left
            if (r or c) and similar(group, shown[predicted]):
                shown[r, c], number[r, c] = shown[predicted], number[predicted]
            else:
                shown[r, c], number[r, c] = group, r * columns + c
    repeated = [[number[r, c] != r * columns + c for c in range(columns)] for r in range(rows)]
    return repeated, [[number[r, c] for c in range(columns)] for r in range(rows)]


@slow
@given(pages(), st.integers(0, 3))
def test_groups_repeat_as_the_loop_says(page: tuple[Tensor, int], steps: int) -> None:
    image, side = page
    repeated, stands_in = repeated_groups(image, side, steps / 64)
    expected = reference(image, side, steps / 64)
    assert repeated.tolist() == expected[0]
    assert stands_in.tolist() == expected[1]


@slow
@given(pages(), st.integers(0, 3))
def test_kept_groups_show_the_page_within_the_tolerance(page: tuple[Tensor, int], steps: int) -> None:
    image, side = page
    repeated, stands_in = repeated_groups(image, side, steps / 64)
    groups = image.unfold(1, side, side).unfold(2, side, side).permute(1, 2, 0, 3, 4).flatten(0, 1)
    assert not repeated.flatten()[stands_in.flatten()].any()
    assert (groups[stands_in.flatten()] - groups).abs().max() <= steps / 64


def test_edges_choose_the_neighbour() -> None:
    """Two columns of stripes side by side are kept once each: below a repeated corner the one above is taken."""
    columns = torch.tensor([0.0, 0.5, 1.0]).repeat_interleave(4)[None, None].expand(3, 12, -1)
    assert repeated_groups(columns, 4)[0].tolist() == [[False] * 3, [True] * 3, [True] * 3]
    rows = columns.transpose(1, 2)
    assert repeated_groups(rows, 4)[0].tolist() == [[False, True, True]] * 3


def test_a_slow_gradient_is_not_dropped_whole() -> None:
    """Neighbours are within the tolerance, the two ends of the page are not."""
    ramp = (torch.arange(64.0) / 256).repeat_interleave(4)[None, None].expand(3, 4, -1)
    repeated, _ = repeated_groups(ramp, 4, 4 / 256)
    assert (~repeated[0]).nonzero().flatten().tolist() == list(range(0, 64, 5))


def test_one_gray_level_counts_through_a_normalisation() -> None:
    """Exact means exact: colors that went through a tower's mean and deviation and back, too."""
    image = torch.full((3, 28, 84), 200 / 255)
    image[1, 5, 60] = 201 / 255
    mean, std = 0.4578275, 0.26130258
    back = ((image - mean) / std) * std + mean
    assert repeated_groups(back, 28)[0].tolist() == [[False, True, False]]
    assert repeated_groups(back, 28, 1 / 255)[0].tolist() == [[False, True, True]]
    assert repeated_groups(back, 28, 0.9 / 255)[0].tolist() == [[False, True, False]]


def test_policies_of_duplicates_keep_what_repeats_nothing() -> None:
    blank = torch.ones(3, 84, 112)
    assert EXACT.keep(blank, 28).sum() == 1
    blank[:, 28:56, 56:84] = 0.5
    kept = EXACT.keep(blank, 28)
    assert kept.nonzero().tolist() == [[0, 0], [1, 2], [1, 3], [2, 2]]
    assert GroupPolicy(scorer="duplicates", margin=1).keep(blank, 28).sum() > kept.sum()
    noise = torch.rand(3, 84, 112)
    assert EXACT.keep(noise, 28).all()
    unknown: Any = "duplicate"
    with pytest.raises(PlanError, match="scorer='duplicate'"):
        GroupPolicy(scorer=unknown)
    with pytest.raises(PlanError, match="threshold=-1"):
        GroupPolicy(scorer="duplicates", threshold=-1)


def test_the_defaults_of_blank_groups_are_named_in_the_docs() -> None:
    densities = torch.tensor([[0.05, 0.06, 0.05, 0.05, 0.0]])
    kept = GroupPolicy(scorer=lambda _: densities[None]).keep(torch.ones(3, 28, 140), 28)
    assert kept.tolist() == [[True, True, True, False, False]]


def test_noise_leaves_no_repetitions() -> None:
    """A rendered page repeats its paper; the same page as a scan does not."""
    rendered = half_a_page()
    clean, scan = batch(rendered)[0], batch(noisy(rendered, 2.0))[0]
    assert EXACT.keep(clean, 28).float().mean() < 0.6
    assert EXACT.keep(scan, 28).all()
    assert GroupPolicy(scorer="duplicates", threshold=20 / 255).keep(scan, 28).float().mean() < 0.6


# -- hosts ------------------------------------------------------------------------------------------------------------


def page(rows: int, columns: int, seed: int, side: int) -> Tensor:
    """A page of three kinds of groups: white, a texture, and noise of their own, `[3, height, width]` in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, 3, (rows, columns), generator=generator)
    noise = torch.rand(3, rows * side, columns * side, generator=generator)
    texture = torch.rand(3, side, side, generator=generator).tile(1, rows, columns)
    kind = kind.repeat_interleave(side, 0).repeat_interleave(side, 1)
    return torch.where(kind == 0, torch.ones(()), torch.where(kind == 1, texture, noise))


@every_navit
def test_hosts_see_the_kept_groups_at_their_places(name: str) -> None:
    """Slow and plain: the whole page, with repeated groups taken out of every attention of the tower by a mask."""
    model: Any = BUILD[name]()
    images = [page(3, 5, 0, SIDE), page(4, 2, 1, SIDE)]
    batch = batch_of(model, images)
    reduced = drop_blank_groups(model, batch, EXACT)
    maps = [~torch.tensor(reference(image, SIDE, 0.0)[0]) for image in images]
    kept = torch.cat([m.flatten() for m in maps])
    assert 0 < int(kept.sum()) < len(kept)
    assert int((reduced["input_ids"] == IMAGE).sum()) == int(kept.sum())
    three, _ = model.model.get_rope_index(
        batch["input_ids"], batch["mm_token_type_ids"], image_grid_thw=batch["image_grid_thw"],
        attention_mask=batch["attention_mask"],
    )  # fmt: skip
    for row, keep in enumerate(maps):
        here, there = (b["input_ids"][row] == IMAGE for b in (batch, reduced))
        assert torch.equal(reduced["position_ids"][1:, row][:, there], three[:, row][:, here][:, keep.flatten()])
    short, whole = short_and_masked(model, batch, reduced, maps)
    assert_close(torch.cat(list(short.pooler_output)), torch.cat(list(whole.pooler_output))[kept])


@every_navit
def test_pages_without_repetitions_are_left_as_they_are(name: str) -> None:
    model: Any = inject_sfa(BUILD[name](), strong_config())
    torch.manual_seed(0)
    batch = batch_of(model, [torch.rand(3, 3 * SIDE, 5 * SIDE), torch.rand(3, 4 * SIDE, 2 * SIDE)])
    reduced = drop_blank_groups(model, batch, EXACT)
    assert torch.equal(reduced["input_ids"], batch["input_ids"])
    assert_close(logits_of(model, reduced), logits_of(model, batch), 1e-5)
    repeated = batch_of(model, [page(3, 5, 0, SIDE)])
    shorter = drop_blank_groups(model, repeated, EXACT)
    assert shorter["input_ids"].shape[1] < repeated["input_ids"].shape[1]
    assert difference(logits_of(model, shorter), logits_of(model, repeated)) > 1e-4


def test_windows_of_qwen_and_generation() -> None:
    """Qwen2.5-VL, whose tower sorts groups into windows; and words go on from the kept positions."""
    model: Any = tiny_qwen()
    images = [page(3, 5, 0, 28), page(4, 2, 1, 28)]
    batch = qwen_batch(images)
    reduced = drop_blank_groups(model, batch, EXACT)
    maps = [~torch.tensor(reference(image, 28, 0.0)[0]) for image in images]
    fixed = {image.shape[1:]: keep for image, keep in zip(images, maps, strict=True)}
    by_map = GroupPolicy(threshold=0.5, margin=0, scorer=lambda x: fixed[x.shape[2:]][None].float())
    expected = drop_blank_groups(model, batch, by_map)
    assert expected.keys() == reduced.keys()
    assert all(torch.equal(value, reduced[key]) for key, value in expected.items())
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        words = model.generate(**drop_blank_groups(model, batch, EXACT, for_generate=True), **options)
    assert words.shape == (2, 3)
    assert words[:, 0].tolist() == last_logits(model, reduced).argmax(-1).tolist()
