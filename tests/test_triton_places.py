"""Places as the kernels read them: marks, records of segments, and which tables belong to which tokens."""

from __future__ import annotations

import torch

from sfa_adapters import TokenLayout
from sfa_adapters.triton_places import kinds_lie_apart, places_of_batch, places_of_segments
from tests.test_attention import adaptive


def test_a_layout_that_images_share() -> None:
    layout = TokenLayout.regular(2, 3, 1)
    places = places_of_batch(layout, 2)
    assert places.row.tolist() == [-1, 0, 0, 0, 1, 1, 1]
    assert places.column.tolist() == [-1, 0, 1, 2, 0, 1, 2]
    assert places.segments.tolist() == [[0, 0, 0, 7, 7, 0, 0, 2, 0, 3], [1, 0, 0, 7, 7, 0, 0, 2, 0, 3]]
    assert (places.longest, places.groups, places.most_kinds) == (7, 1, 3)
    assert places_of_batch(layout, 2) is places
    assert places_of_batch(layout, 1) is not places


def test_a_layout_for_each_image_with_padding() -> None:
    layout = TokenLayout.batch([TokenLayout.regular(2, 2, 1), TokenLayout.regular(1, 2, 1)])
    places = places_of_batch(layout, 2)
    assert (places.row < 0).tolist() == [True, *[False] * 4, True, *[False] * 2, True, True]
    assert places.row[-2:].tolist() == places.column[-2:].tolist() == [-2, -2]
    assert places.segments[:, :5].tolist() == [[0, 0, 0, 5, 5], [1, 0, 5, 5, 3]]  # no key behind the third token
    assert places.runs[0].places == (0, 10)


def test_segments_that_share_tables() -> None:
    page, other = TokenLayout.regular(2, 3, 1), TokenLayout.regular(4, 1, 1)
    places = places_of_segments([page, other, page], [0, 1, 0])
    assert places.segments.tolist() == [
        [0, 0, 0, 7, 7, 0, 0, 2, 0, 3],
        [0, 7, 7, 5, 5, 1, 4, 4, 9, 1],
        [0, 12, 12, 7, 7, 0, 0, 2, 0, 3],
    ]
    assert places.row.tolist() == [-1, 0, 0, 0, 1, 1, 1, -1, 0, 1, 2, 3, -1, 0, 0, 0, 1, 1, 1]
    assert [(run.places, run.group, run.row_table, run.column_table) for run in places.runs] == [
        ((0, 7), 0, (0, 2), (0, 3)),
        ((7, 12), 1, (4, 4), (9, 1)),
        ((12, 19), 0, (0, 2), (0, 3)),
    ]
    assert (places.longest, places.groups, places.most_kinds) == (7, 2, 4)
    assert places_of_segments([page, other, page], [0, 1, 0]) is places
    assert places_of_segments([page, other, page], [0, 1, 2]).groups == 3


def test_kinds_that_overlap() -> None:
    """Also between images of a batch, whose rows are of different height on the page: no pair has both."""
    small, large = TokenLayout.regular(2, 3), TokenLayout.regular(5, 4)
    assert kinds_lie_apart(small)
    assert kinds_lie_apart(large.select(torch.tensor([0, 3, 7, 19])))
    assert kinds_lie_apart(TokenLayout.batch([small, large]))
    assert not kinds_lie_apart(adaptive(3, 0, 1))
    assert not kinds_lie_apart(TokenLayout.batch([small, adaptive(3, 0, 1)]))
