"""Token merging as pure functions, against a double loop and in random cases; attention in proportion to size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfa_adapters.bias import StructuralBias
from sfa_adapters.choices import TERMS
from sfa_adapters.layout import TokenLayout
from sfa_adapters.reduction.dymu.merging import Merged, merge_above, pair_scores, weighted_mean
from sfa_adapters.reduction.dymu.size_attention import SizedPackedMask, SizedSegmentedMask, sized_attention
from sfa_adapters.reduction.dymu.tokens import group_order
from tests.support.compare import assert_close

lengths_of = st.lists(st.integers(1, 9), min_size=1, max_size=4)
thresholds = st.floats(-0.9, 0.99)


def random_units(lengths: list[int], seed: int, width: int = 4) -> Tensor:
    """Few distinct directions, so that there is much to merge."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, width, generator=generator)
    chosen = torch.randint(0, 3, (sum(lengths),), generator=generator)
    return centres[chosen] + 0.3 * torch.randn(sum(lengths), width, generator=generator)


def slow_merge(units: Tensor, threshold: float) -> tuple[list[float], list[int], Tensor]:
    """One image, token by token: size and representative of what is left, and its values."""
    count = len(units)
    parts: dict[int, list[int]] = {i: [i] for i in range(count)}
    for i in range(0, count, 2):
        best, score = -1, -2.0
        for j in range(1, count, 2):
            similarity = torch.nn.functional.cosine_similarity(units[i], units[j], dim=0).item()
            if similarity > score:
                best, score = j, similarity
        if score > threshold:
            parts[best] += parts.pop(i)
    left = sorted(parts)
    return [float(len(parts[i])) for i in left], left, torch.stack([units[parts[i]].mean(0) for i in left])


def merge_once(units: Tensor, lengths: list[int], threshold: float) -> tuple[Merged, Tensor]:
    start = Merged.start(lengths)
    merge = merge_above(start, pair_scores(units, lengths), threshold)
    if merge is None:
        return start, units
    merged, target = merge
    return merged, weighted_mean(units, start.size, target, merged.size)


@settings(max_examples=40, deadline=None)
@given(lengths_of, thresholds, st.integers(0, 10**6))
def test_one_merge_is_that_of_a_double_loop_image_by_image(lengths: list[int], threshold: float, seed: int) -> None:
    units = random_units(lengths, seed)
    merged, values = merge_once(units, lengths, threshold)
    first = at = 0
    for length, left in zip(lengths, merged.lengths, strict=True):
        sizes, origins, wanted = slow_merge(units[first : first + length], threshold)
        assert merged.size[at : at + left].tolist() == sizes
        assert (merged.origin[at : at + left] - first).tolist() == origins
        assert_close(values[at : at + left], wanted)
        first, at = first + length, at + left
    assert at == len(values)


@settings(max_examples=40, deadline=None)
@given(lengths_of, st.lists(thresholds, min_size=1, max_size=3), st.integers(0, 10**6))
def test_merging_again_conserves_size_mean_order_and_ownership(
    lengths: list[int], steps: list[float], seed: int
) -> None:
    units = values = random_units(lengths, seed)
    merged = Merged.start(lengths)
    for threshold in steps:
        merge = merge_above(merged, pair_scores(values, merged.lengths), threshold)
        if merge is None:
            continue
        values = weighted_mean(values, merged.size, merge[1], merge[0].size)
        merged = merge[0]
    assert merged.size.sum() == len(units)
    assert_close((values * merged.size[:, None]).sum(0), units.sum(0))
    assert (merged.origin.diff() > 0).all()  # sorted by the place of the representative, and none twice
    assert torch.equal(torch.bincount(merged.owner, minlength=len(merged.size)).float(), merged.size)
    assert torch.equal(merged.owner[merged.origin], torch.arange(len(merged.origin)))
    assert int(merged.is_represented.sum()) == len(merged.size) == sum(merged.lengths)
    for number in range(len(merged.size)):  # the mean over all that was ever merged, weighted by size
        assert_close(values[number], units[merged.owner == number].mean(0))


@settings(max_examples=40, deadline=None)
@given(lengths_of, thresholds, thresholds, st.integers(0, 10**6))
def test_a_higher_threshold_never_leaves_fewer(lengths: list[int], one: float, other: float, seed: int) -> None:
    units = random_units(lengths, seed)
    low, high = (merge_once(units, lengths, t)[0].lengths for t in sorted((one, other)))
    assert all(a <= b for a, b in zip(low, high, strict=True))


@settings(max_examples=20, deadline=None)
@given(lengths_of, thresholds, st.integers(0, 10**6))
def test_permuting_the_batch_permutes_the_result(lengths: list[int], threshold: float, seed: int) -> None:
    parts = random_units(lengths, seed).split(lengths)
    merged, values = merge_once(torch.cat(parts), lengths, threshold)
    turned, back = merge_once(torch.cat(parts[::-1]), lengths[::-1], threshold)
    assert turned.lengths == merged.lengths[::-1]
    for one, other in zip(values.split(merged.lengths), back.split(turned.lengths)[::-1], strict=True):
        assert torch.equal(one, other)


