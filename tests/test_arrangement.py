"""How the tokens of a forward lie: orders, joining of images, segments, and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfa_adapters.arrangement import ImageTokens, Listed, MergeGroups, Raster, TokenArrangement, Windows
from sfa_adapters.attention import attend
from sfa_adapters.bias import StructuralBias
from sfa_adapters.choices import TERMS
from sfa_adapters.errors import LayoutError
from sfa_adapters.testing.reference import phi_by_pairs, regular_places, softmax_attention

SIDES = st.integers(1, 5)


def by_hand(rows: int, columns: int, side: int, window: int) -> list[tuple[int, int]]:
    """Windows row by row, in each its groups row by row, in each its patches row by row; by loops."""
    places: list[tuple[int, int]] = []
    for top, left in itertools.product(range(0, rows // side, window), range(0, columns // side, window)):
        for y, x in itertools.product(range(top, top + window), range(left, left + window)):
            if y < rows // side and x < columns // side:
                places.extend((y * side + i, x * side + j) for i in range(side) for j in range(side))
    return places


@given(rows=SIDES, columns=SIDES, side=st.integers(1, 3), window=st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_windows_and_groups_are_listed_as_by_hand(rows: int, columns: int, side: int, window: int) -> None:
    rows, columns = rows * side, columns * side
    found = torch.stack(Windows(side, window).places(rows, columns), -1).tolist()
    assert [tuple(place) for place in found] == by_hand(rows, columns, side, window)
    found = torch.stack(MergeGroups(side).places(rows, columns), -1).tolist()
    assert [tuple(place) for place in found] == by_hand(rows, columns, side, max(rows, columns))


def test_raster_is_the_default_and_a_listed_order_gives_the_same_layout() -> None:
    plain, raster = ImageTokens((2, 3)), ImageTokens((2, 3), Raster())
    listed = ImageTokens((2, 3), Listed.of(torch.stack(Raster().places(2, 3), -1)))
    for image in (plain, raster, listed):
        layout = image.layout(1, None)
        assert layout.num_tokens == 7 == 1 + image.num_tokens
        assert torch.equal(layout.block, plain.layout(1, None).block)
        assert torch.allclose(layout.rows.start[layout.rows.index], plain.layout(1, None).rows.start[layout.rows.index])
    assert plain != listed
    assert hash(listed) == hash(ImageTokens((2, 3), Listed((0, 0, 0, 1, 1, 1), (0, 1, 2, 0, 1, 2))))


@given(st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=4), st.integers(0, 2))
@settings(max_examples=30, deadline=None)
def test_padded_images_have_one_length_and_each_its_own_grid(grids: list[tuple[int, int]], prefix: int) -> None:
    longest = max(h * w for h, w in grids) + 1
    images = tuple(ImageTokens((h, w), padding=longest - h * w) for h, w in grids)
    arrangement = TokenArrangement("padded", images, prefix)
    layout = arrangement.layout(None)
    assert layout.num_tokens == arrangement.num_tokens == longest + prefix
    assert layout.batch_size == len(grids)
    assert layout.padding is not None
    assert (~layout.padding).sum(-1).tolist() == [h * w + prefix for h, w in grids] == list(arrangement.lengths)
    for row, image in enumerate(images):
        alone, length = image.layout(prefix, None), arrangement.lengths[row]
        kinds, single = layout.rows, alone.rows
        on_page = slice(prefix, length)
        assert torch.equal(kinds.start[kinds.index[row, on_page]], single.start[single.index[on_page]])
        assert torch.equal(layout.block[row, :length], alone.block)


def test_packed_images_share_the_layout_of_equal_ones() -> None:
    small, large = ImageTokens((1, 2)), ImageTokens((2, 2))
    arrangement = TokenArrangement("packed", (small, large, small), 1)
    first, second, third = arrangement.image_layouts(None)
    assert first is third
    assert [layout.num_tokens for layout in (first, second, third)] == [3, 5, 3] == list(arrangement.lengths)
    assert arrangement.num_tokens == 11


def test_segments_are_parts_of_their_image_with_its_distances() -> None:
    images = (ImageTokens((2, 4), MergeGroups(2)), ImageTokens((2, 2), frames=2))
    arrangement = TokenArrangement("segments", images)
    assert arrangement.num_tokens == 16
    whole = arrangement.segments((0, 8, 12, 16), None)
    assert [layout.grid for layout in whole] == [(2, 4), (2, 2), (2, 2)]
    halves = arrangement.segments((0, 4, 8, 12, 16), None)
    assert [layout.num_tokens for layout in halves] == [4, 4, 4, 4]
    # The second half of the first image: columns 2 and 3 of a page whose largest distance is 1 + 3.
    assert sorted(set(halves[1].columns.start.tolist())) == [0.5, 0.75]


@given(st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=3), st.integers(1, 2), st.integers(1, 2))
@settings(max_examples=30, deadline=None)
def test_prefix_tokens_belong_to_the_first_segment_of_their_image(
    grids: list[tuple[int, int]], prefix: int, frames: int
) -> None:
    images = tuple(ImageTokens(grid, frames=frames) for grid in grids)
    arrangement = TokenArrangement("segments", images, prefix)
    ends = list(itertools.accumulate(arrangement.lengths))
    assert arrangement.num_tokens == ends[-1] == sum(prefix + frames * h * w for h, w in grids)
    for layout, image in zip(arrangement.segments((0, *ends), None), images, strict=True):
        assert (layout.prefix_tokens, layout.num_tokens) == (prefix, prefix + image.num_tokens)
        assert torch.equal(layout.block[prefix:], image.layout(0, None).block)
    # Each image cut behind its prefix and its first token: the rest has no prefix.
    cuts = [cut for start, end in itertools.pairwise((0, *ends)) for cut in {start + prefix + 1, end}]
    parts = arrangement.segments((0, *sorted(cuts)), None)
    assert {layout.prefix_tokens for layout in parts} <= {0, prefix}
    assert sum(layout.prefix_tokens for layout in parts) == prefix * len(images)
    assert sum(layout.num_tokens for layout in parts) == ends[-1]


def test_tokens_behind_the_patches_have_no_place_on_either_backend() -> None:
    arrangement = TokenArrangement("batch", (ImageTokens((2, 3), without_place=((6, 10),)),), prefix_tokens=1)
    assert arrangement.num_tokens == 11 == arrangement.lengths[0]
    layout = arrangement.layout(None)
    assert layout.spatial.tolist() == [False] + [True] * 6 + [False] * 4
    torch.manual_seed(0)
    bias = StructuralBias(2, init_std=1.0, terms=TERMS)
    places = [*regular_places((2, 3), 1), *[None] * 4]
    phi = phi_by_pairs(places, (2, 3), *(getattr(bias, term) for term in ("row", "col", "dist", "block")))
    assert torch.allclose(bias(layout)[0].double(), phi, atol=1e-5)
    query, key, value = torch.randn(3, 1, 2, 11, 8).unbind(0)
    expected = softmax_attention(query.double(), key.double(), value.double(), phi)
    for backend in ("dense", "folded"):
        out = attend(query, key, value, bias.factors(layout), backend=backend)
        assert torch.allclose(out.double(), expected, atol=1e-5), backend


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (lambda: TokenArrangement("batch", ()), "at least one image"),
        (lambda: TokenArrangement("pile", (ImageTokens((1, 1)),)), "must be one of batch, padded, packed, segments"),  # pyright: ignore[reportArgumentType]
        (lambda: TokenArrangement("batch", (ImageTokens((1, 1)),) * 2), "one grid for all images"),
        (lambda: TokenArrangement("padded", (ImageTokens((1, 1)), ImageTokens((1, 2)))), "must have one length"),
        (lambda: ImageTokens((0, 4)), "needs tokens: got a grid of 0x4"),
        (lambda: ImageTokens((1, 4), frames=0), "0 frames"),
        (lambda: MergeGroups(2).places(3, 4), "3x4 patches has no whole 2x2 groups"),
        (lambda: ImageTokens((4, 3), MergeGroups(2)), "4x3 patches has no whole 2x2 groups"),
        (lambda: ImageTokens((3, 4), Windows(2, 2)), "3x4 patches has no whole 2x2 groups"),
        (lambda: ImageTokens((2, 2), Listed((2,), (0,))).layout(0, None), "outside the 2x2 grid"),
        (lambda: TokenArrangement("segments", (ImageTokens((1, 4)),)).segments((0, 5), None), "inside one image"),
        (lambda: TokenArrangement("segments", (ImageTokens((1, 4)),)).segments((0, 0, 4), None), "inside one image"),
        (lambda: TokenArrangement("segments", (ImageTokens((1, 4)),) * 2).segments((0, 5, 8), None), "images end at"),
    ],
)
def test_what_cannot_be_is_refused(act, text: str) -> None:
    with pytest.raises(LayoutError, match=text):
        act()


def test_tokens_without_a_place_are_counted_and_keep_their_position() -> None:
    """Two tiles beside each other, each with a CLS token in front and a padding token that takes part behind."""
    rows, columns = (0, 0, 1, 1, 0, 0, 1, 1), (0, 1, 0, 1, 2, 3, 2, 3)
    image = ImageTokens((2, 4), Listed(rows, columns), without_place=((0, 1), (5, 7), (11, 12)))
    assert image.num_tokens == 12
    layout = image.layout(0, None)
    assert layout.num_tokens == 12
    assert layout.spatial.tolist() == [False, *[True] * 4, False, False, *[True] * 4, False]
    assert layout.padding is None
    alone = ImageTokens((2, 4), Listed(rows, columns)).layout(0, None)
    assert torch.equal(layout.block[layout.spatial], alone.block)
    assert TokenArrangement("batch", (image,)).num_tokens == 12
    nothing = ImageTokens((1, 1), Listed((), ()), without_place=((0, 3),)).layout(0, None)
    assert not nothing.spatial.any()
    behind_cls = ImageTokens((1, 2), without_place=((2, 3),)).layout(1, None)
    assert behind_cls.spatial.tolist() == [False, True, True, False]


@pytest.mark.parametrize("runs", [((1, 1),), ((3, 2),), ((0, 2), (1, 3)), ((-1, 1),), ((5, 6),)])
def test_runs_without_a_place_must_lie_in_order_inside_the_sequence(runs: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(LayoutError, match="without_place"):
        ImageTokens((2, 2), without_place=runs)


def test_images_with_prefix_tokens_are_segments() -> None:
    images = (ImageTokens((2, 3)), ImageTokens((1, 2)))
    arrangement = TokenArrangement("segments", images, prefix_tokens=2)
    assert arrangement.num_tokens == 12
    first, second = arrangement.segments((0, 8, 12), None)
    assert (first.num_tokens, first.prefix_tokens, first.grid) == (8, 2, (2, 3))
    assert (second.num_tokens, second.prefix_tokens, second.grid) == (4, 2, (1, 2))
    assert first.spatial.tolist() == [False, False, *[True] * 6]
    with pytest.raises(LayoutError, match="does not lie inside one image"):
        arrangement.segments((0, 12), None)
    with pytest.raises(LayoutError, match="whole image"):
        TokenArrangement("segments", (ImageTokens((1, 2), without_place=((2, 3),)),)).segments((0, 1, 3), None)