def test_twins_stay_apart_at_threshold_one_and_merge_below() -> None:
    units = torch.randn(1, 64).expand(6, -1) * torch.arange(1, 7)[:, None]
    pairs = pair_scores(units, [6])
    assert float(pairs.score.max()) <= 1.0
    assert merge_above(Merged.start([6]), pairs, 1.0) is None
    merge = merge_above(Merged.start([6]), pairs, 0.999)
    assert merge is not None
    assert merge[0].lengths == (3,)


def test_of_equally_similar_partners_the_first_is_taken() -> None:
    units = torch.eye(4)[[0, 1, 0, 1, 2, 1, 0, 0]]  # exact cosines: 0 or 1; the odd places are 1, 1, 1, 0
    pairs = pair_scores(units, [8])
    assert pairs.score.tolist() == [1.0, 1.0, 0.0, 1.0]
    assert pairs.target.tolist() == [7, 7, 1, 7]
    assert pair_scores(torch.ones(9, 4), [9]).target.tolist() == [1] * 5


def test_one_token_and_no_token_have_nobody_to_merge_with() -> None:
    for lengths in ([1], [1, 0, 1], []):
        pairs = pair_scores(torch.randn(sum(lengths), 4), lengths)
        assert merge_above(Merged.start(lengths), pairs, -1.0) is None


def test_half_precision_is_summed_in_fp32() -> None:
    values = torch.full((2048, 1), 1.0, dtype=torch.bfloat16)
    mean = weighted_mean(values, torch.ones(2048), torch.zeros(2048, dtype=torch.long), torch.tensor([2048.0]))
    assert mean.dtype == torch.bfloat16
    assert mean.item() == 1.0  # bf16 sums stop at 256


def test_groups_are_two_by_two_patches() -> None:
    assert group_order(4, 4, 2).view(4, 4).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


# -- attention in proportion to size ----------------------------------------------------------------------------------


def qkv(tokens: int, seed: int = 0) -> list[Tensor]:
    return list(torch.randn(3, 2, 3, tokens, 8, generator=torch.Generator().manual_seed(seed)).unbind(0))


@pytest.mark.parametrize("backend", ["dense", "folded"])
def test_a_token_of_size_s_counts_like_s_copies_of_it(backend: str) -> None:
    size = torch.tensor([1, 3, 1, 2, 5])
    query, key, value = qkv(5)
    repeated = [states.repeat_interleave(size, dim=2) for states in (key, value)]
    wanted = torch.nn.functional.scaled_dot_product_attention(query, repeated[0], repeated[1], scale=0.4)
    output = sized_attention(query, key, value, size.log(), scale=0.4, backend=backend)  # pyright: ignore[reportArgumentType]
    assert_close(output, wanted)
    per_image = sized_attention(query, key, value, size.log().expand(2, -1), scale=0.4, backend=backend)  # pyright: ignore[reportArgumentType]
    assert_close(per_image, wanted)


@pytest.mark.parametrize("backend", ["dense", "folded"])
def test_sizes_and_phi_add_up(backend: str) -> None:
    torch.manual_seed(0)
    layout = TokenLayout.regular(2, 3, 1)
    bias = StructuralBias(3, init_std=0.7, terms=TERMS).factors(layout)
    query, key, value = qkv(7)
    log_size = torch.tensor([1.0, 2, 1, 4, 1, 1, 3]).log()
    scores = query @ key.transpose(-1, -2) * 8**-0.5 + bias.dense() + log_size
    output = sized_attention(query, key, value, log_size, bias, backend=backend)  # pyright: ignore[reportArgumentType]
    assert_close(output, scores.softmax(-1) @ value)


def test_the_packed_mask_is_its_own_matrix() -> None:
    query, key, value = (states[:1] for states in qkv(7))
    log_size = torch.tensor([1.0, 2, 3, 1, 4, 1, 2]).log()
    mask = SizedPackedMask((3, 4), log_size)
    output = mask.attend(query, key, value, None, 0.0)
    dense = SizedPackedMask((3, 4), log_size).tensor(query)
    assert_close(output, (query @ key.transpose(-1, -2) * 8**-0.5 + dense).softmax(-1) @ value)
    assert mask.used


def test_the_segmented_mask_serves_one_segment_at_a_time() -> None:
    log_size = torch.tensor([1.0, 2, 3, 1, 4]).log()
    mask = SizedSegmentedMask((2, 3), log_size)
    for part in (slice(0, 2), slice(2, 5)):
        query, key, value = (states[:1, :, part] for states in qkv(5))
        wanted = sized_attention(query, key, value, log_size[part], backend="folded")
        assert_close(mask.attend(query, key, value, None, 0.0), wanted)
    assert mask.used
